"""Row → preference: a conversation and two ways to end it. Sources hand it rows where pairs are trained; formats do the reading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastoss.config import Identity
from fastoss.data.conversation import Conversation, Message, Preference
from fastoss.data.formats.columns import ANY_COLUMNS, renamed, replaced_columns
from fastoss.data.formats.conversations import Reading, alpaca_prompt, conversation_from, message_entries, read_row, system_entry, unread_columns
from fastoss.data.formats.messages import ROLES, unread_keys
from fastoss.data.formats.text import content_of, text_of
from fastoss.data.reading.rows import BadRow, Row

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ALPACA_PROMPT = {"input", "history", "system"}
# Where the conversation before the two answers stands, in the order in which we look, and what is read with it.
_PROMPTS = {
    "prompt": {"system"}, "conversations": {"system"}, "instruction": _ALPACA_PROMPT, "question": _ALPACA_PROMPT,
    "query": _ALPACA_PROMPT, "messages": {"system"},
}  # fmt: skip
_ONE_ANSWER = ("rejected_response", "rejected_messages")


def is_preference(row: Row) -> bool:
    """Whether a row's columns are those of a pair of answers."""
    columns = row.columns
    return ("chosen" in columns and "rejected" in columns) or any(name in columns for name in _ONE_ANSWER)


def row_to_preference(row: Row, identity: Identity | None = None, columns: Mapping[str, str] | None = None) -> Preference:
    """Understand a row as a pair of answers to one conversation (docs/data.md lists the shapes).

    Raises `BadRow` with place, fact and hint where either conversation is not what it must be, where the two differ before
    their last message, and where they are the same.
    """
    if columns:
        row = renamed(row, columns)
    better, worse = _pair(row)
    chosen = _understood(row, better, identity, "chosen")
    return Preference(chosen, _checked(chosen, _understood(row, worse, identity, "rejected")))


def _understood(row: Row, reading: Reading, identity: Identity | None, side: str) -> Conversation:
    """The conversation that ends with one of the answers; what is wrong with it names the answer, or the prompt that both share."""
    try:
        return conversation_from(row, reading, identity)
    except BadRow as problem:
        where = f"the {side} answer"
        try:
            conversation_from(row, reading._replace(entries=[*reading.entries[:-1], {"role": "assistant", "content": "…"}]), identity)
        except BadRow as other:  # with an answer that is beyond doubt as well
            if other.fact == problem.fact:
                where = "the prompt"
        raise BadRow(f"{where}: {problem.fact}", place=row.place, hint=problem.hint) from None


def unread_pair_columns(row: Row, columns: Mapping[str, str] | None = None) -> set[str]:
    """Columns of a pair's row, and keys of its messages, that are not understood and so would be lost without a word."""
    unread: set[str] = set()
    try:
        if columns:
            unread, row = replaced_columns(row, columns), renamed(row, columns)
    except BadRow:
        return set()
    here = row.columns
    if "chosen" in here and "rejected" in here:
        name = next((name for name in _PROMPTS if name in here), "")
        unread |= here.keys() - {"chosen", "rejected", name} - _PROMPTS.get(name, set()) - ANY_COLUMNS
        lists = [name, "chosen", "rejected"]
    else:
        unread |= unread_columns(_without_rival(row))
        lists = [*_ONE_ANSWER]
    for name in lists:
        value = here.get(name)
        unread |= unread_keys([value] if isinstance(value, dict) else value, name)
    return unread


def _without_rival(row: Row) -> Row:
    return Row({name: value for name, value in row.columns.items() if name not in _ONE_ANSWER}, row.place)


def _pair(row: Row) -> tuple[Reading, Reading]:
    """The entries of the conversation that ends with the chosen answer, and of the other."""
    columns, place = row.columns, row.place
    if "chosen" in columns and "rejected" in columns:
        prompt = _prompt(row)
        return Reading(_ended(prompt, columns["chosen"], "chosen", place)), Reading(_ended(prompt, columns["rejected"], "rejected", place))
    name = next((name for name in _ONE_ANSWER if name in columns), None)
    if name is None:
        hint = 'give `prompt`, `chosen` and `rejected`, or `messages` and `rejected_response`; rows with a single answer are for method = "sft"'
        raise BadRow(f"the row is not a pair of answers ({', '.join(columns) or 'no columns'})", place=place, hint=hint)
    ours = name.replace("rejected", "chosen")
    if ours in columns:
        hint = f'say which they are: columns = {{ chosen = "{ours}", rejected = "{name}" }}'
        raise BadRow(f"the answers are in `{ours}` and `{name}`, not in `chosen` and `rejected`", place=place, hint=hint)
    reading = read_row(_without_rival(row))
    return reading, reading._replace(entries=_ended(reading.entries[:-1], columns[name], name, place), numbers=None)


