"""Saving and resuming: a checkpoint has its name only when it is whole."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fastoss.run import RunDirectory, move_whole

_NEEDED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def writing_folder(run: RunDirectory) -> Path:
    """Where a checkpoint is written before it is whole; rubbish of a killed run there is overwritten."""
    return run.checkpoints / ".writing"


def publish_checkpoint(run: RunDirectory, step: int, keep: int) -> Path:
    """Give the written checkpoint its name, then remove older ones beyond the last `keep`."""
    final = run.checkpoints / f"checkpoint-{step}"
    move_whole(writing_folder(run) / final.name, final)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    shutil.rmtree(writing_folder(run), ignore_errors=True)
    return final


def sweep(run: RunDirectory) -> None:
    """Remove what a killed run left half-written or half-deleted beside its checkpoints. Only under the run's lock."""
    if run.checkpoints.is_dir():
        whole = set(list_checkpoints(run))
        for path in run.checkpoints.iterdir():
            if path.is_dir() and path not in whole:
                shutil.rmtree(path)


def list_checkpoints(run: RunDirectory) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not run.checkpoints.is_dir():
        return []
    found = {int(name[1]): path for path in run.checkpoints.iterdir() if (name := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return [found[step] for step in sorted(found) if all((found[step] / name).is_file() for name in _NEEDED)]


def latest_checkpoint(run: RunDirectory) -> Path | None:
    """The checkpoint to go on from, or None."""
    checkpoints = list_checkpoints(run)
    return checkpoints[-1] if checkpoints else None


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
