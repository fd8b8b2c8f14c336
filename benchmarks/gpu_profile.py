"""What a card can do at all, and where a step's time goes: the phases `card` and `profile`."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

from gpu_common import Place, Record, checkpoint
from gpu_contest import _fastoss, _rows, fastoss_setting, precision

LISTED = 30
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item", "aten::_local_scalar_dense", "aten::nonzero")


def card(place: Place, record: Record) -> None:
    """The card's matrix products and memory, measured: the limit in the table is made of these."""
    import torch

    device, kind = ("cpu", torch.float32) if place.dry else ("cuda", torch.bfloat16)
    size, count = (512, 2**22) if place.dry else (8192, 2**30)
    one, other = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    product = _seconds(lambda: one @ other, device)
    source, target = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    copy = _seconds(lambda: target.copy_(source), device)
    record.note(flops=2 * size**3 / product, bandwidth=2 * count / copy, product=f"{size}³ in {kind}".replace("torch.", ""))


def _seconds(action: Any, device: str) -> float:
    """The fastest of some, each of several calls in a row: what the card can do, not what it did meanwhile."""
    import torch

    taken = []
    for _ in range(7):
        begun = time.perf_counter()
        for _ in range(5):
            action()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - begun) / 5)
    return min(taken[1:])


def profile(place: Place, record: Record) -> None:
    """Steps 4 and 5 of fastoss at its best setting under torch's profiler: kernels, gaps between them, waits of the host, small copies.

    Profiling slows the host down, so the gaps are those of a profiled step; `step_seconds` before it are not profiled.
    """
    import transformers.trainer
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    setting = fastoss_setting(place)
    folder, kind = checkpoint(place, record, "mxfp4"), precision(place, record)
    data, _ = _rows(place, trial=False)
    activities = [ProfilerActivity.CPU, *([] if place.dry else [ProfilerActivity.CUDA])]
    watched = profiler(activities=activities, record_shapes=False)
    ends: list[float] = []

    class Callback(transformers.trainer.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                _wait(place)
                watched.start()
                self.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _wait(place)
            ends.append(time.perf_counter())
            if state.global_step == 5:
                record.note(profiled_seconds=ends[-1] - self.begun)
                watched.stop()

    transformers.trainer.DEFAULT_CALLBACKS.append(Callback)
    try:
        _fastoss(place, record, folder, kind, data, setting | {"max_steps": 5})
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(Callback)
    plain = [later - earlier for earlier, later in itertools.pairwise(ends[:3])]
    record.note(setting=setting, precision=kind, step_seconds=statistics.median(plain))
    record.note(**_table(place, watched, record.values["profiled_seconds"]))


def _wait(place: Place) -> None:
    if not place.dry:
        import torch

        torch.cuda.synchronize()


def _table(place: Place, watched: Any, wall: float) -> dict[str, Any]:
    """The costliest operations, and how long the device had nothing to do."""
    entries = watched.key_averages()
    on_device = lambda entry: 0 if place.dry else entry.self_device_time_total  # noqa: E731
    spent = (lambda entry: entry.self_cpu_time_total) if place.dry else on_device
    kernels = [entry for entry in entries if spent(entry) > 0]
    busy = sum(map(spent, kernels)) / 1e6
    rows = [
        {
            "name": entry.key[:120], "calls": entry.count, "device_ms": round(on_device(entry) / 1e3, 3),
            "host_ms": round(entry.self_cpu_time_total / 1e3, 3), "share": round(spent(entry) / 1e6 / busy, 4),
        }
        for entry in sorted(kernels, key=spent, reverse=True)[:LISTED]
    ]  # fmt: skip
    return {
        "operations": rows,
        "kernels_launched": sum(entry.count for entry in entries if entry.key in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC")),
        "busy_share": None if place.dry else busy / wall,
        "waits": {entry.key: {"calls": entry.count, "host_ms": round(entry.self_cpu_time_total / 1e3, 3)} for entry in entries if entry.key in WAITS},
        "copies": {entry.key: entry.count for entry in entries if "Memcpy" in entry.key or entry.key in ("cudaMemcpyAsync", "aten::copy_")},
        "profiled_steps": 2,
    }