def _prompt(row: Row) -> list[Any]:
    """The entries of the conversation before the answers; none where the answers bring it themselves."""
    columns, place = row.columns, row.place
    name = next((name for name in _PROMPTS if name in columns), None)
    if name is None:
        return []
    if name in ("instruction", "question", "query"):
        return list(alpaca_prompt(columns, name, place))
    value = columns[name]
    if name == "prompt" and isinstance(value, str):
        entries: list[Any] = _from_hh(value) if _is_hh(value) else [{"role": "user", "content": value}]
    else:
        entries = message_entries(value, name, place)
    if name == "messages" and len(entries) > 1 and _role(entries[-1]) == "assistant":
        entries = entries[:-1]  # UltraFeedback has the chosen conversation here once more
    return [*system_entry(columns, place), *entries]


def _ended(prompt: list[Any], answer: Any, name: str, place: str) -> list[Any]:
    """The whole conversation: `answer` is a text, a message, or messages that hold the answer only or the prompt as well."""
    if isinstance(answer, str) and not prompt and _is_hh(answer):
        return _from_hh(answer)
    if isinstance(answer, str) and not prompt:
        raise BadRow(f"there is no prompt to `{name}`", place=place, hint="give it in `prompt`")
    if isinstance(answer, str):
        return [*prompt, {"role": "assistant", "content": text_of(answer, f"`{name}`", place)}]
    entries = message_entries([answer] if isinstance(answer, dict) else answer, name, place)
    if not prompt:
        return entries
    if _role(entries[0]) not in ("system", "user"):
        return [*prompt, *entries]
    # The answer's messages repeat the prompt. Either may leave out the beginning (a system text, early turns).
    before = _said(entries[:-1], place)
    asked = _said(prompt, place)
    if asked[-len(before) :] == before:
        return [*prompt, entries[-1]]
    if before[-len(asked) :] == asked:
        return entries
    raise BadRow(f"the messages of `{name}` do not begin with the prompt", place=place, hint="give the answer only")


def _role(entry: Any) -> str | None:
    role = entry.get("role") if isinstance(entry, dict) else None
    return ROLES.get(role) if isinstance(role, str) else None


def _said(entries: list[Any], place: str) -> list[tuple[str | None, str]]:
    """Roles and texts, for comparing; what is no message is refused where it is read."""
    said = []
    for number, entry in enumerate(entries, 1):
        texts = isinstance(entry, dict) and isinstance(entry.get("content"), str | list)
        said.append((_role(entry), content_of(entry, number, str(_role(entry)), place).strip() if texts else ""))
    return said


def _is_hh(text: str) -> bool:
    return text.lstrip().startswith("Human:")


def _from_hh(text: str) -> list[Any]:
    """Anthropic's hh-rlhf: `\\n\\nHuman: …\\n\\nAssistant: …` as entries; an `Assistant:` with nothing after it waits for the answer."""
    _, *parts = _SPEAKER.split("\n\n" + text.lstrip())
    said = [(speaker, content.strip()) for speaker, content in zip(parts[::2], parts[1::2], strict=True)]
    if said and said[-1] == ("Assistant", ""):
        said.pop()
    return [{"role": "user" if speaker == "Human" else "assistant", "content": content} for speaker, content in said]


def _checked(chosen: Conversation, rejected: Conversation) -> Conversation:
    """The rejected conversation, after exactly the messages that come before the chosen answer."""
    for number, (one, other) in enumerate(zip(chosen.messages[:-1], rejected.messages[:-1], strict=False), 1):
        if _words(one) != _words(other):
            hint = "a pair has one prompt and two answers to it"
            raise BadRow(f"chosen and rejected differ in message {number} already", place=chosen.place, hint=hint)
    if len(chosen.messages) != len(rejected.messages):
        fact = f"chosen has {len(chosen.messages)} messages, rejected {len(rejected.messages)}"
        raise BadRow(fact, place=chosen.place, hint="they may differ in the last one")
    better, worse = chosen.messages[-1], rejected.messages[-1]
    if _words(better) == _words(worse) and (better.thinking or "") == (worse.thinking or ""):
        raise BadRow("chosen and rejected are the same", place=chosen.place)
    return replace(rejected, messages=(*chosen.messages[:-1], worse))


def _words(message: Message) -> tuple[Any, ...]:
    return message.role, message.content, message.tool_call, message.name
