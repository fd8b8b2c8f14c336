"""JSONL and JSON → rows, piece by piece: memory holds one row and a buffer, however long the file is.

`sources` hands over a path and the name to show for it. What is wrong with one row is yielded as a `BadRow`; what is
wrong with the file as a whole is raised.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from fastoss.data.reading.opening import CHUNK, CUT_SHORT, LONGEST, open_bytes, sample_of, too_long
from fastoss.data.reading.rows import BadRow, Row
from fastoss.data.reading.text_faults import not_utf8
from fastoss.errors import FastossError

_SPLIT = 16  # more letters than any number's end, word or escape has


class StrictJson:
    """JSON as the standard says: `NaN` and a key that stands twice are faults, where Python's reader is silent.

    `decode` and `raw_decode` continue past such a fault; `fault` then says what it was. orjson would be five times as fast,
    but it too keeps the last of two keys silently and rounds long integers; the reader is not what takes the time.
    """

    def __init__(self) -> None:
        self.fault = ""
        decoder = json.JSONDecoder(parse_constant=self._constant, object_pairs_hook=self._object)
        self.decode = decoder.decode
        self.raw_decode = decoder.raw_decode

    def _constant(self, name: str) -> None:
        self.fault = f"not valid JSON: {name} is not JSON"

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            self.fault = f"the key {json.dumps(twice, ensure_ascii=False)} occurs more than once in one object"
        return value

    def row(self, value: Any, place: str) -> Row | BadRow:
        if self.fault:
            fault, self.fault = self.fault, ""
            return BadRow(fault, place=place)
        if not isinstance(value, dict):
            return BadRow(f"a row is a JSON object, not {_kind(value)}", place=place)
        return Row(value, place)


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null", dict: "an object"}
    return kinds.get(type(value), "a number")


def _syntax(problem: json.JSONDecodeError) -> str:
    """The fact of a syntax error. NULs are named: they are what a crash leaves of a file that was being written."""
    if problem.doc[problem.pos : problem.pos + 1] == "\0":
        return "not valid JSON: NUL bytes (the file was torn, as by a crash while it was written)"
    return f"not valid JSON: {problem.msg.removesuffix(' at').removesuffix(' starting')}"


def _beyond(problem: ValueError | RecursionError) -> str:
    """What Python's reader gives up at: about a thousand levels, and a number of thousands of digits."""
    limit = "nested too deep" if isinstance(problem, RecursionError) else f"a number of more than {sys.get_int_max_str_digits():,} digits"
    return f"not valid JSON: {limit}"


# --- JSONL -----------------------------------------------------------------------------------------------------------


def read_jsonl(path: Path, name: str) -> Iterator[Row | BadRow]:
    """One JSON object a line; empty lines are passed over."""
    strict = StrictJson()
    decode, row = strict.decode, strict.row
    first = True
    with open_bytes(path, name) as file:
        if file.peek(3).startswith(codecs.BOM_UTF8):
            file.read(3)
        for number, raw in enumerate(iter(partial(file.readline, LONGEST), b""), 1):
            place = f"{name}:{number}"
            if len(raw) == LONGEST and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(CHUNK)
                yield BadRow(too_long("line"), place=place, hint="each line holds one whole JSON object")
                continue
            if raw.isspace():
                continue
            told: Row | BadRow
            try:
                value = decode(raw.decode())
                if first and isinstance(value, list) and value and isinstance(value[0], dict):
                    raise _one_list(name)
                told = row(value, place)
            except UnicodeDecodeError as problem:
                fault, whole = not_utf8(problem, raw, sample_of(path, name), place)
                if whole:
                    raise fault from None
                told = BadRow(fault.fact, place=place, hint=fault.hint)
            except (ValueError, RecursionError) as problem:
                strict.fault = ""
                told = _bad_line(problem, raw, place, strict, first=first)
            yield told
            first = False


def _bad_line(problem: ValueError | RecursionError, raw: bytes, place: str, strict: StrictJson, *, first: bool) -> Row | BadRow:
    """What is wrong with a line. Raises `FastossError` when the first one shows that the file is no JSONL at all."""
    if not isinstance(problem, json.JSONDecodeError):
        return BadRow(_beyond(problem), place=place)
    if raw.startswith(codecs.BOM_UTF8):  # two files were joined: the mark says nothing, and nothing is lost with it
        raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            return strict.row(strict.decode(raw.decode()), place)
        except (ValueError, RecursionError) as under_mark:
            strict.fault = ""
            return _bad_line(under_mark, raw, place, strict, first=first)
    if problem.doc[problem.pos : problem.pos + 1] in ("\r", "\n"):  # a text that is open at the line's end: say where it begins
        try:
            strict.decode(problem.doc.rstrip("\r\n"))
        except json.JSONDecodeError as open_text:
            problem = open_text
    start = raw.strip()
    if first and raw.endswith(b"\n") and (start == b"{" or start.startswith(b"[")):
        name = place.rpartition(":")[0]
        if start == b"{":
            hint = f"write one object a line: jq -c . {name} > lines.jsonl"
            raise FastossError("the file holds JSON objects over several lines; a .jsonl file holds one a line", place=name, hint=hint)
        raise _one_list(name)
    hint = "each line holds one whole JSON object" if raw.endswith(b"\n") or problem.msg == "Extra data" else CUT_SHORT
    if first and problem.pos == 0 and raw.endswith(b"\n") and b"," in raw:
        hint = "is it a table with commas? then name it .csv"
    column = min(problem.pos, len(problem.doc.rstrip("\r\n"))) + 1
    return BadRow(_syntax(problem), place=f"{place}:{column}", hint=hint)


