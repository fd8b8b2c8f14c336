"""How a start of a run ended, kept in the manifest; then the run's report is written, whatever the end was."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastoss.config import Recipe
from fastoss.data.dataset import Dataset
from fastoss.data.overview import profile_plain
from fastoss.errors import FastossError, Stopped
from fastoss.report.curves import read_metrics
from fastoss.report.report import write_report
from fastoss.run import RunDirectory, read_json, write_json
from fastoss.training.progress import Console, rank


def keep_profile(run: RunDirectory, dataset: Dataset, recipe: Recipe, command: str | None) -> None:
    """Write what the report shows of the data, and how to repeat the run."""
    if rank() == 0:
        write_json(run.profile, profile_plain(dataset, recipe))
        write_json(run.manifest, read_json(run.manifest) | {"command": command})


@contextmanager
def ending(run: RunDirectory, console: Console) -> Iterator[None]:
    """Note whether the block finished, was stopped by a signal or failed, and write the report; the error is raised again."""
    how, said = "finished", None
    try:
        yield
    except Stopped as stopped:
        how, said = "stopped", stopped.fact
        raise
    except BaseException as problem:
        how, said = "failed", problem.fact if isinstance(problem, FastossError) else f"{type(problem).__name__}: {problem}"
        raise
    finally:
        if rank() == 0:
            _finish(run, console, how, said)


def _finish(run: RunDirectory, console: Console, how: str, said: str | None) -> None:
    """A report must never cost a run: one that cannot be written is reported in one line."""
    try:
        manifest: dict[str, Any] = read_json(run.manifest)
        end = {"start": len(manifest["started"]), "how": how, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "said": said}
        write_json(run.manifest, manifest | {"ends": [*manifest.get("ends", []), end]})
        if read_metrics(run):  # a run that was refused before its first step has nothing to show
            console.say(f"report: {write_report(run)}")
    except Exception as problem:
        console.say(f"note: the report could not be written: {type(problem).__name__}: {problem}")
