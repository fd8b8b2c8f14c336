"""Row → a question: any row that training understands, with or without its answer. Batches and evaluation read their input through this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastoss.config import DataSource, Identity
from fastoss.data.conversation import Conversation, Message
from fastoss.data.formats.columns import has_column, renamed
from fastoss.data.formats.conversations import row_to_conversation
from fastoss.data.formats.preferences import is_preference, row_to_preference
from fastoss.data.reading.rows import BadRow, Row
from fastoss.data.reading.sources import read_rows
from fastoss.errors import FastossError

_NO_ANSWER = "(to be answered)"  # stands where a row has none, so that it is read and checked as every other row
# By the column that asks: the one that would answer.
_ANSWERS = {"prompt": "completion", "instruction": "output", "query": "response", "question": "output", "user": "final"}
_LISTS = ("messages", "conversations", "prompt")
_LISTED = 20


@dataclass(frozen=True)
class Asked:
    """A row's chat up to the question; `reference` is the answer that the row gives, where it gives one, `rejected` the worse one of a pair.

    `conversation` is the chat with that reference (or a stand-in): effort, date, tools and place are its own.
    """

    conversation: Conversation
    reference: Message | None
    rejected: Conversation | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.conversation.messages[:-1]

    @property
    def place(self) -> str:
        return self.conversation.place


def row_to_asked(row: Row, identity: Identity | None = None) -> Asked:
    """Understand a row as a question. Of a pair the chosen answer is the reference.

    Raises `BadRow` with place, fact and hint where the row is none of the formats of docs/data.md, with or without its answer.
    """
    if is_preference(row):
        pair = row_to_preference(row, identity)
        return Asked(pair.chosen, pair.chosen.messages[-1], pair.rejected)
    completed = _completed(row)
    conversation = row_to_conversation(completed, "auto", identity)
    return Asked(conversation, conversation.messages[-1] if completed is row else None)


def read_asked(
    path: Path, identity: Identity | None = None, *, columns: Sequence[Mapping[str, str]] = (), max_rows: int | None = None
) -> list[Asked]:
    """All questions of a file, a folder or a glob. `columns` are names that a recipe gives (`{ours: the file's}`, of each of its sources):
    the first that a row has a column of are taken for it. `FastossError` tells of every bad row at once (the first twenty)."""
    asked: list[Asked] = []
    problems: list[FastossError] = []
    for row in read_rows(DataSource(source=str(path), max_rows=max_rows)):
        try:
            if isinstance(row, BadRow):
                raise row
            names = next((names for names in columns if any(has_column(row, theirs) for theirs in names.values())), {})
            asked.append(row_to_asked(renamed(row, names), identity))
        except BadRow as problem:
            problems.append(problem)
            if len(problems) >= _LISTED:
                break
    if problems:
        first, *others = problems
        first.also = [f"{problem.place}: {problem.fact}" for problem in others]
        raise first
    return asked


def _completed(row: Row) -> Row:
    """The row itself where it has an answer; else with a stand-in."""
    columns = row.columns
    for name in _LISTS:
        entries = columns.get(name)
        if isinstance(entries, list) and entries and not (name == "prompt" and "completion" in columns):
            if _answered(entries[-1]):
                return row
            answer = {"from": "gpt", "value": _NO_ANSWER} if name == "conversations" else {"role": "assistant", "content": _NO_ANSWER}
            rest = {key: value for key, value in columns.items() if key != name}
            return Row(rest | {"messages" if name == "prompt" else name: [*entries, answer]}, row.place)
    for asks, answers in _ANSWERS.items():
        if asks in columns and columns.get(answers) is None:
            if asks == "question":  # QA sets without answers
                return Row({"instruction" if key == "question" else key: value for key, value in columns.items()} | {"output": _NO_ANSWER}, row.place)
            return Row(columns | {answers: _NO_ANSWER}, row.place)
    return row


def _answered(entry: Any) -> bool:
    speaker = entry.get("role", entry.get("from")) if isinstance(entry, dict) else None
    return speaker in ("assistant", "gpt", "chatgpt", "model", "bot", "function_call", "tool_call")
