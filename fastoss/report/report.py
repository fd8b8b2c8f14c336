"""A run directory → report.html; several → one page that compares them. The end of every run calls this, and `fastoss report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastoss.errors import FastossError
from fastoss.report.compare import comparison_page
from fastoss.report.facts import read_facts
from fastoss.report.page import report_page
from fastoss.run import RunDirectory, write_whole


def write_report(run: RunDirectory, output: Path | None = None) -> Path:
    """Write a run's page, to `report.html` in its directory or to `output`; the path comes back.

    The page draws its curves itself: it needs no matplotlib, whose start would cost each run a second.

    Raises `FastossError` where there is no run, or the page cannot be written.
    """
    return _write(output or run.report, report_page(read_facts(run)))


def write_comparison(runs: Sequence[RunDirectory], output: Path | None = None) -> Path:
    """Write one page that compares runs, to `comparison.html` beside the first or to `output`. Raises as above."""
    folders = [run.root.resolve() for run in runs]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise FastossError("the same run is named twice", place=str(twice), hint="name each run once")
    return _write(output or runs[0].root.resolve().parent / "comparison.html", comparison_page([read_facts(run) for run in runs]))


def _write(path: Path, content: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as problem:
        raise FastossError(f"cannot be written: {problem.strerror}", place=str(path)) from None
    return path
