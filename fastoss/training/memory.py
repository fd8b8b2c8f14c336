"""When a micro-batch does not fit into memory: cut it into smaller ones with exactly the same loss, or say what to change."""

from __future__ import annotations

import gc
import resource
from collections.abc import Sequence

import torch

from fastoss.errors import RunFailed

_SAID = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(problem: BaseException) -> bool:
    """Of the card (CUDA's allocator, or a library that asks the driver itself) or of the host."""
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(problem, RuntimeError) and any(words in str(problem) for words in _SAID)


def memory_line() -> str:
    """The peak so far, in GiB."""
    if torch.cuda.is_available():
        peak, whole = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return f"{peak / 2**30:.1f} of {whole / 2**30:.1f} GiB at the peak"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at the peak"  # ru_maxrss is in KiB on Linux


def memory_in_use() -> dict[str, int]:
    """Bytes in use now and at the peak so far: of the card where there is one, else of this process."""
    if torch.cuda.is_available():
        return {"memory": torch.cuda.memory_allocated(), "memory_peak": torch.cuda.max_memory_allocated()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not on Linux
        now = peak
    return {"memory": now, "memory_peak": peak}


def free_memory() -> None:
    """Give back what a failed step left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory(step: int, tokens: int, *, splitting: bool) -> RunFailed:
    """The error of a run that ran out of memory. `tokens` are those of the micro-batch, padding included."""
    if splitting:
        hint = 'a single row does not fit: lower model.max_length, set train.recompute = "full", or take a model.precision of fewer bits'
    else:
        hint = 'lower train.tokens_per_batch and raise gradient_accumulation_steps, or set train.on_oom = "split"; train.recompute = "full" helps too'
    return RunFailed(f"memory is full at step {step}: a micro-batch of {tokens:,} tokens, {memory_line()}", hint=hint)


def cut(members: Sequence[int], lengths: Sequence[int], pieces: int) -> list[list[int]]:
    """Members of a micro-batch in at most `pieces` groups of consecutive ones, each of about as many tokens; none is empty.

    `lengths` are the members' tokens. With as many pieces as members each is alone.
    """
    pieces = min(pieces, len(members))
    total, sum_so_far = sum(lengths), 0
    groups: list[list[int]] = [[] for _ in range(pieces)]
    for place, (member, length) in enumerate(zip(members, lengths, strict=True)):
        middle = sum_so_far + length / 2
        # Not so far ahead that a later group stays empty, nor so far behind that an earlier one does.
        group = min(max(int(middle * pieces / total), pieces - (len(members) - place)), place, pieces - 1)
        groups[group].append(member)
        sum_so_far += length
    return [group for group in groups if group]
