"""Row → conversation: understands the columns that people use. Sources hand it rows, harmony takes conversations."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fastoss.config import Identity
from fastoss.data.conversation import Conversation, Message, Tool, ToolCall
from fastoss.data.formats.columns import ANY_COLUMNS, COLUMNS, renamed, replaced_columns
from fastoss.data.formats.columns import KNOWN_COLUMNS as KNOWN_COLUMNS
from fastoss.data.formats.harmony_text import parse_harmony
from fastoss.data.formats.messages import REASONING, read_messages, reasoning_of, unread_keys
from fastoss.data.formats.text import check_text, parsed_json, shown, text_of
from fastoss.data.formats.tools import check_calls, tool_definitions
from fastoss.data.reading.rows import BadRow, Row

_READ = {format: columns | ANY_COLUMNS for format, columns in COLUMNS.items()}
_LISTS = {"messages", "conversations", "prompt", "completion"}  # columns that may hold messages
_SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function_call": "function_call", "tool_call": "function_call", "observation": "tool", "tool_response": "tool",
}  # fmt: skip


class Reading(NamedTuple):
    """A row as entries of {role, content, …} that are not checked yet; `numbers` are what error messages call them, else 1, 2, 3, …"""

    entries: list[Any]
    numbers: Sequence[int] | None = None
    reasoning_effort: str | None = None
    current_date: str | None = None


def row_to_conversation(row: Row, format: str = "auto", identity: Identity | None = None, columns: Mapping[str, str] | None = None) -> Conversation:
    """Understand a row as a conversation. `format` is `auto` or the name of a format (docs/data.md); `columns` says our
    column names in the file's own (`{"instruction": "question"}`, dots reach into objects: `"data.question"`).

    Raises `BadRow` with place, fact and hint when a role, a text or the order of turns is not what it must be, and
    `FastossError` when `columns` names a column of ours that there is not.
    """
    if columns:
        row = renamed(row, columns)
    return conversation_from(row, read_row(row, format), identity)


def unread_columns(row: Row, format: str = "auto", columns: Mapping[str, str] | None = None) -> set[str]:
    """Columns of a row, and keys of its messages, that are not understood and so would be lost without a word."""
    unread: set[str] = set()
    try:
        if columns:
            unread, row = replaced_columns(row, columns), renamed(row, columns)
        format = detect_format(row.columns, row.place) if format == "auto" else format
    except BadRow:
        return set()
    read = _READ[format]
    if not row.columns.keys() <= read:
        unread |= row.columns.keys() - read
        if format == "messages" and "user" in row.columns and "final" in row.columns:
            unread -= COLUMNS["flat"]  # Multilingual-Thinking says everything twice
    for name in _LISTS & read & row.columns.keys():
        unread |= unread_keys(row.columns[name], name)
    return unread


def conversation_from(row: Row, reading: Reading, identity: Identity | None) -> Conversation:
    """The checked conversation of a row's entries, with what the row says besides them: effort, date, tools."""
    columns, place = row.columns, row.place
    messages = read_messages(reading.entries, place, reading.numbers)
    if identity is not None:
        messages = [_filled(message, identity) for message in messages]
    trained = False
    for message in messages:
        check_text(message.content, place)
        if message.role == "assistant":
            trained = trained or message.weight > 0
            if message.thinking:
                check_text(message.thinking, place)
            if message.tool_call:
                check_text(message.tool_call.arguments, place)
    if not trained:
        raise BadRow("nothing in the row is trained", place=place, hint="`train` or `weight` leaves out every answer")
    if ANY_COLUMNS.isdisjoint(columns) and reading.reasoning_effort is None:
        return Conversation(tuple(messages), place, None, reading.current_date)
    tools = _tools(columns, place)
    if tools:
        check_calls(messages, tools, place)
    effort = _said_once(columns.get("reasoning_effort"), reading.reasoning_effort, "`reasoning_effort`", place)
    if effort is not None and effort not in ("low", "medium", "high"):
        raise BadRow(f"`reasoning_effort` is {shown(effort)}", place=place, hint="low, medium or high")
    date = _said_once(_date(columns, "current_date", place), _date(columns, "date", place), "`current_date`", place)
    date = _said_once(date, reading.current_date, "`current_date`", place)
    return Conversation(tuple(messages), place, effort, date, tools)


