"""The original weights that a run was trained on, seen one matrix at a time in float32, whatever form they are stored in.

Exports start from these, never from weights that were rounded to four bits for training: openai/gpt-oss in MXFP4 (which
becomes float32 exactly) or a checkpoint in bf16 or float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastoss.config import ModelConfig
from fastoss.errors import FastossError
from fastoss.export.mxfp4 import dequantise
from fastoss.export.tensors import Checkpoint
from fastoss.model.checkpoint_source import read_config
from fastoss.model.lora import EXPERT_PARAMETERS

_BLOCKS, _SCALES = "_blocks", "_scales"
# Everything a model's folder holds that is not weights, and travels with an export.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_PUBLISHED = ("20b", "120b")


def original_source(model: ModelConfig) -> str:
    """The folder or hub id with the original weights of the model that a run was trained on.

    A checkpoint in bitsandbytes' four bits is not original: the published ones stand for OpenAI's; others are refused.
    """
    if model.name == "tiny":
        from fastoss.model.tiny import tiny_model_folder

        return str(tiny_model_folder())
    folder = Path(model.name).expanduser()
    if not folder.is_dir():
        for size in _PUBLISHED:
            if model.name.startswith((f"unsloth/gpt-oss-{size}-unsloth-bnb-4bit", f"unsloth/gpt-oss-{size}-bnb-4bit")):
                return f"openai/gpt-oss-{size}"
        return model.name
    form = (read_config(str(folder)).get("quantization_config") or {}).get("quant_method")
    if form not in (None, "mxfp4"):
        hint = "train from the checkpoint in MXFP4 or bf16 (precision 4bit rounds it while it loads), or name its folder with --base"
        raise FastossError(
            f"the base holds weights in `{form}`, which are rounded: merging into them would keep the loss", place=str(folder), hint=hint
        )
    return str(folder.resolve())


def fetch(source: str) -> Path:
    """The folder of a checkpoint, downloaded when it is a hub id. `FastossError` when it cannot be had."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith(("/", ".", "~")) or source.count("/") != 1:
        hint = "it was moved or removed; name the base's folder with --base"
        raise FastossError("the base's weights are not there", place=source, hint=hint)
    from huggingface_hub import snapshot_download

    try:
        # OpenAI's repository also holds the same weights in two other forms, in folders of their own.
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.jinja"], ignore_patterns=["original/*", "metal/*"]))
    except Exception as problem:
        hint = "check the network (HF_ENDPOINT names another hub), or name a local folder with --base"
        raise FastossError(f"its weights cannot be fetched: {type(problem).__name__}", place=source, hint=hint) from None


class Base:
    """A checkpoint's tensors by the names they have in bf16; fused experts one by one, always (in, out)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict[str, Any] = read_config(str(folder))
        self.file = Checkpoint(folder)
        self.experts = int(self.config["num_local_experts"])
        self.layers = int(self.config["num_hidden_layers"])
        form = (self.config.get("quantization_config") or {}).get("quant_method")
        if form not in (None, "mxfp4"):
            raise FastossError(f"the checkpoint holds weights in `{form}`", place=str(folder))
        self._check_names()

    @property
    def is_mxfp4(self) -> bool:
        return any(name.endswith(_BLOCKS) for name in self.file.names())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights that are not MXFP4."""
        return self.file.entries["model.embed_tokens.weight"].dtype

    def names(self) -> list[str]:
        """Every tensor once, by its name in bf16, in the order of the files."""
        return [name.removesuffix(_BLOCKS) for name in self.file.names() if not name.endswith(_SCALES)]

    def is_experts(self, name: str) -> bool:
        """Whether this is a fused matrix of experts (their biases are not)."""
        return name.endswith(tuple(f"mlp.experts.{parameter}" for parameter in EXPERT_PARAMETERS))

    def is_packed(self, name: str) -> bool:
        return name + _BLOCKS in self.file

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in bf16: fused experts (experts, in, out)."""
        if not self.is_packed(name):
            return self.file.shape(name)
        experts, out, groups, half = self.file.shape(name + _BLOCKS)
        return experts, groups * half * 2, out

    def expert(self, name: str, number: int) -> torch.Tensor:
        """One expert's matrix in float32, (in, out)."""
        if self.is_packed(name):
            return dequantise(self.file.read_row(name + _BLOCKS, number), self.file.read_row(name + _SCALES, number)).T
        return self.file.read_row(name, number).float()

    def packed_expert(self, name: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's blocks (out, in / 32, 16) and scales (out, in / 32) as they are stored."""
        return self.file.read_row(name + _BLOCKS, number), self.file.read_row(name + _SCALES, number)

    def matrix(self, name: str) -> torch.Tensor:
        """A tensor that is no fused experts, in its own dtype."""
        return self.file.read(name)

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """The same in pieces along its first axis, each a bounded number of bytes."""
        return self.file.read_rows(name)

    def _check_names(self) -> None:
        for layer in range(self.layers):
            for parameter in EXPERT_PARAMETERS:
                name = f"model.layers.{layer}.mlp.experts.{parameter}"
                if name not in self.file and not (name + _BLOCKS in self.file and name + _SCALES in self.file):
                    hint = "a checkpoint with fused experts is needed, as openai/gpt-oss-20b or its bf16 form"
                    raise FastossError(f"`{name}` is not there", place=str(self.folder), hint=hint)
                shape = self.shape(name)
                inner, hidden = int(self.config["intermediate_size"]), int(self.config["hidden_size"])
                wanted = (self.experts, hidden, 2 * inner) if parameter == "gate_up_proj" else (self.experts, inner, hidden)
                if shape != wanted:
                    raise FastossError(f"`{name}` is {list(shape)}, config.json makes it {list(wanted)}", place=str(self.folder))
