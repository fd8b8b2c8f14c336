"""What an export will need, said and checked before it starts: disk, memory, time."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastoss.errors import FastossError
from fastoss.export.adapter_layouts import Adapter
from fastoss.export.base import Base
from fastoss.export.gguf_file import Quantization, parts, stored_bytes
from fastoss.export.merge import merged_tensors, mxfp4_tensors
from fastoss.export.stock import is_small
from fastoss.export.tensors import PIECE_BYTES
from fastoss.terminal import disk_size, rough_duration

_PROCESS = 1.0e9  # Python with torch, transformers and PEFT, and the tokenizer
_LLAMA_PROCESS = 1.0e9
# Values a second on one core, of everything that is done to them: reading, merging, writing, reading back, comparing (docs/log.md).
_RATES = {"adapter": 5e7, "merged": 4.0e6, "mxfp4": 2.2e6, "gguf": 2.0e6}
_MARGIN = 1.02  # of the disk


@dataclass(frozen=True)
class FormatPlan:
    """One format: bytes it will have on disk, the peak of memory while it is made and verified, and about how many seconds that takes."""

    name: str
    disk: int
    memory: int
    seconds: float

    def line(self) -> str:
        return f"{self.name}: {disk_size(self.disk)} on disk, up to {disk_size(self.memory)} of memory, about {rough_duration(self.seconds)}"


def plan_export(base: Base, adapter: Adapter, formats: Sequence[str], quantization: Quantization, scored_tokens: int) -> list[FormatPlan]:
    """`scored_tokens`: how many places' distributions are compared."""
    values = sum(math.prod(base.shape(name)) for name in base.names())
    memory = peak_memory(base, adapter, scored_tokens)
    cores = max(1, int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    companions = 30_000_000
    plans = []
    for name in formats:
        if name == "adapter":
            disk = adapter.file.entries[adapter.where[adapter.names()[0]].keys[0][0]].file.stat().st_size
            need = memory + (16.0 * values if is_small(base) else 0)  # stock PEFT holds all of a small model in float32, and copies while it loads
        elif name == "gguf":
            wanted = parts(base, quantization)
            disk = sum(map(stored_bytes, wanted))
            # The gguf library takes a tensor whole. llama.cpp maps the file: what does not fit into memory it reads again.
            need = memory + max(2.0 * max(map(stored_bytes, wanted)), _LLAMA_PROCESS)
        else:
            disk = sum(tensor.bytes for tensor in (merged_tensors(base) if name == "merged" else mxfp4_tensors(base)))
            need = float(memory)
        seconds = 20 + values / _RATES[name] / min(cores, 8)
        plans.append(FormatPlan(f"{name} {quantization}" if name == "gguf" else name, disk + companions, int(need), seconds))
    return plans


def peak_memory(base: Base, adapter: Adapter, scored_tokens: int) -> int:
    """Bytes at the peak of merging and verifying: some copies of the largest matrix in float32, never a whole tensor of experts.

    It does not grow with the number of layers.
    """
    expert = max(math.prod(base.shape(name)[1:]) for name in base.names() if base.is_experts(name)) * 4
    dense = [math.prod(base.shape(name)) for name in base.names() if ".self_attn." in name]
    pairs = [sum(adapter.file.entries[key].bytes for keys in where.keys for key in keys) for where in adapter.where.values()]
    vocabulary = base.config["vocab_size"]
    answers = 5 * scored_tokens * vocabulary * 4  # adapter, base, base rounded and export, and a copy while they are compared
    return int(_PROCESS + 12 * max(expert, max(dense) * 4) + 6 * max(pairs) + 4 * PIECE_BYTES + answers)


def check_plan(plans: Sequence[FormatPlan], folder: Path) -> None:
    """Raises `FastossError` when disk or memory will not do."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    need, free = int(sum(plan.disk for plan in plans) * _MARGIN), shutil.disk_usage(existing).free
    if need > free:
        hint = "make room, or name another place with --output"
        raise FastossError(f"the disk has {disk_size(free)} free, the export needs {disk_size(need)}", place=str(existing), hint=hint)
    memory, available = max(plan.memory for plan in plans), available_memory()
    if memory > available:
        hint = "close other programs, or export on a machine with more"
        raise FastossError(f"{disk_size(available)} of memory are free, the export needs up to {disk_size(memory)}", hint=hint)


def available_memory() -> int:
    """Bytes that a new program can use without swapping, as Linux tells; within a container's limit."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        cache = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        if limit != "max":
            free = min(free, int(limit) - used + int(cache.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return free
