"""The limit: how fast gpt-oss LoRA could be on a card at most, by arithmetic and by traffic. `python benchmarks/limit.py` prints it for an H200.

The arithmetic stands in fastoss/model/speed.py, where the plan of a run needs it too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from random_checkpoint import GPT_OSS_20B

from fastoss.model.speed import Work, attention_flops, flops_a_token, tokens_a_second

__all__ = ["H200", "Card", "Work", "attention_flops", "flops_a_token", "tokens_a_second"]


@dataclass(frozen=True)
class Card:
    """What a card does in bf16 matrix products (FLOP a second), and its memory's bandwidth (bytes a second). Measured, not promised."""

    flops: float
    bandwidth: float


H200 = Card(790e12, 4.3e12)  # assumed: 80 and 90 % of NVIDIA's data sheet (989, 4.8); the phase `card` measures the one at hand


def main() -> None:
    length = int(sys.argv[1]) if sys.argv[1:] else 2048
    for recompute in (True, False):
        for precision in ("bf16", "mxfp4", "mxfp4 dequantised"):
            work = Work([length], trained=1.0, micro_batch=16384, recompute=recompute, precision=precision)
            found = tokens_a_second(GPT_OSS_20B, work, H200)
            cost = flops_a_token(GPT_OSS_20B, work) / 1e9
            print(f"recompute {recompute!s:6}{precision:18} {cost:5.1f} GFLOP a token, " + ", ".join(f"{k} {v:,.0f} tok/s" for k, v in found.items()))


if __name__ == "__main__":
    main()
