"""Figures → files: one look for all pictures, as SVG that follows the reader's light or dark setting, and as PNG.

Drawn with matplotlib's figure objects alone: no window system, no state that others share.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from fastoss.run import cache_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by all eyes (four of Okabe and Ito, and a brown), and with a contrast of at least 3 on both papers.
BLUE, ORANGE, GREEN, PINK, BROWN = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a6761d"
INK, FAINT, PAPER = "#1f2328", "#d0d7de", "#ffffff"
DARK = {INK: "#e6edf3", FAINT: "#3d444d", PAPER: "#0d1117"}  # what these become for a reader in the dark
_POINTS = 400  # of a longer series, blocks of steps are drawn as their mean and their range


@dataclass(frozen=True)
class Series:
    """A line of a panel: `(step, value)` in order; `dots` marks each value of a dashed line, for few ones (held-out)."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot over the steps: lines, and its range where that is known beforehand."""

    title: str
    series: Sequence[Series]
    limits: tuple[float, float] | None = None
    zero: bool = False  # a line at 0
    log: bool = False  # a logarithmic axis, where the values are far apart


@dataclass(frozen=True)
class Mark:
    """Something that happened between two steps: a line through every panel."""

    step: float
    colour: str


@contextmanager
def drawn(title: str, panels: Sequence[Panel], marks: Sequence[Mark] = (), *, columns: int = 2) -> Iterator[Figure]:
    """Draw panels in rows of `columns`, all over the same steps. The figure is to be saved within the block, where our style holds."""
    with _style():
        from matplotlib.figure import Figure

        rows = max(1, math.ceil(len(panels) / columns))
        figure = Figure(figsize=(4.6 * columns, 0.55 + 2.6 * rows), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        ends = [point[0] for panel in panels for series in panel.series for point in series.points]
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, number + 1)
            _draw(axes, panel, marks)
            axes.set_xlim(_roomy(min(ends), max(ends)))
            if number >= len(panels) - columns:
                axes.set_xlabel("step")
        yield figure


def _draw(axes: Axes, panel: Panel, marks: Sequence[Mark]) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter

    for mark in marks:
        axes.axvline(mark.step, color=mark.colour, linewidth=1, linestyle=(0, (2, 2)))
    if panel.zero:
        axes.axhline(0, color=FAINT, linewidth=1.2)
    for series in panel.series:
        _line(axes, series)
    values = [value for series in panel.series for _, value in series.points]
    if panel.limits:
        axes.set_ylim(*panel.limits)
    elif panel.log and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    elif max(values) == min(values):
        axes.set_ylim(values[0] - (abs(values[0]) or 1) * 0.1, values[0] + (abs(values[0]) or 1) * 0.1)
    axes.set_title(panel.title, loc="left", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.5g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.08)
    if len(panel.series) > 1:
        axes.legend(loc="best", frameon=False, fontsize=8, labelcolor=INK)


def _line(axes: Axes, series: Series) -> None:
    points = series.points
    size = math.ceil(len(points) / _POINTS)
    if size > 1:
        blocks = [points[start : start + size] for start in range(0, len(points), size)]
        middle = [sum(step for step, _ in block) / len(block) for block in blocks]
        values = [[value for _, value in block] for block in blocks]
        axes.fill_between(middle, list(map(min, values)), list(map(max, values)), color=series.colour, alpha=0.25, linewidth=0)
        points = [(step, sum(block) / len(block)) for step, block in zip(middle, values, strict=True)]
    looks: dict[str, Any] = {"color": series.colour, "label": series.label, "linewidth": 1.6}
    if series.dots:
        looks |= {"linestyle": (0, (4, 2)), "linewidth": 1.2}
    if series.dots or len(points) == 1:
        looks |= {"marker": "o", "markersize": 3.5}
    axes.plot([step for step, _ in points], [value for _, value in points], **looks)


def _roomy(low: float, high: float) -> tuple[float, float]:
    room = 0.02 * (high - low) or 0.5
    return low - room, high + room


@contextmanager
def _style() -> Iterator[None]:
    _keep_font_cache_with_ours()
    import matplotlib

    ours = {
        "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
        "ytick.color": INK, "axes.edgecolor": FAINT, "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.6, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.labelsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8,
        "lines.solid_joinstyle": "round", "font.family": ["DejaVu Sans", "sans-serif"], "text.parse_math": False,
        "svg.fonttype": "none",  # text stays text: it can be read aloud and searched, and needs no outlines
    }  # fmt: skip
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing")  # of a PNG, where a run's name is Chinese; in an SVG the reader's fonts have it
        matplotlib.rcdefaults()  # a person's own matplotlibrc is for their plots
        matplotlib.rcParams.update(ours)
        yield


def _keep_font_cache_with_ours() -> None:
    # matplotlib writes its list of fonts into the home directory, or, where that cannot be written, warns at each start.
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))


def to_png(figure: Figure, dots_per_inch: int = 144) -> bytes:
    """The figure on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch)
    return buffer.getvalue()


def to_svg(figure: Figure, title: str) -> str:
    """The figure as one `<svg>` that fetches nothing, runs nothing, and turns dark where the reader's system is.

    It may stand in a file, in an `<img>` or within a page; `title` is what a screen reader says.
    """
    import matplotlib

    buffer = io.StringIO()
    # Ids depend on the title and the content: equal runs give equal files, pictures of one page do not borrow each other's parts.
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawing = buffer.getvalue()
    start = drawing.index("<svg")
    end = drawing.index(">", start) + 1
    # matplotlib's own style is `* {stroke-linejoin: round; …}`, which would reach the page around the picture.
    opening = drawing[start : end - 1] + ' role="img" stroke-linejoin="round">'
    rest = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", drawing[end:], count=1, flags=re.DOTALL)
    return f"{opening}\n <title>{escape(title)}</title>\n{_dark_style()}{rest}"


def _dark_style() -> str:
    """Colours stand in `style` attributes: a reader's program that knows no such rule shows the light picture."""
    rules = [
        f'svg [style*="{what}: {light}"] {{ {what}: {dark} !important }}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    ]  # fmt: skip
    return f" <style>@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>\n"
