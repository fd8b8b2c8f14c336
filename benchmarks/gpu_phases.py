"""What each phase of `gpu_checks.py` does: the real training path at the tiny and the full shape, and what is noted of it.

Nothing here has a result until `benchmarks/results/` holds a card's files; the dry run proves the script, not the card.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_checkpoint  # beside this file; it lets a checkout be imported that is not installed
from random_checkpoint import GPT_OSS_20B, TINY, Shape, checkpoint_bytes, checkpoint_folder, has_checkpoint

from fastoss.config import FormatSettings, load_recipe
from fastoss.data.conversation import Conversation, Message
from fastoss.errors import RunFailed
from fastoss.run import RunDirectory, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "recipes" / "data" / "catgirl.jsonl"
TINY_TOLERANCE = 2e-2  # relative, loss of the first step in bf16 through two backends
GB = 1e9


class Skip(Exception):
    """The phase cannot be done here; the message is the reason."""


@dataclass(frozen=True)
class Place:
    """Where a run of this script works: the card, the folders, and the shape that stands for the 20B one in a dry run."""

    work: Path
    results: Path
    card: str
    dry: bool

    @property
    def shape(self) -> Shape:
        return TINY if self.dry else GPT_OSS_20B

    def file(self, phase: str) -> Path:
        card = re.sub(r"[^a-z0-9]+", "-", self.card.lower()).strip("-")
        return self.results / f"{card}-{phase}.json"


class Record:
    """A phase's JSON. What is noted is on the disk at once: a phase that is killed leaves what it had found."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = read_json(path)

    def note(self, **values: Any) -> None:
        self.values |= values
        write_json(self.path, self.values)


@dataclass(frozen=True)
class Phase:
    name: str
    check: Callable[[Place, Record], None]
    minutes: float


