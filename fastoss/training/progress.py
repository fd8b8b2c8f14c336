"""What a person sees of a run: lines on stderr, kept in the run's log as well, and `metrics.jsonl`, one line a step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastoss import terminal
from fastoss.report.curves import write_curves
from fastoss.run import RunDirectory, read_lines, write_whole
from fastoss.terminal import duration as duration


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class Console:
    """Says things once: on rank 0, to stderr, and to the run's log when it has one."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet or rank() != 0
        self.log: Path | None = None
        self._waiting: list[str] = []  # said before the run directory was there

    def say(self, text: str = "", kind: str = "", **fields: Any) -> None:
        """A line that stays, on the screen and in the log; `fields` are for --log-json alone."""
        if self.quiet:
            return
        terminal.say(text, kind, **fields)
        self._keep(text)

    def shout(self, text: str) -> None:
        """What must be heard from any rank."""
        if rank() == 0:
            self.say(text)
        else:
            terminal.say(f"process {rank()}: {text}")

    def live(self, text: str, *, keep: bool, kind: str = "progress", **fields: Any) -> None:
        """A line that the next one replaces, in a terminal; elsewhere only lines to keep are written."""
        if self.quiet:
            return
        terminal.live(text, kind, keep=keep, **fields)
        if keep:
            self._keep(text)

    def log_to(self, path: Path) -> None:
        if self.quiet:
            return
        self.log = path
        waiting, self._waiting = self._waiting, []
        for text in waiting:
            self._keep(text)

    def _keep(self, text: str) -> None:
        if self.log is None:
            self._waiting.append(text)
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            with open(self.log, "a", encoding="utf-8") as file:
                file.writelines(f"{stamp}  {line}\n" for line in text.splitlines() or [""])
        except OSError as problem:  # what a person reads must not end what was trained
            terminal.say(f"note: {self.log} cannot be written ({problem.strerror}): no more lines go there")
            self.log, self._waiting = None, []


class MetricsFile:
    """`metrics.jsonl`: a line for each step, and one for each evaluation. A resumed run appends after its checkpoint."""

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        self.follow: Callable[[int, dict[str, Any]], None] | None = None  # told of each line that is written
        self.best: dict[str, Any] | None = None  # the lowest held-out loss so far, and its step
        kept = []
        if resume_step and path.is_file():
            for line in read_lines(path):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the line that a kill tore
                if entry.get("step", 0) <= resume_step:
                    kept.append(line)
                    self._note_best(entry)
        if rank() == 0:
            write_whole(path, "".join(line + "\n" for line in kept))

    def _note_best(self, entry: dict[str, Any]) -> None:
        if "eval_loss" in entry and (self.best is None or entry["eval_loss"] < self.best["eval_loss"]):
            self.best = {"eval_loss": entry["eval_loss"], "step": entry["step"]}

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._note_best({"step": step, **values})
        if rank() == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            if self.follow is not None:
                self.follow(step, values)


def draw_curves(run: RunDirectory, console: Console) -> None:
    """Draw the run's metrics so far. A picture that cannot be drawn is reported, and does not affect the run."""
    if rank() != 0:
        return
    try:
        write_curves(run)
    except Exception as problem:
        console.say(f"note: curves.svg could not be drawn: {type(problem).__name__}: {problem}")
