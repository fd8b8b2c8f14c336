"""The header of a GGUF file, and its tensors' bytes a piece at a time (ggml's docs/gguf.md, version 3).

The gguf library's own reader makes an array of every string of the vocabulary, which takes a minute for gpt-oss, and maps the file
into memory. This one skips what verification does not ask for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from fastoss.errors import FastossError

_MAGIC = b"GGUF"
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 30  # of a string, an array, a count: more is damage


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type as ggml names it, its shape as numpy has it, and where its bytes lie."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    bytes: int


class GgufFile:
    """Keys (arrays by their length only) and tensors of a file. `FastossError` when it is damaged or ends too early."""

    def __init__(self, path: Path):
        self.path = path
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            with open(path, "rb", buffering=1 << 20) as file:
                self._read(file, path.stat().st_size)
        except (OSError, ValueError, KeyError, UnicodeDecodeError, struct.error) as problem:
            hint = "the copy is incomplete, or it is not a GGUF file: export the run again"
            raise FastossError(f"the file cannot be read: {problem}", place=str(path), hint=hint) from None

    def read(self, tensor: GgufTensor, first: int = 0, count: int | None = None) -> numpy.ndarray:
        """A tensor's bytes, or those of `count` entries of its first axis."""
        each = tensor.bytes // tensor.shape[0]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(tensor.start + first * each)
            return numpy.fromfile(file, numpy.uint8, tensor.bytes if count is None else count * each)

    def _read(self, file: BinaryIO, size: int) -> None:
        from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
        from gguf.constants import GGML_QUANT_SIZES

        if file.read(4) != _MAGIC:
            raise ValueError("it does not begin as a GGUF file")
        version = _number(file, "I")
        if version != 3:
            raise ValueError(f"version {version}, version 3 is understood")
        count, keys = _number(file, "Q"), _number(file, "Q")
        for _ in range(_sensible(keys)):
            key = _string(file)
            self.fields[key] = _value(file, _number(file, "I"))
        found = []
        for _ in range(_sensible(count)):
            name = _string(file)
            shape = tuple(_number(file, "Q") for _ in range(_sensible(_number(file, "I"), 8)))
            found.append((name, shape[::-1], GGMLQuantizationType(_number(file, "I")), _number(file, "Q")))
        alignment = self.fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        begin = -(-file.tell() // alignment) * alignment
        for name, shape, kind, offset in found:
            block, each = GGML_QUANT_SIZES[kind]
            values = int(numpy.prod(shape, dtype=numpy.int64))
            tensor = GgufTensor(name, kind.name, shape, begin + offset, values // block * each)
            if tensor.start + tensor.bytes > size:
                raise ValueError(f"it ends within `{name}`: {size:,} bytes, {tensor.start + tensor.bytes:,} are needed")
            self.tensors[name] = tensor


def _number(file: BinaryIO, format: str) -> Any:
    data = file.read(struct.calcsize(format))
    return struct.unpack(f"<{format}", data)[0]


def _sensible(count: int, most: int = _LONGEST) -> int:
    if count > most:
        raise ValueError(f"a count of {count:,}")
    return count


def _string(file: BinaryIO) -> str:
    return file.read(_sensible(_number(file, "Q"))).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _number(file, _FORMATS[kind])
    of, count = _number(file, "I"), _sensible(_number(file, "Q"))
    if of == _STRING:
        read, unpack = file.read, struct.Struct("<Q").unpack
        for _ in range(count):
            read(_sensible(unpack(read(8))[0]))
    else:
        file.seek(count * struct.calcsize(_FORMATS[of]), 1)
    return count
