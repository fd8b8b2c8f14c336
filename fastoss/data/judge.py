"""What happens to a row: understood, repaired, kept, dropped or refused, as `[hygiene]` says. The dataset asks for each row."""

from __future__ import annotations

import difflib
import json
import time
from collections import Counter
from collections.abc import Sequence
from itertools import repeat
from typing import IO

from fastoss.config import DataSource, Recipe
from fastoss.data.conversation import Conversation
from fastoss.data.data_report import DataReport
from fastoss.data.formats.columns import has_column, near_column
from fastoss.data.formats.conversations import row_to_conversation, unread_columns
from fastoss.data.formats.preferences import row_to_preference, unread_pair_columns
from fastoss.data.harmony import Example, HarmonyRenderer
from fastoss.data.hygiene import content_key, excerpt, has_empty_reasoning, near_key, shortened, without_empty_reasoning
from fastoss.data.mojibake import first_mojibake, repaired
from fastoss.data.reading.rows import BadRow, Row, spelled
from fastoss.data.store import part_of
from fastoss.errors import FastossError

_LISTED = 20  # bad rows that are named before the reading ends
_LOOKED_S = 5.0  # and so long is looked for further ones after the first
_UNEQUAL = 5  # answers of a pair whose lengths differ by more are counted
_DROPPED_LISTED = 10_000  # dropped rows that are kept with their beginning, for the page

Turn = tuple[int, int, Example]  # the target's message, the early messages left out, the example


class Refusals:
    """Rows that `[hygiene]` calls an error: all that are found soon after the first are told together."""

    def __init__(self) -> None:
        self.problems: list[FastossError] = []
        self._first = 0.0

    def add(self, problem: FastossError) -> None:
        self._first = self._first or time.monotonic()
        self.problems.append(problem)

    def any(self) -> bool:
        return bool(self.problems)

    def enough(self) -> bool:
        return len(self.problems) >= _LISTED or (bool(self.problems) and time.monotonic() - self._first > _LOOKED_S)

    def raise_if_any(self) -> None:
        if self.problems:
            first, *others = self.problems
            first.also = [f"{problem.place}: {problem.fact}" for problem in others]
            if self.enough():
                first.also.append("maybe more: the reading ended here")
            raise first


