"""How fast gpt-oss LoRA could be on a card at most, by arithmetic and by traffic; and from that, about how long a run takes. No torch.

Counted is what no code can leave out: the products of frozen weights forward and backward (no weight gradient, but for LoRA), the
attention, the head on trained tokens, reading the weights once a pass, and an ideal traffic of activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fastoss.model.shape import MXFP4, ModelShape

# Bytes an expert's weight costs in each pass; "dequantised" writes it in bf16 and reads it again.
EXPERT_BYTES = {"bf16": 2.0, "float32": 4.0, "mxfp4": MXFP4, "mxfp4 dequantised": MXFP4 + 4}


class Speed(Protocol):
    """What a card does in bf16 matrix products (FLOP a second), and its memory's bandwidth (bytes a second)."""

    @property
    def flops(self) -> float: ...
    @property
    def bandwidth(self) -> float: ...


@dataclass(frozen=True)
class Work:
    """Documents and how they are trained. `trained` is the share of tokens that carry loss; `micro_batch` in tokens.

    `head_products`: forward and gradient of the hidden states, 2 at least; 3 where logits are computed again in the backward pass.
    """

    lengths: Sequence[int]
    trained: float
    micro_batch: int
    recompute: bool
    rank: int = 8
    precision: str = "bf16"
    head_products: int = 2


def as_computed(precision: str) -> str:
    """How the experts of a recipe's `model.precision` reach the products, as `Work` calls it: packed ones are unpacked."""
    return "mxfp4 dequantised" if precision in ("4bit", "mxfp4") else precision


def flops_a_token(shape: ModelShape, work: Work) -> float:
    again = 1 if work.recompute else 0
    frozen = shape.layers * (_attention_weights(shape) + shape.active_experts * shape.expert_matrices)
    lora = shape.layers * work.rank * (2 * (shape.hidden + shape.queries) + 2 * (shape.hidden + shape.keys))
    lora += shape.layers * shape.active_experts * work.rank * (shape.hidden + 2 * shape.intermediate + shape.intermediate + shape.hidden)
    head = work.trained * work.head_products * shape.hidden * shape.vocabulary
    # Flash attention's backward has five products where the forward has two.
    return 2 * frozen * (2 + again) + 2 * lora * (3 + again) + 2 * head + attention_flops(shape, work.lengths) * (3.5 + again)


def attention_flops(shape: ModelShape, lengths: Sequence[int]) -> float:
    """Of the forward pass, a token, over documents of these lengths: two products with every key that is seen."""

    def pairs(length: int, window: int) -> float:
        ramp = min(length, window)
        return ramp * (ramp + 1) / 2 + (length - ramp) * window

    seen = sum(pairs(length, length) + pairs(length, shape.window) for length in lengths) * shape.layers / 2
    return 4 * shape.queries * seen / sum(lengths)


def weight_bytes(shape: ModelShape, work: Work) -> float:
    """Read in one micro-batch: all experts, since a micro-batch of any size reaches all of them."""
    passes = 3 if work.recompute else 2
    plain = 4.0 if work.precision == "float32" else 2.0
    experts = shape.layers * shape.experts * shape.expert_matrices * EXPERT_BYTES[work.precision]
    return passes * (experts + plain * shape.layers * _attention_weights(shape)) + work.head_products * plain * shape.hidden * shape.vocabulary


def activation_bytes_a_token(shape: ModelShape, work: Work) -> float:
    """Written and read in bf16 if every block were one ideal kernel: rows gathered for the experts, their inner widths, and the attention's."""
    experts = shape.active_experts * 2 * (4 * shape.hidden + 6 * shape.intermediate)
    attention = 2 * (6 * shape.hidden + 4 * shape.queries + 4 * shape.keys)
    return shape.layers * (experts + attention) * (4 if work.recompute else 3)  # the backward moves twice as much as the forward


def tokens_a_second(shape: ModelShape, work: Work, card: Speed) -> dict[str, float]:
    """`arithmetic`: nothing but the products. `with_traffic`: and moving weights and activations, one after the other."""
    products = flops_a_token(shape, work) / card.flops
    traffic = (weight_bytes(shape, work) / work.micro_batch + activation_bytes_a_token(shape, work)) / card.bandwidth
    return {"arithmetic": 1 / products, "with_traffic": 1 / (products + traffic)}


def _attention_weights(shape: ModelShape) -> int:
    """And the router."""
    return shape.attention_matrices + shape.hidden * shape.experts
