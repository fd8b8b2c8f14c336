"""What the journeys share: commands as the README writes them, the demo as `python app.py` starts it, and a look at each screen.

With FASTOSS_SCREENS=FOLDER every screen that a journey comes by is kept there as a picture, to be looked at by people.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastoss.run import RunDirectory

from ..commands import ROOT, Result, Running
from ..conftest import fastoss


@dataclass
class Journey:
    """An empty folder that a person works in."""

    home: Path

    def write(self, name: str, text: str, encoding: str = "utf-8") -> None:
        (self.home / name).write_text(text, encoding=encoding)

    def read(self, name: str) -> str:
        return (self.home / name).read_text(encoding="utf-8")

    def replace(self, name: str, old: str, new: str) -> None:
        text = self.read(name)
        assert text.count(old) == 1, (old, text)
        self.write(name, text.replace(old, new))

    def run(self, command: str, code: int = 0) -> Result:
        """A command line that begins with `fastoss`, as a person types it here; it must end with `code`, and never in a traceback."""
        words = shlex.split(command)
        assert words[0] == "fastoss"
        result = fastoss(*words[1:], cwd=self.home, timeout=600)
        assert result.code == code, f"{command}\n{result.out}\n{result.err}"
        assert "Traceback" not in result.err, result.err
        return result

    def directory(self, name: str) -> RunDirectory:
        return RunDirectory(self.home / "runs" / name)

    @contextmanager
    def demo(self, *arguments: str) -> Iterator[str]:
        """`python app.py …` in a process of its own, until Ctrl-C; yields its address."""
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        log = self.home / "demo.log"
        with open(log, "w") as said:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "app.py"), *arguments, "--port", "0"], cwd=self.home, env=environment, stdout=said, stderr=said
            )
        try:
            until = time.monotonic() + 180
            while not (found := re.search(r"the demo is at (http://\S+);", log.read_text())):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            yield found[1]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) in (0, 130), log.read_text()
            assert "Traceback" not in log.read_text(), log.read_text()
        finally:
            process.kill()


def kill_after(running: Running, checkpoint: Path) -> None:
    """Wait for a checkpoint, then `kill -9`."""
    until = time.monotonic() + 180
    while not checkpoint.exists():
        assert time.monotonic() < until, running.err
        time.sleep(0.01)
    running.kill()
    assert running.wait().code == -signal.SIGKILL


def screen(page: Any, name: str) -> None:
    """Keep a picture of the whole page, where someone wants to look."""
    folder = os.environ.get("FASTOSS_SCREENS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@contextmanager
def opened_report(browser: Any, path: Path) -> Iterator[Any]:
    """A report in the browser; it asks for nothing else, and no script of it fails."""
    context = browser.new_context(viewport={"width": 1180, "height": 900})
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:", "blob:")) else faults.append(asked.url))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert faults == []
