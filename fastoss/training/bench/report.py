"""The results of `fastoss bench` as a table, a JSON and a picture. Nothing here measures; every figure comes from `results/`."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from fastoss.run import write_json, write_whole

Result = dict[str, Any]  # one run, as it lies in `results/`


def write_report(output: Path, facts: dict[str, Any], results: Sequence[Result]) -> None:
    """Write `bench.json`, `bench.md` and `bench.svg` from the runs there are, finished or not."""
    if results:
        summary = summarise(facts, results)
        write_json(output / "bench.json", summary)
        write_whole(output / "bench.md", "\n".join(table_lines(summary)) + "\n")
        write_whole(output / "bench.svg", picture(summary))


def summarise(facts: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Medians and spreads over repeats; ratios are taken within a repeat, whose runs were next to each other in time."""
    warm_up = facts["warm_up"]
    by_name: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: (r["kind"] != "fastoss", r["processes"], r["repeat"])):
        by_name.setdefault(result["contestant"], []).append(result)
    reference = next(iter(by_name.values()))  # ours on the fewest processes, where that has run
    work = sum(reference[0]["trained_tokens"][warm_up:])
    contestants = [_contestant(runs, reference, work, warm_up) for runs in by_name.values()]
    cards = sorted({str(result["gpu"]) for result in results})
    notes = [] if len(cards) == 1 else [f"the runs are of different machines: {', '.join(cards)}"]
    notes += _loss_notes([runs[0] for runs in by_name.values()])
    first = results[0]
    machine = {"gpu": first["gpu"], "python": first["python"], "versions": first["inputs"]["versions"]}
    return {**facts, "machine": machine, "trained_tokens_counted": work, "contestants": contestants, "notes": notes}


def _contestant(runs: list[Result], reference: list[Result], work: int, warm_up: int) -> dict[str, Any]:
    first = runs[0]
    counted = [seconds for run in runs for seconds in run["step_seconds"][warm_up:]]
    speeds = [rate(run, "trained_tokens", warm_up) for run in runs]
    beside = {run["repeat"]: rate(run, "trained_tokens", warm_up) for run in reference}
    ratios = [speed / beside[run["repeat"]] for run, speed in zip(runs, speeds, strict=True) if run["repeat"] in beside]
    row: dict[str, Any] = {
        "contestant": first["contestant"],
        "kind": first["kind"],
        "processes": first["processes"],
        **{key: first[key] for key in ("backend", "precision", "layout")},
        "runs": len(runs),
        "trained_tokens_per_second": _spread(speeds),
        "tokens_per_second": _spread([rate(run, "tokens", warm_up) for run in runs]),
        "seconds_for_the_same_trained_tokens": _spread([work / speed for speed in speeds]),
        "step_seconds": {"p50": percentile(counted, 0.5), "p95": percentile(counted, 0.95)},
        "peak_memory": {key: max(run["peak_memory"][key] for run in runs) for key in first["peak_memory"]} if first["peak_memory"] else None,
        "documents_per_step": sum(first["documents"]) / len(first["documents"]),
        "fill": sum(first["tokens"]) / sum(first["slots"]),
        "speed_up": None,
        "efficiency": None,
        "communication_share_estimate": None,
        "fastoss_is_times_faster": None,
        "losses": first["losses"],
        "trained_tokens": first["trained_tokens"],
    }
    if first["kind"] == "fastoss" and ratios:
        share = first["processes"] / reference[0]["processes"]
        row["speed_up"] = _spread(ratios)
        row["efficiency"] = _spread([ratio / share for ratio in ratios])
        # Ideal is the fewest processes' step divided by how many times more there are. All that is lost beside it is in here: sending
        # gradients, waiting for the slower rank, sharing memory and power.
        row["communication_share_estimate"] = max(0.0, 1 - row["efficiency"]["median"]) if runs is not reference else None
    elif ratios and first["processes"] == reference[0]["processes"]:
        row["fastoss_is_times_faster"] = _spread([1 / ratio for ratio in ratios])
    return row


def _loss_notes(firsts: list[Result]) -> list[str]:
    """How far the contestants' losses are apart: they train on the same documents in each step."""
    notes = []
    for other in firsts[1:]:
        apart = max(abs(a - b) / abs(b) for a, b in zip(other["losses"], firsts[0]["losses"], strict=True))
        notes.append(f"the losses of {other['contestant']} and {firsts[0]['contestant']} are at most {apart:.1e} apart (relative), step by step")
    return notes


def rate(result: Result, what: str, warm_up: int) -> float:
    """`tokens` or `trained_tokens` a second over the steps that count."""
    return float(sum(result[what][warm_up:]) / sum(result["step_seconds"][warm_up:]))


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


# --- the table --------------------------------------------------------------------------------------------------------


