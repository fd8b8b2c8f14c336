"""Whose conversation is whose: one for each page that is open, in memory, up to a limit."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from fastoss.demo.limits import Limits
from fastoss.demo.talk import Talk
from fastoss.errors import FastossError

IDLE_SECONDS = 6 * 3600


class Sessions:
    """Conversations by the page's session. The ones that were used longest ago go when there is no room, or after six hours."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._talks: OrderedDict[str, Talk] = OrderedDict()
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return len(self._talks)

    def of(self, session: str | None) -> Talk:
        """Its conversation, begun where there is none. `FastossError` when there is no room, because all are answering."""
        if not session:
            raise FastossError("the page has no session", hint="reload it")
        with self._guard:
            talk = self._talks.pop(session, None) or Talk()
            idle = [
                name
                for name, other in self._talks.items()
                if not other.busy and (len(self._talks) >= self.limits.sessions or time.monotonic() - other.used > IDLE_SECONDS)
            ]
            for name in idle[: max(1, len(self._talks) - self.limits.sessions + 1)]:
                del self._talks[name]
            if len(self._talks) >= self.limits.sessions:
                raise FastossError("too many people are here just now", hint="try again in a moment")
            self._talks[session] = talk
        return talk

    def end(self, session: str | None) -> None:
        """The page was closed: stop what it asked, and forget it."""
        with self._guard:
            talk = self._talks.pop(session or "", None)
        if talk is not None:
            talk.stop()