def read_row(row: Row, format: str = "auto") -> Reading:
    """The entries of a row in one of the formats."""
    columns, place = row.columns, row.place
    if format == "auto":
        format = detect_format(columns, place)
    elif "chosen" in columns:
        _refuse_pair(columns, place)
    if format == "messages":
        return _list(columns, "messages", place)
    if format == "sharegpt":
        return _list(columns, "conversations", place)
    if format == "alpaca":
        return _alpaca(columns, "instruction", "output", place)
    if format == "query_response":
        return _alpaca(columns, "query", "response", place)
    if format == "prompt_completion":
        return _prompt_completion(columns, place)
    if format == "flat":
        return _flat(columns, place)
    parsed = parse_harmony(text_of(columns.get("text"), "`text`", place), _tools(columns, place), place)
    return Reading(parsed.entries, parsed.numbers, parsed.reasoning_effort, parsed.current_date)


def detect_format(columns: dict[str, Any], place: str) -> str:
    """The format that a row's columns show."""
    if "messages" in columns:
        return "messages"
    if "chosen" in columns:
        _refuse_pair(columns, place)
    if "conversations" in columns:
        return "sharegpt"
    if "prompt" in columns and "completion" in columns:
        return "prompt_completion"
    if "user" in columns and "final" in columns:
        return "flat"
    if "instruction" in columns or "output" in columns:
        return "alpaca"
    if "query" in columns and "response" in columns:
        return "query_response"
    text = columns.get("text")
    if isinstance(text, str) and text.lstrip("\ufeff").startswith("<|start|>"):
        return "harmony"
    hint = "give `messages`, `conversations`, `instruction` and `output`, `prompt` and `completion`, or `user` and `final`"
    fact = f"the columns are not understood ({', '.join(columns) or 'none'})"
    raise BadRow(fact, place=place, hint=f'{hint}; or say which they are: columns = {{ instruction = "question", output = "answer" }}')


def _refuse_pair(columns: dict[str, Any], place: str) -> None:
    """Refuse `chosen` and `rejected`, unless an answer to train stands beside them."""
    answered = "messages" in columns or "output" in columns or "completion" in columns or "final" in columns
    if "rejected" in columns and not answered:
        raise BadRow("the row is a preference pair (`chosen` and `rejected`)", place=place, hint='train pairs with method = "dpo"')


def _list(columns: dict[str, Any], name: str, place: str) -> Reading:
    """A column of messages, and the `system` text that may stand beside it."""
    system = system_entry(columns, place)
    entries = message_entries(columns.get(name), name, place)
    return _after(system, entries)


def _after(system: list[Any], entries: list[Any]) -> Reading:
    """The entries after the system text of a column, which has the number 0, so that theirs stay what people count."""
    return Reading([*system, *entries], range(len(entries) + 1)) if system else Reading(entries)


def message_entries(value: Any, name: str, place: str) -> list[Any]:
    """A list of messages; ShareGPT's {from, value} in the words of the others."""
    if not isinstance(value, list) or not value:
        why = ": it is missing or null" if value is None else ": it is empty" if value == [] else ""
        raise BadRow(f"`{name}` is not a list of messages{why}", place=place)
    if isinstance(value[0], dict) and "from" in value[0]:
        return [_from_sharegpt(entry, number, place) if isinstance(entry, dict) else entry for number, entry in enumerate(value, 1)]
    return value


def _from_sharegpt(entry: dict[str, Any], number: int, place: str) -> dict[str, Any]:
    role, value = entry.get("from"), entry.get("value")
    role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    rest = {key: item for key, item in entry.items() if key not in ("from", "value", "role", "content")}
    if role != "function_call":
        return {"role": role, "content": value, **rest}
    thought = None
    if isinstance(value, str):
        thinking, closed, calls = value.rpartition("</think>")
        thought = thinking + closed or None
        value = parsed_json(calls, f"the call of message {number}", place)
    return {**rest, "role": "assistant", "content": thought, "tool_calls": value if isinstance(value, list) else [value]}


def _prompt_completion(columns: dict[str, Any], place: str) -> Reading:
    """TRL's columns: two texts, or two lists of messages of which the second is the answer."""
    prompt, completion = columns.get("prompt"), columns.get("completion")
    system = system_entry(columns, place)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _after(system, message_entries(prompt, "prompt", place) + message_entries(completion, "completion", place))
    answer = answer_entry(columns, "completion", place)
    return Reading([*system, {"role": "user", "content": text_of(prompt, "`prompt`", place)}, answer])


