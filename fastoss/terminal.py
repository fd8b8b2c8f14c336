"""What is said to a person on stderr while something runs. Data goes to stdout, and not through here."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`7s`, `2m05s`, `3h10m`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def size(count: float) -> str:
    """Bytes: `640 B`, `3.2 MiB`, `12.8 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError
