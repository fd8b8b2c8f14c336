"""CSV → rows, line by line. Lists stand as JSON in their cell, and an empty cell is a column that is not there."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastoss.data.reading.json_files import StrictJson
from fastoss.data.reading.opening import CHUNK, CUT_SHORT, LONGEST, open_bytes, sample_of, too_long
from fastoss.data.reading.rows import BadRow, Row
from fastoss.data.reading.text_faults import not_utf8
from fastoss.errors import FastossError

_LISTS = {"messages", "conversations", "history", "tools", "rejected_messages"}
_MAYBE_LISTS = {"prompt", "completion", "chosen", "rejected"}
_MARKS = {",": "commas", ";": "`;`", "\t": "tabs", "|": "`|`"}
_JSON = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:(\[)\s*[\[{"]|\{\s*")')


def read_csv(path: Path, name: str, columns: dict[str, str]) -> Iterator[Row | BadRow]:
    """Rows of a CSV with a header line. An empty cell means that the column is not there; lists stand as JSON in their cell.

    `columns` says by which names the file goes (`{ours: the file's}`), so that its columns of lists and objects are known.
    """
    csv.field_size_limit(LONGEST)  # of the whole process; Python's own limit of 128 KiB is shorter than a long chat
    lists = {columns.get(column, column) for column in _LISTS} | {name.partition(".")[0] for name in columns.values() if "." in name}
    maybe = {columns.get(column, column) for column in _MAYBE_LISTS}
    with open_bytes(path, name) as file:
        head = file.peek(CHUNK)
        _refuse_json(head, name)
        mark = _separator(head)
        lines = _CsvLines(file, path, name)
        reader = csv.reader(lines, strict=True, delimiter=mark)
        strict = StrictJson()
        header: list[str] | None = None
        line = 1  # where the next row begins; quoted cells may go over several lines
        while True:
            place = f"{name}:{line}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except (csv.Error, BadRow) as problem:
                if header is None:
                    raise FastossError(f"the header is not valid CSV: {problem}", place=place) from None
                line = lines.number + 1
                yield _bad_csv(problem, place, mark)
                continue
            line = lines.number + 1
            if not cells:
                continue
            if header is None:
                header = _checked_header(cells, place)
            elif len(cells) != len(header):
                more = "more" if len(cells) > len(header) else "fewer"
                hint = f"put a text with {_MARKS[mark]} between double quotes"
                yield BadRow(f"the row has {more} cells than the header ({len(cells)}, {len(header)})", place=place, hint=hint)
            else:
                row = {column: cell for column, cell in zip(header, cells, strict=True) if cell}
                yield _with_lists(row, lists, maybe, strict, place)


def _separator(head: bytes) -> str:
    """What stands between the columns: a comma, or what a header without one has in its place (`;`, where numbers are written with commas)."""
    lines = head.decode("utf-8", "replace").removeprefix("\ufeff").splitlines()
    header = re.sub('"[^"]*"', "", next((line for line in lines if line.strip()), ""))
    return max(_MARKS, key=header.count) if "," not in header else ","


def _refuse_json(head: bytes, name: str) -> None:
    start = _JSON.match(head)
    if start:
        raise FastossError("the file is JSON, not CSV", place=name, hint=f"name it {'.json' if start[1] == b'[' else '.jsonl'}")


def _bad_csv(problem: csv.Error | BadRow, place: str, mark: str) -> BadRow:
    if isinstance(problem, BadRow):
        return BadRow(problem.fact, place=place, hint=problem.hint)
    if "field larger" in str(problem):
        return BadRow(too_long("cell"), place=place, hint='a double quote (") that is never closed takes in all that follows')
    if "unexpected end of data" in str(problem):
        hint = f'a double quote (") opened in this row is never closed, or {CUT_SHORT}'
        return BadRow("not valid CSV: the file ends within a quoted cell", place=place, hint=hint)
    return BadRow(f"not valid CSV: {problem}", place=place, hint=f'put texts with {_MARKS[mark]} or line breaks between double quotes (")')


def _checked_header(header: list[str], place: str) -> list[str]:
    """The names of the columns. Raises `FastossError` when they cannot be: empty, or twice."""
    for number, column in enumerate(header, 1):
        if not column.strip():
            hint = "a table saved by pandas? df.to_csv(path, index=False)" if number == 1 else "each column has a name in the first line"
            raise FastossError(f"column {number} has no name in the header", place=place, hint=hint)
        if header.count(column) > 1:
            raise FastossError(f"the header names the column `{column}` {header.count(column)} times", place=place)
    return header


def _with_lists(row: dict[str, Any], lists: set[str], maybe: set[str], strict: StrictJson, place: str) -> Row | BadRow:
    for column in row.keys() & (lists | maybe):
        cell = row[column]
        certain = column in lists
        if not certain and not cell.lstrip().startswith("[{"):
            continue
        strict.fault = ""
        try:
            value = strict.decode(cell)
        except (ValueError, RecursionError):
            if certain:
                return BadRow(f"the cell of `{column}` is not a JSON list", place=place)
            continue
        if strict.fault and certain:
            return BadRow(f"the cell of `{column}`: {strict.fault}", place=place)
        if certain or all(isinstance(entry, dict) and entry.keys() & {"role", "from"} for entry in value):
            row[column] = value
    return Row(row, place)


class _CsvLines:
    """The lines of a CSV as text. An iterator that continues after a bad line, which a generator could not."""

    def __init__(self, file: io.BufferedReader, path: Path, name: str):
        self.file, self.path, self.name = file, path, name
        self.number = 0
        self._pending: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._pending:
            self.number += 1
            return self._pending.pop()
        raw = self.file.readline(LONGEST)
        if not raw:
            raise StopIteration
        self.number += 1
        if len(raw) == LONGEST and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = self.file.readline(CHUNK)
            raise BadRow(too_long("line"))
        try:
            line = raw.decode()
        except UnicodeDecodeError as problem:
            # Which cells a damaged line would have had is unknown: the file is refused as a whole.
            fault, _ = not_utf8(problem, raw, sample_of(self.path, self.name), f"{self.name}:{self.number}")
            raise fault from None
        if self.number == 1:
            line = line.removeprefix("\ufeff")
        if "\0" in line:
            raise BadRow("NUL bytes (the file was torn, as by a crash while it was written)")
        if "\r" in line[:-2]:
            # The line breaks of an old Mac, or of a cell: the reader of csv wants them as lines of their own.
            line, *self._pending = io.StringIO(line, newline="").readlines()
            self._pending.reverse()
        return line
