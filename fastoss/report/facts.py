"""A run directory → what its report tells: everything that is there is read, what is missing or damaged is left out and said."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastoss.errors import FastossError
from fastoss.report.curves import Entry, read_metrics, resumed_after
from fastoss.run import RunDirectory, file_lock, read_json, read_lines


@dataclass(frozen=True)
class Facts:
    """One run. `damaged` are files that could not be read."""

    run: RunDirectory
    recipe: dict[str, Any]
    manifest: dict[str, Any]
    entries: list[Entry]
    samples: list[dict[str, Any]]
    profile: dict[str, Any]
    plan: dict[str, Any]
    evaluation: dict[str, Any]
    log: list[str]
    training: bool  # a process holds the run's lock
    damaged: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.run.root.resolve().name

    @property
    def method(self) -> str:
        return str(self.recipe.get("method", "sft"))

    @cached_property
    def steps(self) -> list[Entry]:
        return [entry for entry in self.entries if "loss" in entry]

    @cached_property
    def evaluations(self) -> list[Entry]:
        return [entry for entry in self.entries if "eval_loss" in entry]

    @cached_property
    def resumed(self) -> list[int]:
        return resumed_after(self.run, self.entries)

    @property
    def first_loss(self) -> float | None:
        return self.steps[0]["loss"] if self.steps else None

    @cached_property
    def loss_window(self) -> int:
        """How many of the last steps make the loss at the end: one step says little."""
        return max(1, min(10, len(self.steps) // 10))

    @property
    def last_loss(self) -> float | None:
        last = self.steps[-self.loss_window :]
        return sum(entry["loss"] for entry in last) / len(last) if last else None

    @property
    def best_evaluation(self) -> Entry | None:
        return min(self.evaluations, key=lambda entry: entry["eval_loss"], default=None)

    @cached_property
    def seconds(self) -> float:
        """Time within training, over all starts; steps that a kill took back are not in it."""
        steps = [entry for entry in self.steps if "seconds" in entry]
        ends = [earlier["seconds"] for earlier, later in pairwise(steps) if later["seconds"] < earlier["seconds"] or earlier["step"] in self.resumed]
        return float(sum(ends) + (steps[-1]["seconds"] if steps else 0))

    @property
    def tokens(self) -> int:
        return int(self.steps[-1].get("num_tokens", 0)) if self.steps else 0

    @cached_property
    def speed(self) -> float | None:
        """Tokens a second, the median of the steps."""
        found = sorted(entry["tokens_per_second"] for entry in self.steps if "tokens_per_second" in entry)
        return found[len(found) // 2] if found else None

    @property
    def memory_peak(self) -> int | None:
        return max((entry["memory_peak"] for entry in self.steps if "memory_peak" in entry), default=None)

    @cached_property
    def fill(self) -> float | None:
        found = [entry["fill"] for entry in self.steps if "fill" in entry]
        return sum(found) / len(found) if found else None

    @property
    def starts(self) -> list[str]:
        return list(self.manifest.get("started", []))

    @cached_property
    def ends(self) -> dict[int, dict[str, Any]]:
        """How each start ended, by its number from 1; a start that was killed has no entry."""
        return {end["start"]: end for end in self.manifest.get("ends", [])}

    @property
    def state(self) -> str:
        """finished, stopped, failed, training, killed; `unfinished` where the run does not say."""
        if self.run.is_finished():
            return "finished"
        last = self.ends.get(len(self.starts))
        if last is not None:
            return str(last["how"])
        if self.training:
            return "training"
        if any("failed" in entry for entry in self.entries):
            return "failed"
        return "killed" if "ends" in self.manifest else "unfinished"

    @cached_property
    def notes(self) -> list[tuple[str, int]]:
        """Warnings that were said, each with how often; in the order in which they came first."""
        found: dict[str, int] = {}
        for line in self.log:
            _, _, said = line.partition("  ")
            if said.startswith(("note: ", "warning: ")):
                said = said.partition(": ")[2]
                found[said] = found.get(said, 0) + 1
        return list(found.items())


def read_facts(run: RunDirectory) -> Facts:
    """Read a run directory. `FastossError` where there is no run."""
    if not run.exists():
        raise FastossError("there is no run in this folder", place=str(run.root), hint="name a run: runs/<name>")
    damaged: list[str] = []

    def plain(path: Path) -> dict[str, Any]:
        try:
            found = read_json(path) if path.is_file() else {}
        except FastossError:
            found = None
        if not isinstance(found, dict):
            damaged.append(path.name)
            return {}
        return found

    samples = []
    for line in read_lines(run.samples) if run.samples.is_file() else ():
        try:
            samples.append(json.loads(line))
        except ValueError:
            damaged.append(run.samples.name)
            break
    log = run.log.read_text(encoding="utf-8", errors="replace").splitlines() if run.log.is_file() else []
    return Facts(
        run=run, recipe=plain(run.resolved_recipe), manifest=plain(run.manifest), entries=read_metrics(run), samples=samples,
        profile=plain(run.profile), plan=plain(run.root / "plan.json"), evaluation=plain(run.evaluation), log=log,
        training=_is_locked(run), damaged=damaged,
    )  # fmt: skip


def _is_locked(run: RunDirectory) -> bool:
    try:
        with file_lock(run.root / ".lock", wait=False):
            return False
    except BlockingIOError:
        return True
    except OSError:  # a directory that may only be read
        return False
