"""Source → rows: reads files line by line; a row knows its file and line. Formats take it from here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastoss.config import DataSource
from fastoss.errors import FastossError


@dataclass(frozen=True)
class Row:
    """The columns of one row, and where it stands: `file:line` (JSONL) or `file[index]` (JSON)."""

    columns: dict[str, Any]
    place: str


class BadRow(FastossError):
    """A row that cannot be read or understood; `[hygiene] malformed` decides what becomes of it."""


def read_rows(source: DataSource, *, sample: bool = False) -> Iterator[Row | BadRow]:
    """Yield the rows of a source in file order, at most `max_rows`.

    An unreadable row is yielded as a `BadRow`, so that the caller can count it. Raises `FastossError` when the file is
    missing, is of an unknown kind, is empty, or is not UTF-8.
    """
    name = source.sample if sample and source.sample else source.source
    path = Path(name)
    if name.startswith(("hf:", "modelscope:")):
        raise FastossError("hub sources are not available in this version", place=name, hint="run it on its sample with --sample")
    if not path.exists():
        raise FastossError("data file not found", place=shown(path), hint="data paths are relative to the recipe file")
    readers = {".jsonl": _read_jsonl, ".json": _read_json}
    if path.is_dir() or path.suffix.lower() not in readers:
        kind = "a folder" if path.is_dir() else f"a `{path.suffix}` file" if path.suffix else "a file without an ending"
        raise FastossError(f"{kind} cannot be read as data", place=shown(path), hint="give a .jsonl or .json file")
    count = 0
    try:
        for row in readers[path.suffix.lower()](path):
            yield row
            count += 1
            if count == source.max_rows:
                return
    except OSError as problem:
        raise FastossError(f"cannot be read: {problem.strerror}", place=shown(path)) from None
    if count == 0:
        raise FastossError("the file has no rows", place=shown(path))


def shown(path: Path) -> str:
    """A path as people know it: relative where it lies below the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{shown(path)}:{number}"
            if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                raw = raw[3:]
            if not raw.strip():
                continue
            yield _parse(raw.rstrip(b"\r\n"), place)


def _parse(raw: bytes, place: str) -> Row | BadRow:
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as problem:
        return BadRow(f"not UTF-8 text (byte {problem.start + 1})", place=place, hint="save the file as UTF-8")
    except json.JSONDecodeError as problem:
        return BadRow(f"not valid JSON: {problem.msg}", place=f"{place}:{problem.colno}", hint="each line holds one whole JSON object")
    except (ValueError, RecursionError) as problem:
        return BadRow(f"not valid JSON: {problem}", place=place)
    return _row(value, place)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _row(value: Any, place: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(f"a row is a JSON object, not {_kind(value)}", place=place)
    return Row(value, place)


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _read_json(path: Path) -> Iterator[Row | BadRow]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise FastossError(f"not UTF-8 text (byte {problem.start + 1})", place=shown(path), hint="save the file as UTF-8") from None
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as problem:
        place = f"{shown(path)}:{problem.lineno}:{problem.colno}"
        hint = "one object a line is JSONL: name the file .jsonl" if problem.msg == "Extra data" else None
        raise FastossError(f"not valid JSON: {problem.msg}", place=place, hint=hint) from None
    except (ValueError, RecursionError) as problem:
        raise FastossError(f"not valid JSON: {problem}", place=shown(path)) from None
    if not isinstance(values, list):
        raise FastossError(
            f"a .json file holds a list of rows, not {_kind(values) if not isinstance(values, dict) else 'an object'}", place=shown(path)
        )
    for index, value in enumerate(values):
        yield _row(value, f"{shown(path)}[{index}]")
