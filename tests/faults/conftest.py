"""What the fault tests share: the server that forks commands, a recipe with frequent checkpoints, and runs prepared once for all workers."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..commands import Commands, Running
from ..conftest import ROWS, TINY_RECIPE, Result

STEPS = 8
CHANGES = ("--set", f"train.max_steps={STEPS}", "--set", "checkpoint.every=2", "--set", "checkpoint.keep=3", "--set", "log.every=1")


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Commands]:
    made = Commands(tmp_path_factory.mktemp("commands"))
    yield made
    made.server.kill()


@contextmanager
def shared(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bool]]:
    """A folder that the workers of a test run share, and whether it has to be made; others wait meanwhile."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / ".made"
        yield folder, not done.exists()
        done.touch()


@dataclass
class Prepared:
    """A folder with data and recipe, a whole run of it, and one that was stopped after step 6."""

    root: Path

    @property
    def whole(self) -> Path:
        return self.root / "whole"

    @property
    def stopped(self) -> Path:
        return self.root / "stopped"


@pytest.fixture(scope="session")
def prepared(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    with shared("prepared-runs", tmp_path_factory) as (folder, to_be_made):
        made = Prepared(folder)
        if to_be_made:
            folder.mkdir()
            (folder / "data.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
            (folder / "recipe.toml").write_text(TINY_RECIPE, encoding="utf-8")
            result = commands.run("train", "recipe.toml", "--output", "whole", *CHANGES, cwd=folder)
            assert result.code == 0, result.err
            running = commands.start("train", "recipe.toml", "--output", "stopped", *CHANGES, cwd=folder, prelude=SLOW)
            wait_for(made.stopped / "checkpoints" / "checkpoint-6", running)
            running.kill()
            assert running.wait().code == -signal.SIGKILL
        return made


# Steps of a tenth of a second at least, so that a test can act between two of them.
SLOW = """
import time
from transformers import Trainer
step = Trainer.training_step
def slow(self, *a, **k):
    time.sleep(0.25)
    return step(self, *a, **k)
Trainer.training_step = slow
"""


def wait_for(path: Path, running: Running, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name} after {seconds} s:\n{running.err}"
        time.sleep(0.01)


@dataclass
class Place:
    """A copy of the stopped run, to break and to start again."""

    root: Path
    commands: Commands

    @property
    def run(self) -> Path:
        return self.root / "run"

    def checkpoint(self, step: int) -> Path:
        return self.run / "checkpoints" / f"checkpoint-{step}"

    def again(self, *changes: object, **keywords: Any) -> Result:
        return self.commands.run("train", "recipe.toml", "--output", "run", *CHANGES, *changes, cwd=self.root, **keywords)

    def start(self, *changes: object, **keywords: Any) -> Running:
        return self.commands.start("train", "recipe.toml", "--output", "run", *CHANGES, *changes, cwd=self.root, **keywords)


@pytest.fixture
def place(prepared: Prepared, commands: Commands, tmp_path: Path) -> Place:
    """data, recipe and a run that was killed after step 6, with the checkpoints of steps 2, 4 and 6."""
    for name in ("data.jsonl", "recipe.toml"):
        shutil.copy(prepared.root / name, tmp_path)
    shutil.copytree(prepared.stopped, tmp_path / "run")
    return Place(tmp_path, commands)


@pytest.fixture
def fresh(prepared: Prepared, commands: Commands, tmp_path: Path) -> Place:
    """data and recipe, no run yet."""
    for name in ("data.jsonl", "recipe.toml"):
        shutil.copy(prepared.root / name, tmp_path)
    return Place(tmp_path, commands)
