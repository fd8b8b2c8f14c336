"""What every reader hands on: a row with its place, or the reason why a row cannot be read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastoss.errors import FastossError


@dataclass(frozen=True, slots=True)
class Row:
    """The columns of one row, and where it stands: `file:line` (JSONL, CSV) or `file[index]` (JSON, Parquet)."""

    columns: dict[str, Any]
    place: str


class BadRow(FastossError):
    """A row that cannot be read or understood; `[hygiene] malformed` decides what becomes of it."""


KINDS = "a .jsonl, .json, .csv or .parquet file, compressed (.gz, .zst) or not"


def kind_of(name: str) -> str:
    """`.jsonl`, `.json`, `.csv` or `.parquet`, however the file is compressed; empty for other files."""
    name = name.lower()
    for packed in (".gz", ".zst"):
        name = name.removesuffix(packed)
    kind = Path(name).suffix
    return kind if kind in (".jsonl", ".json", ".csv", ".parquet") else ""


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def spelled(text: str) -> str:
    """The text with control characters and halves of characters spelled out (`\\x1b`, `\\ud83d`): it can be written and printed."""
    return _UNPRINTABLE.sub(lambda letter: letter[0].encode("unicode_escape").decode(), text)


def shown(path: Path) -> str:
    """A path as people know it: relative where it lies below the current folder."""
    try:
        return spelled(str(path.relative_to(Path.cwd())))
    except ValueError:
        return spelled(str(path))
