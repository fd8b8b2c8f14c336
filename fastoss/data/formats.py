"""Row → conversation: understands the columns that people use. Sources hand it rows, harmony takes conversations."""

from __future__ import annotations

import re
from typing import Any

from fastoss.config import Identity
from fastoss.data.conversation import Conversation, Message
from fastoss.data.sources import BadRow, Row

_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
# What harmony writes as control tokens. As text in a row they are an injection, or the trace of another tool.
_CONTROL = re.compile(r"<\|(start|end|message|channel|constrain|return|call|startoftext|endoftext|endofprompt|target|reserved_\d+)\|>")
_ALPACA = {"instruction", "input", "output", "history", "thinking", "system"}
_MESSAGE = {"role", "content", "thinking", "reasoning_content", "tool_calls"}
KNOWN_COLUMNS = sorted(_ALPACA | {"messages", "tools", "reasoning_effort"})


def unread_columns(row: Row) -> set[str]:
    """Columns of a row, and keys of its messages, that are not understood and so would be lost without a word."""
    if "messages" not in row.columns:
        return set(row.columns) - _ALPACA - {"tools", "reasoning_effort"}
    entries = row.columns["messages"]
    keys = {str(key) for entry in entries if isinstance(entry, dict) for key in entry} if isinstance(entries, list) else set()
    return (set(row.columns) - {"messages", "tools", "reasoning_effort"}) | {f"messages.{key}" for key in keys - _MESSAGE}


def row_to_conversation(row: Row, format: str = "auto", identity: Identity | None = None) -> Conversation:
    """Understand a row as a conversation. `format` is `auto`, `messages` or `alpaca`.

    Raises `BadRow` with place, fact and hint when a role, a text or the order of turns is not what it must be.
    """
    if format == "auto":
        format = _detect(row)
    turns = _from_messages(row) if format == "messages" else _from_alpaca(row)
    if row.columns.get("tools"):
        raise BadRow("the row has `tools`", place=row.place, hint="tool calls are not available in this version")
    effort = row.columns.get("reasoning_effort")
    if effort is not None and effort not in ("low", "medium", "high"):
        raise BadRow(f"`reasoning_effort` is {effort!r}", place=row.place, hint="low, medium or high")
    messages = tuple(_checked(message, row.place, identity) for message in turns)
    _check_order(messages, row.place)
    return Conversation(messages, row.place, effort)


def _detect(row: Row) -> str:
    if "messages" in row.columns:
        return "messages"
    if "instruction" in row.columns or "output" in row.columns:
        return "alpaca"
    columns = ", ".join(row.columns) or "none"
    raise BadRow(f"the columns are not understood ({columns})", place=row.place, hint="give `messages`, or `instruction` and `output`")


def _from_messages(row: Row) -> list[Message]:
    entries = row.columns.get("messages")
    if not isinstance(entries, list) or not entries:
        raise BadRow("`messages` is not a list of messages", place=row.place)
    turns = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise BadRow(f"message {number} is not an object", place=row.place)
        role: Any = entry.get("role")
        role = "system" if role == "developer" else role  # harmony's developer message holds what others call the system text
        if role not in ("system", "user", "assistant"):
            hint = "tool calls are not available in this version" if role == "tool" else "system, user or assistant"
            raise BadRow(f"message {number} has the unknown role {role!r}", place=row.place, hint=hint)
        if entry.get("tool_calls"):
            raise BadRow(f"message {number} calls a tool", place=row.place, hint="tool calls are not available in this version")
        content = _text(entry.get("content"), f"message {number} ({role})", row.place)
        thinking = _reasoning(entry, number, row.place)
        if thinking is not None and role != "assistant":
            raise BadRow(f"message {number} has reasoning, but its role is {role}", place=row.place)
        turns.append(_assistant(content, thinking, row.place) if role == "assistant" else Message(role, content))
    return turns


