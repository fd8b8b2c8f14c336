"""What is said on stderr while something runs: whole lines, in a terminal one live line below them, JSON lines with --log-json.

Data goes to stdout, and not through here. A process has one stderr, so what stands on its last line is this module's to know.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

AS_JSON = "FASTOSS_LOG_JSON"  # set by --log-json; seen by the processes that --gpus starts as well
_REDRAW_S = 0.1
_CALM_S = 10.0  # between lines on how far something has come, where no line can be redrawn
_STILL_S = 60.0  # between signs of life of something that counts nothing
_lock = threading.RLock()
_standing = ""  # the live line that stands on the screen; "" is none
_kept = False  # whether it is to stay when the next line comes


def is_terminal() -> bool:
    """Whether stderr can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not as_json()


def as_json() -> bool:
    return os.environ.get(AS_JSON) == "1"


def say(text: str = "", kind: str = "", **fields: Any) -> None:
    """A line that stays. As JSON: `time`, `kind` (message, note, step, evaluation, progress, stopped, error), `text`, and the fields."""
    with _lock:
        _leave_live()
        print(line_for(text, kind, **fields), file=sys.stderr, flush=True)


def live(text: str, kind: str = "progress", *, keep: bool = False, **fields: Any) -> None:
    """A line that the next one replaces, in a terminal; elsewhere lines to `keep` are said, the others are not."""
    global _standing, _kept
    with _lock:
        if not is_terminal():
            if keep:
                say(text, kind, **fields)
            return
        # A line that wraps could not be taken back.
        _standing, _kept = _cut(text, shutil.get_terminal_size().columns - 1), keep
        print(f"\r\033[K{_standing}", end="", file=sys.stderr, flush=True)


def _leave_live() -> None:
    """Make room for another line: a live line to keep stays above it, any other goes."""
    global _standing
    if _standing:
        print("" if _kept else "\r\033[K", end="\n" if _kept else "", file=sys.stderr, flush=True)
        _standing = ""


def line_for(text: str, kind: str = "", **fields: Any) -> str:
    """The line as it is written: itself, or JSON."""
    if not as_json():
        return text
    found = kind or ("note" if text.startswith("note: ") else "message")
    return json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "kind": found, "text": text, **fields}, ensure_ascii=False)


def _cut(text: str, columns: int) -> str:
    """As much of a text as so many columns show; Chinese takes two a character."""
    taken = 0
    for place, letter in enumerate(text):
        taken += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if taken > columns:
            return text[: max(0, place - 1)] + "…"
    return text


class Counting:
    """How far something countable has come: redrawn in a terminal, elsewhere said every ten seconds and at its end."""

    def __init__(self, tell: Callable[[str], None] = say):
        self.tell = tell
        self.spoke = self.drew = time.monotonic()

    def due(self) -> bool:
        """Whether a line would be seen now: ask this first where making one costs something."""
        now = time.monotonic()
        return now - self.spoke > _CALM_S or (now - self.drew > _REDRAW_S and is_terminal())

    def at(self, text: str, *, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self.spoke > _CALM_S:
            self.spoke = now
            self.tell(text)
        elif now - self.drew > _REDRAW_S and os.environ.get("RANK", "0") == "0":
            self.drew = now
            live(text)


@contextlib.contextmanager
def working(text: str, *, draw: bool = True, tell: Callable[[str], None] = say) -> Iterator[None]:
    """Show that something long and uncountable is still running: the seconds in a terminal, elsewhere a line a minute.

    Without `draw` the terminal is left alone: a library draws bars of its own there.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    over, begun = threading.Event(), time.monotonic()

    def tick() -> None:
        drawing = is_terminal()
        while not over.wait(1.0 if drawing else _STILL_S):
            passed = duration(time.monotonic() - begun)
            if drawing and draw:
                live(f"{text} … {passed}")
            elif not drawing:
                tell(f"still {text} … {passed}")

    thread = threading.Thread(target=tick, daemon=True, name="fastoss-working")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def duration(seconds: float) -> str:
    """`7s`, `2m05s`, `3h10m`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def rough_duration(seconds: float) -> str:
    """What is estimated: `95 s`, `45 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def disk_size(count: float) -> str:
    """Bytes in units of 10⁹ and 10⁶, as disks are sold: `1.4 GB`, `12.0 MB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def size(count: float) -> str:
    """Bytes of memory: `640 B`, `3.2 MiB`, `12.8 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError
