"""Which columns the formats read, and a row whose columns have other names. Formats and preferences ask here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from fastoss.data.reading.rows import BadRow, Row
from fastoss.errors import FastossError

_REASONING = {"thinking", "reasoning_content", "reasoning"}
# The columns of each format; a row's own columns tell which it is. `query_response` is found, but cannot be named.
COLUMNS = {
    "messages": {"messages", "system"},
    "sharegpt": {"conversations", "system"},
    "alpaca": {"instruction", "input", "output", "history", "system", *_REASONING},
    "query_response": {"query", "input", "response", "history", "system", *_REASONING},
    "prompt_completion": {"prompt", "completion", "system", *_REASONING},
    "flat": {"developer", "user", "analysis", "final", "reasoning_language"},
    "harmony": {"text"},
}
ANY_COLUMNS = frozenset({"tools", "functions", "reasoning_effort", "current_date", "date"})
PAIR_COLUMNS = frozenset({"chosen", "rejected", "rejected_response", "rejected_messages", "question"})
KNOWN_COLUMNS = sorted(ANY_COLUMNS.union(*COLUMNS.values()))
# A row need not have these: an empty cell of a CSV or Parquet file is a column that is not there.
_OPTIONAL = ANY_COLUMNS | _REASONING | {"input", "history", "system", "developer", "analysis", "reasoning_language"}
_ABSENT = object()


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with our names for the file's columns. A dotted name reaches into an object, unless a column is called just so.

    Raises `FastossError` for a name of ours that no format knows, `BadRow` for a column that the row lacks and needs.
    """
    known = {*KNOWN_COLUMNS, *PAIR_COLUMNS}
    found: dict[str, Any] = {}
    for ours, theirs in columns.items():
        if ours not in known:
            close = difflib.get_close_matches(ours, sorted(known), n=1, cutoff=0.5)
            hint = f"did you mean `{close[0]}`?" if close else "write our name on the left (instruction, output, thinking), the file's on the right"
            raise FastossError(f"`columns` names `{ours}`, a column that no format knows", place=row.place, hint=hint)
        value = _reached(row.columns, theirs)
        if value is not _ABSENT:
            found[ours] = value
        elif ours not in _OPTIONAL:
            hint = f"`columns` says that it is `{ours}`; the row has {', '.join(f'`{name}`' for name in row.columns) or 'none'}"
            raise BadRow(f"the column `{theirs}` is not there", place=row.place, hint=hint)
    gone = {*columns, *map(_top(row.columns), columns.values())}
    return Row({name: value for name, value in row.columns.items() if name not in gone} | found, row.place)


def has_column(row: Row, theirs: str) -> bool:
    """Whether the row has what `columns` calls `theirs`: a column, or a dotted name within one."""
    return _reached(row.columns, theirs) is not _ABSENT


def replaced_columns(row: Row, columns: Mapping[str, str]) -> set[str]:
    """Columns of the file that are not read because `columns` gives their name to another."""
    return (columns.keys() & row.columns.keys()) - set(map(_top(row.columns), columns.values()))


def near_column(name: str) -> str | None:
    """The column that a name without meaning to us was perhaps meant to be."""
    close = [] if name in KNOWN_COLUMNS else difflib.get_close_matches(name, KNOWN_COLUMNS, n=1, cutoff=0.75)
    return close[0] if close else None


def _reached(columns: dict[str, Any], name: str) -> Any:
    if name in columns:
        return columns[name]
    value: Any = columns
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _top(columns: dict[str, Any]) -> Any:
    """A function from a name, dotted or not, to the column that it begins in."""
    return lambda name: name if name in columns else name.partition(".")[0]