def _flat(columns: dict[str, Any], place: str) -> Reading:
    """The columns of Multilingual-Thinking: developer, user, analysis, final."""
    system = system_entry(columns, place, "developer")
    user = {"role": "user", "content": text_of(columns.get("user"), "`user`", place)}
    answer = {"role": "assistant", "content": text_of(columns.get("final"), "`final`", place)}
    if columns.get("analysis") is not None:
        answer["thinking"] = text_of(columns["analysis"], "`analysis`", place)
    return Reading([*system, user, answer])


def _alpaca(columns: dict[str, Any], asked: str, answered: str, place: str) -> Reading:
    return Reading([*alpaca_prompt(columns, asked, place), answer_entry(columns, answered, place)])


def alpaca_prompt(columns: dict[str, Any], asked: str, place: str) -> list[dict[str, Any]]:
    """System text, history and the user's text, which is the column `asked`, then `input`."""
    user = text_of(columns.get(asked), f"`{asked}`", place)
    extra = columns.get("input")
    if extra is not None and text_of(extra, "`input`", place).strip():
        user = f"{user}\n{extra}"
    entries = system_entry(columns, place)
    history = columns.get("history")
    if history is not None and not isinstance(history, list):
        raise BadRow("`history` is not a list of [user, assistant] pairs", place=place)
    for number, pair in enumerate(history or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"pair {number} of `history` is not [user, assistant]", place=place)
        entries.append({"role": "user", "content": text_of(pair[0], f"the user's text in pair {number} of `history`", place)})
        entries.append({"role": "assistant", "content": text_of(pair[1], f"the answer in pair {number} of `history`", place)})
    entries.append({"role": "user", "content": user})
    return entries


def system_entry(columns: dict[str, Any], place: str, name: str = "system") -> list[dict[str, Any]]:
    """The system text of a column, as a list of one entry or none."""
    text = columns.get(name)
    return [] if text is None or text == "" else [{"role": "system", "content": text_of(text, f"`{name}`", place)}]


def answer_entry(columns: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    """The answer of a column, with the reasoning that may stand beside it."""
    answer: dict[str, Any] = {"role": "assistant", "content": text_of(columns.get(name), f"`{name}`", place)}
    if any(name in columns for name in REASONING):
        answer["thinking"] = reasoning_of(columns, "", place)
    return answer


def _tools(columns: dict[str, Any], place: str) -> tuple[Tool, ...]:
    """The functions of `tools`; OpenAI's older files call the column `functions`."""
    tools, functions = columns.get("tools"), columns.get("functions")
    if tools and functions:
        raise BadRow("the row has both `tools` and `functions`", place=place, hint="keep one")
    return tool_definitions(functions if functions else tools, place)


def _date(columns: dict[str, Any], name: str, place: str) -> str | None:
    """A date as text: YYYY-MM-DD, or a date as Parquet gives it."""
    value = columns.get(name)
    if value is None:
        return None
    if isinstance(value, datetime.datetime):
        value = value.date()
    try:
        date = value if isinstance(value, datetime.date) else datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        date = None
    if date is None or (isinstance(value, str) and value != date.isoformat()):
        hint = "YYYY-MM-DD: it is the date that the system message says; give the column another name if it means something else"
        raise BadRow(f"`{name}` is {shown(value)}", place=place, hint=hint)
    return date.isoformat()


def _said_once(value: Any, other: Any, what: str, place: str) -> Any:
    if value is not None and other is not None and value != other:
        raise BadRow(f"{what} is {shown(value)}, but the row says {shown(other)} as well", place=place, hint="keep one")
    return other if value is None else value


def _filled(message: Message, identity: Identity) -> Message:
    """The message with {{NAME}} and {{AUTHOR}} filled in."""

    def filled(text: str, within_json: bool = False) -> str:
        for mark, said in (("{{NAME}}", identity.name), ("{{AUTHOR}}", identity.author)):
            text = text.replace(mark, json.dumps(said, ensure_ascii=False)[1:-1] if within_json else said)
        return text

    thinking, call = message.thinking, message.tool_call
    if not any("{{" in text for text in (message.content, thinking or "", call.arguments if call else "")):
        return message
    call = call and ToolCall(call.name, filled(call.arguments, within_json=True))
    return replace(message, content=filled(message.content), thinking=thinking and filled(thinking), tool_call=call)
