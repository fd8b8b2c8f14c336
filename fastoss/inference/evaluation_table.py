"""An evaluation → a table for people, with a sentence for each measure that needs one."""

from __future__ import annotations

import unicodedata
from typing import Any

_HIDDEN = ("perplexity_analysis", "perplexity_commentary", "bleu")  # in the JSON; the table says the same in other words already


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """The table's cells, its heads first: a measure a row, both models with their 95 % intervals, and what is to be thought of the change."""
    sides = ["base", "tuned"] if result["compared"] else ["tuned"]
    rows = [["", *([result.get("before", "base"), "tuned", "change"] if result["compared"] else ["value"]), "rows"]]
    for name, entry in result["measures"].items():
        if name in _HIDDEN:
            continue
        cells = [entry["label"], *(_cell(entry.get(side), entry["unit"]) for side in sides)]
        if result["compared"]:
            cells.append(entry.get("verdict", ""))
        counts = {entry[side]["n"] for side in sides if entry.get(side)}
        rows.append([*cells, "/".join(map(str, sorted(counts)))])
    return rows


def table_notes(result: dict[str, Any]) -> list[str]:
    """How to read the table, in sentences."""
    notes = ["In brackets: where the value would lie in 95 of 100 such samples of rows."]
    if result.get("before") == "start":
        notes.append('"start" is the adapter that the run started from, and its reference.')
    if result["compared"]:
        notes.append('"better" and "worse" are said only where chance does not explain the change (paired bootstrap, and a sign test at 5 %).')
    if any(entry["unit"] == "nats" for entry in result["measures"].values()):
        notes.append("Loss is in nats per token: 0 is word for word as expected, each 0.69 less is twice as likely.")
    counted = [name for name in ("reasoning_language", "answer_language") if name in result["measures"]]
    if counted:
        notes.append("Languages are counted where a text is long enough to tell.")
    if result["rows"] < 30:
        notes.append(f"{result['rows']} rows are few: differences below about {200 / max(1, result['rows']) ** 0.5:.0f} points are hard to see.")
    return notes


def table_lines(result: dict[str, Any]) -> list[str]:
    """The table for a terminal, and how to read it."""
    rows = table_rows(result)
    widths = [max(_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{result['model']}: {result['rows']} of {result['of']} rows ({result['source']})", ""]
    lines += ["  ".join(_padded(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "", *table_notes(result)]


def _cell(value: dict[str, Any] | None, unit: str) -> str:
    if value is None:
        return "–"
    figures = [value[key] for key in ("mean", "low", "high")]
    if unit == "share":
        mean, low, high = (f"{100 * figure:.0f}" for figure in figures)
        return f"{mean} % ({low}–{high})"
    if unit == "ppl":
        mean, low, high = (f"{figure:,.1f}" if figure < 1e5 else f"{figure:.1e}" for figure in figures)
        return f"{mean} ({low}–{high})"
    digits = 2 if unit == "nats" else 0 if unit == "tokens" else 1
    mean, low, high = (f"{figure:,.{digits}f}" for figure in figures)
    return f"{mean} ({low}–{high})"


def _width(text: str) -> int:
    """Columns in a terminal: wide letters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))
