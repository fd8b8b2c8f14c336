"""The memory that a run really takes, by the same rule by which it is planned."""

from __future__ import annotations

import importlib
import resource
from pathlib import Path

from fastoss.data.tokenizer import encode
from fastoss.model.backend import ModelPlan, prepare_process


class MemoryMeter:
    """Begins before the model is loaded; `peak_bytes` tells how far memory has come since.

    On a GPU that is what torch's allocator has reserved at most, on a processor the growth of the process over what it held
    with all libraries imported and the tokenizer ready.
    """

    def __init__(self, plan: ModelPlan, method: str):
        self.gpu = plan.device == "gpu"
        self._before = 0
        if self.gpu:
            return  # Unsloth is to be imported with the model, and torch counts for itself
        prepare_process(plan)
        importlib.import_module(f"fastoss.training.{method}")

        encode("ready")
        _forget_peak()
        self._before = _status("VmRSS")

    def peak_bytes(self) -> int:
        if self.gpu:
            import torch

            return int(torch.cuda.max_memory_reserved())
        return max(0, _status("VmHWM") - self._before)


def _forget_peak() -> None:
    """Reset the kernel's count of this process's peak (proc(5), clear_refs). Where it does not, an earlier peak may stand for the run's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    try:
        told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(told[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # elsewhere the peak is all there is
