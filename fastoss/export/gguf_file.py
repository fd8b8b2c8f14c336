"""Merged weights → one GGUF file for llama.cpp and Ollama, written with ggml's own `gguf` library.

The names and keys are those that llama.cpp's converter writes for gpt-oss (held against it, tensor for tensor: docs/log.md). The
converter itself is not used: it wants the merged checkpoint on disk first, and ships in no package of its makers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy
import torch

from fastoss.errors import FastossError
from fastoss.export.base import Base
from fastoss.export.merge import Merged, Progress, mxfp4_expert, steps
from fastoss.run import read_json

Quantization = Literal["mxfp4", "bf16", "f16", "q8_0"]
QUANTIZATIONS: tuple[Quantization, ...] = ("mxfp4", "bf16", "f16", "q8_0")
ARCHITECTURE = "gpt-oss"

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
}
_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
FILE_TYPES = {"bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "mxfp4": "MOSTLY_MXFP4_MOE"}


class Part(NamedTuple):
    """One tensor of the file: which base tensor it comes from, and of gate_up which half (0 gate, 1 up; the two alternate)."""

    name: str
    source: str
    half: int | None
    type: str  # as ggml names it: F32, F16, BF16, Q8_0, MXFP4
    shape: tuple[int, ...]  # as numpy has it; GGUF counts its axes from the other end


def check_quantization(name: str) -> Quantization:
    """Raises `FastossError` with the reason for any other kind."""
    if name in QUANTIZATIONS:
        return name
    hint = f"one of {', '.join(QUANTIZATIONS)}; mxfp4 is the form in which gpt-oss was published, and the smallest"
    reason = "is not offered"
    if name.lower().startswith(("q2", "q3", "q4", "q5", "q6", "iq", "tq")):
        reason = "needs rows of 256 values, and gpt-oss's have 2,880: llama.cpp would store most of them in another type"
    raise FastossError(f"{name} {reason}", place="--quantization", hint=hint)


def parts(base: Base, quantization: Quantization) -> list[Part]:
    """Every tensor of the file, in its order."""
    return [part for name in base.names() for part in _parts_of(base, name, quantization)]


def _parts_of(base: Base, name: str, quantization: Quantization) -> Iterator[Part]:
    shape = base.shape(name)
    target, kind = _target(name), _type(base, name, quantization)
    if base.is_experts(name):
        experts, into, out = shape
        if into % 32 and kind in ("MXFP4", "Q8_0"):
            raise FastossError(f"`{name}` maps {into} values, which is not a whole number of blocks of 32", place=f"--quantization {quantization}")
        if name.endswith("gate_up_proj"):
            for half, part in enumerate(("gate", "up")):
                yield Part(target.format(part), name, half, kind, (experts, out // 2, into))
        else:
            yield Part(target, name, None, kind, (experts, out, into))
    elif name.endswith("gate_up_proj_bias"):
        for half, part in enumerate(("gate", "up")):
            yield Part(target.format(part), name, half, kind, (shape[0], shape[1] // 2))
    else:
        yield Part(target, name, None, kind, shape)


def _target(name: str) -> str:
    """The GGUF name of a base tensor; of gate_up with a place for which half."""
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    if rest.startswith("mlp.experts.gate_up_proj"):
        return f"blk.{layer}.ffn_{{}}_exps." + ("bias" if rest.endswith("_bias") else "weight")
    if rest in _LAYER_NAMES:
        return f"blk.{layer}.{_LAYER_NAMES[rest]}"
    stem, kind = rest.rsplit(".", 1)
    if stem not in _LAYER_NAMES:
        raise FastossError(f"`{name}` has no name in GGUF", place="--format gguf")
    return f"blk.{layer}.{_LAYER_NAMES[stem]}.{kind}"


def _type(base: Base, name: str, quantization: Quantization) -> str:
    shape = base.shape(name)
    if len(shape) == 1 or name.endswith("_bias") or ".router." in name or "norm" in name:
        return "F32"  # llama.cpp computes with these in float32 only
    if quantization == "mxfp4":
        return "MXFP4" if base.is_experts(name) else "BF16"  # as published: experts in four bits, the rest as it was
    return {"bf16": "BF16", "f16": "F16", "q8_0": "Q8_0"}[quantization]


def write_gguf(merged: Merged, path: Path, quantization: Quantization, template: str, name: str, progress: Progress) -> None:
    """Write the file, tensor by tensor; one tensor of the model is in memory at a time."""
    import gguf

    base = merged.base
    wanted = parts(base, quantization)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for key in _metadata(base, quantization, name):
        key(writer)
    _add_tokenizer(writer, base, template)
    for part in wanted:
        kind = gguf.GGMLQuantizationType[part.type]
        stored, dtype = _stored(part)
        writer.add_tensor_info(part.name, stored, dtype, stored_bytes(part), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        by_name = {part.name: part for part in wanted}
        for each in steps(list(by_name), f"GGUF {quantization}", progress):
            writer.write_tensor_data(tensor_data(merged, by_name[each]))
    finally:
        writer.close()


def _stored(part: Part) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a tensor's bytes: quantised ones are bytes, a row's blocks one after the other."""
    import gguf

    dtype = {"F32": numpy.float32, "F16": numpy.float16, "BF16": numpy.uint16}.get(part.type)
    if dtype is not None:
        return part.shape, numpy.dtype(dtype)
    return gguf.quants.quant_shape_to_byte_shape(part.shape, gguf.GGMLQuantizationType[part.type]), numpy.dtype(numpy.uint8)


