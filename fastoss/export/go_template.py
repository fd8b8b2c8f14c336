"""Go's text/template, as much of it as our Ollama template uses, so that an export can check it where there is no Go.

Understood: text with trim markers, comments, `if`/`else if`/`else`, `range` (with variables, with else), declaring and setting variables,
fields, strings, numbers, parentheses, and the functions eq, ne, gt, lt, and, or, not, len. Anything else is an error, never skipped.
The tests render the same chats with Go itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from fastoss.errors import FastossError

_ACTION = re.compile(r"\{\{(?P<left>- )?\s*(?P<code>(?:\"(?:[^\"\\]|\\.)*\"|/\*.*?\*/|[^\"}]|\}(?!\}))*?)\s*(?P<right> -)?\}\}", re.DOTALL)
_TOKEN = re.compile(r"\s*(?:(?P<string>\"(?:[^\"\\]|\\.)*\")|(?P<number>-?\d+)|(?P<name>[$.]?[A-Za-z_][\w.]*|\.|\$)|(?P<sign>:=|=|[(),|]))")


class _Node(NamedTuple):
    """`kind` is text, print, set, if or range; the other fields are what that kind needs."""

    kind: str
    code: Any = None
    body: Sequence[Any] = ()
    other: Sequence[Any] = ()


class GoTemplate:
    """A parsed template. `FastossError` where it holds what this file does not know."""

    def __init__(self, text: str):
        self._pieces = list(_split(text))
        self._at = 0
        self._nodes, end = self._parse_list()
        if end is not None:
            raise _unknown(f"`{end}` without a beginning")

    def render(self, values: dict[str, Any]) -> str:
        out: list[str] = []
        _run(self._nodes, values, [{"$": values}], out)
        return "".join(out)

    def _parse_list(self) -> tuple[list[_Node], str | None]:
        """Nodes up to the `end` or `else …` that closes them; that one is returned."""
        nodes: list[_Node] = []
        while self._at < len(self._pieces):
            is_code, piece = self._pieces[self._at]
            self._at += 1
            if not is_code:
                nodes.append(_Node("text", piece))
                continue
            word = piece.split(None, 1)[0] if piece else ""
            if word in ("end", "else"):
                return nodes, piece
            if word in ("if", "range"):
                nodes.append(self._parse_block(word, piece[len(word) :]))
            elif piece and not piece.startswith("/*"):
                nodes.append(_parse_action(piece))
        return nodes, None

    def _parse_block(self, kind: str, code: str) -> _Node:
        head = _parse_range(code) if kind == "range" else _parse_expression(code)
        body, end = self._parse_list()
        if end is None:
            raise _unknown(f"`{kind}{code}` has no end")
        other: list[_Node] = []
        if end.startswith("else"):
            rest = end[4:].strip()
            if rest.startswith("if "):
                return _Node(kind, head, body, [self._parse_block("if", rest[2:])])
            if rest:
                raise _unknown(end)
            other, end = self._parse_list()
            if end != "end":
                raise _unknown(f"`{kind}{code}` has no end")
        return _Node(kind, head, body, other)


def _split(text: str) -> Iterator[tuple[bool, str]]:
    place, trim = 0, False
    for action in _ACTION.finditer(text):
        before = text[place : action.start()]
        before = before.lstrip() if trim else before
        before = before.rstrip() if action["left"] else before
        if before:
            yield False, before
        yield True, action["code"]
        place, trim = action.end(), bool(action["right"])
    rest = text[place:].lstrip() if trim else text[place:]
    if "{{" in rest:
        raise _unknown(rest[rest.index("{{") :][:40])
    if rest:
        yield False, rest


def _unknown(what: str) -> FastossError:
    return FastossError(f"not understood in the Go template: {what.strip()}", place="Modelfile")


def _parse_action(code: str) -> _Node:
    tokens = _tokens(code)
    if len(tokens) > 2 and tokens[0][1].startswith("$") and tokens[1] in (("sign", ":="), ("sign", "=")):
        return _Node("set", (tokens[0][1], tokens[1][1] == ":=", _expression(tokens[2:], code)))
    return _Node("print", _expression(tokens, code))


def _parse_range(code: str) -> tuple[list[str], Any]:
    names, found, rest = code.partition(":=")
    if not found:
        return [], _parse_expression(code)
    return [name.strip() for name in names.split(",")], _parse_expression(rest)


def _parse_expression(code: str) -> Any:
    return _expression(_tokens(code), code)


def _tokens(code: str) -> list[tuple[str, str]]:
    tokens, place = [], 0
    code = code.strip()
    while place < len(code):
        found = _TOKEN.match(code, place)
        if found is None or found.lastgroup is None:
            raise _unknown(code)
        tokens.append((found.lastgroup, found[found.lastgroup]))
        place = found.end()
    return tokens


def _expression(tokens: list[tuple[str, str]], code: str) -> Any:
    """A value, or (function, values). One level of parentheses is one value."""
    values: list[Any] = []
    place = 0
    while place < len(tokens):
        kind, text = tokens[place]
        if (kind, text) == ("sign", "("):
            depth, end = 1, place + 1
            while end < len(tokens) and depth:
                depth += {"(": 1, ")": -1}.get(tokens[end][1], 0) if tokens[end][0] == "sign" else 0
                end += 1
            if depth:
                raise _unknown(code)
            values.append(_expression(tokens[place + 1 : end - 1], code))
            place = end
            continue
        if kind == "string":
            values.append(("value", json.loads(text)))
        elif kind == "number":
            values.append(("value", int(text)))
        elif kind == "name" and text in _FUNCTIONS and not values:
            values.append(("function", text))
        elif kind == "name" and text[0] in ".$":
            values.append(("field", text))
        else:
            raise _unknown(code)
        place += 1
    if values and values[0][0] == "function":
        return ("call", values[0][1], values[1:])
    if len(values) != 1:
        raise _unknown(code)
    return values[0]


def _value(expression: Any, dot: Any, scopes: list[dict[str, Any]]) -> Any:
    if expression[0] == "value":
        return expression[1]
    if expression[0] == "call":
        return _FUNCTIONS[expression[1]](*(_value(argument, dot, scopes) for argument in expression[2]))
    name = expression[1]
    if name == ".":
        return dot
    head, *fields = name.split(".") if name.startswith("$") else ("", *name[1:].split("."))
    value = dot
    if head:
        scope = next((scope for scope in reversed(scopes) if head in scope), None)
        if scope is None:
            raise _unknown(f"{head} was never set")
        value = scope[head]
    for part in fields:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _run(nodes: Sequence[_Node], dot: Any, scopes: list[dict[str, Any]], out: list[str]) -> None:
    for node in nodes:
        if node.kind == "text":
            out.append(node.code)
        elif node.kind == "print":
            value = _value(node.code, dot, scopes)
            out.append("<no value>" if value is None else str(value))
        elif node.kind == "set":
            name, new, expression = node.code
            value = _value(expression, dot, scopes)
            scope = scopes[-1] if new else next((scope for scope in reversed(scopes) if name in scope), None)
            if scope is None:
                raise _unknown(f"{name} was never set")
            scope[name] = value
        elif node.kind == "if":
            chosen = node.body if _truth(_value(node.code, dot, scopes)) else node.other
            _run(chosen, dot, [*scopes, {}], out)
        else:
            names, expression = node.code
            items = _value(expression, dot, scopes) or ()
            for index, item in enumerate(items):
                named = dict(zip(names, (index, item) if len(names) == 2 else (item,), strict=False))
                _run(node.body, item, [*scopes, named], out)
            if not items:
                _run(node.other, dot, [*scopes, {}], out)


def _truth(value: Any) -> bool:
    return bool(value)


def _first(values: Sequence[Any], wanted: bool) -> Any:
    """Go's `and` and `or` return the value that decides."""
    return next((value for value in values if _truth(value) is wanted), values[-1])


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda left, *right: left in right,
    "ne": lambda left, right: left != right,
    "gt": lambda left, right: left > right,
    "lt": lambda left, right: left < right,
    "and": lambda *values: _first(values, False),
    "or": lambda *values: _first(values, True),
    "not": lambda value: not _truth(value),
    "len": len,
}
