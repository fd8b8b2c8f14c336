"""A GGUF file's tensors as gpt-oss's matrices in float32: verification reads an export back with ggml's own library."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastoss.errors import FastossError
from fastoss.export.base import Base
from fastoss.export.gguf_file import FILE_TYPES, Part, parts, unpack
from fastoss.export.gguf_reader import GgufFile, GgufTensor
from fastoss.export.tensors import PIECE_BYTES


class GgufWeights:
    """The same names as a bf16 checkpoint has; experts one by one, (in, out), gate and up alternating again.

    Raises `FastossError` naming the tensor that is missing, has another type or shape, or lies beyond the file's end.
    """

    def __init__(self, path: Path, base: Base):
        self.path, self.config, self.layers, self.experts = path, base.config, base.layers, base.experts
        self.file = GgufFile(path)
        tensors = dict(self.file.tensors)
        self.quantization = self._quantization()
        self._parts: dict[str, list[tuple[Part, GgufTensor]]] = {}
        for part in parts(base, self.quantization):
            tensor = tensors.pop(part.name, None)
            if tensor is None:
                raise FastossError(f"`{part.name}` is not there", place=str(path))
            have = (tensor.type, tensor.shape)
            if have != (part.type, part.shape):
                raise FastossError(f"`{part.name}` is {have[0]} {list(have[1])}, expected {part.type} {list(part.shape)}", place=str(path))
            self._parts.setdefault(part.source, []).append((part, tensor))
        if tensors:
            raise FastossError(f"`{next(iter(tensors))}` does not belong to gpt-oss", place=str(path))

    def field(self, name: str) -> Any:
        """A key's value. `FastossError` where it is missing."""
        if name not in self.file.fields:
            raise FastossError(f"the key {name} is not there", place=str(self.path))
        return self.file.fields[name]

    def type_of(self, name: str) -> str:
        return self._parts[name][0][0].type

    def matrix(self, name: str) -> torch.Tensor:
        return self._join(name, None)

    def expert(self, name: str, number: int) -> torch.Tensor:
        return self._join(name, number).T

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """A matrix in pieces along its first axis, each a bounded number of bytes."""
        ((part, tensor),) = self._parts[name]
        count = max(1, PIECE_BYTES // (4 * math.prod(part.shape[1:])))
        for first in range(0, part.shape[0], count):
            rows = min(count, part.shape[0] - first)
            yield unpack(self.file.read(tensor, first, rows), part, (rows, *part.shape[1:]))

    def _join(self, name: str, number: int | None) -> torch.Tensor:
        """A tensor, or one expert's (out, in). Of gate_up the halves alternate along the axis of outputs."""
        found = self._parts[name]
        if number is None:
            values = [unpack(self.file.read(tensor), part, part.shape) for part, tensor in found]
        else:
            values = [unpack(self.file.read(tensor, number, 1), part, part.shape[1:]) for part, tensor in found]
        if len(values) == 1:
            return values[0]
        # One expert's halves are (out / 2, in), biases (experts, out / 2).
        return torch.stack(values, dim=1).flatten(0, 1) if number is not None else torch.stack(values, dim=-1).flatten(-2)

    def _quantization(self) -> Any:
        import gguf

        kind = int(self.field("general.file_type"))
        for name, file_type in FILE_TYPES.items():
            if int(gguf.LlamaFileType[file_type]) == kind:
                return name
        raise FastossError(f"its file type {kind} is not one that fastoss writes", place=str(self.path))

    def bytes(self) -> int:
        return self.path.stat().st_size
