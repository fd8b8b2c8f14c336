"""Tokens → dataset: reads the recipe's sources, renders them, judges every row, splits off the held-out part.

Nothing disappears uncounted: the `DataReport` says what was read, what was dropped, why, and where it stood.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastoss.config import Recipe
from fastoss.data.conversation import Conversation
from fastoss.data.formats import KNOWN_COLUMNS, row_to_conversation, unread_columns
from fastoss.data.harmony import Example, HarmonyRenderer
from fastoss.data.sources import BadRow, Row, read_rows
from fastoss.errors import FastossError

_SHOWN = 5  # so many places are listed for each reason


@dataclass
class Drop:
    """How many rows (or examples, one a trained turn) were left out for one reason, and where the first ones stood."""

    unit: str
    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < _SHOWN:
            self.places.append(place)

    def listed(self) -> str:
        return ", ".join(self.places) + (", …" if self.count > len(self.places) else "")


@dataclass
class DataReport:
    """What was read and what became of it. Counts are of rows, or of examples (one a trained turn) where so named."""

    rows: int = 0
    examples: int = 0
    train_rows: int = 0
    eval_rows: int = 0
    train_examples: int = 0
    eval_examples: int = 0
    train_tokens: int = 0
    trained_tokens: int = 0
    trained_by_channel: dict[str, int] = field(default_factory=dict)
    longest: int = 0
    unread: Counter[str] = field(default_factory=Counter)  # columns that no format knows, and in how many rows
    drops: dict[str, Drop] = field(default_factory=dict)
    shortened: Drop = field(default_factory=lambda: Drop("examples"))
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""

    def drop(self, reason: str, place: str, unit: str = "rows") -> None:
        self.drops.setdefault(reason, Drop(unit)).add(place)

    def lines(self) -> list[str]:
        """The report as people read it."""
        share = ", ".join(f"{channel} {count:,}" for channel, count in self.trained_by_channel.items())
        lines = [
            f"{_of(self.rows, 'row')} → {_of(self.train_examples, 'training example')}, "
            f"{self.eval_examples:,} held out ({_of(self.eval_rows, 'row')})",
            f"{self.train_tokens:,} tokens, of which {self.trained_tokens:,} are trained ({share}); longest example {self.longest:,}",
        ]
        for reason, entry in self.drops.items():
            total = self.rows if entry.unit == "rows" else self.examples
            lines.append(f"dropped {entry.count:,} of {total:,} {entry.unit}: {reason} ({entry.listed()})")
        if self.shortened.count:
            lines.append(
                f"left out early turns of {self.shortened.count:,} of {self.examples:,} examples to fit max_length ({self.shortened.listed()})"
            )
        for name, count in self.unread.most_common():
            close = difflib.get_close_matches(name, KNOWN_COLUMNS, n=1, cutoff=0.7)
            lines.append(f"the column `{name}` of {_of(count, 'row')} is not read" + (f": did you mean `{close[0]}`?" if close else ""))
        return lines + self.notes


def _of(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Dataset:
    """Examples for training and evaluation, in file order, and the report on how they came about."""

    train: list[Example]
    eval: list[Example]
    report: DataReport


def build_dataset(recipe: Recipe, *, sample: bool = False) -> Dataset:
    """Read, render, judge and split the recipe's data. Deterministic, and alike on every rank.

    Raises `FastossError` (exit 2) with `file:line` for whatever `[hygiene]` calls an error, and when nothing is left.
    """
    renderer = HarmonyRenderer(recipe.format)
    report = DataReport()
    conversations = _without_duplicates(list(_conversations(recipe, report, sample)), recipe, report)
    held_out = _held_out(conversations, recipe, report)

    train: list[Example] = []
    eval: list[Example] = []
    for key, conversation in conversations:
        chosen = eval if key in held_out else train
        chosen.extend(_fitting(conversation, renderer, recipe, report))
    if not train:
        gone = [f"{entry.count:,} × {reason}" for reason, entry in report.drops.items()]
        gone += [f"{report.eval_rows:,} held out by eval.fraction"] if report.eval_rows else []
        raise FastossError(f"no training example is left ({'; '.join(gone)})", place=recipe.data[0].source)
    _count(train, eval, report)
    if recipe.eval.fraction and not eval:
        why = "the rows held out were dropped" if report.eval_rows else f"{recipe.eval.fraction:g} of {_of(len(conversations), 'row')} makes none"
        report.notes.append(f"no evaluation: {why}")
    if "analysis" not in recipe.format.train_on and any(m.thinking for e in train for m in e.conversation.messages[-1:]):
        report.notes.append("the data has reasoning, but format.train_on leaves it out: the model will not learn to reason so")
    return Dataset(train, eval, report)


def content_key(conversation: Conversation) -> str:
    """A hash of what a conversation says; rows that say the same have the same key."""
    digest = hashlib.sha256()
    for message in conversation.messages:
        for part in (message.role, message.content, message.thinking or ""):
            digest.update(part.encode())
            digest.update(b"\0")
    digest.update((conversation.reasoning_effort or "").encode())
    return digest.hexdigest()


Keyed = tuple[str, Conversation]


def _conversations(recipe: Recipe, report: DataReport, sample: bool) -> Iterator[Keyed]:
    fingerprint = hashlib.sha256()
    for source in recipe.data:
        if sample and source.sample is None:
            report.notes.append(f"no sample is named for {source.source}: it is read in full")
        for row in read_rows(source, sample=sample):
            report.rows += 1
            if isinstance(row, Row):
                report.unread.update(unread_columns(row, source.format))
            try:
                if isinstance(row, BadRow):
                    raise row
                conversation = row_to_conversation(row, source.format, recipe.format.identity)
            except BadRow as problem:
                if recipe.hygiene.malformed == "error":
                    if problem.hint is None:
                        problem.hint = 'mend the row, or set hygiene.malformed = "drop"'
                    raise
                report.drop(problem.fact, problem.place or "")
                continue
            key = content_key(conversation)
            fingerprint.update(key.encode())
            yield key, conversation
    report.fingerprint = fingerprint.hexdigest()


def _without_duplicates(conversations: list[Keyed], recipe: Recipe, report: DataReport) -> list[Keyed]:
    first: dict[str, str] = {}
    kept = []
    again = 0
    for key, conversation in conversations:
        if key in first:
            again += 1
            if recipe.hygiene.duplicates == "error":
                hint = 'remove it, or set hygiene.duplicates = "drop" or "keep"'
                raise FastossError(f"the row is the same as {first[key]}", place=conversation.place, hint=hint)
            if recipe.hygiene.duplicates == "drop":
                report.drop("the same as an earlier row", conversation.place)
                continue
        first.setdefault(key, conversation.place)
        kept.append((key, conversation))
    if again and recipe.hygiene.duplicates == "keep":
        report.notes.append(f"{again:,} rows are the same as an earlier one, and kept (hygiene.duplicates)")
    return kept


def _held_out(conversations: list[Keyed], recipe: Recipe, report: DataReport) -> set[str]:
    """Keys of the held-out rows: the smallest hashes, so that a row's lot hangs on its content alone.

    Rows that say the same go the same way, so no training row can stand in eval (`hygiene.leakage` holds by
    construction; sources of their own for eval come with the data work).
    """
    wanted = round(recipe.eval.fraction * len(conversations))
    chosen: set[str] = set()
    rows = 0
    copies = Counter(key for key, _ in conversations)
    for key in sorted(copies):
        if rows + copies[key] <= wanted:
            chosen.add(key)
            rows += copies[key]
        if rows == wanted:
            break
    report.eval_rows = rows
    report.train_rows = len(conversations) - rows
    return chosen


def _fitting(conversation: Conversation, renderer: HarmonyRenderer, recipe: Recipe, report: DataReport) -> Iterator[Example]:
    """The conversation's examples that fit into `max_length`, by the rule of `hygiene.over_length`."""
    limit = recipe.model.max_length
    for example in renderer.render_examples(conversation):
        report.examples += 1
        if example.trained_tokens == 0:
            report.drop("nothing in them is trained (format.train_on)", conversation.place, "examples")
            continue
        report.longest = max(report.longest, len(example))
        if len(example) <= limit:
            yield example
            continue
        if recipe.hygiene.over_length == "error":
            fact = f"an example of {len(example):,} tokens is longer than model.max_length {limit:,}"
            hint = 'raise model.max_length, or set hygiene.over_length = "drop" or "truncate_left_turns"'
            raise FastossError(fact, place=conversation.place, hint=hint)
        shorter = _truncated(example, renderer, limit) if recipe.hygiene.over_length == "truncate_left_turns" else None
        if shorter is None:
            report.drop(f"longer than max_length {limit:,}", conversation.place, "examples")
        else:
            report.shortened.add(conversation.place)
            yield shorter


def _truncated(example: Example, renderer: HarmonyRenderer, limit: int) -> Example | None:
    """The example with whole early turns removed until it fits; the system text, the last question and the target stay."""
    messages = example.conversation.messages
    first = 1 if messages[0].role == "system" else 0
    for cut in range(first + 2, len(messages) - 1, 2):
        rest = Conversation(messages[:first] + messages[cut:], example.conversation.place, example.conversation.reasoning_effort)
        shorter = renderer.render_examples(rest)[-1]
        if len(shorter) <= limit:
            return shorter
    return None


def _count(train: list[Example], eval: list[Example], report: DataReport) -> None:
    report.train_examples, report.eval_examples = len(train), len(eval)
    report.train_tokens = sum(map(len, train))
    channels: Counter[str] = Counter()
    for example in train:
        for span in example.spans:
            if span.trained and span.channel:
                channels[span.channel] += span.end - span.start
    report.trained_by_channel = dict(sorted(channels.items()))
    report.trained_tokens = sum(channels.values())
