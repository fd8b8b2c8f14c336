"""Entries of {role, content, …} → messages: roles, whose turn it is, reasoning, weights. Formats hand the entries of every row here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastoss.data.conversation import Message, Role
from fastoss.data.formats.text import content_of, shown, text_of
from fastoss.data.formats.tools import Call, Result, calls_of, one_by_one, result_of
from fastoss.data.reading.rows import BadRow

# harmony's developer message holds what others call the system text
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
REASONING = ("thinking", "reasoning_content", "reasoning")
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_PLAIN = {"role", "content"}
_KEYS = {"role", "content", "from", "value", *REASONING, "tool_calls", "function_call", "train", "loss", "weight", "loss_weight"}
_RESULT_KEYS = _KEYS | {"name", "tool_call_id"}
_RESULT_ROLES = {"tool", "function", "observation", "tool_response"}


def read_messages(entries: list[Any], place: str, numbers: Sequence[int] | None = None) -> list[Message]:
    """Read the entries of a conversation. `numbers` are what error messages call them, else 1, 2, 3, …

    Raises `BadRow` when an entry, its role or its turn is not what it must be, and when no answer ends the conversation.
    """
    turns = _Turns(place)
    for number, entry in zip(numbers or range(1, len(entries) + 1), entries, strict=True):
        turns.take(entry, number)
    return turns.ended()


def unread_keys(entries: Any, column: str) -> set[str]:
    """Keys of messages that would be lost without a word, as `column.key`."""
    unread: set[str] = set()
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and not entry.keys() <= _PLAIN:
            role = entry.get("from", entry.get("role"))
            known = _RESULT_KEYS if isinstance(role, str) and role in _RESULT_ROLES else _KEYS
            unread.update(f"{column}.{key}" for key in entry.keys() - known if entry[key] is not None)
    return unread


class _Turns:
    """The messages read so far, and whose turn it is."""

    def __init__(self, place: str):
        self.place = place
        self.messages: list[Message] = []
        self.wanted: Role = "user"
        self.caller: tuple[Message, int] | None = None  # the message that calls, and its number
        self.calls: list[Call] = []
        self.results: list[Result] = []

    def take(self, entry: Any, number: int) -> None:
        if not isinstance(entry, dict):
            raise BadRow(f"message {number} is not an object", place=self.place)
        given = entry.get("role")
        role = ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise BadRow(f"message {number} has the unknown role {shown(given)}", place=self.place, hint="system, user, assistant or tool")
        if role != self.wanted and (role != "system" or self.messages):
            self._out_of_turn(role, number)
        if role == "assistant":
            self._assistant(entry, number)
        elif role == "tool":
            self._result(entry, number)
        else:
            content = content_of(entry, number, role, self.place)
            if not content or content.isspace():
                raise BadRow("the user's text is empty" if role == "user" else "the system text is empty", place=self.place)
            _check_other(entry, role, number, self.place)
            self.messages.append(Message(role, content))
            self.wanted = "assistant" if role == "user" else "user"

    def _assistant(self, entry: dict[str, Any], number: int) -> None:
        place = self.place
        if entry.keys() <= _PLAIN:
            calls: list[Call] = []
            thinking, weight = None, 1.0
        else:
            calls = calls_of(entry, number, place)
            thinking, weight = reasoning_of(entry, f" of message {number}", place), _weight(entry, "assistant", number, place)
        content = "" if calls and entry.get("content") is None else content_of(entry, number, "assistant", place)
        if "<think>" in content or "</think>" in content:
            content, thinking = _without_think(content, thinking, place)
        if thinking is not None and not thinking.strip():
            thinking = ""  # given, but empty: the recipe decides what becomes of it
        blank = not content or content.isspace()
        if calls:
            self.caller = Message("assistant", "" if blank else content, thinking, weight=weight), number
            self.calls, self.results, self.wanted = calls, [], "tool"
            return
        if blank:
            raise BadRow("the answer is empty", place=place)
        self.messages.append(Message("assistant", content, thinking, weight=weight))
        self.wanted = "user"

    def _result(self, entry: dict[str, Any], number: int) -> None:
        assert self.caller is not None
        _check_other(entry, "tool", number, self.place)
        self.results.append(result_of(entry, number, self.place))
        if len(self.results) == len(self.calls):
            self.messages += one_by_one(self.caller[0], self.calls, self.results, self.place)
            self.wanted = "assistant"

    def ended(self) -> list[Message]:
        if self.wanted == "tool" and self.caller is not None:
            if len(self.calls) > 1:
                self._results_are_missing()
            message = self.caller[0]
            self.messages.append(Message("assistant", message.content, message.thinking, self.calls[0].call, weight=message.weight))
        elif not self.messages or self.messages[-1].role != "assistant":
            raise BadRow("the conversation does not end with an answer", place=self.place)
        return self.messages

    def _out_of_turn(self, role: Role, number: int) -> None:
        place = self.place
        if role == "system":
            raise BadRow("a system message that is not the first", place=place, hint="harmony has one, at the beginning: join them there")
        if role == "tool" and self.messages and self.messages[-1].role == "tool" and self.caller is not None:
            calls = "1 call" if len(self.calls) == 1 else f"{len(self.calls)} calls"
            raise BadRow(f"message {number} is one tool result too many: message {self.caller[1]} makes {calls}", place=place)
        if role == "tool":
            raise BadRow(f"message {number} is a tool's result, but no tool was called", place=place)
        if self.wanted == "tool" and len(self.calls) > 1:
            self._results_are_missing()
        if self.wanted == "tool":
            raise BadRow(f"message {number} is of the {role}, but the result of `{self.calls[0].call.name}` must follow its call", place=place)
        raise BadRow(f"message {number} is of the {role}, but it is the {self.wanted}'s turn", place=place)

    def _results_are_missing(self) -> None:
        assert self.caller is not None
        follow = "1 result follows" if len(self.results) == 1 else f"{len(self.results)} results follow"
        fact = f"message {self.caller[1]} makes {len(self.calls)} calls, but {follow}"
        raise BadRow(fact, place=self.place, hint="gpt-oss makes one call at a time, and each needs its result before the next")


def reasoning_of(columns: dict[str, Any], whose: str, place: str) -> str | None:
    """The reasoning, under whatever name it stands."""
    given = [name for name in REASONING if columns.get(name) is not None]
    if not given:
        return None
    texts = [text_of(columns[name], f"`{name}`{whose}", place) for name in given]
    if len(set(texts)) > 1:
        raise BadRow(f"`{given[0]}` and `{given[1]}`{whose} differ", place=place, hint="keep one")
    return texts[0]


def _without_think(content: str, thinking: str | None, place: str) -> tuple[str, str]:
    """The answer and its reasoning, where that stands as `<think>…</think>` before it."""
    found = _THINK.match(content)
    rest = content[found.end() :] if found else content
    if found is None or "<think>" in found[1] or "<think>" in rest or "</think>" in rest:
        hint = "write <think>reasoning</think> and then the answer"
        raise BadRow("a <think> tag is not closed, or not at the beginning", place=place, hint=hint)
    inner = found[1].strip()
    if thinking is not None and thinking.strip() != inner:
        raise BadRow("the answer has a <think> part and other reasoning as well", place=place, hint="keep one")
    return rest, inner


def _check_other(entry: dict[str, Any], role: Role, number: int, place: str) -> None:
    """What only an assistant's message may have."""
    if entry.keys() <= _PLAIN:
        return
    thinking = reasoning_of(entry, f" of message {number}", place)
    if thinking is not None and thinking.strip():
        raise BadRow(f"message {number} has reasoning, but its role is {role}", place=place)
    if entry.get("tool_calls") or entry.get("function_call"):
        raise BadRow(f"message {number} calls a tool, but its role is {role}", place=place)
    _weight(entry, role, number, place)


def _weight(entry: dict[str, Any], role: Role, number: int, place: str) -> float:
    """What a message says of its loss: `train` (or `loss`), `weight` (or `loss_weight`). Only an assistant's message can have any."""
    flags = [(name, entry[name]) for name in ("train", "loss") if entry.get(name) is not None]
    weights = [(name, entry[name]) for name in ("weight", "loss_weight") if entry.get(name) is not None]
    for name, flag in flags:
        if not isinstance(flag, bool):
            raise BadRow(f"`{name}` of message {number} is {shown(flag)}", place=place, hint="true or false")
    for name, weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1e6:
            raise BadRow(f"`{name}` of message {number} is {shown(weight)}", place=place, hint="a number from 0")
    trained = {bool(value) for _, value in flags + weights}
    if len(trained) > 1 or len({weight for _, weight in weights}) > 1:
        names = " and ".join(f"`{name}`" for name, _ in flags + weights)
        raise BadRow(f"{names} of message {number} contradict each other", place=place, hint="keep one")
    if role != "assistant" and True in trained:
        raise BadRow(f"message {number} is to be trained, but its role is {role}", place=place, hint="only the assistant's messages are trained")
    if False in trained:
        return 0.0
    return float(weights[0][1]) if weights else 1.0