class Judge:
    """Judges the rows of one recipe, in order; what it sees is counted in `report`."""

    def __init__(self, recipe: Recipe, report: DataReport, refusals: Refusals, dropped: IO[str]):
        self.recipe, self.report, self.refusals, self.dropped = recipe, report, refusals, dropped
        self.hygiene = recipe.hygiene
        scored = {"train_on": dict.fromkeys(recipe.dpo.score_on, 1.0)} if recipe.dpo else {}
        self.renderer = HarmonyRenderer(recipe.format.model_copy(update=scored))
        self.targets: Counter[str] = Counter()  # examples whose target has something in a channel
        self.too_long: list[int] = []
        self.near = 0  # the last row's `near_key`
        self._places: dict[int, str] = {}  # content keys of training rows; their places where an error would name them
        self._near: set[int] = set()
        self._eval: dict[int, str] = {}
        self._listed = 0
        self._seen: set[str] = set()  # of the names that the source's `columns` gives: those that some row had
        self._had: set[str] = set()  # all columns of such a source

    def understood(self, row: Row | BadRow, source: DataSource, *, held_out: bool) -> tuple[Conversation, ...] | None:
        """The row as it is passed on: its conversation, or of a pair the chosen one and the rejected one; None when it does not.

        `self.near` is then its key.
        """
        if isinstance(row, Row):
            self._note_columns(row, source)
        try:
            if isinstance(row, BadRow):
                raise row
            said = self._read(row, source)
        except BadRow as problem:
            begins = _begins(row) if isinstance(row, Row) else ""
            problem.fact = spelled(problem.fact)
            problem.hint = problem.hint or self._hint(row, source)
            self._verdict(self.hygiene.malformed, problem, problem.fact, begins)
            return None
        mended: list[Conversation] = []
        noticed: dict[str, str] = {}  # once a row: the two answers of a pair share what was said before them
        for conversation in said:
            whole = self._mended(conversation, noticed)
            if whole is None:
                return None
            mended.append(whole)
        for what, place in noticed.items():
            self.report.keep(what, place)
        return tuple(mended) if self._stands_alone(mended, held_out) else None

    def _hint(self, row: Row | BadRow, source: DataSource) -> str:
        """What to do about a row that is not understood: a column may only be misspelled."""
        if isinstance(row, Row) and self.hygiene.malformed == "error":
            for name in sorted(self._unread(row, source)):
                close = near_column(name)
                if close and close not in row.columns:
                    return f"the row has `{name}`: did you mean `{close}`?"
        return 'fix the row, or set hygiene.malformed = "drop"'

    def check_columns(self, source: DataSource, rows: int) -> None:
        """After a source's last row: a column that `columns` names and no row had is a mistake, also where rows need not have it."""
        whole = rows > 0 and source.max_rows is None and not self.refusals.any()
        for ours, theirs in source.columns.items() if whole else ():
            if theirs in self._seen:
                continue
            close = difflib.get_close_matches(theirs, sorted(self._had), n=1, cutoff=0.6)
            hint = f"did you mean `{close[0]}`?" if close else f"the rows have {', '.join(f'`{name}`' for name in sorted(self._had)[:12])}"
            self.refusals.add(FastossError(f"`columns` says that `{ours}` is `{theirs}`, and no row has that", place=source.source, hint=hint))
        self._seen, self._had = set(), set()

    def _note_columns(self, row: Row, source: DataSource) -> None:
        if source.columns:
            self._had.update(row.columns)
            self._seen.update(theirs for theirs in source.columns.values() if theirs not in self._seen and has_column(row, theirs))

    def _unread(self, row: Row, source: DataSource) -> set[str]:
        pairs = self.recipe.method == "dpo"
        unread = unread_pair_columns(row, source.columns) if pairs else unread_columns(row, source.format, source.columns)
        return {spelled(name) for name in unread}

    def _read(self, row: Row, source: DataSource) -> tuple[Conversation, ...]:
        identity = self.recipe.format.identity
        self.report.unread.update(self._unread(row, source))
        if self.recipe.method == "dpo":
            pair = row_to_preference(row, identity, source.columns)
            return pair.chosen, pair.rejected
        return (row_to_conversation(row, source.format, identity, source.columns),)

    def _mended(self, conversation: Conversation, noticed: dict[str, str]) -> Conversation | None:
        """Without mojibake and empty reasoning, by the recipe's rules; `noticed` takes what is kept or repaired, and where."""
        found = first_mojibake(conversation)
        if found:
            fact = f"looks like UTF-8 that was read as Latin-1: “{found[0]}” for “{found[1]}”"
            if self.hygiene.mojibake == "repair":
                conversation = repaired(conversation) or conversation
                noticed["mojibake, repaired"] = conversation.place
            elif self.hygiene.mojibake == "keep":
                noticed["look like mojibake, and kept (hygiene.mojibake)"] = conversation.place
            else:
                hint = 'set hygiene.mojibake = "repair" to have it repaired, or "keep" if it is meant'
                self._verdict(self.hygiene.mojibake, BadRow(fact, place=conversation.place, hint=hint), "mojibake", excerpt(conversation))
                return None
        if has_empty_reasoning(conversation):
            if self.hygiene.empty_reasoning != "keep":
                hint = 'set hygiene.empty_reasoning = "keep" to read it as an answer without reasoning'
                problem = BadRow("the reasoning is empty", place=conversation.place, hint=hint)
                self._verdict(self.hygiene.empty_reasoning, problem, "the reasoning is empty", excerpt(conversation))
                return None
            noticed["with empty reasoning, read as none"] = conversation.place
            conversation = without_empty_reasoning(conversation)
        return conversation

    def _stands_alone(self, said: Sequence[Conversation], held_out: bool) -> bool:
        """Whether it is passed on though it may occur elsewhere already, by the recipe's rules."""
        key, self.near = content_key(said), near_key(said)
        place = said[0].place
        if held_out:
            self._eval.setdefault(self.near, place)
            return True
        hygiene = self.hygiene
        for policy, name, seen, what in (
            (hygiene.leakage, "leakage", self._eval.get(self.near), "is in the evaluation data as well"),
            (hygiene.duplicates, "duplicates", self._places.get(key), "is the same as an earlier row"),
            (hygiene.near_duplicates, "near_duplicates", "an earlier row" if self.near in self._near and key not in self._places else None,
             "is nearly the same as an earlier row"),
        ):  # fmt: skip
            if seen is None:
                continue
            if policy == "keep":
                self.report.keep(f"{what.replace('is ', '', 1)}, and kept (hygiene.{name})", place)
                continue
            others = [value for value in ("drop", "keep") if value != policy]
            hint = f"remove it, or set hygiene.{name} = {' or '.join(json.dumps(value) for value in others)}"
            fact = f"the row {what}" + (f" ({seen})" if seen != "an earlier row" else "")
            self._verdict(policy, BadRow(fact, place=place, hint=hint), what.replace("is ", "", 1), excerpt(said[0]))
            return False
        self._places.setdefault(key, place if hygiene.duplicates == "error" else "an earlier row")
        self._near.add(self.near)
        return True

    def examples(self, said: Sequence[Conversation]) -> list[list[Turn]]:
        """Of each conversation the examples that carry loss and fit into `max_length`, by the rule of `hygiene.over_length`.

        Of a pair both answers, or neither.
        """
        if len(said) == 1:
            (conversation,) = said
            examples = self.renderer.render_examples(conversation)
            if not examples:  # `turns = "last"`, and the row leaves its last answer out
                self._drop("the last answer is not to be trained (format.turns)", conversation.place, excerpt(conversation))
            return [[turn for turn in map(self._fitting, examples, repeat(conversation)) if turn]]
        both = [self._fitting(self.renderer.render_last(conversation), conversation) for conversation in said]
        if not all(both):
            if any(both):
                self._drop("the other answer of their pair was dropped", said[0].place, excerpt(said[0]), "examples")
            return [[], []]
        self._note_pair(said, [turn[2].trained_tokens for turn in both if turn])
        return [[turn] for turn in both if turn]

    def _note_pair(self, said: Sequence[Conversation], scored: Sequence[int]) -> None:
        """What makes a pair teach something else than that one answer is better."""
        place = said[0].place
        if near_key(said[:1]) == near_key(said[1:]):
            self.report.keep("the two answers differ in case, spaces or punctuation alone", place)
        if len({bool(conversation.messages[-1].thinking) for conversation in said}) > 1:
            self.report.keep("one answer has reasoning and the other has none: that difference is what would be learned", place)
        if max(scored) > _UNEQUAL * min(scored):
            self.report.keep(f"one answer is more than {_UNEQUAL} times as long as the other", place)

    def _fitting(self, example: Example, conversation: Conversation) -> Turn | None:
        limit, rule = self.recipe.model.max_length, self.hygiene.over_length
        self.report.examples += 1
        for channel in {span.channel for span in example.spans if span.start >= example.prompt_length}:
            self.targets[str(channel)] += 1
        turn, place = len(example.conversation.messages) - 1, conversation.place
        if example.trained_tokens == 0:
            self._drop("nothing in them is trained (format.train_on)", place, excerpt(conversation), "examples")
            return None
        if len(example) <= limit:
            return turn, 0, example
        if rule == "error":
            fact = f"an example of {len(example):,} tokens is longer than model.max_length {limit:,}"
            hint = 'raise model.max_length, or set hygiene.over_length = "drop" or "truncate_left_turns"'
            self.refusals.add(FastossError(fact, place=place, hint=hint))
            return None
        self.too_long.append(len(example))
        shorter = self._truncated(conversation, turn) if rule == "truncate_left_turns" else None
        if shorter is None:
            self._drop(f"longer than max_length {limit:,}", place, excerpt(conversation), "examples")
        else:
            self.report.keep("early turns left out to fit max_length", place, "examples")
        return shorter

    def _truncated(self, conversation: Conversation, turn: int) -> Turn | None:
        """The example with whole early turns removed until it fits; the system text, the last question and the target stay."""
        questions = [i for i, message in enumerate(conversation.messages[:turn]) if message.role == "user"]
        for cut in questions[1:]:
            shorter = self.renderer.render_last(part_of(conversation, turn, cut))
            if len(shorter) <= self.recipe.model.max_length:
                return turn, cut, shorter
        return None

    def _verdict(self, policy: str, problem: FastossError, reason: str, begins: str) -> None:
        if policy == "error":
            self.refusals.add(problem)
        else:
            self._drop(reason, problem.place or "", begins)

    def _drop(self, reason: str, place: str, begins: str, unit: str = "rows") -> None:
        self.report.drop(reason, place, unit)
        self._listed += 1
        if self._listed <= _DROPPED_LISTED:
            self.dropped.write(json.dumps({"place": place, "unit": unit, "reason": reason, "excerpt": begins}, ensure_ascii=False) + "\n")


def _begins(row: Row) -> str:
    """The beginning of a row, for the list of those that were dropped."""
    try:
        text = json.dumps(row.columns, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # Parquet's maps may have keys of any type; JSON may be nested deep
        text = ", ".join(map(str, row.columns))
    return spelled(shortened(text))
