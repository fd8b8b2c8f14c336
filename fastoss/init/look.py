"""A source of rows → what is in it: the first rows, read and understood as training would. `write.py` proposes a recipe from it."""

from __future__ import annotations

import itertools
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field

from fastoss.config import DataSource
from fastoss.data.conversation import Conversation
from fastoss.data.data_report import counted
from fastoss.data.formats.columns import renamed
from fastoss.data.formats.conversations import detect_format, row_to_conversation
from fastoss.data.formats.preferences import is_preference, row_to_preference
from fastoss.data.reading.rows import BadRow, Row
from fastoss.data.reading.sources import read_rows
from fastoss.errors import FastossError
from fastoss.inference.languages import language_of
from fastoss.inference.sampling import ReasoningLanguage, asked_language

_ROWS = 1000  # rows that are looked at; all of them are read when the recipe is planned
_NAMED = 200  # answers whose language is detected, at a millisecond each


@dataclass
class Look:
    """What the first rows are. Counts are of rows; `languages` are those of answers, `reasoning_languages` those that rows ask for."""

    rows: int = 0
    more: bool = False  # there are more than were looked at
    pairs: int = 0
    reasoned: int = 0
    several_turns: int = 0
    systems: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    reasoning_languages: Counter[str] = field(default_factory=Counter)
    bad: list[BadRow] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        kinds = ", ".join(f"{name} {count:,}" for name, count in self.formats.most_common())
        lines = [f"{'the first ' if self.more else ''}{counted(self.rows, 'row')} looked at: {kinds}"]
        what = "pairs of answers" if self.pairs else "chats"
        lines.append(
            f"{what}: {self.several_turns:,} with several turns, {self.systems:,} with a system text, "
            f"{self.reasoned:,} with reasoning, {self.understood - self.reasoned:,} without"
        )
        for what, found in (("answers in", self.languages), ("reasoning asked for in", self.reasoning_languages)):
            if found:
                lines.append(f"{what} " + ", ".join(f"{name} {count:,}" for name, count in found.most_common(5)) + _rest(found))
        if self.bad:
            lines.append(f"{counted(len(self.bad), 'row')} cannot be read or understood: {self.bad[0].place}: {self.bad[0].fact}")
        return lines

    @property
    def understood(self) -> int:
        return self.rows - len(self.bad)


def _rest(found: Counter[str]) -> str:
    rest = sum(found.values()) - sum(count for _, count in found.most_common(5))
    return f", others {rest:,}" if rest else ""


def look_at(source: DataSource) -> Look:
    """Look at the first rows of a source.

    Raises `FastossError` when there is no such source, when it is no data, and when not one row is understood, with what is wrong with the first.
    """
    look = Look()
    rows = read_rows(source)
    for row in itertools.islice(rows, _ROWS):
        look.rows += 1
        try:
            _add(look, row if isinstance(row, BadRow) else renamed(row, source.columns))
        except BadRow as problem:
            look.bad.append(problem)
    look.more = next(rows, None) is not None
    if not look.understood:
        first, *others = look.bad
        also = [f"{problem.place}: {problem.fact}" for problem in others[:4]]
        raise FastossError(first.fact, place=first.place, hint=first.hint and _as_options(first.hint), also=also)
    return look


def _as_options(hint: str) -> str:
    """A hint that says what to write into a recipe, for a person who has none yet: `columns` as the options of `fastoss init`."""

    def options(columns: re.Match[str]) -> str:
        return " ".join(f"--column {shlex.quote(f'{ours}={theirs}')}" for ours, theirs in re.findall(r'(\w+) = "([^"]*)"', columns[1]))

    return re.sub(r"columns = \{(.*?)\}", options, hint)


def _add(look: Look, row: Row | BadRow) -> None:
    if isinstance(row, BadRow):
        raise row
    pair = is_preference(row)
    chat = row_to_preference(row).chosen if pair else row_to_conversation(row)
    look.formats["pairs" if pair else detect_format(row.columns, row.place)] += 1
    look.pairs += pair
    answers = [message for message in chat.messages if message.role == "assistant"]
    look.several_turns += sum(message.role == "user" for message in chat.messages) > 1
    look.systems += chat.messages[0].role == "system"
    look.reasoned += any((message.thinking or "").strip() for message in answers)
    _add_languages(look, chat, answers[-1].content)


def _add_languages(look: Look, chat: Conversation, answer: str) -> None:
    asked = asked_language(chat.messages)
    if asked is not None:
        look.reasoning_languages[asked.english_name] += 1
    if look.rows <= _NAMED:
        code = language_of(answer)
        if code is not None:
            look.languages[ReasoningLanguage(code).english_name] += 1
