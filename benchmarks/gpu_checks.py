"""GPU checks in short phases, smallest first: `make gpu` runs them all, `make gpu-dry` walks the same way on a CPU.

Written before any of it had been run on a GPU: until `benchmarks/results/` holds a card's files, nothing here is a
claim about one. The dry run proves the script, not the card.

Each phase is a process of its own with a time limit, and needs no network. It writes what it found to
`benchmarks/results/<card>-<phase>.json`. A phase that fails does not stop the next; one that was ok before on this
card is not run again without `--again`. The exit code is 0 when no phase failed (a skipped one gives its reason).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_checkpoint  # beside this file; it lets a checkout be imported that is not installed
from random_checkpoint import GPT_OSS_20B, TINY, Shape, checkpoint_bytes, checkpoint_folder, has_checkpoint

from fastoss.config import FormatSettings, load_recipe
from fastoss.data.conversation import Conversation, Message
from fastoss.errors import FastossError, RunFailed
from fastoss.model.adapter import library_versions
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


# --- the phases -------------------------------------------------------------------------------------------------------


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
    code = pytest.main([*options, "-m", "gpu", "tests"], plugins=[counter])
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


def _peak_memory() -> dict[str, float | None]:
    """GB, of this process alone, loading included; None where there is no GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {"peak_allocated_gb": None, "peak_reserved_gb": None}
    return {"peak_allocated_gb": torch.cuda.max_memory_allocated() / GB, "peak_reserved_gb": torch.cuda.max_memory_reserved() / GB}


# --- running them -------------------------------------------------------------------------------------------------


def run_inside(phase: Phase, place: Place) -> int:
    """The phase's own process."""
    record = Record(place.file(phase.name))
    try:
        phase.check(place, record)
        record.note(status="ok")
    except Skip as skip:
        record.note(status="skipped", reason=str(skip))
    except BaseException as problem:
        fact = problem.fact if isinstance(problem, FastossError) else f"{type(problem).__name__}: {problem}"
        record.note(status="failed", reason=_public(fact, place))
        raise
    finally:
        record.note(**_peak_memory())
    return 0


