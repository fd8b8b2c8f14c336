"""Room on the disk: asked for before the first step, and said in bytes when it runs out in the middle."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from fastoss.errors import FastossError, RunFailed
from fastoss.run import RunDirectory, size_of
from fastoss.terminal import disk_size

_MARGIN = 64 * 2**20  # logs, metrics, samples, and what the file system itself needs
HINT = "free some space, or keep fewer checkpoints (checkpoint.keep); run the same command again to resume from the last checkpoint"


def check_room(run: RunDirectory, trained_parameters: int, keep: int) -> int:
    """Refuse a run whose checkpoints would not fit; returns the bytes it needs.

    A checkpoint holds the adapter and AdamW's two moments in float32, 12 bytes a trained parameter; `keep` of them lie
    there while the next one is written, and the adapter at the end.
    """
    checkpoint = 12 * trained_parameters
    needed = (keep + 1) * checkpoint + 4 * trained_parameters + _MARGIN
    free = shutil.disk_usage(run.root).free
    there = size_of(run.checkpoints) if run.checkpoints.is_dir() else 0  # a resumed run has some of it already
    if free + there < needed:
        fact = f"{disk_size(needed)} are needed for checkpoints and adapter, {disk_size(free)} are free on this disk"
        raise FastossError(fact, place=str(run.root), hint="free some space, choose another place with --output, or lower checkpoint.keep")
    return needed


def disk_full(problem: BaseException, folder: Path, needed: int, what: str) -> RunFailed | None:
    """The error to raise when `problem` comes from a full disk, else None. `needed` in bytes, 0 where nobody knows."""
    causes = [problem, problem.__cause__, problem.__context__]
    said = any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause) for cause in causes)
    free = shutil.disk_usage(folder).free
    # torch's writer tells of a write that failed, and not why.
    if not said and not (isinstance(problem, RuntimeError) and free < max(needed, 2**20)):
        return None
    wanted = f"{what} needs {disk_size(needed)}" if needed else f"{what} could not be written"
    return RunFailed(f"the disk is full: {wanted}, {disk_size(free)} are free", place=str(folder), hint=HINT)
