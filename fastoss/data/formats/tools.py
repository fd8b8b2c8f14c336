"""Tool definitions and tool calls as rows give them → ours. The reader of messages hands the calls of a message and their results here.

gpt-oss makes one call at a time. Several calls in one message, as OpenAI's API allows them, are told one after the other:
call, result, call, result.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fastoss.data.conversation import Message, Tool, ToolCall
from fastoss.data.formats.text import check_text, content_of, json_text, parsed_json, shown, text_of
from fastoss.data.reading.rows import BadRow

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class Call(NamedTuple):
    """A call as a row makes it. `id` is what its result refers to."""

    id: str | int | None
    call: ToolCall


class Result(NamedTuple):
    """What a tool gave back, in message `number`. `id` and `name` are None where the row does not say them."""

    id: str | int | None
    name: Any
    content: str
    number: int


def tool_definitions(value: Any, place: str) -> tuple[Tool, ...]:
    """A row's `tools`: a list, or a JSON text of one, of functions, bare or as `{"type": "function", "function": …}`."""
    if isinstance(value, str):
        value = parsed_json(value, "`tools`", place) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadRow("`tools` is not a list of functions", place=place)
    tools = tuple(_definition(entry, f"tool {number}", place) for number, entry in enumerate(value, 1))
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise BadRow(f"the tool `{name}` is defined twice", place=place)
    return tools


def _definition(entry: Any, what: str, place: str) -> Tool:
    function = _function(entry, what, place)
    description, parameters = function.get("description"), function.get("parameters")
    text = "" if description is None else text_of(description, f"the description of {what}", place)
    if parameters is not None and not isinstance(parameters, dict):
        raise BadRow(f"`parameters` of {what} is not an object", place=place, hint="give a JSON Schema")
    check_text(text, place)
    check_text(json_text(parameters, f"`parameters` of {what}", place), place)
    return Tool(_name(function.get("name"), what, place), text, parameters)


def _function(entry: Any, what: str, place: str) -> dict[str, Any]:
    """The function within `{"type": "function", "function": …}`, or the entry itself."""
    if not isinstance(entry, dict):
        raise BadRow(f"{what} is not an object", place=place)
    if entry.get("type") not in (None, "function"):
        raise BadRow(f"{what} is of the type {shown(entry['type'])}", place=place, hint="only functions are understood")
    function = entry.get("function")
    return function if isinstance(function, dict) else entry


def _name(value: Any, what: str, place: str) -> str:
    name = text_of(value, f"the name of {what}", place).removeprefix("functions.")
    if not _NAME.fullmatch(name):
        raise BadRow(f"{what} has the name {shown(name)}", place=place, hint="a name is made of letters, digits, _, . and -")
    return name


def calls_of(entry: dict[str, Any], number: int, place: str) -> list[Call]:
    """The calls that a message makes: its `tool_calls`, or the older `function_call`."""
    what = f"the call of message {number}"
    calls, single = entry.get("tool_calls"), entry.get("function_call")
    if isinstance(calls, str):
        calls = parsed_json(calls, f"`tool_calls` of message {number}", place) if calls.strip() else None
    if calls is not None and not isinstance(calls, list):
        raise BadRow(f"`tool_calls` of message {number} is not a list", place=place)
    if calls and single:
        raise BadRow(f"message {number} has both `tool_calls` and `function_call`", place=place, hint="keep one")
    entries = calls or ([single] if single else [])
    if len(entries) == 1:
        return [_call(entries[0], what, place)]
    return [_call(entry, f"call {index} of message {number}", place) for index, entry in enumerate(entries, 1)]


def _call(entry: Any, what: str, place: str) -> Call:
    function = _function(entry, what, place)
    if "arguments" not in function:
        raise BadRow(f"{what} has no `arguments`", place=place, hint="write {} for none")
    arguments = function["arguments"]
    if arguments is None:  # what Parquet makes of an empty object
        arguments = {}
    if isinstance(arguments, str):
        text, arguments = arguments.strip(), parsed_json(arguments, f"`arguments` of {what}", place)
    else:
        text = json_text(arguments, f"`arguments` of {what}", place)
    if not isinstance(arguments, dict):
        raise BadRow(f"`arguments` of {what} is not a JSON object", place=place)
    return Call(_id(entry.get("id"), what, place), ToolCall(_name(function.get("name"), what, place), text))


def result_of(entry: dict[str, Any], number: int, place: str) -> Result:
    """A message of role `tool`: its text, or whatever else it holds as JSON text."""
    content, what = entry.get("content"), f"message {number} (tool)"
    parts = isinstance(content, list) and content and all(isinstance(part, dict) and part.get("type") == "text" for part in content)
    text = content_of(entry, number, "tool", place) if parts or content is None or isinstance(content, str) else json_text(content, what, place)
    return Result(_id(entry.get("tool_call_id"), what, place), entry.get("name"), text, number)


def _id(value: Any, what: str, place: str) -> str | int | None:
    if value is not None and not isinstance(value, str | int):
        raise BadRow(f"the id of {what} is not a text", place=place)
    return None if value == "" else value


def one_by_one(message: Message, calls: Sequence[Call], results: Sequence[Result], place: str) -> list[Message]:
    """Calls and as many results as call, result, call, result; `message`'s reasoning and text stand before the first call.

    Results belong to calls by their ids, or else by their order. `BadRow` where ids or names do not fit together.
    """
    turns = []
    for index, (call, result) in enumerate(zip(calls, _in_order(calls, results, place), strict=True)):
        name = call.call.name
        if result.name is not None and _name(result.name, f"message {result.number} (tool)", place) != name:
            raise BadRow(f"message {result.number} is a result of {shown(result.name)}, but `{name}` was called", place=place)
        base = message if index == 0 else replace(message, content="", thinking=None)
        turns += [replace(base, tool_call=call.call), Message("tool", result.content, name=name)]
    return turns


def _in_order(calls: Sequence[Call], results: Sequence[Result], place: str) -> list[Result]:
    """The results in the order of their calls."""
    ids = [call.id for call in calls]
    if None in ids or any(result.id is None for result in results):
        return list(results)
    found: list[Result] = []
    for id in ids:
        fitting = [result for result in results if result.id == id]
        if len(fitting) != 1 or ids.count(id) > 1:
            other = next((result for result in results if result.id not in ids), None)
            if other is not None:
                raise BadRow(f"message {other.number} answers the call {shown(other.id)}, which was not made", place=place)
            raise BadRow(f"the id {shown(id)} stands for more than one call or result", place=place)
        found += fitting
    return found


def check_calls(messages: Sequence[Message], tools: Sequence[Tool], place: str) -> None:
    """Where a row defines tools, only those may be called."""
    names = {tool.name for tool in tools}
    for message in messages:
        if message.tool_call is not None and message.tool_call.name not in names:
            raise BadRow(f"the tool `{message.tool_call.name}` is called, but not defined in `tools`", place=place)
