"""`fastoss doctor RUN`: is everything in a run directory there, whole, and of one piece?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fastoss.config import recipe_from_resolved
from fastoss.data.data_report import counted
from fastoss.errors import FastossError
from fastoss.model.adapter import STAMP, check_adapter, read_stamp
from fastoss.run import RunDirectory, file_lock, read_json, read_lines
from fastoss.training.checkpoint import checkpoint_fault, list_checkpoints
from fastoss.training.resume import MANIFEST_KEYS


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `ok`, `note` (no harm, worth knowing) or `broken`, and what to do about it."""

    what: str
    state: Literal["ok", "note", "broken"]
    told: str
    hint: str | None = None

    def line(self) -> str:
        return f"{self.state:<7}{self.what}: {self.told}" + (f"\n       hint: {self.hint}" if self.hint else "")

    def to_plain(self) -> dict[str, str | None]:
        return asdict(self)


def verdict(findings: list[Finding]) -> str:
    """All of them in one sentence."""
    broken = [finding.what for finding in findings if finding.state == "broken"]
    notes = sum(finding.state == "note" for finding in findings)
    return (f"broken: {', '.join(broken)}" if broken else "intact") + (f" ({counted(notes, 'note')})" if notes else "")


def examine_run(run: RunDirectory) -> list[Finding]:
    """Look at every part of a run directory; changes nothing, loads no model. `FastossError` when it is no run."""
    if not run.exists():
        raise FastossError("there is no run in this folder", place=str(run.root), hint="name a run: runs/<name>")
    return [*_papers(run), *_metrics(run), *_checkpoints(run), *_adapter(run), *_leftovers(run)]


def _papers(run: RunDirectory) -> Iterator[Finding]:
    for path, needed in ((run.resolved_recipe, ()), (run.manifest, MANIFEST_KEYS)):
        try:
            content = read_json(path)
            if path == run.resolved_recipe:
                recipe_from_resolved(content, str(path))
            missing = [key for key in needed if key not in content]
            if missing:
                raise FastossError(f"`{missing[0]}` is missing")
            yield Finding(path.name, "ok", "readable")
        except FastossError as problem:
            yield Finding(path.name, "broken", problem.fact, "the run cannot be resumed; its adapter may be whole")
    if not run.recipe.is_file():
        yield Finding(run.recipe.name, "note", "missing: the recipe as it was written; its settings are in recipe.resolved.json")


def _metrics(run: RunDirectory) -> Iterator[Finding]:
    if not run.metrics.is_file():
        yield Finding("metrics.jsonl", "note", "not there yet")
        return
    steps, torn, failed = [], 0, None
    for line in read_lines(run.metrics):
        try:
            entry = json.loads(line)
            steps += [int(entry["step"])] if "loss" in entry else []
            failed = entry.get("failed", failed)
        except (ValueError, KeyError, TypeError):
            torn += 1
    if failed:
        yield Finding("metrics.jsonl", "broken", f"the run failed: {failed}", "log.txt names the rows")
    elif steps != sorted(set(steps)):
        yield Finding("metrics.jsonl", "broken", "a step occurs twice", "the run was written by two processes at once")
    elif torn:
        yield Finding("metrics.jsonl", "note", f"{len(steps):,} steps; {torn} torn lines, which resuming removes")
    else:
        yield Finding("metrics.jsonl", "ok", f"{len(steps):,} steps" + (f", the last is {steps[-1]:,}" if steps else ""))


def _checkpoints(run: RunDirectory) -> Iterator[Finding]:
    found = list_checkpoints(run)
    faults = {checkpoint: checkpoint_fault(checkpoint) for checkpoint in found}
    whole = [checkpoint for checkpoint in found if faults[checkpoint] is None]
    for checkpoint, fault in faults.items():
        if fault is None:
            yield Finding(checkpoint.name, "ok", "whole, all checksums right")
        else:
            hint = f"the run would resume from {whole[-1].name}" if whole else "no other is whole: start over with --no-resume --overwrite"
            yield Finding(checkpoint.name, "broken", fault, hint)
    if not found and not run.is_finished():
        yield Finding("checkpoints", "note", "none yet: the same command would start over")


def _adapter(run: RunDirectory) -> Iterator[Finding]:
    if not run.is_finished():
        yield Finding("adapter", "note", "not there: the run has not finished")
        return
    try:
        stamp = read_stamp(run.adapter)
        source = stamp.model.name if Path(stamp.model.name).is_dir() else None
        check_adapter(run.adapter, source)
        yield Finding("adapter", "ok", f"whole, trained on {stamp.model.name}, {STAMP} agrees with its weights")
    except FastossError as problem:
        yield Finding("adapter", "broken", problem.fact, problem.hint)


def _leftovers(run: RunDirectory) -> Iterator[Finding]:
    try:
        with file_lock(run.root / ".lock", wait=False):
            pass
    except BlockingIOError:
        yield Finding("lock", "note", "a process is training here now")
        return
    left = [*run.root.glob(".*.tmp"), *run.root.glob(".*.old"), *run.checkpoints.glob(".*")]
    if left:
        told = f"{len(left)} half-written files or folders of a killed start ({left[0].name}, …): the next start removes them"
        yield Finding("leftovers", "note", told)
