"""Facts of a run → the report page: what happened in words first, then what it answers, the curves, the data, and how to do it again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import fastoss
from fastoss.inference.evaluation_table import table_notes, table_rows
from fastoss.report.curves import panels_of
from fastoss.report.drawing import INK, ORANGE, Mark
from fastoss.report.examples import masks_part, recipe_text, samples_part, section, words
from fastoss.report.facts import Facts
from fastoss.report.feed import data_part
from fastoss.report.html import Html, join, page, tag
from fastoss.report.plot import figure
from fastoss.report.story import interruptions, model_name, sentences
from fastoss.terminal import disk_size, duration, size

_BADGES = {"finished": "good", "failed": "bad", "killed": "bad", "stopped": "warn", "unfinished": "warn", "training": "warn"}


def report_page(facts: Facts) -> str:
    """The page as one file."""
    sections = [
        samples_part(facts), _evaluation_part(facts), _curves_part(facts), data_part(facts), masks_part(facts), _plan_part(facts),
        _course_part(facts), _environment_part(facts), _repeat_part(facts),
    ]  # fmt: skip
    body = join(_head(facts), _story(facts), _tiles(facts), *sections, footer())
    return page(f"{facts.name} · fastoss report", body)


def footer() -> Html:
    stamp = time.strftime("%Y-%m-%d %H:%M")
    return tag("footer", f"written by fastoss {fastoss.__version__} on {stamp} · this page loads nothing and runs nothing")


def _head(facts: Facts) -> Html:
    started = facts.starts[0][:16].replace("T", " ") if facts.starts else ""
    method = {"sft": "SFT", "dpo": "DPO"}[facts.method]
    meta = [model_name(facts), f"{method}, LoRA r {facts.recipe.get('lora', {}).get('r', '?')}", facts.manifest.get("gpu") or "CPU", started]
    badge = tag("span", facts.state, class_=f"badge {_BADGES[facts.state]}")
    return tag("header", tag("h1", facts.name, " ", badge), tag("p", *(tag("span", str(part)) for part in meta if part), class_="meta"))


def _story(facts: Facts) -> Html:
    return tag("div", *(tag("p", sentence) for sentence in sentences(facts)), class_="story")


def _tiles(facts: Facts) -> Html:
    return tag("div", *(tag("div", tag("b", value), tag("span", label), class_="tile") for value, label in _figures(facts)), class_="tiles")


def _figures(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.first_loss is not None and facts.last_loss is not None:
        yield f"{facts.first_loss:.3g} → {facts.last_loss:.3g}", "training loss"
    if facts.evaluations:
        losses = [entry["eval_loss"] for entry in facts.evaluations]
        yield (f"{losses[0]:.3g} → {losses[-1]:.3g}" if len(losses) > 1 else f"{losses[0]:.3g}"), "held-out loss"
        share = facts.evaluations[-1].get("eval_rewards/accuracies")
        if share is not None:
            yield f"{100 * share:.0f} %", "of held-out pairs: chosen preferred"
    if facts.steps:
        yield f"{facts.steps[-1]['step']:,}", "steps"
        yield f"{facts.tokens:,}", "tokens seen"
        yield duration(facts.seconds), "training time"
    if facts.speed:
        yield f"{facts.speed:,.0f}", "tokens a second (median)"
    if facts.memory_peak:
        yield size(facts.memory_peak), "peak memory" if facts.manifest.get("gpu") else "peak memory, libraries included"


def _evaluation_part(facts: Facts) -> Html | None:
    """What `fastoss evaluate` measured on held-out rows."""
    result = facts.evaluation
    if not result.get("measures"):
        return None
    heads, *rows = table_rows(result)
    table = tag("table", tag("tr", *(tag("th", head) for head in heads)), *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows))
    lead = tag("p", f"By fastoss evaluate: {result['rows']} of {result['of']} rows ({result['source']}).", class_="muted")
    return section("evaluation", "Held-out rows", lead, tag("div", table, class_="wide"), tag("p", " ".join(table_notes(result)), class_="small"))


def _curves_part(facts: Facts) -> Html | None:
    panels = panels_of(facts.entries, facts.resumed)
    if not panels:
        return None
    marks = [Mark(step + 0.5, INK) for step in facts.resumed] + [Mark(entry["step"], ORANGE) for entry in facts.entries if "failed" in entry]
    steps = [step for panel in panels for line in panel.series for step, _ in line.points]
    told = ["Over the steps; the figure at the right of a heading is the last value."]
    if facts.resumed:
        told.append(f"Dotted vertical lines: the run was started again after step {', '.join(f'{step:,}' for step in facts.resumed)}.")
    if any("failed" in entry for entry in facts.entries):
        told.append("The orange vertical line: the step that failed.")
    plots = tag("div", *(figure(panel, marks, (min(steps), max(steps))) for panel in panels), class_="plots")
    return section("curves", "How it learned", tag("p", " ".join(told), class_="muted"), plots)


def _plan_part(facts: Facts) -> Html | None:
    """What was planned before the model was loaded, beside what was measured."""
    plan = facts.plan
    if not plan:
        return None
    measured = plan.get("measured") or {}
    rows = [tag("tr", tag("th", ""), *(tag("th", name, class_="number") for name in ("planned", "measured", "difference")))]
    for key, label, show in (("peak_bytes", "peak memory", size), ("disk_bytes", "disk", disk_size), ("seconds", "time", duration)):
        expected, found = plan.get(key), measured.get(key)
        if expected is None and found is None:
            continue
        apart = f"{100 * (found / expected - 1):+.0f} %" if expected and found is not None else "–"
        cells = (show(expected) if expected is not None else "–", show(found) if found is not None else "–", apart)
        rows.append(tag("tr", tag("td", label), *(tag("td", cell, class_="number") for cell in cells)))
    parts = [(name, count) for name, count in plan.get("components", {}).items() if count]
    whole = max((count for _, count in parts), default=1)
    bars = [
        tag("tr", tag("td", name), tag("td", bar(count / whole), class_="share"), tag("td", size(count), class_="number")) for name, count in parts
    ]
    card = f" for {plan['card']}" if plan.get("card") else ""
    counted = "" if facts.manifest.get("gpu") else " Memory is what the run adds to a process that has its libraries imported."
    lead = tag("p", f"Computed{card} before the model was loaded.{counted}", class_="muted")
    return section(
        "plan", "The plan, and what was measured", lead, tag("div", tag("table", *rows), tag("table", *bars) if bars else None, class_="columns")
    )


def bar(share: float, class_: str = "blue") -> Html:
    """A bar that fills this share of its width."""
    return tag("svg", tag("rect", width=round(100 * share, 2), height=10, rx=2, class_=f"fill {class_}"), viewBox="0 0 100 10", class_="bar",
               preserveAspectRatio="none", aria_hidden="true")  # fmt: skip


def _course_part(facts: Facts) -> Html | None:
    """Starts and ends, and the warnings."""
    stops = interruptions(facts)
    rows = []
    for number, begun in enumerate(facts.starts, 1):
        end = facts.ends.get(number, {})
        how = str(end.get("how") or (stops[number - 1][0] if number <= len(stops) else facts.state))
        after = stops[number - 2][1] if number > 1 else None
        went = "from the beginning" if number == 1 else f"after step {after:,}" if after is not None else "from a checkpoint"
        rows.append(
            tag(
                "tr",
                *(tag("td", cell) for cell in (_time(begun), went, f"{how} {_time(str(end.get('at', '')))}".strip(), str(end.get("said") or ""))),
            )
        )
    for change in facts.manifest.get("changed", []):
        rows.append(tag("tr", tag("td", f"at step {change.get('at_step', '?')}"), tag("td", f"changed: {change.get('what')}", colspan=3)))
    notes = [tag("li", words(said, "span"), f" ({count} times)" if count > 1 else None) for said, count in facts.notes]
    notes += [tag("li", f"{name} is damaged and was left out of this page") for name in facts.damaged]
    head = tag("tr", *(tag("th", name) for name in ("started", "resumed", "ended", "last message")))
    table = tag("div", tag("table", head, *rows), class_="wide stack") if rows else None
    warned = join(tag("h3", "Warnings and notes"), tag("ul", *notes, class_="notes")) if notes else tag("p", "No warnings.", class_="muted")
    return section("course", "Starts and ends", table, warned)


def _time(stamp: str) -> str:
    return stamp[:16].replace("T", " ")


def _environment_part(facts: Facts) -> Html | None:
    manifest = facts.manifest
    if not manifest:
        return None
    plain = {
        "GPU": manifest.get("gpu") or "none (CPU)", "processes": manifest.get("world_size"), "backend": manifest.get("backend"),
        "precision": manifest.get("precision"), "batches": manifest.get("layout"), "seed": manifest.get("seed"), "Python": manifest.get("python"),
        "system": manifest.get("platform"), "commit": manifest.get("commit"), "run id": manifest.get("run_id"),
        "data fingerprint": manifest.get("data", {}).get("fingerprint"),
    }  # fmt: skip
    versions = {str(name): version for name, version in manifest.get("versions", {}).items() if version}
    return section("environment", "Where it ran", tag("div", table_of(plain), table_of(versions), class_="columns"))


def table_of(values: dict[str, Any]) -> Html:
    return tag("table", *(tag("tr", tag("th", name), tag("td", str(value), class_="mono")) for name, value in values.items() if value is not None))


def _repeat_part(facts: Facts) -> Html:
    command = facts.manifest.get("command")
    parts: list[Html | None] = []
    if command:
        again = "removes this run and starts over" if "--overwrite" in str(command) else "resumes where the run stopped"
        told = f"The same command in the same folder {again}; add --output DIR to repeat it elsewhere."
        parts += [tag("pre", str(command), class_="command"), tag("p", told, class_="muted")]
    given = facts.run.recipe.read_text(encoding="utf-8", errors="replace") if facts.run.recipe.is_file() else None
    if given is not None:
        parts.append(tag("details", tag("summary", "the recipe as it was written"), tag("pre", given)))
    parts.append(tag("details", tag("summary", "every setting, as it was resolved"), tag("pre", recipe_text(facts.recipe))))
    return section("repeat", "How to repeat it", *parts)
