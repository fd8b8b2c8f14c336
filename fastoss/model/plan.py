"""What a run will need before anything is loaded: memory by component, disk, and time. From numbers alone, without torch.

Work (from training/planning/run_plan.py, which counts it in the schedule) and a model's shape come in, a `MemoryPlan` goes out. What the
processor's part says was measured on it (benchmarks/plan_cpu.py); a GPU's part is arithmetic and the constants of
model/plan_constants.py, which say where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastoss.config import LoraSettings
from fastoss.model.plan_constants import Constants
from fastoss.model.shape import BF16, FLOAT32, ModelShape

# What model/attention_kernels.py and model/head.py do on a processor; they import torch. A test compares.
EAGER_ROWS = 128
CPU_HEAD_ROWS, GPU_HEAD_ROWS = 32, 256

Strategy = Literal["ddp", "zero2", "zero3", "fsdp"]


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a run. `documents`: tokens of each document in it; padded rows count whole."""

    documents: Sequence[int]

    @property
    def tokens(self) -> int:
        return sum(self.documents)


@dataclass(frozen=True)
class Setting:
    """All that memory depends on besides the shape and the micro-batch."""

    backend: str
    precision: str
    device: str  # gpu | cpu
    lora: LoraSettings
    recompute: bool
    strategy: Strategy = "ddp"
    ranks: int = 1
    host_layers: int = 0  # with fsdp: their shares wait on the host
    mapped: bool = False  # on a processor: the weights lie in a file of the same dtype, and are read when they are touched


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak of training, by component, of one process (one card).

    The components add up to `peak`. `beside` is what the card holds that torch's allocator does not count. `others` are peaks of
    their own, at other times or on another device.
    """

    components: dict[str, int]
    beside: int = 0
    others: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return sum(self.components.values())

    @property
    def card_bytes(self) -> int:
        """What must be free on the card."""
        return self.peak + self.beside


def plan_memory(shape: ModelShape, setting: Setting, batch: MicroBatch, constants: Constants) -> MemoryPlan:
    """Memory at the peak of a training step of `batch`."""
    parts = _held(shape, setting)
    if setting.device == "cpu":
        return MemoryPlan(_with_cpu_step(shape, setting, batch, constants, parts), 0, {"merging and exporting (CPU)": merge_peak(shape)})
    working = _gpu_step(shape, setting, batch, constants)
    # After the activations are gone, AdamW's foreach form makes a copy of what it updates.
    update = 4 * sum(shape.lora_parameters(setting.lora).values()) // _shards(setting, "optimizer")
    if update > sum(working.values()):
        working = {"the optimizer's own copy": update}
    evaluation = sum(parts.values()) + int(batch.tokens * layer_bytes(shape, BF16)) + head_tile(shape, setting)
    others = {"evaluation": min(evaluation, sum(parts.values()) + sum(working.values())), "merging and exporting (CPU)": merge_peak(shape)}
    return MemoryPlan(parts | working, constants.context, others)


def _held(shape: ModelShape, setting: Setting) -> dict[str, int]:
    """What stays from the first step to the last: the frozen base, the adapter, its gradients, AdamW's two moments."""
    weights = shape.weight_bytes(setting.precision, setting.backend)
    if setting.device == "cpu" and setting.mapped:
        weights["weights: embedding and head"] //= 2  # of the embedding the rows that are met, no more
    if setting.device == "cpu" and setting.precision != "float32":
        weights = shape.weight_bytes("bf16", setting.backend)
    parts = {name: count // _shards(setting, "weights") for name, count in weights.items()}
    waiting = min(setting.host_layers, shape.layers) if _shards(setting, "weights") > 1 and setting.device == "gpu" else 0
    for name in ("weights: experts", "weights: attention"):
        parts[name] -= parts[name] * waiting // shape.layers
    trained = sum(shape.lora_parameters(setting.lora).values())
    # PEFT and Unsloth keep the adapter in float32, whatever the base is in.
    parts["LoRA"] = FLOAT32 * trained // _shards(setting, "LoRA")
    parts["gradients"] = FLOAT32 * trained // _shards(setting, "gradients")
    parts["optimizer states"] = 2 * FLOAT32 * trained // _shards(setting, "optimizer")
    if setting.ranks > 1:
        # DDP reduces copies of the gradients, ZeRO-2 its bucket. The others fetch layers: FSDP2 holds the one that computes beside the next
        # one's buffer in the backward pass, beside two buffers in the forward pass (where experts with LoRA take one stack less).
        layer = (shape.attention_matrices + shape.experts * shape.expert_matrices) * (FLOAT32 if setting.precision == "float32" else BF16)
        fetched = (2 if shape.lora_parameters(setting.lora)["experts"] else 3) * layer + (layer // setting.ranks if waiting else 0)
        parts["exchange between cards"] = {"ddp": FLOAT32 * trained, "zero2": min(FLOAT32 * trained, 2 * 10**9)}.get(setting.strategy, fetched)
    return parts


def _shards(setting: Setting, what: Literal["weights", "LoRA", "gradients", "optimizer"]) -> int:
    """Over how many processes a kind is spread."""
    spread = {
        "ddp": (),
        "zero2": ("gradients", "optimizer"),
        "zero3": ("weights", "LoRA", "gradients", "optimizer"),
        "fsdp": ("weights",),  # of the frozen base; the LoRA is whole in each process (model/sharding.py)
    }
    return setting.ranks if what in spread[setting.strategy] else 1


def head_tile(shape: ModelShape, setting: Setting) -> int:
    """Logits of so many positions over the whole vocabulary, their probabilities, and on a GPU the product before it is made float32."""
    if setting.device == "cpu":
        return 2 * CPU_HEAD_ROWS * shape.vocabulary * FLOAT32
    return GPU_HEAD_ROWS * shape.vocabulary * (2 * FLOAT32 + BF16)


def merge_peak(shape: ModelShape) -> int:
    """Of `fastoss export`, which works matrix by matrix: a process, and some copies of the largest matrix in float32 (export/export_plan.py)."""
    largest = max(2 * shape.hidden * shape.intermediate, shape.hidden * shape.queries) * FLOAT32
    answers = 5 * 8 * 48 * shape.vocabulary * FLOAT32
    return int(1e9 + 12 * largest + answers)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def layer_bytes(shape: ModelShape, width: int) -> float:
    """Bytes a token of the ideal working set of one layer's backward pass (shared figures: 198 kB for gpt-oss-20b in bf16)."""
    experts = shape.active_experts * (2 * (2 * shape.intermediate) + 2 * shape.hidden) * width
    attention = 2 * (shape.queries + 2 * shape.keys) * width
    return experts + attention + 2 * shape.hidden * FLOAT32


def kept_bytes(shape: ModelShape, width: int) -> float:
    """Bytes a token that one layer keeps without recomputation: rows for the experts, gate and up, what becomes of them, q, k, v, o, norms."""
    experts = shape.active_experts * (2 * shape.hidden + 7 * shape.intermediate) * width
    return experts + (2 * shape.queries + 2 * shape.keys) * width + 3 * shape.hidden * FLOAT32


def _gpu_step(shape: ModelShape, setting: Setting, batch: MicroBatch, constants: Constants) -> dict[str, int]:
    width = FLOAT32 if setting.precision == "float32" else BF16
    layers, tokens = shape.layers, batch.tokens
    working = tokens * layer_bytes(shape, width) * constants.working_set
    kept = tokens * shape.hidden * width * layers if setting.recompute else tokens * kept_bytes(shape, width) * layers * constants.kept
    parts = {("checkpoints of activations" if setting.recompute else "activations kept"): int(kept), "working set of a layer": int(working)}
    stack = shape.experts * shape.expert_matrices * width
    lora = shape.lora_parameters(setting.lora)
    if setting.backend == "transformers" and lora["experts"]:
        # PEFT adds W + BA for a layer's whole stack, and its gradient is as large; kept for every layer where nothing is computed again.
        chosen = layers if setting.lora.expert_layers == "all" else len(setting.lora.expert_layers)
        parts["experts with LoRA added in"] = int(stack * (2 if setting.recompute else chosen + 1))
    elif setting.precision == "mxfp4":
        parts["experts of a layer, unpacked"] = int(stack)
    elif setting.precision == "4bit":
        parts["a matrix, unpacked"] = int(4 * shape.hidden * shape.intermediate * BF16)
    # The head's gradient of the hidden states, in bf16 and float32.
    parts["the head's tile"] = head_tile(shape, setting) + int(tokens * shape.hidden * (width + FLOAT32))
    parts["what the allocator leaves unused"] = int(constants.unused * sum(parts.values()))
    return parts


# --- on a processor, in float32 ----------------------------------------------------------------------------------------


def cpu_layer_bytes(shape: ModelShape, setting: Setting, documents: Sequence[int]) -> int:
    """Bytes that one layer keeps for its backward pass, in float32, averaged over the two kinds of layers.

    Counted with saved_tensors_hooks on models of many shapes, exact to a percent (docs/log.md).
    """
    tokens = sum(documents)
    lora = setting.lora
    expert_lora = lora.r if "experts" in lora.targets else 0
    rows = shape.active_experts * (6 * shape.intermediate + shape.hidden + (shape.intermediate + shape.hidden if expert_lora else 0))
    a_token = rows + 3 * shape.hidden + 2 * shape.queries + 3 * shape.heads + (4 * lora.r if "attention" in lora.targets else 0) + 30
    attention = sum(_seen(length, None, shape) + _seen(length, shape.window, shape) for length in documents) / 2
    return int(FLOAT32 * (tokens * a_token + attention))


def _seen(length: int, window: int | None, shape: ModelShape) -> int:
    """Values that the eager kernel keeps of a document: each part's weights, and the keys and values it saw, a copy for every head."""
    values = 0
    for first in range(0, length, EAGER_ROWS):
        last = min(first + EAGER_ROWS, length)
        keys = last - (0 if window is None else max(0, first - window + 1))
        values += shape.heads * (last - first) * keys + 2 * shape.heads * shape.head_dim * keys
    return values


def _with_cpu_step(shape: ModelShape, setting: Setting, batch: MicroBatch, constants: Constants, parts: dict[str, int]) -> dict[str, int]:
    layer = cpu_layer_bytes(shape, setting, batch.documents)
    if setting.recompute:
        parts["checkpoints of activations"] = FLOAT32 * batch.tokens * shape.hidden * shape.layers
        parts["working set of a layer"] = 2 * layer
    else:
        parts["activations kept"] = layer * shape.layers
        parts["working set of a layer"] = layer
    if shape.lora_parameters(setting.lora)["experts"]:
        stack = shape.experts * shape.expert_matrices * FLOAT32
        chosen = shape.layers if setting.lora.expert_layers == "all" else len(setting.lora.expert_layers)
        parts["experts with LoRA added in"] = stack * (2 if setting.recompute else chosen + 1)
    parts["the head's tile"] = head_tile(shape, setting)
    parts["libraries"] = constants.cpu_libraries
    return parts
