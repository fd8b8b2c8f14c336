"""Whose turn it is: several threads ask one model, and each is answered in the order in which it came, one or a few at a time."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

from fastoss.errors import RunFailed


class Busy(RunFailed):
    """Too many are waiting already."""


class Turns:
    """A lock that is handed on first come, first served. `limit` is how many may wait (None: any number), `places` how many hold it at once."""

    def __init__(self, limit: int | None = None, places: int = 1):
        self.limit, self.places = limit, places
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._held = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether whoever comes now has to wait."""
        return self._held == self.places

    @contextlib.contextmanager
    def turn(self, given_up: threading.Event | None = None) -> Iterator[bool]:
        """Wait for the turn, and hold it. Yields False when `given_up` was set meanwhile: then the caller does not have the turn.

        Raises `Busy` at once when `limit` others wait.
        """
        mine = threading.Event()
        with self._guard:
            if self._held < self.places and not self._waiting:
                self._held += 1
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
                    self._held -= 1
