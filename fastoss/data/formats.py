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
# The columns of each format; a row's own columns tell which it is.
_COLUMNS = {
    "messages": {"messages"},
    "sharegpt": {"conversations", "system"},
    "alpaca": {"instruction", "input", "output", "history", "thinking", "system"},
    "prompt_completion": {"prompt", "completion"},
    "flat": {"developer", "user", "analysis", "final", "reasoning_language"},
}
_ANY = {"tools", "reasoning_effort"}
_MESSAGE = {"role", "content", "thinking", "reasoning_content", "tool_calls"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
KNOWN_COLUMNS = sorted(set().union(*_COLUMNS.values(), _ANY))


def unread_columns(row: Row, format: str = "auto") -> set[str]:
    """Columns of a row, and keys of its messages, that are not understood and so would be lost without a word."""
    try:
        format = _detect(row) if format == "auto" else format
    except BadRow:
        return set()
    unread = set(row.columns) - _COLUMNS[format] - _ANY
    if format == "messages" and "user" in row.columns and "final" in row.columns:
        unread -= _COLUMNS["flat"]  # Multilingual-Thinking says everything twice
    entries = row.columns.get("messages")
    keys = {str(key) for entry in entries if isinstance(entry, dict) for key in entry} if isinstance(entries, list) else set()
    return unread | {f"messages.{key}" for key in keys - _MESSAGE}


def row_to_conversation(row: Row, format: str = "auto", identity: Identity | None = None) -> Conversation:
    """Understand a row as a conversation. `format` is `auto` or the name of one of the five formats (docs/data.md).

    Raises `BadRow` with place, fact and hint when a role, a text or the order of turns is not what it must be.
    """
    if format == "auto":
        format = _detect(row)
    readers = {
        "messages": _from_messages, "sharegpt": _from_sharegpt, "alpaca": _from_alpaca,
        "prompt_completion": _from_prompt_completion, "flat": _from_flat,
    }  # fmt: skip
    turns = readers[format](row)
    if row.columns.get("tools"):
        raise BadRow("the row has `tools`", place=row.place, hint="tool calls are not available in this version")
    effort = row.columns.get("reasoning_effort")
    if effort is not None and effort not in ("low", "medium", "high"):
        raise BadRow(f"`reasoning_effort` is {effort!r}", place=row.place, hint="low, medium or high")
    messages = tuple(_checked(message, row.place, identity) for message in turns)
    _check_order(messages, row.place)
    return Conversation(messages, row.place, effort)


def _detect(row: Row) -> str:
    columns = row.columns
    for format, telling in (
        ("messages", ("messages",)),
        ("sharegpt", ("conversations",)),
        ("prompt_completion", ("prompt", "completion")),
        ("flat", ("user", "final")),
    ):
        if all(name in columns for name in telling):
            return format
    if "instruction" in columns or "output" in columns:
        return "alpaca"
    hint = "give `messages`, `conversations`, `instruction` and `output`, `prompt` and `completion`, or `user` and `final`"
    raise BadRow(f"the columns are not understood ({', '.join(columns) or 'none'})", place=row.place, hint=hint)


def _from_messages(row: Row) -> list[Message]:
    return _messages(row.columns.get("messages"), "messages", row.place)


def _messages(entries: Any, column: str, place: str) -> list[Message]:
    if not isinstance(entries, list) or not entries:
        raise BadRow(f"`{column}` is not a list of messages", place=place)
    turns = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise BadRow(f"message {number} is not an object", place=place)
        role: Any = entry.get("role")
        role = "system" if role == "developer" else role  # harmony's developer message holds what others call the system text
        if role not in ("system", "user", "assistant"):
            hint = "tool calls are not available in this version" if role == "tool" else "system, user or assistant"
            raise BadRow(f"message {number} has the unknown role {role!r}", place=place, hint=hint)
        if entry.get("tool_calls"):
            raise BadRow(f"message {number} calls a tool", place=place, hint="tool calls are not available in this version")
        content = _text(entry.get("content"), f"message {number} ({role})", place)
        thinking = _reasoning(entry, number, place)
        if thinking is not None and role != "assistant":
            raise BadRow(f"message {number} has reasoning, but its role is {role}", place=place)
        turns.append(_assistant(content, thinking, place) if role == "assistant" else Message(role, content))
    return turns


def _from_sharegpt(row: Row) -> list[Message]:
    """`conversations` of {from, value}; entries of {role, content} under that name are read as messages."""
    entries = row.columns.get("conversations")
    if isinstance(entries, list):
        entries = [
            {"role": _SHAREGPT_ROLES.get(str(e["from"]), e["from"]), "content": e.get("value")} if isinstance(e, dict) and "from" in e else e
            for e in entries
        ]
    turns = _messages(entries, "conversations", row.place)
    return _system_text(row) + turns


def _from_prompt_completion(row: Row) -> list[Message]:
    """TRL's columns: two texts, or two lists of messages of which the second is the answer."""
    prompt, completion = row.columns.get("prompt"), row.columns.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _messages(prompt, "prompt", row.place) + _messages(completion, "completion", row.place)
    answer = _assistant(_text(completion, "`completion`", row.place), None, row.place)
    return [Message("user", _text(prompt, "`prompt`", row.place)), answer]


def _from_flat(row: Row) -> list[Message]:
    """The columns of Multilingual-Thinking: developer, user, analysis, final."""
    columns = row.columns
    turns = []
    if columns.get("developer") not in (None, ""):
        turns.append(Message("system", _text(columns["developer"], "`developer`", row.place)))
    turns.append(Message("user", _text(columns.get("user"), "`user`", row.place)))
    analysis = columns.get("analysis")
    thinking = None if analysis is None else _text(analysis, "`analysis`", row.place)
    return [*turns, _assistant(_text(columns.get("final"), "`final`", row.place), thinking, row.place)]


def _system_text(row: Row) -> list[Message]:
    text = row.columns.get("system")
    return [] if text in (None, "") else [Message("system", _text(text, "`system`", row.place))]


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
    turns = _system_text(row)
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
