"""A gpt-oss in numbers, from its config alone: how many parameters of which kind, and the bytes they take in each precision. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastoss.config import LoraSettings
from fastoss.model.checkpoint_source import read_config

BF16, FLOAT32 = 2, 4
# MXFP4: 4 bits a value, and a byte of scale for 32 of them (OCP Microscaling Formats 1.0).
MXFP4 = 0.5 + 1 / 32
# NF4 with double quantisation (bitsandbytes): 4 bits, a byte of scale for 64 values, and a float32 for 256 such bytes.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a gpt-oss; `window` is that of every other layer's attention."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    experts: int
    active_experts: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    window: int = 128

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.key_value_heads * self.head_dim

    @property
    def attention_matrices(self) -> int:
        """Weights of q, k, v and o of one layer."""
        return 2 * self.hidden * (self.queries + self.keys)

    @property
    def expert_matrices(self) -> int:
        """Weights of gate_up and down of one expert."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_biases(self) -> int:
        return 2 * self.intermediate + self.hidden

    @property
    def router(self) -> int:
        return (self.hidden + 1) * self.experts

    @property
    def small(self) -> int:
        """Of one layer: biases of q, k, v and o, sinks, two norms."""
        return self.queries + 2 * self.keys + self.hidden + self.heads + 2 * self.hidden

    @property
    def vocabulary_matrix(self) -> int:
        """The embedding, or the head: one of the two."""
        return self.vocabulary * self.hidden

    @property
    def total(self) -> int:
        """All parameters."""
        experts = self.experts * (self.expert_matrices + self.expert_biases)
        return self.layers * (self.attention_matrices + self.small + self.router + experts) + 2 * self.vocabulary_matrix + self.hidden

    @property
    def active(self) -> int:
        """Parameters that a token meets: its experts and the head; of the embedding it takes one row, which is not counted."""
        experts = self.active_experts * (self.expert_matrices + self.expert_biases)
        return self.layers * (self.attention_matrices + self.small + self.router + experts) + self.vocabulary_matrix + self.hidden

    def weight_bytes(self, precision: str, backend: str = "unsloth") -> dict[str, int]:
        """Bytes of the frozen base by component.

        4bit is Unsloth's bnb-4bit checkpoint: attention and every expert in NF4, all else bf16; through transformers only
        attention is packed, since fused experts are no Linear. mxfp4 packs the experts alone.
        """
        plain = FLOAT32 if precision == "float32" else BF16
        packed = {"mxfp4": MXFP4, "4bit": NF4 if backend == "unsloth" else BF16}
        attention = NF4 if precision == "4bit" else plain
        experts = self.experts * (self.expert_matrices * packed.get(precision, plain) + self.expert_biases * plain)
        small = (self.small + self.router) * plain
        return {
            "weights: experts": int(self.layers * experts),
            "weights: attention": int(self.layers * (self.attention_matrices * attention + small) + self.hidden * plain),
            "weights: embedding and head": int(2 * self.vocabulary_matrix * plain),
        }

    def lora_parameters(self, lora: LoraSettings) -> dict[str, int]:
        """Trainable parameters by group. A matrix of (in, out) gets r · (in + out)."""
        layers = self.layers if lora.expert_layers == "all" else min(self.layers, len(lora.expert_layers))
        attention = lora.r * self.layers * (2 * (self.hidden + self.queries) + 2 * (self.hidden + self.keys))
        experts = lora.r * layers * self.experts * (2 * self.hidden + 3 * self.intermediate)
        return {"attention": attention * ("attention" in lora.targets), "experts": experts * ("experts" in lora.targets)}


GPT_OSS_20B = ModelShape("gpt-oss-20b", 2880, 2880, 24, 32, 4, 64, 8, 64, 201088)
GPT_OSS_120B = ModelShape("gpt-oss-120b", 2880, 2880, 36, 128, 4, 64, 8, 64, 201088)
# model/tiny.py holds the same numbers beside the weights; it imports torch. A test compares.
TINY = ModelShape("tiny", 64, 256, 4, 4, 2, 16, 4, 16, 201088)


def shape_of(name: str) -> ModelShape:
    """The shape of `model.name`: of a folder from its config.json, of a hub id by what it is called (nothing is downloaded)."""
    if name == "tiny":
        return TINY
    folder = Path(name).expanduser()
    if folder.is_dir():
        return shape_from_config(folder.name, read_config(str(folder)))
    return GPT_OSS_120B if "120b" in name.lower() else GPT_OSS_20B


def shape_from_config(name: str, config: dict[str, Any]) -> ModelShape:
    """The shape in a gpt-oss config.json. What it leaves out has the published model's value, as in transformers."""

    def number(key: str, default: int) -> int:
        value = config.get(key)
        return default if value is None else int(value)

    return ModelShape(
        name=name, hidden=number("hidden_size", 2880), intermediate=number("intermediate_size", 2880), layers=number("num_hidden_layers", 36),
        experts=number("num_local_experts", 128), active_experts=number("num_experts_per_tok", 4), heads=number("num_attention_heads", 64),
        key_value_heads=number("num_key_value_heads", 8), head_dim=number("head_dim", 64), vocabulary=number("vocab_size", 201088),
        window=number("sliding_window", 128),
    )  # fmt: skip