def gpu_tests(place: Place, record: Record) -> None:
    """The tests marked `gpu`. A dry run only collects them."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    import pytest

    class Counter:
        def __init__(self) -> None:
            self.counts = {"collected": 0, "passed": 0, "failed": 0, "skipped": 0}

        def pytest_collection_finish(self, session: Any) -> None:
            self.counts["collected"] = len(session.items)

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.failed or report.skipped:
                self.counts[report.outcome] += 1

    counter = Counter()
    os.chdir(ROOT)
    # Without the project's own options: they start parallel workers, which would share the GPU and hide its peak memory.
    options = ["-o", "addopts=-q --strict-markers", "-p", "no:cacheprovider", *(["--collect-only"] if place.dry else [])]
    code = pytest.main([*options, "-m", "gpu", "tests/test_gpu.py"], plugins=[counter])
    record.note(tests=counter.counts)
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise Skip("no test is marked gpu")
    if code != pytest.ExitCode.OK:
        raise RunFailed(f"pytest ended with {pytest.ExitCode(code).name}")
    if not place.dry and not counter.counts["passed"]:
        raise Skip("every gpu test skipped itself")


def tiny_unsloth(place: Place, record: Record) -> None:
    _tiny(place, record, "unsloth")


def tiny_transformers(place: Place, record: Record) -> None:
    _tiny(place, record, "transformers")
    _compare(place, record, "tiny-unsloth", TINY_TOLERANCE)


def _tiny(place: Place, record: Record, backend: str) -> None:
    """Train the embedded tiny model on the shipped sample: the loss falls, the adapter is kept, and a chat loads it."""
    from fastoss.inference.engine import Engine, Sampling

    steps = 4 if place.dry else 12
    model = {"name": "tiny", "precision": "float32" if place.dry else "bf16", "max_length": 512, "backend": backend}
    train = {"max_steps": steps, "learning_rate": 4e-3, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "warmup_steps": 0}
    run = _train(place, record, model, {"source": str(SAMPLE), "max_rows": 32}, train)
    losses = record.values["losses"]
    if sum(losses[-2:]) / 2 >= losses[0]:
        raise RunFailed(f"the loss did not fall: {losses[0]:.4f} → {losses[-1]:.4f}")
    reply = Engine.load(str(run.root)).complete([[Message("user", "你是谁?")]], Sampling(max_new_tokens=8))[0]
    record.note(reply={"thinking": reply.thinking, "content": reply.content})


def make_mxfp4(place: Place, record: Record) -> None:
    """Write the random checkpoint in the published MXFP4 layout."""
    _checkpoint(place, record, "mxfp4")


def mxfp4_unsloth_2k(place: Place, record: Record) -> None:
    _large(place, record, "unsloth", "mxfp4", rows=2)


def mxfp4_unsloth_8k(place: Place, record: Record) -> None:
    _large(place, record, "unsloth", "mxfp4", rows=8)


def bf16_transformers(place: Place, record: Record) -> None:
    """The same weights, dequantised to bf16 on the card; the difference to Unsloth's loss is reported, not judged.

    A random router sits on the fence for many tokens, and bf16 rounding alone moves them: no bound is known yet.
    """
    _need_memory(place, record, 46)  # 41.8 GB of weights, and PEFT builds one layer's experts anew in each pass
    _large(place, record, "transformers", "bf16", rows=2)
    _compare(place, record, "mxfp4-20b-unsloth-2k", None)


def four_bits_unsloth(place: Place, record: Record) -> None:
    """Unsloth quantises the experts of a bf16 folder to NF4 as it loads them; a MXFP4 folder would stay MXFP4."""
    if place.dry:
        _checkpoint(place, record, "bf16")  # the writer is the same, and the test reads what it wrote
        raise Skip("4 bits need a GPU")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed")
    _need_memory(place, record, 22)
    try:
        _large(place, record, "unsloth", "4bit", rows=2, form="bf16")
        _compare(place, record, "mxfp4-20b-unsloth-2k", None)
    finally:
        shutil.rmtree(checkpoint_folder(place.work, place.shape, "bf16"), ignore_errors=True)  # 42 GB


def _large(place: Place, record: Record, backend: str, precision: str, *, rows: int, form: Any = "mxfp4") -> None:
    """Three steps at the 20B shape on one batch of `rows` rows of 1,024 tokens: the first compiles, two are timed."""
    folder = _checkpoint(place, record, form)
    length = 128 if place.dry else 1024
    data = place.work / f"rows-{rows}x{length}.jsonl"
    lengths = _write_rows(data, rows, length)
    model = {"name": str(folder), "precision": "float32" if place.dry else precision, "max_length": length, "backend": backend}
    # Exactly one batch, padded or packed: every step, and every backend, trains on the same rows.
    train = {"max_steps": 3, "learning_rate": 1e-4, "tokens_per_batch": rows * length, "lr_scheduler_type": "constant", "warmup_steps": 0}
    run = _train(place, record, model, {"source": str(data)}, train)
    shutil.rmtree(run.checkpoints)  # optimizer states of a gigabyte
    timed = record.values["step_seconds"][1:]
    record.note(batch_tokens=sum(lengths), tokens_per_second=round(sum(lengths) * len(timed) / sum(timed), 1))


PHASES = (
    Phase("tests", gpu_tests, 8),
    Phase("tiny-unsloth", tiny_unsloth, 5),
    Phase("tiny-transformers", tiny_transformers, 4),
    Phase("make-mxfp4-20b", make_mxfp4, 6),
    Phase("mxfp4-20b-unsloth-2k", mxfp4_unsloth_2k, 8),
    Phase("mxfp4-20b-unsloth-8k", mxfp4_unsloth_8k, 8),
    Phase("bf16-20b-transformers", bf16_transformers, 8),
    Phase("4bit-20b-unsloth", four_bits_unsloth, 8),
)

# --- what the phases share ----------------------------------------------------------------------------------------


def _train(place: Place, record: Record, model: dict[str, Any], data: dict[str, Any], train: dict[str, Any]) -> RunDirectory:
    """Run a recipe through the same call as `fastoss train`; notes its losses and the seconds of each step."""
    from fastoss.training.train import train as train_recipe

    root = place.work / "runs" / record.values["phase"]
    shutil.rmtree(root, ignore_errors=True)
    tables: dict[str, dict[str, Any]] = {
        "model": model,
        "lora": {"r": 8, "lora_alpha": 32},
        "[data]": data,
        "eval": {"fraction": 0.0},
        "train": train,
    }
    lines = ['name = "gpu-check"']
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())]
    path = place.work / f"{record.values['phase']}.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = train_recipe(load_recipe(path), path, RunDirectory(root))
    gc.collect()  # the trainer holds itself in cycles, and with it the model
    steps = [entry for entry in map(json.loads, run.metrics.read_text(encoding="utf-8").splitlines()) if "loss" in entry]
    ends = [0.0, *(entry["seconds"] for entry in steps)]
    seconds = [round(end - start, 3) for start, end in itertools.pairwise(ends)]
    settings = model | {"name": Path(model["name"]).name} | {"recipe": train | {"r": 8, "lora_alpha": 32}}
    record.note(model=settings, losses=[entry["loss"] for entry in steps], step_seconds=seconds)
    if not run.is_finished():
        raise RunFailed("the run left no adapter")
    return run


def _checkpoint(place: Place, record: Record, form: Any) -> Path:
    """The random checkpoint's folder, written when it is not there."""
    folder, size = checkpoint_folder(place.work, place.shape, form), checkpoint_bytes(place.shape, form)
    device = "cpu" if place.dry else "cuda"
    there = has_checkpoint(folder, place.shape, form, device)
    if not there:
        for old in (folder, *place.work.glob(f".{folder.name}.*")):  # another one, or what a killed process left
            shutil.rmtree(old, ignore_errors=True)
        free, needed = shutil.disk_usage(place.work).free, size + 3 * GB  # adapters and optimizer states beside it
        if free < needed:
            raise Skip(f"the checkpoint needs {needed / GB:.0f} GB of disk, {free / GB:.0f} GB are free (--work names another folder)")
        # In a process of its own: this one must not touch the GPU before Unsloth has set up its allocator.
        subprocess.run([sys.executable, random_checkpoint.__file__, str(folder), place.shape.name, form, device], check=True)
    record.note(checkpoint={"shape": place.shape.name, "form": form, "bytes": size, "was_there": there})
    return folder


