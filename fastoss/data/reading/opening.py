"""A data file's bytes, decompressed and checked: every reader of files opens them here."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

from fastoss.data.reading.text_faults import refuse_disguise
from fastoss.errors import FastossError

LONGEST = 64 << 20  # bytes of one line, list entry or cell: longer ones are a broken file, and would fill the memory
CHUNK = 1 << 20
_BUFFER = 1 << 18
_PACKED = {".gz": ("gzip", b"\x1f\x8b"), ".zst": ("zstd", b"\x28\xb5\x2f\xfd")}
CUT_SHORT = "the file may be cut short: fetch or write it again"


def open_bytes(path: Path, name: str, *, expected: bytes | None = None) -> io.BufferedReader:
    """Open a file, decompressed if it is compressed. Raises `FastossError` when it is not what its name says."""
    packing, mark = _PACKED.get(path.suffix.lower(), ("", b""))
    if packing:
        with open(path, "rb") as packed:
            head = packed.read(4096)
        refuse_disguise(head, name, but=mark)
        if head and not head.startswith(mark):
            fact, plain = f"cannot be read: it is not compressed with {packing}, as its extension says", name.rpartition("/")[2].rpartition(".")[0]
            raise FastossError(fact, place=name, hint=f"name it {plain}")
    raw: Any
    if packing == "gzip":
        raw = gzip.open(path, "rb")  # noqa: SIM115 (the buffer closes it)
    elif packing == "zstd":
        import pyarrow

        # Arrow's reader notices a torn file; the zstandard package ends it without a word.
        raw = pyarrow.input_stream(str(path), compression="zstd")
    else:
        raw = open(path, "rb", buffering=0)  # noqa: SIM115
    file = io.BufferedReader(raw, _BUFFER)
    try:
        head = file.peek(4096)[:4096]
        if packing and head.startswith(tuple(mark for _, mark in _PACKED.values())):
            raise FastossError("the file is compressed twice", place=name, hint="decompress it once")
        refuse_disguise(head, name, but=expected)
    except BaseException:
        file.close()
        raise
    return file


def sample_of(path: Path, name: str) -> bytes:
    """The beginning of a file, for a second look at it."""
    with open_bytes(path, name) as file:
        return file.read(CHUNK)


def too_long(what: str) -> str:
    return f"the {what} is longer than {LONGEST >> 20} MiB"