def tensor_data(merged: Merged, part: Part) -> numpy.ndarray:
    """A tensor's bytes as the file holds them."""
    if not merged.base.is_experts(part.source):
        weight = merged.matrix(part.source)
        return encode(weight if part.half is None else weight[..., part.half :: 2], part)
    shape, dtype = _stored(part)
    data = numpy.empty(shape, dtype)
    for number in range(merged.base.experts):
        if part.type == "MXFP4":
            blocks, scales = mxfp4_expert(merged, part.source, number)
            rows = slice(None) if part.half is None else slice(part.half, None, 2)
            data[number] = pack_mxfp4(blocks[rows], scales[rows])
        else:
            matrix = merged.expert(part.source, number).T
            data[number] = encode(matrix if part.half is None else matrix[part.half :: 2], part)
    return data


def encode(weight: torch.Tensor, part: Part) -> numpy.ndarray:
    """Values (…, in) as this tensor's type stores them."""
    import gguf

    weight = weight.contiguous()
    if part.type == "BF16":
        return weight.to(torch.bfloat16).view(torch.uint16).numpy()
    if part.type == "Q8_0":
        quantised: numpy.ndarray = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
        return quantised
    if part.type == "F16":
        if weight.abs().max() > torch.finfo(torch.float16).max:
            raise FastossError(f"`{part.source}` has values above 65,504, which f16 does not hold", place="--quantization f16", hint="use bf16")
        return weight.to(torch.float16).numpy()
    return weight.float().numpy()


