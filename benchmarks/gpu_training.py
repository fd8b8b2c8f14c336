"""Phases that only ask whether it works: the tests marked `gpu`, the tiny model, and a few steps at the 20B shape through each way in."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

from gpu_common import ROOT, Place, Record, Skip, checkpoint, compare, need_memory, train_and_note
from gpu_rows import SAMPLE, write_rows
from random_checkpoint import checkpoint_folder

from fastoss.data.conversation import Message
from fastoss.errors import RunFailed

TINY_TOLERANCE = 2e-2  # relative, loss of the first step in bf16 through two backends


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
    compare(place, record, "tiny-unsloth", TINY_TOLERANCE)


def _tiny(place: Place, record: Record, backend: str) -> None:
    """Train the embedded tiny model on the shipped sample: the loss falls, the adapter is kept, and a chat loads it."""
    from fastoss.inference.engine import Engine, Sampling

    steps = 4 if place.dry else 12
    model = {"name": "tiny", "precision": "float32" if place.dry else "bf16", "max_length": 512, "backend": backend}
    train = {"max_steps": steps, "learning_rate": 4e-3, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "warmup_steps": 0}
    run = train_and_note(place, record, model, {"source": str(SAMPLE), "max_rows": 32}, train)
    losses = record.values["losses"]
    if sum(losses[-2:]) / 2 >= losses[0]:
        raise RunFailed(f"the loss did not fall: {losses[0]:.4f} → {losses[-1]:.4f}")
    reply = Engine.load(str(run.root)).complete([[Message("user", "你是谁?")]], Sampling(max_new_tokens=8))[0]
    record.note(reply={"thinking": reply.thinking, "content": reply.content})


def make_mxfp4(place: Place, record: Record) -> None:
    """Write the random checkpoint in the published MXFP4 layout."""
    checkpoint(place, record, "mxfp4")


def mxfp4_unsloth_2k(place: Place, record: Record) -> None:
    _large(place, record, "unsloth", "mxfp4", rows=2)


def mxfp4_unsloth_8k(place: Place, record: Record) -> None:
    _large(place, record, "unsloth", "mxfp4", rows=8)


def bf16_transformers(place: Place, record: Record) -> None:
    """The same weights, dequantised to bf16 on the card; the difference to Unsloth's loss is reported, not judged.

    A random router sits on the fence for many tokens, and bf16 rounding alone moves them: no bound is known yet.
    """
    need_memory(place, record, 46)  # 41.8 GB of weights, and PEFT builds one layer's experts anew in each pass
    _large(place, record, "transformers", "bf16", rows=2)
    compare(place, record, "mxfp4-20b-unsloth-2k", None)


def four_bits_unsloth_2k(place: Place, record: Record) -> None:
    _four_bits(place, record, rows=2)
    compare(place, record, "mxfp4-20b-unsloth-2k", None)


def four_bits_unsloth_8k(place: Place, record: Record) -> None:
    """The target in 4 bits: at most 20 GB at the peak of training."""
    _four_bits(place, record, rows=8, most_gb=20)


def four_bits_unsloth_32k(place: Place, record: Record) -> None:
    """The largest micro-batch for a card of 24 GB. The 42 GB of bf16 weights on the disk go with it."""
    try:
        _four_bits(place, record, rows=32, most_gb=24)
    finally:
        shutil.rmtree(checkpoint_folder(place.work, place.shape, "bf16"), ignore_errors=True)


def _four_bits(place: Place, record: Record, *, rows: int, most_gb: float | None = None) -> None:
    """Unsloth quantises the experts of a bf16 folder to NF4 as it loads them; a MXFP4 folder would stay MXFP4."""
    if place.dry:
        checkpoint(place, record, "bf16")  # the writer is the same, and the test reads what it wrote
        raise Skip("4 bits need a GPU")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed")
    need_memory(place, record, 22)
    _large(place, record, "unsloth", "4bit", rows=rows, form="bf16")
    if most_gb is not None:
        peak = record.values["training_peak_gb"]
        record.note(target={"peak_gb": most_gb, "met": peak is not None and peak <= most_gb})


def _large(place: Place, record: Record, backend: str, precision: str, *, rows: int, form: Any = "mxfp4") -> None:
    """Three steps at the 20B shape on one batch of `rows` rows of 1,024 tokens: the first compiles, two are timed."""
    from gpu_clock import Clock

    folder = checkpoint(place, record, form)
    length = 128 if place.dry else 1024
    data = place.work / f"rows-{rows}x{length}.jsonl"
    lengths = write_rows(data, [length] * rows)
    model = {"name": str(folder), "precision": "float32" if place.dry else precision, "max_length": length, "backend": backend}
    # Exactly one batch, packed: every step, and every backend, trains on the same rows.
    train = {"max_steps": 3, "learning_rate": 1e-4, "tokens_per_batch": rows * length, "lr_scheduler_type": "constant", "warmup_steps": 0}
    with Clock() as clock:
        run = train_and_note(place, record, model, {"source": str(data)}, train)
    shutil.rmtree(run.checkpoints)  # optimizer states of a gigabyte
    timed = record.values["step_seconds"][1:]
    speed = round(sum(lengths) * len(timed) / sum(timed), 1)
    record.note(batch_tokens=sum(lengths), tokens_per_second=speed, training_peak_gb=clock.summary(1)["training_peak_gb"])
