"""A base of which each process holds its share alone (PyTorch's FSDP2): read from the files by shares, fetched layer by layer in each pass.

backend.py's `load_model` calls it for `distributed.strategy = "fsdp"`. Only the frozen base is shared out. LoRA is attached afterwards and
is whole in every process, as under DDP: optimizer, clipping, checkpoints and the adapter know nothing of any shares.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from fastoss.errors import FastossError

_BLOCKS, _SCALES = "_blocks", "_scales"  # of experts in MXFP4
_INDEX = "model.safetensors.index.json"


def load_shared_out(source: str, attention: str, dtype: torch.dtype, device: torch.device, *, host_layers: int = 0) -> Any:
    """The base at `source` (a folder or a hub id) in `dtype`, each parameter cut along its first axis over all processes of the group.

    No process ever holds more than its share, and its share of one tensor on the host meanwhile. What is fetched at once: a decoder
    layer, the embedding, the head. Of `host_layers` decoder layers the share waits in the host's memory. Raises `FastossError` where
    the files lack a tensor, or hold it in another shape.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from transformers import GenerationConfig, GptOssConfig, GptOssForCausalLM
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    config = GptOssConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # MXFP4 is unpacked below
    config.name_or_path = source  # as from_pretrained does: the adapter names its base
    with torch.device("meta"):
        model = GptOssForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    waiting = {model.model.layers[number] for number in layers_on_host(host_layers, len(model.model.layers))}
    for part in (*model.model.layers, model.model.embed_tokens, model.model.norm, model.lm_head):
        there = CPUOffloadPolicy(pin_memory=device.type == "cuda") if part in waiting else OffloadPolicy()
        fully_shard(part, mesh=mesh, reshard_after_forward=True, offload_policy=there)
        part.to_empty(device="cpu" if part in waiting else device)
    model.model.rotary_emb = GptOssRotaryEmbedding(config).to(device)  # computed, and in no file
    # PEFT calls `forward` of the outermost module, past its hooks: so the body is the root, and the head one of its own.
    fully_shard(model.model, mesh=mesh)
    _fill(model, WeightFiles(_folder(source), device), torch.distributed.get_rank())
    with contextlib.suppress(OSError):  # a folder may have none
        model.generation_config = GenerationConfig.from_pretrained(source)
    model._is_fsdp_managed_module = True  # `generate` asks: no process stops sampling before all are done
    return model.eval()


def layers_on_host(count: int, layers: int) -> set[int]:
    """Which of so many layers: spread evenly, so that the way from the host hides behind the layers between. At most all."""
    count = min(count, layers)
    return {number for number in range(layers) if (number + 1) * count // layers > number * count // layers}


def held_bytes(model: Any) -> tuple[int, int, int]:
    """Bytes of the frozen base that this process holds between two passes, those among them that wait on the host, and the whole base's."""
    held = waiting = base = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        count = parameter.to_local().untyped_storage().nbytes()
        held += count
        waiting += count if parameter.device.type != model.device.type else 0
        base += parameter.numel() * parameter.element_size()
    return held, waiting, base


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A parameter that is used outside its module's forward: fetched from all processes where it is shared out, else as it is."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


@torch.no_grad()
def _fill(model: Any, files: WeightFiles, rank: int) -> None:
    for name, parameter in model.named_parameters():
        if files.shape(name) != tuple(parameter.shape):
            raise FastossError(f"`{name}` is {list(files.shape(name))}, config.json makes it {list(parameter.shape)}", place=str(files.folder))
        first = rank * -(-parameter.shape[0] // parameter.device_mesh.size())  # as torch.chunk cuts
        files.read_into(parameter.to_local(), name, first)


class WeightFiles:
    """Tensors of a checkpoint by the names they have in bf16, read by rows of their first axis; experts in MXFP4 are unpacked on `device`."""

    def __init__(self, folder: Path, device: torch.device):
        from safetensors import safe_open

        self.folder, self.device = folder, device
        index = folder / _INDEX
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())) if index.is_file() else None
        paths = [folder / name for name in names] if names else sorted(folder.glob("*.safetensors"))
        files = [safe_open(path, framework="pt") for path in paths]  # mapped: what the processes of a machine read lies in memory once
        self._file = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor, unpacked."""
        if name + _BLOCKS in self._file:
            experts, out, groups, half = self._slice(name + _BLOCKS).get_shape()
            return experts, groups * half * 2, out
        return tuple(self._slice(name).get_shape())

    def read_into(self, share: torch.Tensor, name: str, first: int) -> None:
        """Fill `share` with the rows from `first` on, converted to its dtype."""
        if name + _BLOCKS not in self._file:
            if len(share):
                share.copy_(self._slice(name)[first : first + len(share)])
            return
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        for row in range(len(share)):  # an expert at a time: unpacking takes several times its size
            place = slice(first + row, first + row + 1)
            packed = (self._slice(name + part)[place].to(self.device) for part in (_BLOCKS, _SCALES))
            share[row] = convert_moe_packed_tensors(*packed)[0]

    def _slice(self, name: str) -> Any:
        if name not in self._file:
            hint = "a checkpoint with fused experts is needed, as openai/gpt-oss-20b or its bf16 form"
            raise FastossError(f"`{name}` is not there", place=str(self.folder), hint=hint)
        return self._file[name].get_slice(name)


def _folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        # OpenAI's repository also holds the same weights in two other forms, in folders of their own.
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["original/*", "metal/*"]))
    except Exception as problem:
        hint = "check the network (HF_ENDPOINT names another hub), or give a local folder as model.name"
        raise FastossError(f"its weights cannot be fetched: {type(problem).__name__}", place=f"model.name = {source}", hint=hint) from None
