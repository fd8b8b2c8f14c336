"""Errors, told once and clearly: every layer raises these, only the command line prints them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EXIT_RUN_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving, the same command resumes


class FastossError(Exception):
    """A person's mistake or a machine's limit, told as place, fact and hint.

    `fact` says what is wrong, `place` where (`file:line`, a recipe key, a command), `hint` what to do about it.
    `also` are further mistakes of the same kind, one line each. `exit_code` is what the process returns: 2 for bad input
    (the default), 1 when a run failed.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, fact: str, *, place: str | None = None, hint: str | None = None, also: Sequence[str] = ()):
        super().__init__(fact)
        self.fact = fact
        self.place = place
        self.hint = hint
        self.also = list(also)

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        also = "".join(f"\n  also {line}" for line in self.also)
        hint = f"\nhint: {self.hint}" if self.hint else ""
        return f"error: {where}{self.fact}{also}{hint}"

    def to_plain(self) -> dict[str, Any]:
        """The error as JSON values."""
        return {"place": self.place, "fact": self.fact, "hint": self.hint, "also": self.also}


class RunFailed(FastossError):
    """The input was fine and the run failed all the same (NaN, lost process, full disk): exit 1."""

    exit_code = EXIT_RUN_FAILED


class Stopped(FastossError):
    """A signal stopped the run after it had saved: exit 75, the same command resumes."""

    exit_code = EXIT_STOPPED

    def __str__(self) -> str:
        return f"stopped: {self.fact}"
