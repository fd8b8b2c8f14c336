"""What a run was fed, for its report: counts, what was dropped and why, lengths, channels and writing systems."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from fastoss.report.examples import section
from fastoss.report.facts import Facts
from fastoss.report.html import Html, join, tag
from fastoss.report.plot import ticks

_DROPPED = 12  # rows listed


def data_part(facts: Facts) -> Html | None:
    """The section of the data; None where the run says nothing of it."""
    data, profile = facts.manifest.get("data"), facts.profile
    if not data:
        return None
    left = [_counts(facts, data)]
    if data.get("drops") or data.get("kept"):
        left.append(_verdicts(data))
    right = []
    if profile.get("histogram", {}).get("kept"):
        lengths = ", ".join(f"{name} {count:,}" for name, count in profile["lengths"].items())
        caption = tag("figcaption", tag("span", "tokens an example"), tag("span", lengths, class_="muted number"))
        right.append(tag("figure", caption, histogram(profile["histogram"], profile["max_length"]), class_="plot"))
    if profile.get("channels"):
        right.append(_channels(profile["channels"]))
    if profile.get("scripts"):
        right.append(_scripts(profile["scripts"]))
    listed = _dropped(profile) if profile.get("dropped") else None
    return section("data", "The data", tag("div", tag("div", *left), tag("div", *right), class_="columns"), listed)


def _counts(facts: Facts, data: dict[str, Any]) -> Html:
    sides = 2 if data.get("pairs") else 1
    made = "pairs" if data.get("pairs") else "examples (one a trained turn)"
    rows = {
        "read from": ", ".join(f"{source}{f' ({told[:19]})' if told else ''}" for source, told in data.get("sources", {}).items()) or None,
        "rows": f"{data['rows']:,}",
        f"training {made}": f"{data['train_examples'] // sides:,}",
        f"held out {made}": f"{data['eval_examples'] // sides:,}",
        "tokens for training": f"{data['train_tokens']:,}",
        "of these trained": f"{data['trained_tokens']:,} ({100 * data['trained_tokens'] / max(1, data['train_tokens']):.0f} %)",
        "longest example": f"{data['longest']:,} tokens",
        "dropped": f"{sum(tally['count'] for tally in data['drops'].values()):,}",
        "fill of the batches": f"{100 * facts.fill:.1f} %" if facts.fill is not None else None,
    }
    return tag("table", *(tag("tr", tag("th", name), tag("td", value, class_="value")) for name, value in rows.items() if value is not None))


def _verdicts(data: dict[str, Any]) -> Html:
    """Why rows were dropped, and what was noticed of rows that were kept."""
    items = []
    for kind, verb in (("drops", "dropped"), ("kept", "kept")):
        for reason, tally in data.get(kind, {}).items():
            places = ", ".join(tally["places"][:3]) + (", …" if tally["count"] > 3 else "")
            items.append(tag("li", tag("b", f"{tally['count']:,} {tally['unit']} {verb}"), f": {reason} ", tag("span", places, class_="mono muted")))
    return tag("ul", *items, class_="notes")


def _channels(channels: list[dict[str, Any]]) -> Html:
    whole = max(sum(channel["tokens"] for channel in channels), 1)
    bars, place = [], 0.0
    for channel in channels:
        for part, class_ in ((channel["trained"], "strong"), (channel["tokens"] - channel["trained"], "pale")):
            width = 100 * part / whole
            if part:
                told = f"{channel['name']}: {part:,} tokens{' trained' if class_ == 'strong' else ' of context'}"
                bars.append(
                    tag("rect", tag("title", told), x=round(place, 3), width=round(width, 3), height=10, class_=f"{class_} {channel['name']}")
                )
            place += width
    rows = []
    for channel in channels:
        square = tag("rect", width=10, height=10, rx=3)
        name = tag("td", tag("svg", square, viewBox="0 0 10 10", class_=f"swatch {channel['name']}", aria_hidden="true"), channel["name"])
        counts = (tag("td", f"{channel[key]:,}", class_="number") for key in ("tokens", "trained"))
        rows.append(tag("tr", name, *counts))
    head = tag("tr", tag("th", "tokens by channel"), tag("th", "in all", class_="number"), tag("th", "trained", class_="number"))
    picture = tag("svg", *bars, viewBox="0 0 100 10", class_="bar tall", preserveAspectRatio="none", aria_hidden="true")
    return join(picture, tag("table", head, *rows))


def _scripts(scripts: dict[str, int]) -> Html:
    whole = sum(scripts.values())
    shown = [f"{name} {100 * count / whole:.3g} %" for name, count in list(scripts.items())[:6] if count >= 0.001 * whole]
    return tag("p", "Letters of the answers: ", tag("span", ", ".join(shown)), class_="small")


def histogram(bins: dict[str, list[int]], max_length: int) -> Html:
    """How many examples are how long: kept ones, and those dropped for their length beyond the limit."""
    width, height, left, top, bottom = 380, 190, 46, 10, 24
    edges, kept, dropped = bins["edges"], bins["kept"], bins["dropped"]
    most, end = max(map(sum, zip(kept, dropped, strict=True))), edges[-1]

    def x(value: float) -> float:
        return round(left + (width - left - 10) * (value - edges[0]) / (end - edges[0]), 2)

    def y(count: float) -> float:
        return round(height - bottom - (height - top - bottom) * count / most, 2)

    parts = []
    for count in (count for count in ticks(0, most, 3) if count == int(count)):
        parts += [
            tag("line", x1=left, x2=width - 10, y1=y(count), y2=y(count), class_="grid"),
            tag("text", f"{count:,.0f}", x=left - 6, y=y(count) + 3.5, text_anchor="end"),
        ]
    parts += [tag("text", f"{value:,.0f}", x=x(value), y=height - 7, text_anchor="middle") for value in ticks(edges[0], end, 5)]
    for number, (low, high) in enumerate(pairwise(edges)):
        for base, count, class_ in ((0, kept[number], "blue"), (kept[number], dropped[number], "orange")):
            if count:
                told = f"{low + 1:,} to {high:,} tokens: {count:,}{' dropped' if class_ == 'orange' else ''}"
                parts.append(tag("rect", tag("title", told), x=x(low) + 0.4, width=max(0.6, round(x(high) - x(low) - 0.8, 2)), y=y(base + count),
                                 height=round(y(base) - y(base + count), 2), class_=f"fill {class_}"))  # fmt: skip
    if max_length <= end:
        parts.append(tag("line", x1=x(max_length), x2=x(max_length), y1=top, y2=height - bottom, class_="mark orange"))
    title = f"Tokens of {sum(kept):,} examples" + (f"; {sum(dropped):,} were too long" if sum(dropped) else "")
    return tag("svg", tag("title", title), *parts, viewBox=f"0 0 {width} {height}", role="img", class_="curves")


def _dropped(profile: dict[str, Any]) -> Html:
    shown = profile["dropped"][:_DROPPED]
    rows = [
        tag("tr", tag("td", entry["place"], class_="mono"), tag("td", entry["reason"]), tag("td", entry["excerpt"][:200], class_="muted", dir="auto"))
        for entry in shown
    ]
    head = tag("tr", tag("th", "where"), tag("th", "why"), tag("th", "how it begins"))
    count = profile["dropped_total"]
    title = f"{count:,} dropped" + (f", the first {len(shown)}" if count > len(shown) else "")
    return tag("details", tag("summary", title), tag("div", tag("table", head, *rows), class_="wide stack"))