def _one_list(name: str) -> FastossError:
    return FastossError("the file is one JSON list; a .jsonl file holds one object a line", place=name, hint="name it .json")


# --- JSON ------------------------------------------------------------------------------------------------------------


def read_json(path: Path, name: str) -> Iterator[Row | BadRow]:
    """The objects of one JSON list, one after the other: the text is read and forgotten chunk by chunk."""
    strict = StrictJson()
    with open_bytes(path, name) as file:
        text = _JsonText(file, path, name)
        first = text.peek()
        if not first:
            return
        if first != "[":
            raise _no_list(text, strict)
        text.skip()
        index = 0
        if text.peek() == "]":
            text.skip()
        else:
            while True:
                value = text.value(strict)
                yield strict.row(value, f"{name}[{index}]")
                index += 1
                letter = text.peek()
                text.skip()
                if letter == "]":
                    break
                if letter != ",":
                    raise text.error("Expecting ',' delimiter", back=len(letter))
        if text.peek():
            raise text.error("Extra data")


class _TooLong(FastossError):
    """One entry of a list does not fit into memory."""


def _no_list(text: _JsonText, strict: StrictJson) -> FastossError:
    """Why a file that does not begin with `[` cannot be read, with the way out where its first value shows one."""
    try:
        value = text.value(strict)
    except _TooLong:
        return FastossError("a .json file holds a list of rows, not an object", place=text.name)
    if text.peek():
        return text.error("Extra data", hint="one object a line is JSONL: name the file .jsonl" if isinstance(value, dict) else None)
    lists = [key for key, entry in value.items() if isinstance(entry, list)] if isinstance(value, dict) else []
    hint = None
    if len(lists) == 1:
        base = text.name.rpartition("/")[2]
        hint = f"the rows seem to be in `{lists[0]}`: jq -c '.[{json.dumps(lists[0], ensure_ascii=False)}][]' {base} > {Path(base).stem}.jsonl"
    return FastossError(f"a .json file holds a list of rows, not {_kind(value)}", place=text.name, hint=hint)


class _JsonText:
    """A window on a file's text that knows its line and column, and takes JSON values off its front."""

    def __init__(self, file: IO[bytes], path: Path, name: str):
        self.file, self.path, self.name = file, path, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer = ""
        self._at = 0
        self._lines = 0  # line breaks before the buffer
        self._column = 0  # characters between the last of them and the buffer
        self._ended = False

    def _more(self, size: int) -> bool:
        """Forget what was taken, read on; False at the end of the file."""
        if self._at:
            taken = self._buffer[: self._at]
            breaks = taken.count("\n")
            self._lines += breaks
            self._column = len(taken) - taken.rfind("\n") - 1 if breaks else self._column + len(taken)
            self._buffer = self._buffer[self._at :]
            self._at = 0
        raw = self.file.read(size)
        try:
            self._buffer += self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as problem:
            line = self._lines + self._buffer.count("\n") + problem.object[: problem.start].count(b"\n") + 1
            bad = problem.object[problem.object.rfind(b"\n", 0, problem.start) + 1 :].partition(b"\n")[0]
            fault, _ = not_utf8(problem, bad if raw else bytes(problem.object), sample_of(self.path, self.name), f"{self.name}:{line}")
            raise fault from None
        self._ended = not raw
        return not self._ended

    def peek(self) -> str:
        """The next letter that is not white space; empty at the end of the file."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in " \t\r\n":
                    return self._buffer[self._at]
                self._at += 1
            if not self._more(CHUNK):
                return ""

    def skip(self) -> None:
        """Take the letter that `peek` showed."""
        self._at = min(self._at + 1, len(self._buffer))

    def value(self, strict: StrictJson) -> Any:
        """Take one JSON value. An error at the very end of the buffer may be the buffer's fault: then more is read."""
        if not self.peek():
            raise self.error("Expecting value")
        size = CHUNK
        while True:
            try:
                strict.fault = ""
                value, end = strict.raw_decode(self._buffer, self._at)
                # An object or text ends with its last letter; of a number the buffer may hold the first digits only.
                if self._ended or end < len(self._buffer) - (0 if isinstance(value, dict | list | str) else _SPLIT):
                    self._at = end
                    return value
                unclosed = None
            except json.JSONDecodeError as found:
                # A text, number or word that the buffer cuts in two fails near its end; a text may have begun long before.
                unclosed = found.pos if found.msg.startswith("Unterminated string") else None
                if self._ended or (unclosed is None and found.pos <= len(self._buffer) - _SPLIT):
                    hint = None if unclosed is None else CUT_SHORT
                    raise self.error(_syntax(found), pos=found.pos, hint=hint) from None
            except (ValueError, RecursionError) as found:
                raise self.error(_beyond(found)) from None
            if len(self._buffer) - self._at > LONGEST:
                fact = too_long("entry") if unclosed is None else f"not valid JSON: a text is never closed, or longer than {LONGEST >> 20} MiB"
                raise _TooLong(fact, place=self.error("", pos=unclosed).place)
            self._more(size)
            size *= 2  # so that a long entry is tried a few times only

    def error(self, fact: str, *, pos: int | None = None, back: int = 0, hint: str | None = None) -> FastossError:
        """An error at a position of the buffer (by default where we stand), told as line and column."""
        pos = self._at - back if pos is None else pos
        line = self._lines + self._buffer.count("\n", 0, pos) + 1
        newline = self._buffer.rfind("\n", 0, pos)
        column = pos - newline if newline >= 0 else self._column + pos + 1
        if pos >= len(self._buffer) and self._ended:
            hint = CUT_SHORT
        fact = fact if fact.startswith(("not valid", "the ")) else f"not valid JSON: {fact}"
        return FastossError(fact, place=f"{self.name}:{line}:{column}", hint=hint)
