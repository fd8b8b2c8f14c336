"""A panel of curves → inline SVG for the report page: coloured by the page's style, readable at phone width, no script and no library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fastoss.report.drawing import BLUE, BROWN, GREEN, INK, ORANGE, PINK, Mark, Panel, Series
from fastoss.report.html import Html, tag

COLOURS = {BLUE: "blue", ORANGE: "orange", GREEN: "green", PINK: "pink", BROWN: "brown", INK: "ink"}  # classes of the page's style
_WIDTH, _HEIGHT = 380, 214
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 24
_POINTS = 300  # of a longer line, blocks of steps are drawn as their mean, over a band of their range
_STRIPS = 60  # places over which a pointer may rest to read values


def figure(panel: Panel, marks: Sequence[Mark] = (), extent: tuple[float, float] | None = None) -> Html:
    """A `<figure>`: heading, picture, and what its colours mean where there are several. `extent` are the steps that all panels share."""
    keys = [
        tag("li", tag("svg", tag("path", d="M1 6h16", class_=f"line {COLOURS[line.colour]}{' dashed' if line.dots else ''}"),
                      viewBox="0 0 18 12", aria_hidden="true"), line.label)
        for line in panel.series
    ]  # fmt: skip
    last = panel.series[0].points[-1][1]
    head = tag("figcaption", tag("span", panel.title), tag("span", _short(last), class_="number muted", title="the last value of the first line"))
    return tag("figure", head, picture(panel, marks, extent), tag("ul", *keys, class_="keys") if len(keys) > 1 else None, class_="plot")


def picture(panel: Panel, marks: Sequence[Mark] = (), extent: tuple[float, float] | None = None) -> Html:
    """The `<svg>` alone. Every series has at least one point."""
    values = [value for line in panel.series for _, value in line.points]
    steps = [step for line in panel.series for step, _ in line.points]
    low, high = extent or (min(steps), max(steps))
    log = panel.log and min(values) > 0 and max(values) > 30 * min(values)
    bottom, top = panel.limits or _range(values, zero=panel.zero, log=log)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((step - low) / (high - low) if high > low else 0.5)

    def y(value: float) -> float:
        if log:
            value, ends = math.log10(value), (math.log10(bottom), math.log10(top))
        else:
            ends = (bottom, top)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - ends[0]) / (ends[1] - ends[0])

    parts: list[Html] = []
    for value in decades(bottom, top) if log else ticks(bottom, top, 4):
        place = round(y(value), 1)
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=place, y2=place, class_="zero" if value == 0 and panel.zero else "grid"))
        parts.append(tag("text", _short(value), x=_LEFT - 6, y=place + 3.5, text_anchor="end"))
    for step in (step for step in ticks(low, high, 5) if step == int(step)):
        parts.append(tag("text", f"{step:,.0f}", x=round(x(step), 1), y=_HEIGHT - 7, text_anchor="middle"))
    for mark in marks:
        if low <= mark.step <= high:
            place = round(x(mark.step), 1)
            parts.append(tag("line", x1=place, x2=place, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_=f"mark {COLOURS.get(mark.colour, 'ink')}"))
    for line in panel.series:
        parts += _line(line, x, y)
    parts += _strips(panel, x, low, high)
    return tag("svg", tag("title", _told(panel)), *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", class_="curves")


def _line(line: Series, x: object, y: object) -> Iterator[Html]:
    assert callable(x)
    assert callable(y)
    colour, points = COLOURS[line.colour], line.points
    size = math.ceil(len(points) / _POINTS)
    if size > 1:
        blocks = [points[start : start + size] for start in range(0, len(points), size)]
        middle = [sum(step for step, _ in block) / len(block) for block in blocks]
        edges = [(step, max(v for _, v in block)) for step, block in zip(middle, blocks, strict=True)]
        edges += reversed([(step, min(v for _, v in block)) for step, block in zip(middle, blocks, strict=True)])
        yield tag("path", d=_path([(x(step), y(value)) for step, value in edges]) + "Z", class_=f"band {colour}")
        points = [(step, sum(v for _, v in block) / len(block)) for step, block in zip(middle, blocks, strict=True)]
    if len(points) > 1:
        yield tag("path", d=_path([(x(step), y(value)) for step, value in points]), class_=f"line {colour}{' dashed' if line.dots else ''}")
    if len(points) == 1 or (line.dots and len(points) <= 40):
        for step, value in points:
            yield tag("circle", r=3, cx=round(x(step), 1), cy=round(y(value), 1), class_=f"dot {colour}")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _strips(panel: Panel, x: object, low: float, high: float) -> Iterator[Html]:
    """Unseen strips whose titles a browser shows where the pointer rests: the values there, without a script."""
    assert callable(x)
    found: dict[int, dict[str, tuple[float, float]]] = {}
    for line in panel.series:
        for step, value in line.points:
            place = min(_STRIPS - 1, int(_STRIPS * (step - low) / (high - low))) if high > low else 0
            found.setdefault(place, {})[line.label] = (step, value)
    width = (_WIDTH - _LEFT - _RIGHT) / _STRIPS
    for place, lines in sorted(found.items()):
        step = max(step for step, _ in lines.values())
        told = "\n".join([f"step {step:,.0f}", *(f"{label}: {_short(value)}" for label, (_, value) in lines.items())])
        yield tag(
            "rect",
            tag("title", told),
            x=round(_LEFT + place * width, 1),
            y=_TOP,
            width=round(width, 1),
            height=_HEIGHT - _TOP - _BOTTOM,
            class_="strip",
        )


def _told(panel: Panel) -> str:
    """What a screen reader says."""
    ends = (f"{line.label} {_short(line.points[0][1])} to {_short(line.points[-1][1])}" for line in panel.series)
    return f"{panel.title}, over the steps: {'; '.join(ends)}"


def _range(values: Sequence[float], *, zero: bool, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        room = (abs(low) or 1) * 0.1
        return low - room, high + room
    room = 0.06 * (high - low)
    # A quantity that is never negative gets no axis below zero.
    return (0.0 if low >= 0 and low - room < 0 else low - room), high + room


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values between two ends: 1, 2, 2.5 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten between two ends, with 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def _short(value: float) -> str:
    """A figure of at most five characters or so: 0.00012 → 1.2e-4, 12,345 → 12.3k."""
    size = abs(value)
    if size >= 1e9:
        return f"{value / 1e9:.3g}G"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}" if size < 1000 else f"{value:,.0f}"