def run_phase(phase: Phase, place: Place, facts: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """Run a phase in a process of its own; returns its record, finished whatever happened to the process."""
    dry = ["--dry-run"] if place.dry else []
    command = " ".join(["python", "benchmarks/gpu_checks.py", "--only", phase.name, "--again", *dry])
    empty = {"losses": None, "peak_allocated_gb": None, "peak_reserved_gb": None, "reason": None}
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record = {"phase": phase.name, "status": "running", **facts, "command": command, "started": started, "seconds": None, **empty}
    write_json(place.file(phase.name), record)
    arguments = [sys.executable, __file__, "--inside", phase.name, "--work", str(place.work), "--card", place.card, *dry]
    log = place.work / f"{phase.name}.log"
    begun = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(arguments, cwd=place.work, stdout=output, stderr=output, env=_environment(place), process_group=0)
    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group: what it left behind goes too
        process.wait()
    finished = Record(place.file(phase.name))
    if code is None:
        finished.note(status="failed", reason=f"stopped after its limit of {limit_s:.0f} s")
    elif code != 0 and finished.values["reason"] is None:
        finished.note(status="failed", reason=f"the process ended with {code}: {_public(_last_line(log), place)}")
    finished.note(seconds=round(time.monotonic() - begun, 1))
    return finished.values


def _environment(place: Place) -> dict[str, str]:
    """Of the phases' processes: no hub, so that a forgotten download fails at once; no GPU in a dry run."""
    settings = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    if place.dry:
        settings |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | settings


def _public(text: str, place: Place) -> str:
    """Results are committed: no paths of this machine."""
    for path, name in ((place.work, "WORK"), (ROOT, "."), (Path(sys.prefix), "PYTHON"), (Path.home(), "~")):
        text = text.replace(str(path), name) if len(str(path)) > 1 else text
    return text[:1000]


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def machine(dry: bool) -> dict[str, Any]:
    """Card, driver, versions and commit, the same in every record. Asked in another process, which leaves the GPU free."""
    facts: dict[str, Any] = {"dry_run": dry, "card": "cpu", "gpu_memory_gb": None, "gpu_free_gb": None, "cuda": None, "driver": None}
    if not dry:
        code = "import json, torch; c = torch.cuda; print(json.dumps([c.get_device_name(), *c.mem_get_info(), torch.version.cuda]))"
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if asked.returncode != 0:
            raise FastossError("torch sees no GPU", place="gpu_checks.py", hint="--dry-run walks the same way on a CPU")
        name, free, total, cuda = json.loads(asked.stdout.splitlines()[-1])
        facts |= {"card": name, "gpu_memory_gb": round(total / GB, 1), "gpu_free_gb": round(free / GB, 1), "cuda": cuda, "driver": _driver()}
    versions = library_versions() | {"python": sys.version.split()[0]}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["triton"] = importlib.metadata.version("triton")
    return facts | {"versions": versions, "commit": _commit()}


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _commit() -> str | None:
    """The checkout's commit, read from its files: the machine with the GPU may have no git."""
    with contextlib.suppress(OSError, StopIteration):
        git = ROOT / ".git"
        if git.is_file():  # a worktree: `gitdir: PATH`
            git = (ROOT / git.read_text().split(":", 1)[1].strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
        loose = common / head[5:]
        if loose.is_file():
            return loose.read_text().strip()
        packed = (common / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {head[5:]}"))
    return None


def _line(record: dict[str, Any]) -> str:
    parts = [f"{record['status']:8}{record['phase']:24}{record['seconds']:6.0f} s"]
    if record["losses"]:
        parts.append(f"loss {record['losses'][0]:.4f} → {record['losses'][-1]:.4f}")
    if record["peak_allocated_gb"]:
        parts.append(f"peak {record['peak_allocated_gb']:.1f} GB")
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    return "  ".join([*parts, *([record["reason"]] if record["reason"] else [])])


def main() -> int:
    parser = argparse.ArgumentParser(description="GPU checks in short phases.", epilog="See the docstring of this file.")
    parser.add_argument("--list", action="store_true", help="print the phases and end")
    parser.add_argument("--only", metavar="NAME", action="append", help="only this phase, or those whose names begin with NAME-")
    parser.add_argument("--again", action="store_true", help="run phases that were ok before as well")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no phase after so many minutes, and let none run longer")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for checkpoints and runs, 60 GB at most (default: a temporary one)")
    parser.add_argument("--dry-run", action="store_true", help="the tiny shape on the CPU; results go to DIR/results")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--card", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{phase.name:24}limit {phase.minutes:.0f} min" for phase in PHASES))
        return 0
    chosen = [p for p in PHASES if not options.only or any(p.name == name or p.name.startswith(f"{name}-") for name in options.only)]
    unknown = [name for name in options.only or [] if not any(p.name == name or p.name.startswith(f"{name}-") for p in chosen)]
    if unknown:
        parser.error(f"there is no phase {unknown[0]} (--list)")

    default = Path(tempfile.gettempdir()) / f"fastoss-gpu-checks-{os.getuid()}"
    work = options.work or (Path(tempfile.mkdtemp(prefix="fastoss-gpu-dry-")) if options.dry_run else default)
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    work = work.resolve()
    results = work / "results" if options.dry_run else ROOT / "benchmarks" / "results"
    if options.inside:
        return run_inside(next(p for p in PHASES if p.name == options.inside), Place(work, results, options.card, options.dry_run))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`: the phase's process ends as well
    try:
        facts = machine(options.dry_run)
        place = Place(work, results, facts["card"], options.dry_run)
        results.mkdir(exist_ok=True)
        return _run_all(chosen, place, facts, again=options.again, minutes=options.minutes)
    except FastossError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        if options.dry_run and options.work is None:
            shutil.rmtree(work, ignore_errors=True)


def _run_all(phases: list[Phase], place: Place, facts: dict[str, Any], *, again: bool, minutes: float | None) -> int:
    print(f"{facts['card']}, results in {place.results}, logs in {place.work}", flush=True)
    deadline = time.monotonic() + minutes * 60 if minutes else float("inf")
    ended = []
    for phase in phases:
        path = place.file(phase.name)
        if not again and path.is_file() and (before := read_json(path))["status"] == "ok":
            print(f"ok      {phase.name:24}done before, {before['started']} (--again repeats it)", flush=True)
            ended.append("ok")
        elif deadline - time.monotonic() < 10:
            print(f"left    {phase.name:24}no time left; the same command goes on here", flush=True)
            ended.append("left")
        else:
            record = run_phase(phase, place, facts, min(phase.minutes * 60, deadline - time.monotonic()))
            print(_line(record), flush=True)
            ended.append(record["status"])
    print(", ".join(f"{ended.count(status)} {status}" for status in ("ok", "skipped", "failed", "left") if status in ended))
    if not place.dry:
        print(f"the checkpoint stays in {place.work} for the next call; remove the folder when you are done")
    return 1 if {"failed", "left"} & set(ended) else 0


if __name__ == "__main__":
    sys.exit(main())
