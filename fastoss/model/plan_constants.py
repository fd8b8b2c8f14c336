"""What arithmetic cannot tell about a card: the constants of the plan, and where each comes from."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Constants:
    """Factors over the ideal, bytes, and shares. `source` says what they were fitted to; empty: to no GPU result of fastoss."""

    # One layer's working set over the ideal 198 kB a token: so that checkpoints and working set make the 0.92 MB a token that Unsloth publishes.
    working_set: float = 3.95
    # Activations kept without recomputation over what the autograd graph saves: nothing measured, taken as it is.
    kept: float = 1.0
    # Of what a step takes: torch's allocator reserves more than is in use.
    unused: float = 0.05
    # CUDA's context, its libraries and compiled kernels: what nvidia-smi shows of a process that holds nothing.
    context: int = 600 * 2**20
    # Share of the limit (arithmetic and traffic at the card's stated figures) that a run reaches: a guess. Unsloth publishes 3.7k to 11.5k
    # tokens a second of bf16 LoRA on a B200, a twentieth to a sixth of it, one row at a time; packed batches are fuller.
    speed: float = 0.2
    # On a processor: what libraries allocate and touch for the first time (benchmarks/plan_cpu.py).
    cpu_libraries: int = 45 * 2**20
    source: str = ""

    @property
    def measured(self) -> bool:
        return bool(self.source)

    def note(self) -> str:
        return f"fitted to {self.source}" if self.source else "estimated, not measured: there is no GPU result yet"


# What is left when nothing is wasted: no run takes less.
IDEAL = Constants(working_set=1.0, kept=0.5, unused=0.0, context=300 * 2**20)


@cache
def constants() -> Constants:
    """Those that benchmarks/calibrate.py wrote, else the estimates above."""
    file = resources.files("fastoss.assets").joinpath("plan.json")
    if not file.is_file():
        return Constants()
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    known = {f.name for f in fields(Constants)}
    return Constants(**{name: value for name, value in found.items() if name in known})
