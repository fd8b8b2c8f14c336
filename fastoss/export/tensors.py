"""Weights on disk, a piece at a time: safetensors shards are read and written without a whole tensor in memory.

The merge reads a base checkpoint through `Checkpoint` and writes through `ShardWriter`; verification reads both sides.
safetensors' own library maps files into memory, where every page that was touched counts as the process's; plain reads keep
the peak at one expert's matrices, whatever the size of the model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastoss.errors import FastossError
from fastoss.run import read_json, write_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4_000_000_000
PIECE_BYTES = 64_000_000  # of a tensor that is copied as it is
_LARGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its file, the place of its first byte, and what it is."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. `FastossError` when it is damaged or shorter than its header says."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError("its header is damaged")
            header = json.loads(file.read(length))
        entries = {}
        for name, told in header.items():
            if name == "__metadata__":
                continue
            begin, end = told["data_offsets"]
            entry = Entry(path, 8 + length + begin, DTYPES[told["dtype"]], tuple(told["shape"]))
            if end - begin != entry.bytes:
                raise ValueError(f"`{name}` has {end - begin:,} bytes, its shape needs {entry.bytes:,}")
            if 8 + length + end > size:
                raise ValueError(f"it ends within `{name}`: {size:,} bytes, its header says {8 + length + end:,}")
            entries[name] = entry
    except FileNotFoundError:
        raise FastossError("the file is missing", place=str(path)) from None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        hint = "the copy or the download is incomplete: fetch it again"
        raise FastossError(f"the weights cannot be read: {problem}", place=str(path), hint=hint) from None
    return entries


class Checkpoint:
    """The tensors of a model's folder by name, one file or several with an index. Opens no file before it is asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX
        files: Iterable[Path]
        if index.is_file():
            named: dict[str, str] = read_json(index)["weight_map"]
            files = sorted({folder / name for name in named.values()})
        else:
            named = {}
            files = sorted(folder.glob("*.safetensors"))
        self.entries: dict[str, Entry] = {}
        for file in files:
            self.entries |= read_header(file)
        if not self.entries:
            raise FastossError("the folder has no *.safetensors", place=str(folder), hint="fastoss reads safetensors only")
        lost = sorted(set(named) - set(self.entries))
        if lost:
            raise FastossError(f"`{lost[0]}` is in the index and in no file ({len(lost)} do)", place=str(folder))
        odd = [name for name in self.entries if name.endswith("$")]
        if odd:
            hint = "transformers wrote it with save_pretrained after loading MXFP4: its experts are lost when it is loaded; export the run again"
            raise FastossError(f"a tensor is named literally `{odd[0]}`", place=str(folder), hint=hint)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def names(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, in its own dtype."""
        entry = self.entries[name]
        return _read(entry, entry.start, entry.shape)

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """`tensor[row]`: of fused experts, one expert."""
        entry = self.entries[name]
        shape = entry.shape[1:]
        return _read(entry, entry.start + row * math.prod(shape) * entry.dtype.itemsize, shape)

    def read_rows(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor in pieces along its first axis, each a bounded number of bytes."""
        entry = self.entries[name]
        if not entry.shape:
            yield self.read(name)
            return
        each = max(1, math.prod(entry.shape[1:]) * entry.dtype.itemsize)
        rows = max(1, PIECE_BYTES // each)
        for first in range(0, entry.shape[0], rows):
            count = min(rows, entry.shape[0] - first)
            yield _read(entry, entry.start + first * each, (count, *entry.shape[1:]))


def _read(entry: Entry, start: int, shape: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(shape)
    buffer = bytearray(count * entry.dtype.itemsize)
    try:
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(start)
            view, done = memoryview(buffer), 0
            while done < len(buffer):
                got = file.readinto(view[done:])
                if not got:
                    raise FastossError("the file ended while it was read", place=str(entry.file))
                done += got
    except OSError as problem:
        raise FastossError(f"cannot be read: {problem.strerror}", place=str(entry.file)) from None
    if count == 0:
        return torch.empty(shape, dtype=entry.dtype)
    return torch.frombuffer(buffer, dtype=entry.dtype).view(shape)


@dataclass(frozen=True)
class Wanted:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(wanted: Iterable[Wanted], limit: int = SHARD_BYTES) -> list[list[Wanted]]:
    """Tensors in their order, cut into files of about `limit` bytes."""
    shards: list[list[Wanted]] = []
    size = 0
    for tensor in wanted:
        if not shards or size + tensor.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


class ShardWriter:
    """Writes the shards of a checkpoint whose tensors are known beforehand; their bytes come in that order, in pieces of any size."""

    def __init__(self, folder: Path, shards: list[list[Wanted]]):
        self.folder, self.shards = folder, shards
        self._number = -1
        self._file: BinaryIO | None = None
        self._left: list[Wanted] = []
        self._bytes_left = 0
        self._weight_map: dict[str, str] = {}

    def write(self, name: str, piece: torch.Tensor) -> None:
        """The next bytes of tensor `name`; an error of ours when they come out of order or too many."""
        if self._bytes_left == 0:
            self._begin_tensor()
        tensor = self._left[0]
        assert (tensor.name, tensor.dtype) == (name, piece.dtype), f"{name} {piece.dtype} came, {tensor} was planned"
        data = piece.contiguous().view(torch.uint8) if piece.dim() else piece.reshape(1).view(torch.uint8)
        assert data.numel() <= self._bytes_left, f"{name} has more bytes than planned"
        assert self._file is not None
        self._file.write(memoryview(data.flatten().numpy()))
        self._bytes_left -= data.numel()
        if self._bytes_left == 0:
            self._left.pop(0)

    def close(self) -> None:
        """End the last file and write the index, when there are several."""
        assert self._number == len(self.shards) - 1, "not all shards were written"
        assert not self._left, "not all tensors were written"
        assert self._bytes_left == 0
        self._end_file()
        if len(self.shards) > 1:
            size = sum(tensor.bytes for shard in self.shards for tensor in shard)
            write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(self._weight_map.items()))})

    def _begin_tensor(self) -> None:
        if not self._left:
            self._end_file()
            self._number += 1
            self._left = list(self.shards[self._number])
            name = self._file_name()
            self._weight_map |= {tensor.name: name for tensor in self._left}
            self._file = open(self.folder / name, "wb")  # noqa: SIM115 - closed in _end_file, over many calls
            self._file.write(_header(self._left))
        self._bytes_left = self._left[0].bytes

    def _file_name(self) -> str:
        count = len(self.shards)
        return "model.safetensors" if count == 1 else f"model-{self._number + 1:05d}-of-{count:05d}.safetensors"

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())  # gigabytes are handed to the disk as they come, not all at the end
            self._file.close()
            self._file = None


def _header(tensors: list[Wanted]) -> bytes:
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        told[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, place + tensor.bytes]}
        place += tensor.bytes
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
