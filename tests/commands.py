"""The command line in processes of their own: forked from one that has the libraries imported, seconds each in place of ten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass
class Result:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


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
    """`fastoss …` as processes forked from a server that has the libraries imported (see command_server.py)."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.command_server"], cwd=ROOT, env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.server.stdout
        line = self.server.stdout.readline()
        assert line, "the server of commands has died"
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
            "arguments": [str(argument) for argument in arguments], "cwd": str(cwd), "env": os.environ | environment, "prelude": prelude,
            "out": str(folder / "out"), "err": str(folder / "err"),
        }  # fmt: skip
        return Running(self, self.ask(request)["pid"], folder)

    def run(self, *arguments: object, cwd: Path, prelude: str = "", timeout: float = 120, **environment: str) -> Result:
        return self.start(*arguments, cwd=cwd, prelude=prelude, **environment).wait(timeout)
