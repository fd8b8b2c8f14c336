"""Several processes wait for each other at every step: when one of them stalls, the others say which, where, and end the run.

Each process has a thread that writes a line about it into the run directory every few seconds and reads the others'. No
collective operation is used for it: those are what hangs. Only changes are timed, by each reader's own monotonic clock, so that a
wall clock that jumps, or two machines that disagree on the time, mean nothing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fastoss.errors import EXIT_RUN_FAILED
from fastoss.run import RunDirectory
from fastoss.training.progress import duration, rank, world_size

_BEATS = 20  # lines written within the timeout


class Watchdog:
    """Knows the stage each process is in. With one process it does nothing.

    A process whose thread is silent for `timeout` seconds is frozen or gone; one whose thread speaks and whose stage has not changed
    for that long hangs in it (only between `watch` and `rest`: loading may take its time).
    """

    def __init__(self, run: RunDirectory, timeout: float, say: Callable[[str], None]):
        self.folder = run.root / ".processes"
        self.timeout, self.say = timeout, say
        self.strict = False
        self.text = "starting"
        self._count = self._beats = 0
        self._session = os.environ.get("TORCHELASTIC_RUN_ID", "")
        self._done = threading.Event()
        self._seen: dict[int, tuple[str, float, int, float]] = {}  # rank: its line, since when; its stage's number, since when

    def start(self) -> None:
        if world_size() > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._beat()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._done.set()

    def stage(self, text: str) -> None:
        """What this process does from now on, in words for a person."""
        self.text = text
        self._count += 1

    def watch(self) -> None:
        """From here on a stage may not last longer than the timeout."""
        self.stage("on the way to its first step")
        self.strict = True

    def rest(self) -> None:
        self.strict = False

    def _beat(self) -> None:
        self._beats += 1
        line = json.dumps({"session": self._session, "beat": self._beats, "stage": self._count, "text": self.text, "strict": self.strict})
        path = self._file(rank())
        beside = path.with_suffix(".tmp")
        try:
            beside.write_text(line)
            beside.replace(path)
        except OSError:
            pass  # a full disk is the checkpoint's to report

    def _file(self, number: int) -> Path:
        return self.folder / f"rank-{number}.json"

    def _watch(self) -> None:
        pause = self.timeout / _BEATS
        while not self._done.wait(pause):
            self._beat()
            verdict = self._verdict()
            if verdict:
                # One process speaks, and the launcher ends the others: the higher ranks leave the first word to the lower ones.
                if rank() and self._done.wait(min(5.0, self.timeout) * rank()):
                    return
                self.say(f"error: {verdict}\nhint: run the same command again to resume from the last checkpoint")
                sys.stderr.flush()
                os._exit(EXIT_RUN_FAILED)

    def _verdict(self) -> str | None:
        """Which process stalls, and where; None while all move."""
        now = time.monotonic()
        lines = {}
        for number in range(world_size()):
            try:
                text = self._file(number).read_text()
                line = json.loads(text)
            except (OSError, ValueError):
                continue
            if line["session"] != self._session:
                continue  # of an earlier start
            _, since, stage, stage_since = self._seen.get(number, ("", now, -1, now))
            since = since if self._seen.get(number, ("",))[0] == text else now
            stage_since = stage_since if stage == line["stage"] else now
            self._seen[number] = text, since, line["stage"], stage_since
            lines[number] = line
        for number, line in lines.items():
            silent = now - self._seen[number][1]
            if silent > self.timeout:
                return f"process {number} is frozen or gone: no sign of life for {duration(silent)}, last seen {line['text']}"
        if len(lines) == world_size() and all(line["strict"] for line in lines.values()):
            stuck = {number: now - self._seen[number][3] for number in lines}
            if min(stuck.values()) > self.timeout:
                # All stand still: the one that is least far keeps the others waiting.
                last = min(lines, key=lambda number: lines[number]["stage"])
                if len({line["stage"] for line in lines.values()}) == 1:
                    return f"all processes have been {lines[last]['text']} for {duration(stuck[last])}"
                others = "; ".join(f"process {number} waits {line['text']}" for number, line in lines.items() if number != last)
                return f"process {last} has been {lines[last]['text']} for {duration(stuck[last])}; {others}"
        return None
