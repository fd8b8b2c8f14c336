"""Several runs → one page: in which keys their recipes differ, what each came to, their curves laid over each other, their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from fastoss.report.curves import Entry, speeds
from fastoss.report.drawing import BLUE, BROWN, GREEN, ORANGE, PINK, Panel, Series
from fastoss.report.examples import LONG, section, words
from fastoss.report.facts import Facts
from fastoss.report.html import Html, join, page, tag
from fastoss.report.page import footer
from fastoss.report.plot import figure
from fastoss.terminal import duration, size

_COLOURS = (BLUE, ORANGE, GREEN, PINK, BROWN)
_QUESTIONS = 8
_METRICS = (
    ("training loss", "loss"), ("held-out loss", "eval_loss"), ("token accuracy", "mean_token_accuracy"), ("margin", "rewards/margins"),
    ("held-out margin", "eval_rewards/margins"), ("share of pairs with a margin above 0", "rewards/accuracies"), ("KL proxy", "kl_proxy"),
    ("learning rate", "learning_rate"), ("gradient norm", "grad_norm"),
)  # fmt: skip


def comparison_page(runs: Sequence[Facts]) -> str:
    """The page as one file. Runs are told apart by name, or by folder where names are the same."""
    names = [facts.name for facts in runs]
    if len(set(names)) < len(names):
        names = [str(facts.run.root) for facts in runs]
    head = tag("header", tag("h1", f"{len(runs)} runs compared"), tag("p", *(tag("span", name) for name in names), class_="meta"))
    story = tag("div", *(tag("p", sentence) for sentence in _sentences(runs, names)), class_="story")
    sections = [_differences_part(runs, names), _ends_part(runs, names), _curves_part(runs, names), _answers_part(runs, names)]
    return page(f"{', '.join(names)} · fastoss comparison", join(head, story, *sections, footer()))


def _sentences(runs: Sequence[Facts], names: Sequence[str]) -> list[str]:
    told = []
    keys = [key for key, _ in differences(runs)]
    told.append(
        f"The recipes differ in {', '.join(keys[:6])}{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}."
        if keys
        else "The recipes are the same."
    )
    if len({facts.manifest.get("data", {}).get("fingerprint") for facts in runs}) > 1:
        told.append("Their data is not the same, so their losses cannot be compared directly.")
    elif all(facts.evaluations for facts in runs) and len({facts.method for facts in runs}) == 1:
        best = min(range(len(runs)), key=lambda number: runs[number].evaluations[-1]["eval_loss"])
        told.append(f"On the same held-out rows “{names[best]}” ends lowest, with a loss of {runs[best].evaluations[-1]['eval_loss']:.4g}.")
    return told


def differences(runs: Sequence[Facts]) -> list[tuple[str, list[Any]]]:
    """Keys of the resolved recipes that are not the same in all runs, with each run's value; names and folders of runs aside."""
    flat = [_flat(facts.recipe) for facts in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    return [(key, [one.get(key) for one in flat]) for key in keys if key != "name" and any(one.get(key) != flat[0].get(key) for one in flat)]


def _flat(values: Any, above: str = "") -> dict[str, Any]:
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        values = {str(number): value for number, value in enumerate(values, 1)} if len(values) > 1 else values[0]
    if not isinstance(values, dict) or not values:
        return {above: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{above}.{key}" if above else str(key))
    return found


def _differences_part(runs: Sequence[Facts], names: Sequence[str]) -> Html:
    found = differences(runs)
    rows = [tag("tr", tag("th", key, class_="mono"), *(tag("td", _value(value), class_="mono") for value in values)) for key, values in found]
    versions = sorted({name for facts in runs for name in facts.manifest.get("versions", {})})
    for name in versions:
        told = [facts.manifest.get("versions", {}).get(name) for facts in runs]
        if len(set(told)) > 1:
            rows.append(tag("tr", tag("th", f"version of {name}", class_="mono"), *(tag("td", _value(value), class_="mono") for value in told)))
    if not rows:
        return section("differences", "What differs", tag("p", "No key of the recipe and no library version."))
    return section("differences", "What differs", tag("div", tag("table", _head("", names), *rows), class_="wide"))


def _value(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _head(first: str, names: Sequence[str]) -> Html:
    keys = (tag("th", _key(number), name) for number, name in enumerate(names))
    return tag("tr", tag("th", first), *keys)


def _key(number: int) -> Html:
    """A run's colour, before its name."""
    colours = ("blue", "orange", "green", "pink", "brown")
    line = tag("path", d="M1 6h16", class_=f"line {colours[number % 5]}{' dashed' if number >= 5 else ''}")
    return tag("svg", line, viewBox="0 0 18 12", class_="key", aria_hidden="true")


def _ends_part(runs: Sequence[Facts], names: Sequence[str]) -> Html:
    def last(key: str) -> Callable[[Facts], str | None]:
        def found(facts: Facts) -> str | None:
            value = next((entry[key] for entry in reversed(facts.entries) if key in entry), None)
            return None if value is None else f"{value:.4g}"

        return found

    lines: list[tuple[str, Callable[[Facts], str | None]]] = [
        ("ended", lambda facts: facts.state),
        ("steps", lambda facts: f"{facts.steps[-1]['step']:,}" if facts.steps else None),
        ("tokens", lambda facts: f"{facts.tokens:,}" if facts.steps else None),
        ("training loss", lambda facts: f"{facts.last_loss:.4g}" if facts.last_loss is not None else None),
        ("held-out loss at the end", last("eval_loss")),
        ("lowest held-out loss", lambda facts: _best(facts.best_evaluation)),
        ("held-out pairs: chosen preferred", last("eval_rewards/accuracies")),
        ("held-out margin", last("eval_rewards/margins")),
        ("token accuracy", last("mean_token_accuracy")),
        ("training time", lambda facts: duration(facts.seconds) if facts.steps else None),
        ("tokens a second (median)", lambda facts: f"{facts.speed:,.0f}" if facts.speed else None),
        ("peak memory", lambda facts: size(facts.memory_peak) if facts.memory_peak else None),
        ("fill of the batches", lambda facts: f"{100 * facts.fill:.1f} %" if facts.fill is not None else None),
        ("machine", lambda facts: facts.manifest.get("gpu") or "CPU"),
    ]
    rows = []
    for label, ask in lines:
        cells = [ask(facts) for facts in runs]
        if any(cell is not None for cell in cells):
            rows.append(tag("tr", tag("th", label), *(tag("td", cell or "–", class_="number start") for cell in cells)))
    return section("ends", "Results", tag("div", tag("table", _head("", names), *rows), class_="wide"))


def _best(entry: Entry | None) -> str | None:
    return f"{entry['eval_loss']:.4g} at step {entry['step']:,}" if entry else None


def _curves_part(runs: Sequence[Facts], names: Sequence[str]) -> Html | None:
    panels = [Panel(title, _overlaid(runs, names, key), zero="margin" in title, log=key == "grad_norm") for title, key in _METRICS]
    pace = [Series(name, speeds(facts.entries, facts.resumed), *_look(number)) for number, (facts, name) in enumerate(zip(runs, names, strict=True))]
    panels.append(Panel("tokens a second", [line for line in pace if line.points], zero=True))
    shown = [panel for panel in panels if panel.series]
    return section("curves", "Their curves", tag("div", *(figure(panel) for panel in shown), class_="plots")) if shown else None


def _overlaid(runs: Sequence[Facts], names: Sequence[str], key: str) -> list[Series]:
    found = []
    for number, (facts, name) in enumerate(zip(runs, names, strict=True)):
        points = [(entry["step"], entry[key]) for entry in facts.entries if isinstance(entry.get(key), int | float)]
        if points:
            found.append(Series(name, points, *_look(number)))
    return found


def _look(number: int) -> tuple[str, bool]:
    """Colour, and whether dashed: beyond five runs the colours come again."""
    return _COLOURS[number % len(_COLOURS)], number >= len(_COLOURS)


def _answers_part(runs: Sequence[Facts], names: Sequence[str]) -> Html | None:
    """Questions that several of the runs were asked, with each one's answer after training."""
    asked: dict[str, dict[int, dict[str, Any]]] = {}
    for number, facts in enumerate(runs):
        for entry in facts.samples:
            if entry.get("after"):
                asked.setdefault(json.dumps(entry["messages"], ensure_ascii=False), {})[number] = entry
    common = [answers for answers in asked.values() if len(answers) > 1][:_QUESTIONS]
    if not common:
        return None
    articles = []
    for answers in common:
        replies = [tag("div", tag("h3", _key(number), names[number]), *_answer(entry["after"]), class_="reply") for number, entry in answers.items()]
        question = words(str(next(iter(answers.values()))["messages"][-1]["content"]))
        articles.append(
            tag("article", tag("div", question, class_="asked"), tag("div", *replies, class_=f"answers n{min(3, len(replies))}"), class_="sample")
        )
    return section("answers", "The same questions, after training", *articles)


def _answer(reply: dict[str, Any]) -> list[Html]:
    folded = [tag("details", tag("summary", "reasoning"), words(reply["thinking"]), class_="reasoning")] if reply.get("thinking") else []
    content = str(reply.get("content") or "(no answer)")
    return [*folded, words(content if len(content) <= LONG else f"{content[:LONG]}…")]
