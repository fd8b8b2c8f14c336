"""A random gpt-oss checkpoint at any shape, in OpenAI's MXFP4 layout or in bf16: `gpu_checks.py` and its test load it.

Speed and memory do not depend on what weights say, so the full 20B shape can be measured with no network. The names,
shapes and config.json are those of openai/gpt-oss-20b as transformers loads it. The values keep activations sane: each
matrix has the standard deviation 1 / sqrt(fan_in); those that write into the residual stream are smaller (GPT-2's
rule), so that tokens stay distinct and the router's choices spread over all experts down to the last layer.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed works too

from fastoss.data.tokenizer import PAD, STOP_IDS
from fastoss.model.shape import GPT_OSS_20B, ModelShape
from fastoss.run import read_json, whole_folder, write_json

Form = Literal["mxfp4", "bf16"]
SEED = 20
BLOCK = 32  # values that share one scale in MXFP4; two values a byte
# FP4 (e2m1), OCP Microscaling Formats 1.0: the highest of the four bits is the sign.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_STAMP = "random_checkpoint.json"


# Sizes are multiples of 32.
TINY = ModelShape("gpt-oss-tiny", 64, 96, layers=2, experts=4, active_experts=2, heads=4, key_value_heads=2, head_dim=16, vocabulary=201088)


@dataclass(frozen=True)
class Spec:
    """One tensor of the checkpoint. A matrix is drawn with the standard deviation 1 / sqrt(`fan_in`)."""

    kind: Literal["weight", "bias", "norm", "sinks", "embedding", "blocks", "scales", "experts"]
    size: tuple[int, ...]
    fan_in: int = 1

    def bytes(self) -> int:
        return math.prod(self.size) * (1 if self.kind in ("blocks", "scales") else 2)


def checkpoint_specs(shape: ModelShape, form: Form) -> list[dict[str, Spec]]:
    """Every tensor by name, one dictionary a file: the layers first, then embedding, last norm and head."""
    files = [_layer_specs(shape, layer, form) for layer in range(shape.layers)]
    rest = {
        "model.embed_tokens.weight": Spec("embedding", (shape.vocabulary, shape.hidden)),
        "model.norm.weight": Spec("norm", (shape.hidden,)),
        "lm_head.weight": Spec("weight", (shape.vocabulary, shape.hidden), shape.hidden),
    }
    return [*files, rest]


def checkpoint_bytes(shape: ModelShape, form: Form) -> int:
    """Bytes of all tensors on disk."""
    return sum(spec.bytes() for file in checkpoint_specs(shape, form) for spec in file.values())


def published_config(shape: ModelShape, form: Form) -> dict[str, Any]:
    """config.json as openai/gpt-oss-20b has it, at this shape; without its quantisation for bf16."""
    config = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": STOP_IDS[0],
        "experts_per_token": shape.active_experts,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(shape.layers)],
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.active_experts,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.key_value_heads,
        "num_local_experts": shape.experts,
        "output_router_logits": False,
        "pad_token_id": PAD,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }  # fmt: skip
    if form == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return config | {"quantization_config": {"modules_to_not_convert": kept, "quant_method": "mxfp4"}}
    return config | {"dtype": "bfloat16"}


def checkpoint_folder(work: Path, shape: ModelShape, form: Form) -> Path:
    """Where the checkpoint lies in a work folder; the name is like the published one, which libraries look at."""
    return work / f"{shape.name}-random-{form}"


def has_checkpoint(folder: Path, shape: ModelShape, form: Form, device: str) -> bool:
    """Whether the folder holds this very checkpoint, whole. CPU and GPU draw other numbers from the same seed."""
    return (folder / _STAMP).is_file() and read_json(folder / _STAMP) == _stamp(shape, form, device)


def write_checkpoint(folder: Path, shape: ModelShape, form: Form, device: str = "cpu") -> None:
    """Write config, weights (one safetensors file a layer, and an index), tokenizer and template. Whole or not at all."""
    from safetensors.torch import save_file

    from fastoss.model.tiny import write_tokenizer

    specs = checkpoint_specs(shape, form)
    with whole_folder(folder) as beside:
        names: dict[str, str] = {}
        for number, file in enumerate(specs, 1):
            path = beside / f"model-{number:05d}-of-{len(specs):05d}.safetensors"
            tensors = {name: tensor.cpu() for name, tensor in random_tensors(file, device)}
            save_file(tensors, path, metadata={"format": "pt"})
            names |= dict.fromkeys(tensors, path.name)
        write_json(beside / "model.safetensors.index.json", {"metadata": {"total_size": checkpoint_bytes(shape, form)}, "weight_map": names})
        write_json(beside / "config.json", published_config(shape, form))
        generation = {"bos_token_id": 199998, "do_sample": True, "eos_token_id": list(STOP_IDS), "pad_token_id": PAD}
        write_json(beside / "generation_config.json", generation)
        write_json(beside / _STAMP, _stamp(shape, form, device))
        write_tokenizer(beside)


def random_tensors(specs: dict[str, Spec], device: str) -> Iterator[tuple[str, Any]]:
    """Name and tensor, one after the other. Each comes from a seed of its own name: both forms hold the same weights."""
    import torch

    def generator(name: str) -> torch.Generator:
        seed = int.from_bytes(hashlib.sha256(f"{SEED}/{name}".encode()).digest()[:6], "big")
        return torch.Generator(device).manual_seed(seed)

    def blocks(name: str, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, device=device, generator=generator(name))

    def scales(name: str, size: tuple[int, ...], fan_in: int) -> torch.Tensor:
        # Two neighbouring powers of two, mixed so that the mean square comes out as 1 / fan_in.
        wanted = 1 / math.sqrt(fan_in) / math.sqrt(sum(value**2 for value in FP4) / len(FP4))
        low = math.floor(math.log2(wanted))
        share = (wanted**2 - 4.0**low) / (4.0 ** (low + 1) - 4.0**low)
        draw = torch.rand(size, device=device, generator=generator(name))
        return (draw < share).to(torch.uint8) + (127 + low)

    for name, spec in specs.items():
        if spec.kind == "blocks":
            tensor = blocks(name, spec.size)
        elif spec.kind == "scales":
            tensor = scales(name, spec.size, spec.fan_in)
        elif spec.kind == "experts":
            experts, width, out = spec.size
            packed = blocks(f"{name}_blocks", (experts, out, width // BLOCK, BLOCK // 2))
            tensor = dequantise(packed, scales(f"{name}_scales", (experts, out, width // BLOCK), spec.fan_in)).transpose(1, 2).contiguous()
        elif spec.kind == "norm":
            tensor = torch.ones(spec.size, dtype=torch.bfloat16)
        else:
            deviation = {"weight": spec.fan_in**-0.5, "bias": 0.02, "sinks": 1.0, "embedding": 1.0}[spec.kind]
            # In float32 and one tensor at a time: the largest takes 2.3 GB at the 20B shape.
            tensor = torch.randn(spec.size, device=device, generator=generator(name)).mul_(deviation).to(torch.bfloat16)
        yield name, tensor


def dequantise(blocks: Any, scales: Any) -> Any:
    """MXFP4 `blocks` (…, groups, 16) and `scales` (…, groups), both uint8, as bf16 (…, groups · 32). Nothing is rounded."""
    import torch

    table = torch.tensor(FP4, dtype=torch.bfloat16, device=blocks.device)
    pairs = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1)  # the low half of a byte comes first
    factor = torch.exp2(scales.float() - 127).to(torch.bfloat16)  # powers of two: exact
    return (pairs.flatten(-2) * factor[..., None]).flatten(-2)


def _layer_specs(shape: ModelShape, layer: int, form: Form) -> dict[str, Spec]:
    hidden, inner, experts = shape.hidden, shape.intermediate, shape.experts
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    specs = {"input_layernorm.weight": Spec("norm", (hidden,)), "post_attention_layernorm.weight": Spec("norm", (hidden,))}
    writers = 2 * shape.layers  # matrices that add to the residual stream: o and down of each layer
    for name, out, into in (("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries)):
        specs[f"self_attn.{name}_proj.weight"] = Spec("weight", (out, into), into * writers if name == "o" else into)
        specs[f"self_attn.{name}_proj.bias"] = Spec("bias", (out,))
    specs["self_attn.sinks"] = Spec("sinks", (shape.heads,))
    specs["mlp.router.weight"] = Spec("weight", (experts, hidden), hidden)
    specs["mlp.router.bias"] = Spec("bias", (experts,))
    for name, out, into, fan_in in (("gate_up_proj", 2 * inner, hidden, hidden), ("down_proj", hidden, inner, inner * writers)):
        if form == "mxfp4":
            specs[f"mlp.experts.{name}_blocks"] = Spec("blocks", (experts, out, into // BLOCK, BLOCK // 2))
            specs[f"mlp.experts.{name}_scales"] = Spec("scales", (experts, out, into // BLOCK), fan_in)
        else:
            specs[f"mlp.experts.{name}"] = Spec("experts", (experts, into, out), fan_in)  # transformers keeps (in, out)
        specs[f"mlp.experts.{name}_bias"] = Spec("bias", (experts, out))
    return {f"model.layers.{layer}.{name}": spec for name, spec in specs.items()}


def _stamp(shape: ModelShape, form: Form, device: str) -> dict[str, Any]:
    return {"shape": asdict(shape), "form": form, "seed": SEED, "device": device}


if __name__ == "__main__":  # python benchmarks/random_checkpoint.py FOLDER gpt-oss-20b mxfp4 cuda
    _folder, _name, _form, _device = sys.argv[1:]
    write_checkpoint(Path(_folder), {shape.name: shape for shape in (GPT_OSS_20B, TINY)}[_name], "bf16" if _form == "bf16" else "mxfp4", _device)
