"""Texts of a run → markup: samples before and after side by side, and training examples with what was trained in colour."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from fastoss.report.facts import Facts
from fastoss.report.html import Html, join, tag
from fastoss.report.story import is_expected

_SHOWN = 8  # samples in the open; the others unfold
_NOISE = 240  # characters of a malformed reply (an untrained model's noise) that are in the open
LONG = 1_600  # and of any other
_TOKEN = re.compile(r"<\|[a-z_]+\|>")
_NAMES = ("system", "developer", "user", "tool", "assistant", "analysis", "commentary", "final")  # colours of the page's style


def samples_part(facts: Facts) -> Html | None:
    """The section of samples; None where nothing was asked."""
    if not facts.samples:
        return None
    entries = [_sample(entry) for entry in facts.samples]
    lead = "The same questions, asked before and after training, always taking the likeliest token."
    model = facts.recipe.get("model", {})
    if model.get("name") == "tiny" and not model.get("adapter"):
        lead += " The tiny model starts from random weights: before training it writes noise, after training what it has learned by heart."
    more = (
        tag("details", tag("summary", f"{len(entries) - _SHOWN} more questions"), *entries[_SHOWN:], class_="more") if len(entries) > _SHOWN else None
    )
    return section("samples", "What it answers, before and after", tag("p", lead, class_="muted"), *entries[:_SHOWN], more)


def section(name: str, title: str, *children: Html | None) -> Html:
    return tag("section", tag("h2", title), *children, id=name, class_="card")


def _sample(entry: dict[str, Any]) -> Html:
    *earlier, last = entry["messages"]
    asked: list[Html | None] = []
    if earlier:
        turns = [tag("p", tag("b", message["role"]), " ", words(str(message["content"]), "span"), class_="turn") for message in earlier]
        asked.append(tag("details", tag("summary", f"{len(earlier)} earlier message{'' if len(earlier) == 1 else 's'}"), *turns))
    asked.append(words(str(last["content"])))
    answers = [
        _reply("Before", str(entry.get("start") or "the base model"), entry, entry.get("before")),
        _reply("After", "this run", entry, entry.get("after")),
    ]
    expected = entry.get("expected")
    if expected and not is_expected(entry, entry.get("after")):
        answers.append(_reply("In the data", "held out of training" if entry.get("held_out") else "what training shows", entry, expected))
    return tag("article", tag("div", *asked, class_="asked"), tag("div", *answers, class_=f"answers n{len(answers)}"), class_="sample")


def _reply(title: str, whose: str, entry: dict[str, Any], reply: dict[str, Any] | None) -> Html:
    right = is_expected(entry, reply) and title == "After"
    problems = (reply or {}).get("problems")
    badge = (
        tag("span", "word for word", class_="badge good")
        if right
        else tag("span", "malformed", class_="badge bad", title="; ".join(problems))
        if problems
        else None
    )
    head = tag("h3", title, " ", tag("small", whose), badge)
    if reply is None:
        return tag("div", head, tag("p", "Not asked: the run has not finished.", class_="muted"), class_="reply")
    thinking = reply.get("thinking")
    folded = tag("details", tag("summary", f"reasoning, {len(thinking):,} characters"), words(thinking), class_="reasoning") if thinking else None
    content = reply.get("content") or ""
    limit = _NOISE if problems else LONG
    shown = words(content[:limit] + ("…" if len(content) > limit else "")) if content else tag("p", "(no answer)", class_="muted")
    rest = tag("details", tag("summary", f"all {len(content):,} characters"), words(content)) if len(content) > limit else None
    return tag("div", head, folded, shown, rest, class_="reply" + (" after" if title == "After" else ""))


def words(text: str, name: str = "div") -> Html:
    """A text in its own direction, its line breaks kept."""
    return tag(name, text, class_="words", dir="auto")


def masks_part(facts: Facts) -> Html | None:
    """A few training examples, what was trained in colour."""
    examples = facts.profile.get("examples")
    if not examples:
        return None
    lead = "A few rows as the model saw them. Coloured: trained, with the loss on every token. Plain: context that it reads and is not trained on."
    return section("masks", "What was trained, token by token", tag("p", lead, class_="muted"), *(_example(example) for example in examples))


def _example(example: dict[str, Any]) -> Html:
    label = f"{example['label']} answer, " if example.get("label") else ""
    counts = f"{label}{example['tokens']:,} tokens, {example['trained']:,} trained"
    head = tag("h3", tag("span", example["place"], class_="mono"), " ", tag("small", counts))
    return tag("article", head, *_spans(example["spans"]), class_="example")


def _spans(spans: Sequence[dict[str, Any]]) -> Iterator[Html]:
    for span in spans:
        name = span["name"] if span["name"] in _NAMES else "other"
        weight = f" × {span['weight']:g}" if span["trained"] and span["weight"] != 1.0 else ""
        told = join(
            tag("span", "+" if span["trained"] else "·", class_="sign"), tag("strong", span["name"] + weight),
            tag("span", f"{span['tokens']:,} tokens{', trained' if span['trained'] else ''}"),
        )  # fmt: skip
        cut = tag("p", f"… {span['cut']:,} more characters", class_="muted") if span.get("cut") else None
        body = tag("div", *_marked(span["text"]), class_="words mono", dir="auto")
        # The system text is the same everywhere: it unfolds.
        opened = span["trained"] or span["name"] not in ("system", "developer")
        yield tag("details", tag("summary", told), body, cut, class_=f"span {name}{' trained' if span['trained'] else ''}", open=opened)


def _marked(text: str) -> Iterator[Html | str]:
    """Special tokens as little labels, all else as it is."""
    place = 0
    for found in _TOKEN.finditer(text):
        yield text[place : found.start()]
        yield tag("span", found[0], class_="token")
        place = found.end()
    yield text[place:]


def recipe_text(recipe: dict[str, Any]) -> str:
    """The resolved recipe, a key a line, as `--set` takes them."""
    lines = []
    for section_name, values in recipe.items():
        pairs = values.items() if isinstance(values, dict) else [("", values)]
        lines += [f"{section_name}{'.' if key else ''}{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in pairs]
    return "\n".join(lines)