def _write_rows(path: Path, rows: int, length: int) -> list[int]:
    """Write rows that fill `length` tokens as nearly as text allows, made of the sample; returns their lengths in tokens."""
    from fastoss.data.harmony import HarmonyRenderer

    renderer = HarmonyRenderer(FormatSettings())
    sample = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    said = [f"{row['instruction']} {row['output']} " for row in sample]

    def example(start: int, characters: int) -> tuple[dict[str, str], int]:
        text = "".join(said[start:] + said[:start])
        text = (text * (characters // len(text) + 1))[:characters]
        first, second = characters // 4, characters // 2
        asked, thought, answered = text[:first], text[first:second], text[second:]
        messages = (Message("user", asked), Message("assistant", answered, thought))
        return {"instruction": asked, "thinking": thought, "output": answered}, len(renderer.render_examples(Conversation(messages))[0])

    lines, lengths = [], []
    for number in range(rows):
        low, high = 8, 8 * length  # characters; a token holds one at least, and hardly more than eight
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if example(number * 7, middle)[1] <= length else (low, middle)
        row, tokens = example(number * 7, low)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        lengths.append(tokens)
    path.write_text("".join(lines), encoding="utf-8")
    return lengths


def _compare(place: Place, record: Record, other: str, tolerance: float | None) -> None:
    """Hold the first step's loss against that of another phase on the same batch, where that one was ok."""
    path = place.file(other)
    theirs = read_json(path) if path.is_file() else {}
    if theirs.get("status") != "ok":
        record.note(compared={"with": other, "relative_difference": None, "reason": f"{other} has no result here"})
        return
    mine, reference = record.values["losses"][0], theirs["losses"][0]
    difference = abs(mine - reference) / abs(reference)
    record.note(compared={"with": other, "loss": mine, "reference": reference, "relative_difference": difference, "tolerance": tolerance})
    if tolerance is not None and difference > tolerance:
        raise RunFailed(f"the first loss is {mine:.4f}, and {reference:.4f} in {other}: {difference:.1%} apart")


def _need_memory(place: Place, record: Record, gigabytes: float) -> None:
    free = record.values["gpu_free_gb"]
    if not place.dry and free < gigabytes:
        raise Skip(f"needs {gigabytes:.0f} GB of free GPU memory, {free:.0f} GB were free at the start")


def peak_memory() -> dict[str, float | None]:
    """GB, of this process alone, loading included; None where there is no GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {"peak_allocated_gb": None, "peak_reserved_gb": None}
    return {"peak_allocated_gb": torch.cuda.max_memory_allocated() / GB, "peak_reserved_gb": torch.cuda.max_memory_reserved() / GB}
