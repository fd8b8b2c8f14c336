"""What a machine does to a run: full disks, no memory, numbers that are none, trackers that fail, folders that cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastoss.run import RunDirectory
from fastoss.training.checkpoint import checkpoint_fault, list_checkpoints
from fastoss.training.memory import cut

from ..conftest import losses, metrics
from .conftest import CHANGES, Place, Prepared
from .test_checkpoints import same_end


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system of its own on a folder; skips where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a small file system: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_too_small_is_refused_before_the_first_step(fresh: Place):
    with small_disk(fresh.root / "disk", 20_000):
        result = fresh.commands.run("train", "recipe.toml", "--output", "disk/run", *CHANGES, cwd=fresh.root)
        assert result.code == 2, result.err
        assert "are needed for checkpoints and adapter, " in result.err
        assert "MB are free on this disk" in result.err
        assert not list((fresh.root / "disk" / "run").glob("checkpoints/*"))


def test_a_disk_that_fills_up_leaves_what_was_saved(fresh: Place, prepared: Prepared):
    """Room for two checkpoints of 0.9 MB; the check before the run is told another size, as if something else filled the disk meanwhile."""
    unaware = "import fastoss.training.train as t\nt.check_room = lambda *a: 0"
    with small_disk(fresh.root / "disk", 2_500):
        run = fresh.root / "disk" / "run"
        result = fresh.commands.run("train", "recipe.toml", "--output", "disk/run", *CHANGES, cwd=fresh.root, prelude=unaware)
        assert result.code == 1, result.err
        assert "the disk is full: checkpoint-6 needs" in result.err or "the disk is full: checkpoint-6 could not be written" in result.err, result.err
        assert "MB are free" in result.err
        assert "run the same command again to resume" in result.err
        whole = list_checkpoints(RunDirectory(run))
        assert [checkpoint.name for checkpoint in whole] == ["checkpoint-2", "checkpoint-4"]
        assert [checkpoint_fault(checkpoint) for checkpoint in whole] == [None, None]
        shutil.copytree(run, fresh.run)  # as if there were room again
    again = fresh.again()
    assert again.code == 0, again.err
    assert "resuming from checkpoint-4" in again.err
    same_end(fresh.run, prepared.whole)


def test_a_log_that_cannot_be_written_does_not_stop_the_run(place: Place, prepared: Prepared):
    """/dev/full is a disk without room."""
    (place.run / "log.txt").unlink()
    (place.run / "log.txt").symlink_to("/dev/full")
    result = place.again()
    assert (result.code, "log.txt cannot be written (No space left on device): no more lines go there" in result.err) == (0, True), result.err
    same_end(place.run, prepared.whole)


def test_metrics_that_cannot_be_written_fail_the_run(fresh: Place):
    full = """
import fastoss.training.progress as p
write = p.MetricsFile.write
def at_full_disk(self, step, values):
    if step == 3:
        self.path = p.Path("/dev/full")
    write(self, step, values)
p.MetricsFile.write = at_full_disk
"""
    result = fresh.again(prelude=full)
    assert (result.code, "the disk is full: the run could not be written" in result.err) == (1, True), result.err
    assert [checkpoint_fault(checkpoint) for checkpoint in list_checkpoints(RunDirectory(fresh.run))] == [None]


def test_a_place_that_cannot_be_written(fresh: Place):
    (fresh.root / "file").write_text("")
    for place in ("/proc/run", "file/run"):
        result = fresh.commands.run("train", "recipe.toml", "--output", place, *CHANGES, cwd=fresh.root)
        assert (result.code, "cannot write: " in result.err, "choose another place with --output" in result.err) == (2, True, True), result.err


# --- memory ---------------------------------------------------------------------------------------------------------------

# The model's forward pass fails as torch does when there is no memory: beyond so many tokens.
NO_ROOM = """
import torch
from transformers import GptOssModel
forward = GptOssModel.forward
def small(self, input_ids=None, **k):
    if self.training and input_ids.numel() > {tokens}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return forward(self, input_ids=input_ids, **k)