def pack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> numpy.ndarray:
    """OpenAI's blocks (…, groups, 16) and scales (…, groups) in ggml's order: the scale's byte first, and value i shares a byte with value i + 16."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    packed = codes[..., :16] | (codes[..., 16:] << 4)
    return torch.cat([scales[..., None], packed], dim=-1).flatten(-2).numpy()


def unpack(data: numpy.ndarray, part: Part, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 values of a tensor's bytes, or of some of them that make up `shape`, by the gguf library: the way back that verification takes."""
    import gguf

    if part.type == "BF16":
        return torch.from_numpy(data.view(numpy.uint16)).view(torch.bfloat16).float().view(shape)
    kind = gguf.GGMLQuantizationType[part.type]
    rows = data.reshape(-1, data.size * shape[-1] // int(numpy.prod(shape)))
    return torch.from_numpy(numpy.array(gguf.quants.dequantize(rows, kind), dtype=numpy.float32)).view(shape)


def _metadata(base: Base, quantization: Quantization, name: str) -> Iterator[Any]:
    import gguf

    config, rope = base.config, rope_settings(base.config)
    if rope.get("rope_type") != "yarn":
        raise FastossError(f"positions are scaled by `{rope.get('rope_type')}`, not YaRN", place=str(base.folder / "config.json"))
    yield lambda w: w.add_type("model")
    yield lambda w: w.add_name(name)
    yield lambda w: w.add_block_count(base.layers)
    yield lambda w: w.add_context_length(config["max_position_embeddings"])
    yield lambda w: w.add_embedding_length(config["hidden_size"])
    yield lambda w: w.add_feed_forward_length(config["intermediate_size"])
    yield lambda w: w.add_expert_feed_forward_length(config["intermediate_size"])
    yield lambda w: w.add_head_count(config["num_attention_heads"])
    yield lambda w: w.add_head_count_kv(config["num_key_value_heads"])
    yield lambda w: w.add_key_length(config["head_dim"])
    yield lambda w: w.add_value_length(config["head_dim"])
    yield lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    yield lambda w: w.add_rope_scaling_factor(float(rope["factor"]))
    yield lambda w: w.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    # llama.cpp rounds YaRN's correction range to whole numbers and has no key for the checkpoint's `truncate: false`.
    yield lambda w: w.add_rope_scaling_yarn_beta_fast(float(rope["beta_fast"]))
    yield lambda w: w.add_rope_scaling_yarn_beta_slow(float(rope["beta_slow"]))
    yield lambda w: w.add_rope_freq_base(float(rope["rope_theta"]))
    yield lambda w: w.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    yield lambda w: w.add_expert_count(base.experts)
    yield lambda w: w.add_expert_used_count(config["num_experts_per_tok"])
    yield lambda w: w.add_sliding_window(config["sliding_window"])
    yield lambda w: w.add_file_type(gguf.LlamaFileType[FILE_TYPES[quantization]])
    yield lambda w: w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    yield lambda w: w.add_license("apache-2.0")


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """YaRN's numbers, under either of the names that config.json has had for them."""
    told = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    told.setdefault("rope_theta", config.get("rope_theta"))
    told.setdefault("original_max_position_embeddings", config.get("initial_context_length"))
    return told


def _add_tokenizer(writer: Any, base: Base, template: str) -> None:
    """OpenAI's tokenizer: its tokens and merges, the ids that it leaves free up to the model's size, and what the control tokens are."""
    import gguf

    from fastoss.data.tokenizer import END_OF_TEXT, RETURN, tokenizer_file

    file = base.folder / "tokenizer.json"
    content = read_json(file if file.is_file() else tokenizer_file())
    size = base.config["vocab_size"]
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [int(gguf.TokenType.UNUSED)] * size
    for text, number in content["model"]["vocab"].items():
        tokens[number], kinds[number] = text, int(gguf.TokenType.NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(gguf.TokenType.CONTROL)
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(199998)
    writer.add_eos_token_id(RETURN)
    writer.add_pad_token_id(END_OF_TEXT)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(template)


def expected_metadata(base: Base) -> dict[str, Any]:
    """The keys without which llama.cpp would compute another model, and their values."""
    config, rope = base.config, rope_settings(base.config)
    own = {
        "block_count": base.layers,
        "embedding_length": config["hidden_size"],
        "expert_feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.sliding_window": config["sliding_window"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "expert_count": base.experts,
        "expert_used_count": config["num_experts_per_tok"],
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
    }
    tokenizer = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-4o", "tokenizer.ggml.add_bos_token": False}
    return {f"{ARCHITECTURE}.{key}": value for key, value in own.items()} | {"general.architecture": ARCHITECTURE} | tokenizer


def stored_bytes(part: Part) -> int:
    shape, dtype = _stored(part)
    return int(numpy.prod(shape)) * int(dtype.itemsize)
