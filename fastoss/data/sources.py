"""Source → rows: reads files piece by piece; a row knows its file and line. Formats take it from here."""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

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
    """Yield the rows of a source in file order, at most `max_rows`; files of a folder or glob in the order of their names.

    An unreadable row is yielded as a `BadRow`, so that the caller can count it. Raises `FastossError` when a file is
    missing, is of an unknown kind, is empty, or is not UTF-8.
    """
    name = source.sample if sample and source.sample else source.source
    if name.startswith(("hf:", "modelscope:")):
        raise FastossError("hub sources are not available in this version", place=name, hint="run it on its sample with --sample")
    count = 0
    for path in _files(Path(name)):
        before = count
        try:
            for row in _READERS[_kind_of(path)](path):
                yield row
                count += 1
                if count == source.max_rows:
                    return
        except (OSError, EOFError, zlib.error) as problem:
            reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
            raise FastossError(f"cannot be read: {reason}", place=shown(path)) from None
        if count == before:
            raise FastossError("the file has no rows", place=shown(path))


def _files(path: Path) -> list[Path]:
    """The files that a source names: itself, all data files below a folder, or those that a glob matches."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind_of(p) and not p.name.startswith("."))
        if not files:
            raise FastossError(f"the folder holds no data file ({_KINDS})", place=shown(path))
        return files
    if not path.exists() and any(letter in str(path) for letter in "*?["):
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
        if not files:
            raise FastossError("no file matches", place=shown(path), hint="data paths are relative to the recipe file")
    elif not path.exists():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else "data paths are relative to the recipe file"
        raise FastossError("data file not found", place=shown(path), hint=hint)
    else:
        files = [path]
    for file in files:
        if not _kind_of(file):
            kind = f"a `{file.suffix}` file" if file.suffix else "a file without an ending"
            raise FastossError(f"{kind} cannot be read as data", place=shown(file), hint=f"give {_KINDS}")
    return files


def _kind_of(path: Path) -> str:
    """`.jsonl`, `.json`, `.csv` or `.parquet`, whatever it is packed with; empty for other files."""
    name = path.name.lower()
    for packed in (".gz", ".zst"):
        name = name.removesuffix(packed)
    kind = Path(name).suffix
    return kind if kind in _READERS else ""


def _opened(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        import pyarrow

        # Arrow's reader notices a torn file; the zstandard package ends it without a word.
        return cast(IO[bytes], io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return open(path, "rb")


def shown(path: Path) -> str:
    """A path as people know it: relative where it lies below the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    with _opened(path) as file:
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
    with _opened(path) as file:
        raw = file.read()
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


def _read_csv(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a CSV with a header line. An empty cell means that the column is not there; lists stand as JSON in their cell."""
    with io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        line = 2  # where the next row begins; quoted cells may go over several lines
        while True:
            place = f"{shown(path)}:{line}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as problem:
                raise FastossError(f"not UTF-8 text ({problem.reason})", place=place, hint="save the file as UTF-8") from None
            except csv.Error as problem:
                yield BadRow(f"not valid CSV: {problem}", place=place, hint='put texts with commas or line breaks between double quotes (")')
                line = reader.line_num + 1
                continue
            yield _csv_row(cells, place)
            line = reader.line_num + 1


def _csv_row(cells: dict[Any, Any], place: str) -> Row | BadRow:
    if None in cells or None in cells.values():
        more = "more" if None in cells else "fewer"
        return BadRow(f"the row has {more} cells than the header", place=place, hint="a text with commas stands between double quotes")
    columns: dict[str, Any] = {name: cell for name, cell in cells.items() if cell != ""}
    for name in _LIST_COLUMNS & set(columns):
        try:
            columns[name] = json.loads(columns[name])
        except ValueError:
            return BadRow(f"the cell of `{name}` is not a JSON list", place=place)
    return Row(columns, place)


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        file = pyarrow.parquet.ParquetFile(_opened(path) if path.suffix != ".parquet" else path)
        for batch in file.iter_batches(batch_size=1024):
            for columns in batch.to_pylist():
                yield Row({name: value for name, value in columns.items() if value is not None}, f"{shown(path)}[{index}]")
                index += 1
    except pyarrow.ArrowException as problem:
        raise FastossError(f"not valid Parquet: {problem}", place=shown(path)) from None


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
_KINDS = "a .jsonl, .json, .csv or .parquet file, packed as .gz or .zst or not"
_LIST_COLUMNS = {"messages", "conversations", "history"}
