"""Base + adapter → merged weights, one matrix at a time and in float32; written as bf16 or float32, or requantised to MXFP4.

`Merged` is the one place where a LoRA delta meets a weight; the checkpoints here and the GGUF are written from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastoss.errors import FastossError
from fastoss.export.adapter_layouts import Adapter
from fastoss.export.base import COMPANIONS, Base
from fastoss.export.mxfp4 import BLOCK, quantise
from fastoss.export.tensors import ShardWriter, Wanted, plan_shards
from fastoss.run import write_json, write_whole
from fastoss.terminal import Counting

Progress = Callable[[str], None]


class Merged:
    """The merged model's matrices, made when they are asked for. `FastossError` when the adapter is not for this base."""

    def __init__(self, base: Base, adapter: Adapter):
        self.base, self.adapter = base, adapter
        for name in adapter.names():
            self._check_fits(name)

    def names(self) -> list[str]:
        return self.base.names()

    def is_changed(self, name: str) -> bool:
        return name in self.adapter.where

    def matrix(self, name: str) -> torch.Tensor:
        """A tensor that is no fused experts: merged in float32 where LoRA changes it, else as the base has it."""
        weight = self.base.matrix(name)
        return weight.float() + self.adapter.delta(name) if self.is_changed(name) else weight

    def expert(self, name: str, number: int) -> torch.Tensor:
        """One expert's matrix in float32, (in, out)."""
        weight = self.base.expert(name, number)
        return weight + self.adapter.delta(name, number) if self.is_changed(name) else weight

    def _check_fits(self, name: str) -> None:
        place, stored = str(self.adapter.folder), name if not self.base.is_packed(name) else f"{name}_blocks"
        if stored not in self.base.file:
            raise FastossError(f"the adapter changes `{name}`, which the base does not have", place=place)
        pair, shape = self.adapter.pair(name), self.base.shape(name)
        wanted = (shape[0], shape[2], shape[1]) if self.base.is_experts(name) else shape
        have = (*pair.b.shape[:-1], pair.a.shape[-1])
        if have != wanted:
            hint = "it was trained on another model; or its layout is another one: `fastoss adapter check`"
            raise FastossError(f"the adapter's change of `{name}` is {list(have)}, the base needs {list(wanted)}", place=place, hint=hint)


def merged_dtype(base: Base) -> torch.dtype:
    """bf16, as gpt-oss is published; float32 where the base is (the tiny model without a GPU)."""
    return torch.float32 if base.dtype == torch.float32 else torch.bfloat16


def merged_tensors(base: Base) -> list[Wanted]:
    """What a merged checkpoint holds."""
    dtype = merged_dtype(base)
    return [Wanted(name, dtype, base.shape(name)) for name in base.names()]


def mxfp4_tensors(base: Base) -> list[Wanted]:
    """What a checkpoint in OpenAI's MXFP4 layout holds: experts in blocks and scales, the rest in bf16 or float32."""
    wanted = []
    for name in base.names():
        if not base.is_experts(name):
            wanted.append(Wanted(name, merged_dtype(base), base.shape(name)))
            continue
        experts, into, out = base.shape(name)
        if into % BLOCK:
            raise FastossError(f"`{name}` maps {into} values, which is not a whole number of blocks of {BLOCK}", place="--format mxfp4")
        wanted.append(Wanted(f"{name}_blocks", torch.uint8, (experts, out, into // BLOCK, BLOCK // 2)))
        wanted.append(Wanted(f"{name}_scales", torch.uint8, (experts, out, into // BLOCK)))
    return wanted


def write_merged(merged: Merged, folder: Path, template: str, progress: Progress) -> None:
    """Write the merged checkpoint into an existing folder, in the layout of a published gpt-oss in bf16."""
    base, dtype = merged.base, merged_dtype(merged.base)
    writer = ShardWriter(folder, plan_shards(merged_tensors(base)))
    for name in steps(base.names(), "merged", progress):
        if base.is_experts(name):
            for number in range(base.experts):
                writer.write(name, merged.expert(name, number).to(dtype))
        else:
            _write_plain(merged, writer, name, dtype)
    writer.close()
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    write_companions(base, folder, config | _dtype_entry(dtype), template)


def write_mxfp4(merged: Merged, folder: Path, template: str, progress: Progress) -> None:
    """Write the merged checkpoint requantised: experts in OpenAI's blocks and scales. Experts that LoRA left alone keep their bytes."""
    base, dtype = merged.base, merged_dtype(merged.base)
    writer = ShardWriter(folder, plan_shards(mxfp4_tensors(base)))
    for name in steps(base.names(), "requantised", progress):
        if not base.is_experts(name):
            _write_plain(merged, writer, name, dtype)
            continue
        scales = []
        for number in range(base.experts):
            blocks, scale = mxfp4_expert(merged, name, number)
            writer.write(f"{name}_blocks", blocks)
            scales.append(scale)
        for scale in scales:
            writer.write(f"{name}_scales", scale)
    writer.close()
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = base.config.get("quantization_config") or {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    write_companions(base, folder, base.config | {"quantization_config": quantization} | _dtype_entry(dtype), template)


def mxfp4_expert(merged: Merged, name: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's blocks and scales; those of the base where nothing changes them."""
    if merged.base.is_packed(name) and not merged.is_changed(name):
        return merged.base.packed_expert(name, number)
    return quantise(merged.expert(name, number).T)


def _write_plain(merged: Merged, writer: ShardWriter, name: str, dtype: torch.dtype) -> None:
    if merged.is_changed(name):
        writer.write(name, merged.matrix(name).to(dtype))
        return
    for piece in merged.base.file.read_rows(name):  # an embedding of 1.2 GB goes through in pieces
        writer.write(name, piece.to(dtype))


def _dtype_entry(dtype: torch.dtype) -> dict[str, Any]:
    return {"dtype": str(dtype).removeprefix("torch.")}


def write_companions(base: Base, folder: Path, config: dict[str, Any], template: str) -> None:
    """config.json, tokenizer and chat template beside the weights."""
    write_json(folder / "config.json", config)
    for name in COMPANIONS:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    if not (folder / "tokenizer.json").is_file():
        from fastoss.model.tiny import write_tokenizer

        write_tokenizer(folder)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        from fastoss.run import read_json

        # A template kept in here would win in older versions of transformers.
        write_json(settings, {key: value for key, value in read_json(settings).items() if key != "chat_template"})
    write_whole(folder / "chat_template.jinja", template)


def steps(names: list[str], what: str, progress: Progress) -> Iterator[str]:
    """The names, telling now and then how far it has come."""
    counting = Counting(progress)
    for number, name in enumerate(names, 1):
        yield name
        counting.at(f"{what} {number:,} of {len(names):,} tensors", last=number == len(names))
