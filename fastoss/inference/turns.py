"""Whose turn it is: several threads ask one model, and each is answered in the order in which it came."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

from fastoss.errors import RunFailed


class Busy(RunFailed):
    """Too many are waiting already."""


class Turns:
    """A lock that is handed on first come, first served. `limit` is how many may wait (None: any number)."""

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._held = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether somebody has the turn."""
        return self._held

    @contextlib.contextmanager
    def turn(self, given_up: threading.Event | None = None) -> Iterator[bool]:
        """Wait for the turn, and hold it. Yields False when `given_up` was set meanwhile: then it is not one's turn.

        Raises `Busy` at once when `limit` others wait.
        """
        mine = threading.Event()
        with self._guard:
            if not self._held and not self._waiting:
                self._held = True
                mine.set()
            elif self.limit is not None and len(self._waiting) >= self.limit:
                raise Busy(f"{len(self._waiting)} questions are waiting already", hint="try again in a moment")
            else:
                self._waiting.append(mine)
        while not mine.wait(0.05 if given_up is not None else None):
            if given_up is not None and given_up.is_set():
                with self._guard:
                    if not mine.is_set():
                        self._waiting.remove(mine)
                        break
        if not mine.is_set():
            yield False
            return
        try:
            yield True
        finally:
            with self._guard:
                if self._waiting:
                    self._waiting.popleft().set()
                else:
                    self._held = False
