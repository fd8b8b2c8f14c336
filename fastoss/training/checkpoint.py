"""Saving and resuming: a checkpoint has its name only when it is whole, and says of each of its files what it must be.

The trainer hands over a folder with the small files and a copy of the optimizer's state; the rest is written beside the training.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastoss.errors import FastossError, RunFailed
from fastoss.run import RunDirectory, file_digest, move_whole, read_json, size_of, write_json
from fastoss.training.disk import disk_full

MANIFEST = "checkpoint.json"
_NEEDED = ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def writing_folder(run: RunDirectory) -> Path:
    """Where a checkpoint is written before it is whole; rubbish of a killed run there is overwritten."""
    return run.checkpoints / ".writing"


def list_checkpoints(run: RunDirectory) -> list[Path]:
    """All folders that bear a checkpoint's name, oldest first, whole or not."""
    if not run.checkpoints.is_dir():
        return []
    found = {int(name[1]): path for path in run.checkpoints.iterdir() if (name := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return [found[step] for step in sorted(found)]


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_fault(checkpoint: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None: a file that is missing, too short, or (with `contents`) not what was written."""
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FastossError as problem:
        return f"{MANIFEST}: {problem.fact}"
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"{MANIFEST} is not understood"
    for name in _NEEDED:
        if name not in expected:
            return f"{MANIFEST} does not name {name}"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
        if contents and file_digest(path) != digest:
            return f"{name} is not what was written (its checksum differs)"
    return None


def latest_checkpoint(run: RunDirectory, say: Callable[[str], None] | None = None, *, contents: bool = True) -> Path | None:
    """The newest whole checkpoint, or None. Newer ones that are damaged are passed over, each with a line to `say`.

    Without `contents` names and sizes are enough: for whoever does not resume from it and need not read gigabytes.
    """
    for checkpoint in reversed(list_checkpoints(run)):
        fault = checkpoint_fault(checkpoint, contents=contents)
        if fault is None:
            return checkpoint
        if say is not None:
            say(f"note: {checkpoint.name} is passed over: {fault}")
    return None


def sweep(run: RunDirectory) -> None:
    """Remove what a killed run left half-written or half-deleted. Only under the run's lock."""
    for path in [*run.checkpoints.glob(".*"), *run.root.glob(".*.tmp"), *run.root.glob(".*.old")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass
class Saving:
    """A checkpoint on its way to disk: the folder of what is written already, and what is not."""

    folder: Path
    step: int
    facts: dict[str, Any]  # what checkpoint.json says beside its files
    optimizer: Any  # a copy of the state that no step changes
    waited_s: float  # how long the training stood still for it


class CheckpointWriter:
    """Writes, checks and names checkpoints in a thread of its own, one at a time, and removes older ones.

    An error there is raised in the training at the next `check` or `wait`.
    """

    def __init__(self, run: RunDirectory, keep: int, say: Callable[[str], None]):
        self.run, self.keep, self.say = run, keep, say
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.costs: list[dict[str, Any]] = []  # of each checkpoint: step, bytes, seconds waited and seconds written beside

    def begin(self, saving: Saving) -> None:
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(saving,), name="checkpoint", daemon=False)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong while writing, if anything did."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until the checkpoint being written is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _write(self, saving: Saving) -> None:
        begun = time.monotonic()
        expected = 0
        try:
            import torch

            expected = size_of(saving.folder) + _tensor_bytes(saving.optimizer)
            torch.save(saving.optimizer, saving.folder / "optimizer.pt")
            final = self._publish(saving)
            wrote = time.monotonic() - begun
            self.costs.append(
                {"step": saving.step, "bytes": size_of(final), "waited_s": round(saving.waited_s, 3), "written_beside_s": round(wrote, 3)}
            )
            self.say(f"saved {final.name} ({saving.waited_s:.1f}s of waiting, {wrote:.1f}s beside the training)")
        except Exception as problem:
            full = disk_full(problem, self.run.root, expected, f"checkpoint-{saving.step}")
            self._error = full or RunFailed(
                f"checkpoint-{saving.step} could not be saved: {problem}", hint="run the same command again to resume from the last checkpoint"
            )

    def _publish(self, saving: Saving) -> Path:
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(saving.folder.iterdir())
            if path.name != MANIFEST
        }
        write_json(saving.folder / MANIFEST, {"step": saving.step, **saving.facts, "files": files})
        final = self.run.checkpoints / saving.folder.name
        move_whole(saving.folder, final)
        remove_older(self.run, self.keep)
        return final


def remove_older(run: RunDirectory, keep: int) -> None:
    """Keep the newest `keep` whole checkpoints and what is newer than them; with fewer whole ones, remove none."""
    whole = [checkpoint for checkpoint in list_checkpoints(run) if checkpoint_fault(checkpoint, contents=False) is None]
    if len(whole) < keep:
        return
    oldest = checkpoint_step(whole[-keep])
    for checkpoint in list_checkpoints(run):
        if checkpoint_step(checkpoint) < oldest:
            # Renamed first: a kill in the middle leaves nothing under a checkpoint's name.
            leaving = checkpoint.with_name(f".{checkpoint.name}.leaving")
            checkpoint.rename(leaving)
            shutil.rmtree(leaving)


def _tensor_bytes(state: Any) -> int:
    import torch

    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(_tensor_bytes, state.values()))
    return sum(map(_tensor_bytes, state)) if isinstance(state, (list, tuple)) else 0