def table_lines(summary: dict[str, Any]) -> list[str]:
    """Markdown: a row a contestant, the median and in brackets the spread over repeats."""
    machine = summary["machine"]
    versions = machine["versions"]
    where = machine["gpu"] or "CPU: good as ratios only"
    runs = min(row["runs"] for row in summary["contestants"])
    lines = [
        f"# {summary['recipe']}",
        "",
        f"{where}. fastoss {versions['fastoss']}, torch {versions['torch']}, transformers {versions['transformers']}.",
        f"{summary['steps']} steps a run, the first {summary['warm_up']} not counted; {runs} of {summary['repeats']} repeats; "
        "median (lowest to highest).",
        "",
    ]
    work = f"{summary['trained_tokens_counted']:,}"
    lines += [
        f"| | processes | time for {work} trained tokens | speed-up | efficiency | lost beside the ideal ¹ | trained tok/s | tok/s ² "
        "| step p50 / p95 | peak memory | fill |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_table_row(row) for row in summary["contestants"]]
    lines += [
        "",
        "¹ estimated as 1 - ideal / actual step time: communication, and waiting for the slower process.  ² without padding, a shared history once.",
        "",
    ]
    for row in summary["contestants"]:
        if row["fastoss_is_times_faster"]:
            ours, processes = row["fastoss_is_times_faster"], row["processes"]
            on = f"{processes} process{'es' * (processes > 1)}"
            lines.append(f"- fastoss trains as many tokens {_with_spread(ours, lambda v: f'{v:.2f}')} times as fast as {row['kind']} on {on}.")
    lines += [f"- {note}." for note in summary["notes"]]
    return [*lines, "", "![tokens a second, and losses](bench.svg)"]


def _table_row(row: dict[str, Any]) -> str:
    share = row["communication_share_estimate"]
    p50, p95 = row["step_seconds"]["p50"], row["step_seconds"]["p95"]
    cells = [
        row["kind"],
        str(row["processes"]),
        _with_spread(row["seconds_for_the_same_trained_tokens"], _seconds),
        _with_spread(row["speed_up"], lambda v: f"{v:.2f}×"),
        _with_spread(row["efficiency"], lambda v: f"{v:.2f}"),
        "–" if share is None else f"{100 * share:.0f} %",
        _with_spread(row["trained_tokens_per_second"], lambda v: f"{v:,.0f}"),
        f"{row['tokens_per_second']['median']:,.0f}",
        f"{_seconds(p50)} / {_seconds(p95)}",
        ", ".join(f"{value:.1f} GB {key.removesuffix('_gb')}" for key, value in (row["peak_memory"] or {}).items()) or "–",
        f"{row['fill']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _with_spread(values: dict[str, float] | None, show: Callable[[float], str]) -> str:
    if values is None:
        return "–"
    middle, low, high = (show(values[key]) for key in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


# --- the picture ------------------------------------------------------------------------------------------------------

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # told apart by all eyes (Okabe and Ito)
_LEFT, _RIGHT, _TOP, _BOTTOM = (70, 390), (510, 890), 50, 300  # the two panels, in pixels


def picture(summary: dict[str, Any]) -> str:
    """An SVG of 960 × 360: bars of trained tokens a second with their spread, and each contestant's loss over the tokens trained."""
    rows = summary["contestants"]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 360" font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f"<title>{escape(str(summary['recipe']))}: trained tokens a second, and losses</title>",
        '<rect width="960" height="360" fill="white"/>',
        _text(_LEFT[0], 24, "trained tokens a second (bar: median, line: lowest to highest)"),
        _text(_RIGHT[0], 24, "loss over trained tokens"),
        *_bars(rows),
        *_curves(rows),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _bars(rows: list[dict[str, Any]]) -> list[str]:
    top = max(row["trained_tokens_per_second"]["max"] for row in rows)
    scale = _scale(0, top, _BOTTOM, _TOP)
    parts = _axis(_LEFT, scale, _ticks(0, top))
    room = (_LEFT[1] - _LEFT[0]) / len(rows)
    for number, row in enumerate(rows):
        speed, middle = row["trained_tokens_per_second"], _LEFT[0] + room * (number + 0.5)
        width, start = min(60, room * 0.6), scale(speed["median"])
        parts += [
            f'<path d="M{middle:.1f} {_BOTTOM}V{start:.1f}" stroke="{_colour(number)}" stroke-width="{width:.1f}"/>',
            f'<path d="M{middle:.1f} {scale(speed["min"]):.1f}V{scale(speed["max"]):.1f}" stroke="#222" stroke-width="1.5"/>',
            _text(middle, scale(speed["max"]) - 5, f"{speed['median']:,.0f}", "middle"),
            _text(middle, _BOTTOM + 18, row["kind"], "middle"),
            _text(middle, _BOTTOM + 34, f"{row['processes']} process{'es' * (row['processes'] > 1)}", "middle"),
        ]
    return parts


def _curves(rows: list[dict[str, Any]]) -> list[str]:
    losses = [loss for row in rows for loss in row["losses"]]
    most = max(sum(row["trained_tokens"]) for row in rows)
    low, high = min(losses), max(losses)
    across, up = _scale(0, most, *_RIGHT), _scale(low, high if high > low else low + 1, _BOTTOM, _TOP)
    parts = _axis(_RIGHT, up, _ticks(low, high))
    parts += [_text(across(tick), _BOTTOM + 18, f"{tick:,.0f}", "middle") for tick in _ticks(0, most)]
    for number, row in enumerate(rows):
        places = zip(itertools.accumulate(row["trained_tokens"]), row["losses"], strict=True)
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in places)
        # Curves that lie on each other stay visible: each is thinner than the one below it.
        width = max(1.5, 7 - 2.5 * number)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_colour(number)}" stroke-width="{width}"/>')
        parts.append(f'<rect x="{_RIGHT[1] - 120}" y="{_TOP + 18 * number}" width="12" height="12" fill="{_colour(number)}"/>')
        parts.append(_text(_RIGHT[1] - 102, _TOP + 18 * number + 11, row["contestant"]))
    return parts


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values between `low` and `high`."""
    raw = (high - low) / 4 or 1.0
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axis(across: tuple[int, int], up: Callable[[float], float], ticks: list[float]) -> list[str]:
    lines = [f'<path d="M{across[0]} {up(tick):.1f}H{across[1]}" stroke="#ddd"/>' for tick in ticks]
    return [*lines, *(_text(across[0] - 8, up(tick) + 4, f"{tick:,.6g}", "end") for tick in ticks)]


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
