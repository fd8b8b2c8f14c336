"""Which model is asked: the loaded run, the runs beside it that could be loaded instead, and what the page says about it."""

from __future__ import annotations

import contextlib
import gc
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastoss.demo.limits import Limits
from fastoss.errors import FastossError
from fastoss.inference.open_model import open_model
from fastoss.report.report import write_report
from fastoss.run import RunDirectory, read_json, read_lines

_EXAMPLES = ("Who are you?", "Explain in two sentences why the sky is blue.", "Write a haiku about rain.")
_SHOWN = 4


@dataclass(frozen=True)
class About:
    """What people want to know of a model: its name, a line on what it is, questions to begin with."""

    name: str
    line: str
    examples: tuple[str, ...] = _EXAMPLES
    run: RunDirectory | None = None

    @classmethod
    def of(cls, name: str) -> About:
        """Read from the run directory where there is one; loads nothing."""
        run = RunDirectory(Path(name))
        short = name.rstrip("/").rpartition("/")[2] or name
        if not run.exists():
            return cls(short, "a model that was not trained here")
        recipe = read_json(run.resolved_recipe)
        method = str(recipe.get("method", "sft")).upper()
        line = f"{recipe.get('model', {}).get('name', 'a model')} with LoRA, {method}"
        return cls(short, line, tuple(_examples(run, recipe)) or _EXAMPLES, run)


def _examples(run: RunDirectory, recipe: dict[str, Any]) -> list[str]:
    """First questions: those that the recipe asks for samples, else those that were asked."""
    found = [str(prompt) for prompt in recipe.get("samples", {}).get("prompts", ())]
    if not found and run.samples.is_file():
        for line in read_lines(run.samples):
            with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
                messages = json.loads(line)["messages"]
                asked = [message["content"] for message in messages if message["role"] == "user"]
                if len(asked) == 1 and asked[0] not in found:
                    found.append(asked[0])
    short = [text for text in found if len(text) <= 80] or found
    return short[:_SHOWN]


@dataclass
class Models:
    """One model is in memory at a time. `engine` is whatever answers at the moment; changing it waits until nobody asks."""

    name: str
    limits: Limits
    engine: Any = None
    about: About = field(init=False)

    def __post_init__(self) -> None:
        self._changing = threading.Lock()
        self._in_use = 0
        self._free = threading.Condition()
        self.about = About.of(self.name)

    def load(self) -> None:
        self.engine = self._opened(self.name)

    def _opened(self, name: str) -> Any:
        engine = open_model(name)
        if hasattr(engine, "turns"):
            engine.turns.limit = self.limits.waiting
        return engine

    @contextlib.contextmanager
    def using(self) -> Iterator[Any]:
        """The engine, for one question. `FastossError` while another is being loaded."""
        with self._free:
            if self.engine is None:
                raise FastossError("another model is being loaded", hint="ask again in a moment")
            self._in_use += 1
            engine = self.engine
        try:
            yield engine
        finally:
            with self._free:
                self._in_use -= 1
                self._free.notify_all()

    def report(self) -> str | None:
        """The run's report as a page; written where a run has none yet."""
        run = self.about.run
        if run is None:
            return None
        path = run.root / "report.html"
        try:
            return (path if path.is_file() else write_report(run)).read_text(encoding="utf-8")
        except (OSError, FastossError):
            return None

    def choices(self) -> list[str]:
        """Finished runs in the folder of this one, this one first."""
        here = RunDirectory(Path(self.name))
        if not here.exists():
            return [self.name]
        folder = here.root.resolve()
        runs = [RunDirectory(here.root.parent / path.name) for path in sorted(folder.parent.iterdir()) if path.is_dir() and path.resolve() != folder]
        return [self.name, *(str(run.root) for run in runs if run.exists() and run.is_finished())]

    def change(self, name: str) -> None:
        """Load another of the `choices` in place of this one. Where that fails, the old one is loaded again."""
        if name not in self.choices():
            raise FastossError("there is no such run here", place=name)
        if name == self.name and self.engine is not None:
            return
        if not self._changing.acquire(blocking=False):
            raise FastossError("another model is being loaded already", hint="wait a moment")
        try:
            with self._free:
                self.engine, old = None, self.engine
                self._free.wait_for(lambda: self._in_use == 0, timeout=self.limits.reply_seconds + 10)
            # Two 20B models have no room beside each other: the old one goes first.
            del old
            gc.collect()
            try:
                self.engine = self._opened(name)
                self.name, self.about = name, About.of(name)
            except FastossError:
                self.engine = self._opened(self.name)
                raise
        finally:
            self._changing.release()
