"""LoRA on gpt-oss: which tensors a target group means, that every one of them was really reached, and how an adapter is kept.

Backends attach the adapter (each library has its own call); this file knows what must come out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastoss.config import LoraSettings
from fastoss.errors import FastossError
from fastoss.run import read_json

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class TrainableCounts:
    """Trainable parameters by group, and all parameters of the model."""

    attention: int
    experts: int
    total: int

    def line(self) -> str:
        trained = self.attention + self.experts
        return f"trainable: attention {self.attention:,} · experts {self.experts:,} ({trained / self.total:.2%} of {self.total:,})"


def chosen_expert_layers(settings: LoraSettings, layers: int, *, tiny: bool) -> tuple[list[int], str | None]:
    """The layers whose experts are trained, and a note where they are not the ones that were named.

    The tiny model stands in for a deeper one: named layers are mapped by their depth. Elsewhere a layer that the model
    does not have is a `FastossError`.
    """
    if settings.expert_layers == "all":
        return list(range(layers)), None
    named = list(settings.expert_layers)
    missing = [layer for layer in named if layer >= layers]
    if not missing:
        return named, None
    if not tiny:
        hint = f"the layers are 0 to {layers - 1}"
        raise FastossError(f"names layer {missing[0]}, the model has {layers}", place="lora.expert_layers", hint=hint)
    depth = 24 if max(named) < 24 else 36  # gpt-oss-20b or 120b
    mapped = sorted({min(layers - 1, round((layer + 1) * layers / depth) - 1 if layer else 0) for layer in named} - {-1})
    return mapped, f"expert_layers {named} of {depth} layers stand for {mapped} of the tiny model's {layers}"


def peft_targets(settings: LoraSettings, layers: list[int]) -> dict[str, Any]:
    """`LoraConfig` arguments for a model whose experts are fused parameters."""
    modules = list(ATTENTION_MODULES) if "attention" in settings.targets else []
    parameters = [f"{layer}.mlp.experts.{name}" for layer in layers for name in EXPERT_PARAMETERS]
    return {"target_modules": modules, "target_parameters": parameters if "experts" in settings.targets else None}


def check_targets(model: Any, settings: LoraSettings, expert_layers: list[int]) -> TrainableCounts:
    """Count what will train, and refuse when a named target was not reached (PEFT skips such targets silently).

    Raises `FastossError` naming the group and the layers that got no LoRA.
    """
    layers = model.config.num_hidden_layers
    counts = {"attention": 0, "experts": 0}
    reached: dict[str, set[int]] = {"attention": set(), "experts": set()}
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if not parameter.requires_grad:
            continue
        layer = re.search(r"\.layers\.(\d+)\.(self_attn|mlp)\b", name)
        if layer is None or ".lora_" not in name:
            raise FastossError(f"`{name}` would train, but is not a LoRA weight of attention or experts")
        group = "attention" if layer[2] == "self_attn" else "experts"
        counts[group] += parameter.numel()
        reached[group].add(int(layer[1]))
    hint = "this checkpoint's layout is not known to fastoss"
    named = {"attention": set(range(layers)), "experts": set(expert_layers)}
    for group, matrices in _matrices(model.config).items():
        wanted = named[group] if group in settings.targets else set()
        if reached[group] != wanted:
            missing, extra = sorted(wanted - reached[group]), sorted(reached[group] - wanted)
            what = f"layers {missing} got none" if missing else f"layers {extra} got it without being named"
            raise FastossError(f'LoRA on "{group}" did not reach what was named: {what}', hint=hint)
        expected = len(wanted) * settings.r * sum(size_in + size_out for size_in, size_out in matrices)
        if counts[group] != expected:
            have = f"{counts[group]:,} parameters, its {len(matrices)} matrices a layer make {expected:,}"
            raise FastossError(f'LoRA on "{group}" has {have}: some were not reached', hint=hint)
    return TrainableCounts(counts["attention"], counts["experts"], total)


def _matrices(config: Any) -> dict[str, list[tuple[int, int]]]:
    """(in, out) of every matrix of a layer that LoRA can target; rank-r LoRA adds r · (in + out) parameters to each."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    expert = [(hidden, 2 * inner), (inner, hidden)]
    return {"attention": [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)], "experts": expert * config.num_local_experts}


def check_adapter_settings(folder: Path, settings: LoraSettings) -> None:
    """Refuse an adapter whose rank or alpha is not the recipe's, from its config alone."""
    saved = read_json(folder / "adapter_config.json")
    for key, ours in (("r", settings.r), ("lora_alpha", settings.lora_alpha)):
        if saved.get(key) != ours:
            hint = f"set lora.{key} = {saved.get(key)}"
            raise FastossError(f"the adapter has {key} {saved.get(key)}, the recipe {ours}", place=str(folder), hint=hint)


def load_adapter_weights(model: Any, folder: Path, settings: LoraSettings) -> None:
    """Fill a freshly attached adapter with the weights of a saved one. `FastossError` unless every tensor fits."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    check_adapter_settings(folder, settings)
    result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    missing = [key for key in result.missing_keys if "lora_" in key]
    wrong = [*missing, *result.unexpected_keys]
    if wrong:
        hint = "lora.targets and lora.expert_layers must be those of the adapter"
        raise FastossError(f"the adapter's tensors are not the recipe's ({len(wrong)} differ, e.g. {wrong[0]})", place=str(folder), hint=hint)


def adapter_folder(name: str) -> Path:
    """The adapter that a run, or an adapter's own folder, holds. `FastossError` when there is none."""
    path = Path(name).expanduser()
    for folder in (path / "adapter", path):
        if (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file():
            return folder
    if not path.is_dir():
        raise FastossError("there is no such run or adapter", place=name, hint="name a run (runs/<name>), or an adapter's folder")
    checkpoint = (path / "checkpoints").is_dir()
    hint = (
        "the run has not finished: run the same train command again"
        if checkpoint
        else "name a run (runs/<name>), or a folder with adapter_model.safetensors"
    )
    raise FastossError("no adapter in this folder", place=name, hint=hint)
