"""Parquet → rows in small batches. Arrow gives every row all columns; what is null in it was not there."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastoss.data.reading.opening import open_bytes
from fastoss.data.reading.rows import BadRow, Row
from fastoss.errors import FastossError

_BATCH_ROWS = 1024
_BATCH_BYTES = 8 << 20


def read_parquet(path: Path, name: str) -> Iterator[Row | BadRow]:
    """The rows of a Parquet file. Nested lists, structs and maps become lists and dicts."""
    import pyarrow
    import pyarrow.parquet

    with open_bytes(path, name, expected=b"PAR1") as file, tempfile.TemporaryFile() as unpacked:
        source: Any = path
        if path.suffix.lower() != ".parquet":
            shutil.copyfileobj(file, unpacked)  # a Parquet file is read from its end, which a compressed one does not allow
            source = unpacked
        try:
            # Without these two settings a whole row group is held, which may be the whole file.
            table = pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
            yield from _rows(table, name)
        except (pyarrow.ArrowException, ValueError) as problem:
            raise FastossError(f"not valid Parquet: {str(problem).splitlines()[0]}", place=name) from None


def _rows(table: Any, name: str) -> Iterator[Row | BadRow]:
    columns = table.schema_arrow.names
    for column in columns:
        if columns.count(column) > 1:
            raise FastossError(f"the file has the column `{column}` {columns.count(column)} times", place=name)
    convert = {field.name: converter for field in table.schema_arrow if (converter := _converter(field.type))}
    groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
    widest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    index = 0
    for batch in table.iter_batches(batch_size=max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(widest, 1)))):
        try:
            every = batch.to_pylist()
        except (ValueError, OverflowError):
            every = None  # a text that is not UTF-8, a date beyond the calendar: find the row that has it
        for number in range(batch.num_rows):
            yield _row(every[number] if every else batch.slice(number, 1), convert, f"{name}[{index}]")
            index += 1


def _row(values: Any, convert: dict[str, Callable[[Any], Any]], place: str) -> Row | BadRow:
    """One row from Python's values, or from a batch of this row alone."""
    try:
        if not isinstance(values, dict):
            (values,) = values.to_pylist()
        row = {column: value for column, value in values.items() if value is not None}
        for column in convert.keys() & row.keys():
            row[column] = convert[column](row[column])
    except (ValueError, OverflowError) as problem:
        return BadRow(f"a value cannot be read: {problem}", place=place)
    return Row(row, place)


def _converter(type: Any) -> Callable[[Any], Any] | None:
    """What makes a value of an Arrow type the value that was written; None where it is that already.

    Within a struct Arrow fills in null for a key that a row does not have (`thinking` of a user's message): such keys go.
    A JSON column (as `datasets` writes it for values of several types) is a text to Arrow: it is read.
    """
    import pyarrow

    types = pyarrow.types
    if isinstance(type, pyarrow.BaseExtensionType):
        return json.loads if type.extension_name == "arrow.json" else _converter(type.storage_type)
    if types.is_struct(type):
        inner = {field.name: converter for field in type if (converter := _converter(field.type))}
        return lambda value: {key: inner[key](entry) if key in inner else entry for key, entry in value.items() if entry is not None}
    if types.is_map(type):
        of_item = _converter(type.item_type)
        return lambda value: {key: of_item(entry) if of_item and entry is not None else entry for key, entry in value}
    if types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type):
        of_entry = _converter(type.value_type)
        return of_entry and (lambda value: [None if entry is None else of_entry(entry) for entry in value])
    return None
