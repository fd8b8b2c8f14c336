"""metrics.jsonl → curves.svg: loss, learning rate, gradient and speed of a run over its steps; of DPO also what its answers did."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from typing import Any

from fastoss.errors import FastossError
from fastoss.report.drawing import BLUE, BROWN, GREEN, INK, ORANGE, PINK, Mark, Panel, Series, drawn, to_png, to_svg
from fastoss.run import RunDirectory, read_json, read_lines, write_whole

Entry = dict[str, Any]  # a line of metrics.jsonl
_CHANNELS = (("analysis", "loss_analysis", GREEN), ("commentary", "loss_commentary", BROWN), ("final", "loss_final", PINK))
_ONE = "train"  # a panel of one metric: the line is called train, and the dotted one held-out


def write_curves(run: RunDirectory, *, png: bool = False) -> Path:
    """Draw what `metrics.jsonl` holds so far into `curves.svg` of the run directory, whole or not at all; with `png` into `curves.png` as well."""
    entries = read_metrics(run)
    resumed = resumed_after(run, entries)
    marks = [Mark(step + 0.5, INK) for step in resumed] + [Mark(entry["step"], ORANGE) for entry in entries if "failed" in entry]
    with drawn(heading(run, entries), panels_of(entries, resumed), marks, columns=3) as figure:
        picture = to_svg(figure, f"Curves of the run {run.root.name}")
        if png:
            write_whole(run.curves_png, to_png(figure))
    write_whole(run.curves, picture)
    return run.curves


def read_metrics(run: RunDirectory) -> list[Entry]:
    """The lines of `metrics.jsonl` in order: steps, evaluations, and what ended a run. A line that a kill tore is passed over."""
    entries = []
    if run.metrics.is_file():
        for line in read_lines(run.metrics):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and "step" in entry:
                entries.append(entry)
    return entries


def panels_of(entries: Sequence[Entry], resumed: Sequence[int] = ()) -> list[Panel]:
    """The plots that these metrics make; a metric that was never written makes none. `resumed` are steps after which the run was started again."""
    preferences = any("rewards/margins" in entry or "eval_rewards/margins" in entry for entry in entries)
    trained_channels = [channel for channel in _CHANNELS if any(channel[1] in entry for entry in entries)]
    sides = (("chosen", "{}/chosen", BLUE), ("rejected", "{}/rejected", ORANGE))
    panels = [_panel(entries, "loss", (_ONE, "loss", BLUE))]
    if preferences:
        panels += [
            _panel(entries, "rewards (nats × beta)", *((label, key.format("rewards"), colour) for label, key, colour in sides), zero=True),
            _panel(entries, "margin: reward of chosen − of rejected", (_ONE, "rewards/margins", BLUE), zero=True),
            _panel(entries, "accuracy: share of pairs with a margin above 0", (_ONE, "rewards/accuracies", BLUE), limits=(-0.03, 1.03)),
            _panel(entries, "log-probability of an answer (nats)", *((label, key.format("logps"), colour) for label, key, colour in sides)),
            _panel(entries, "KL proxy: mean log-ratio to the reference (nats)", (_ONE, "kl_proxy", BLUE), zero=True),
            _panel(entries, "SFT term (nats a token)", (_ONE, "sft", BLUE)),
        ]
    else:
        if len(trained_channels) > 1:
            panels.append(_panel(entries, "loss by channel", *trained_channels))
        panels.append(_panel(entries, "token accuracy", (_ONE, "mean_token_accuracy", BLUE)))
    panels += [
        _panel(entries, "learning rate", (_ONE, "learning_rate", BLUE)),
        _panel(entries, "gradient norm", (_ONE, "grad_norm", BLUE), log=True),
    ]
    measured = speeds(entries, resumed)
    if measured:
        panels.append(Panel("tokens a second", [Series(_ONE, measured, BLUE)], limits=(0, 1.1 * max(speed for _, speed in measured))))
    memory = [Series(label, _gib(entries, key), colour) for label, key, colour in (("in use", "memory", BLUE), ("peak", "memory_peak", ORANGE))]
    panels.append(Panel("memory (GiB)", [line for line in memory if line.points], zero=True))
    panels.append(_panel(entries, "fill: share of a batch that is tokens", (_ONE, "fill", BLUE), limits=(0, 1.05)))
    return [panel for panel in panels if panel.series]


def _panel(entries: Sequence[Entry], title: str, *lines: tuple[str, str, str], **looks: Any) -> Panel:
    """A panel of some metrics, `(label, key, colour)`, each as trained and as held out, where there are such values."""
    series = []
    for label, key, colour in lines:
        series.append(Series(label, _points(entries, key), colour))
        held_out = ("held-out", ORANGE) if label == _ONE else (f"{label}, held-out", colour)
        series.append(Series(held_out[0], _points(entries, f"eval_{key}"), held_out[1], dots=True))
    return Panel(title, [line for line in series if line.points], **looks)


def _points(entries: Sequence[Entry], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), int | float)]


def _gib(entries: Sequence[Entry], key: str) -> list[tuple[float, float]]:
    return [(step, value / 2**30) for step, value in _points(entries, key)]


def speeds(entries: Sequence[Entry], resumed: Sequence[int] = ()) -> list[tuple[float, float]]:
    """Tokens a second of each step but the first after a start.

    Of records from before a step's own speed was kept, the pause for an evaluation or a checkpoint counts with the step after it.
    """
    steps = [entry for entry in entries if "seconds" in entry]
    if any("tokens_per_second" in entry for entry in steps):
        kept = [entry for earlier, entry in pairwise(steps) if earlier["step"] not in resumed]
        return [(entry["step"], entry["tokens_per_second"]) for entry in kept if "tokens_per_second" in entry]
    return [
        (later["step"], (later["num_tokens"] - earlier["num_tokens"]) / (later["seconds"] - earlier["seconds"]))
        for earlier, later in pairwise(steps)
        if earlier["step"] not in resumed and later["seconds"] > earlier["seconds"]  # the clock counts from each start
    ]


def resumed_after(run: RunDirectory, entries: Sequence[Entry]) -> list[int]:
    """Steps whose checkpoint the run resumed from, and has gone beyond."""
    told = _manifest(run).get("resumed_after_step", [])
    last = max((entry["step"] for entry in entries), default=0)
    # Where a later start had to go back further, the steps were made again, in one go.
    return sorted({step for number, step in enumerate(told) if step < last and all(step <= later for later in told[number + 1 :])})


def heading(run: RunDirectory, entries: Sequence[Entry]) -> str:
    """The run's name, how far it went, how often it was started, and what became of it."""
    steps = [entry["step"] for entry in entries if "loss" in entry]
    told = [run.root.name, f"{steps[-1]:,} step{'s' * (steps[-1] > 1)}" if steps else "no step yet"]
    starts = len(_manifest(run).get("started", []))
    resumed = ", ".join(f"{step:,}" for step in resumed_after(run, entries))
    if starts > 1:
        told.append(f"started {starts} times" + (f" (dashed: after step {resumed})" if resumed else ""))
    told += [f"failed at step {entry['step']:,}: {shorten(str(entry['failed']), 60)}" for entry in entries if "failed" in entry]
    return " · ".join(told)


def _manifest(run: RunDirectory) -> dict[str, Any]:
    """What it says of the run's starts; damaged or missing, it says nothing."""
    try:
        found = read_json(run.manifest)
    except FastossError:
        return {}
    return found if isinstance(found, dict) else {}
