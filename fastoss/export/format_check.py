"""The third part of verification: do the templates in an export write the recipe's rows as training saw them, token by token?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastoss.config import FormatSettings, Recipe
from fastoss.data.conformance import builtin_chats
from fastoss.data.conversation import Conversation
from fastoss.data.dataset import build_dataset
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.other_renderers import Kind, Refusal, as_chat_message, as_chat_tool, encode_control, template_environment
from fastoss.data.tokenizer import decode
from fastoss.errors import FastossError

MOST_ROWS = 2_000
Render = Callable[[Conversation, Kind], list[int]]


class Row(NamedTuple):
    """A training example: its conversation, its tokens, and how many of them the prompt supplies."""

    conversation: Conversation
    ids: list[int]
    prompt_length: int


@dataclass
class FormatCheck:
    """What a template was compared with, and where it first differed from training."""

    name: str
    rows: int = 0
    differing: int = 0
    problems: list[str] = field(default_factory=list)

    def to_plain(self) -> dict[str, Any]:
        return {"template": self.name, "passed": not self.problems, "texts": self.rows, "differing": self.differing, "problems": self.problems}


def training_rows(recipe: Recipe, sample: bool) -> tuple[list[Row], str | None, str]:
    """Examples of the recipe (at most `MOST_ROWS`, evenly chosen), a note where its data cannot be read any more, and its fingerprint."""
    try:
        dataset = build_dataset(recipe, sample=sample)
    except FastossError as problem:
        return [], f"the recipe's rows were not compared: {problem.fact}", ""  # no place: the card goes out of the house
    train = dataset.train
    count = min(MOST_ROWS, len(train))
    chosen = [train[index * len(train) // count] for index in range(count)]
    return [Row(example.conversation, list(example.input_ids), example.prompt_length) for example in chosen], None, dataset.report.fingerprint


def builtin_rows(format: FormatSettings) -> list[Row]:
    """Chats that reach every corner of the format, rendered as training would."""
    renderer = HarmonyRenderer(format)
    rows = []
    for chat in builtin_chats():
        example = renderer.render_last(chat)
        rows.append(Row(chat, list(example.input_ids), example.prompt_length))
    return rows


def check_rows(name: str, render: Render, rows: Iterable[Row], kinds: Sequence[Kind]) -> FormatCheck:
    """Render each row as a prompt and as an example, and name the first token that differs."""
    result = FormatCheck(name)
    for row in rows:
        for kind in kinds:
            wanted = row.ids[: row.prompt_length] if kind == "prompt" else row.ids
            result.rows += 1
            chat = row.conversation
            asked = Conversation(chat.messages[:-1], chat.place, chat.reasoning_effort, chat.current_date, chat.tools) if kind == "prompt" else chat
            try:
                given = render(asked, kind)
            except Refusal as refusal:
                _differs(result, f"{chat.place}: {name} refuses it: {refusal}")
                continue
            if given != wanted:
                _differs(result, f"{chat.place}: {_first_difference(wanted, given)} ({kind})")
    return result


def _differs(result: FormatCheck, problem: str) -> None:
    result.differing += 1
    if len(result.problems) < 5:
        result.problems.append(problem)


def _first_difference(wanted: list[int], given: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(wanted, given, strict=False)) if a != b), min(len(wanted), len(given)))
    ours, theirs = decode(wanted[at : at + 6]), decode(given[at : at + 6])
    return f"token {at} is {theirs!r}, in training {ours!r}"


def jinja_renderer(template: str) -> Render:
    """Ids as a program gets them that renders the export's template and is told of nothing but the row's own settings."""
    import jinja2

    try:
        compiled = template_environment().from_string(template)
    except jinja2.TemplateError as problem:
        raise FastossError(f"it is not a Jinja template: {problem}", place="chat_template.jinja") from None

    def render(conversation: Conversation, kind: Kind) -> list[int]:
        settings = {"reasoning_effort": conversation.reasoning_effort, "current_date": conversation.current_date}
        given: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
        if conversation.tools:
            given["tools"] = [as_chat_tool(tool) for tool in conversation.tools]
        try:
            text = compiled.render(
                messages=[as_chat_message(message, parsed=False) for message in conversation.messages],
                add_generation_prompt=kind == "prompt",
                strftime_now=_today,
                **given,
            )
        except Exception as problem:  # a template can raise whatever its own expressions raise
            raise Refusal(str(problem) or type(problem).__name__) from None
        return encode_control(text)

    return render


def _today(pattern: str) -> str:
    """What a program would stamp: a template that asks for it is not pinned, and must not pass on the day of the check."""
    import datetime

    return datetime.date(1999, 12, 31).strftime(pattern)
