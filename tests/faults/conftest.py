"""What the fault tests share: the server that forks commands, a recipe with frequent checkpoints, and runs prepared once for all workers."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..conftest import ROOT, ROWS, TINY_RECIPE, Result

STEPS = 8
CHANGES = ("--set", f"train.max_steps={STEPS}", "--set", "checkpoint.every=2", "--set", "checkpoint.keep=3", "--set", "log.every=1")


@dataclass
class Running:
    """A command under way."""

    commands: Commands
    pid: int
    folder: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    @property
    def err(self) -> str:
        path = self.folder / "err"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait_for_line(self, words: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while words not in self.err:
            assert time.monotonic() < until, f"never said {words!r}:\n{self.err}"
            time.sleep(0.01)

    def wait(self, timeout: float = 120) -> Result:
        code = self.commands.ask({"wait": self.pid, "timeout": timeout})["code"]
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s:\n{self.err}")
        return Result(code, (self.folder / "out").read_text(encoding="utf-8"), self.err)


class Commands:
    """`fastoss …` as forked processes (see server.py)."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"], cwd=ROOT, env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.server.stdout
        line = self.server.stdout.readline()
        assert line, "the server of the fault tests has died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.server.stdin
        self.server.stdin.write(json.dumps(request) + "\n")
        return self._answer()

    def start(self, *arguments: object, cwd: Path, prelude: str = "", **environment: str) -> Running:
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir(parents=True)
        request = {
            "arguments": [str(argument) for argument in arguments], "cwd": str(cwd), "env": environment, "prelude": prelude,
            "out": str(folder / "out"), "err": str(folder / "err"),
        }  # fmt: skip
        return Running(self, self.ask(request)["pid"], folder)

    def run(self, *arguments: object, cwd: Path, prelude: str = "", timeout: float = 120, **environment: str) -> Result:
        return self.start(*arguments, cwd=cwd, prelude=prelude, **environment).wait(timeout)


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
