"""What the CPU benchmarks share: how a call is timed, how two are timed beside each other, and how repeats are summed up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
REPEATS = 7


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], repeats: int = REPEATS) -> dict[str, Any]:
    """Time two functions alternately after a warm-up; the ratio is theirs / ours, pair by pair, of this process's processor time.

    On a busy machine a clock says who was interrupted; processor time says what was computed.
    """
    ours(), theirs()
    pairs = [[seconds(function)[1] for function in (ours, theirs)] for _ in range(repeats)]
    return {
        "seconds_ours": statistics.median(mine for mine, _ in pairs),
        "seconds_theirs": statistics.median(other for _, other in pairs),
        "times_faster": spread([other / mine for mine, other in pairs]),
        "clock": "processor",
        "repeats": repeats,
    }