GptOssModel.forward = small
"""


def test_no_memory_is_one_line_that_says_what_to_change(fresh: Place):
    result = fresh.again(prelude=NO_ROOM.format(tokens=100))
    assert result.code == 1
    assert "memory is full at step 1: a micro-batch of" in result.err
    assert "GiB at the peak" in result.err
    assert 'train.on_oom = "split"' in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("changes", [(), ("--set", "train.gradient_accumulation_steps=2")], ids=["one", "accumulated"])
def test_split_micro_batches_train_on_the_same_loss(fresh: Place, prepared: Prepared, changes):
    whole = prepared.whole
    if changes:
        result = fresh.commands.run("train", "recipe.toml", "--output", "wide", *CHANGES, *changes, cwd=fresh.root)
        assert result.code == 0, result.err
        whole = fresh.root / "wide"
    split = fresh.again("--set", "train.on_oom=split", *changes, prelude=NO_ROOM.format(tokens=130))
    assert split.code == 0, split.err
    assert "did not fit into memory at step" in split.err
    assert "micro-batches are cut into 2 from here on; batch and loss stay the same" in split.err
    assert losses(fresh.run) == pytest.approx(losses(whole), rel=1e-5)
    norms = [[entry["grad_norm"] for entry in metrics(run)] for run in (fresh.run, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    channels = [[entry["loss_final"] for entry in metrics(run)] for run in (fresh.run, whole)]
    assert channels[0] == pytest.approx(channels[1], rel=1e-5), "what was computed again counts once"
    pieces = json.loads((fresh.run / "checkpoints" / "checkpoint-8" / "checkpoint.json").read_text())["pieces"]
    assert pieces == [2]


def test_splitting_has_a_floor(fresh: Place):
    result = fresh.again("--set", "train.on_oom=split", prelude=NO_ROOM.format(tokens=20))
    assert result.code == 1
    assert "memory is full at step 1" in result.err
    assert "a single row does not fit: lower model.max_length" in result.err


def test_pieces_are_consecutive_and_none_is_empty():
    for lengths in ([5], [9, 1, 1, 1], [1, 1, 1, 9], [3] * 7, [100, 1]):
        members = list(range(10, 10 + len(lengths)))
        for pieces in range(1, 10):
            groups = cut(members, lengths, pieces)
            assert [member for group in groups for member in group] == members
            assert all(groups)
            assert len(groups) <= pieces
        assert cut(members, lengths, len(members)) == [[member] for member in members]


# --- numbers, trackers, clocks ----------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_names_the_rows_and_keeps_the_last_checkpoint(place: Place, prepared: Prepared):
    broken = """
from transformers import Trainer
step = Trainer.training_step
Trainer.training_step = lambda self, *a, **k: step(self, *a, **k) * (float("nan") if self.state.global_step == 6 else 1)
"""
    result = place.again(prelude=broken)
    assert (result.code, "the loss is nan at step 7; rows of the batch: " in result.err) == (1, True), result.err
    assert "data.jsonl:" in result.err
    assert metrics(place.run)[-1] == {"step": 7, "failed": "the loss is nan"}, "it stays to be seen"
    doctor = place.commands.run("doctor", "run", cwd=place.root)
    assert "broken metrics.jsonl: the run failed: the loss is nan" in doctor.out
    again = place.again()
    assert again.code == 0, again.err
    same_end(place.run, prepared.whole)


def test_a_tracker_that_fails_does_not_stop_the_run(fresh: Place, prepared: Prepared):
    (fresh.root / "occupied").write_text("a file where TensorBoard wants a folder")
    place = str(fresh.root / "occupied" / "deep")
    result = fresh.again("--set", 'log.trackers=["tensorboard"]', TENSORBOARD_LOGGING_DIR=place)
    assert result.code == 0, result.err
    assert "note: tensorboard failed (" in result.err
    assert "the run continues without it, metrics.jsonl has every figure" in result.err
    same_end(fresh.run, prepared.whole)


def test_a_clock_that_goes_backwards(place: Place, prepared: Prepared):
    """Wall time runs from 2038 to 1980 during the run, and the files of the first start lie in the future."""
    for path in place.run.rglob("*"):
        os.utime(path, (2**31, 2**31))
    backwards = """
import itertools, time
ticks = itertools.count()
time.time = lambda: 2**31 - 1e6 * next(ticks) % 2**30
"""
    result = place.again(prelude=backwards)
    assert (result.code, "resuming from checkpoint-6" in result.err) == (0, True), result.err
    same_end(place.run, prepared.whole)


def test_two_runs_in_one_directory(place: Place):
    from .conftest import SLOW

    running = place.start(prelude=SLOW)
    running.wait_for_line("loading")
    second = place.again()
    assert (second.code, "another process is training in this run directory" in second.err) == (2, True), second.err
    doctor = place.commands.run("doctor", "run", cwd=place.root)
    assert "a process is training here now" in doctor.out
    assert "\n\nintact" in doctor.out
    running.kill(signal.SIGKILL)
    running.wait()
    assert place.again().code == 0, "a killed process leaves no lock"