def _reasoning(entry: dict[str, Any], number: int, place: str) -> str | None:
    given = [name for name in ("thinking", "reasoning_content") if entry.get(name) is not None]
    if len(given) == 2 and entry["thinking"] != entry["reasoning_content"]:
        raise BadRow(f"message {number} has both `thinking` and `reasoning_content`", place=place, hint="keep one")
    return _text(entry[given[0]], f"`{given[0]}` of message {number}", place) if given else None


def _from_alpaca(row: Row) -> list[Message]:
    columns = row.columns
    instruction = _text(columns.get("instruction"), "`instruction`", row.place)
    extra = columns.get("input")
    user = instruction
    if extra is not None and _text(extra, "`input`", row.place).strip():
        user = f"{instruction}\n{extra}"
    turns = []
    if columns.get("system") not in (None, ""):
        turns.append(Message("system", _text(columns["system"], "`system`", row.place)))
    history = columns.get("history")
    if history is not None and not isinstance(history, list):
        raise BadRow("`history` is not a list of [user, assistant] pairs", place=row.place)
    for number, pair in enumerate(history or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"pair {number} of `history` is not [user, assistant]", place=row.place)
        turns.append(Message("user", _text(pair[0], f"the user's text in pair {number} of `history`", row.place)))
        turns.append(_assistant(_text(pair[1], f"the answer in pair {number} of `history`", row.place), None, row.place))
    turns.append(Message("user", user))
    thinking = columns.get("thinking")
    thinking = None if thinking is None else _text(thinking, "`thinking`", row.place)
    turns.append(_assistant(_text(columns.get("output"), "`output`", row.place), thinking, row.place))
    return turns


def _assistant(content: str, thinking: str | None, place: str) -> Message:
    """An assistant message whose reasoning may stand as `<think>…</think>` before the answer."""
    if "<think>" in content or "</think>" in content:
        found = _THINK.match(content)
        rest = content[found.end() :] if found else content
        if found is None or "<think>" in rest or "</think>" in rest:
            raise BadRow(
                "a <think> tag is not closed, or not at the beginning", place=place, hint="write <think>reasoning</think> and then the answer"
            )
        if thinking is not None and thinking.strip() != found[1].strip():
            raise BadRow("the answer has a <think> part and a `thinking` column", place=place, hint="keep one")
        content, thinking = rest, found[1].strip()
    # Reasoning of nothing but space is no reasoning: it must not be learned as an empty analysis message.
    return Message("assistant", content, thinking if thinking and thinking.strip() else None)


def _text(value: Any, what: str, place: str) -> str:
    if value is None:
        raise BadRow(f"{what} is missing or null", place=place)
    if not isinstance(value, str):
        raise BadRow(f"{what} is not a text", place=place)
    return value


def _checked(message: Message, place: str, identity: Identity | None) -> Message:
    if not message.content.strip():
        who = {"assistant": "the answer", "user": "the user's text", "system": "the system text"}[message.role]
        raise BadRow(f"{who} is empty", place=place)
    if identity is not None:
        message = Message(message.role, _filled(message.content, identity), _filled(message.thinking, identity))
    for text in (message.content, message.thinking or ""):
        control = _CONTROL.search(text)
        if control:
            hint = "remove it: fastoss writes the control tokens itself"
            raise BadRow(f"the text holds the control token {control[0]}", place=place, hint=hint)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow("the text holds half a character (a lone surrogate)", place=place) from None
    return message


def _filled(text: Any, identity: Identity) -> Any:
    return text and text.replace("{{NAME}}", identity.name).replace("{{AUTHOR}}", identity.author)


def _check_order(messages: tuple[Message, ...], place: str) -> None:
    roles = [message.role for message in messages]
    if "system" in roles[1:]:
        raise BadRow("a system message that is not the first", place=place, hint="harmony has one, at the beginning: join them there")
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * ((len(turns) + 1) // 2)
    for number, (role, wanted) in enumerate(zip(turns, expected, strict=False), 1 + len(roles) - len(turns)):
        if role != wanted:
            raise BadRow(f"message {number} is of the {role}, but it is the {wanted}'s turn", place=place)
    if not turns or turns[-1] != "assistant":
        raise BadRow("the conversation does not end with an answer", place=place)
