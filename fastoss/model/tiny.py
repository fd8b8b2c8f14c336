"""The embedded tiny gpt-oss: the real architecture, tokenizer and template in small, so that every command runs anywhere.

Its weights are random and frozen; LoRA alone makes it memorise. The scales below let it do so in about a minute on
one core (docs/log.md has what was tried): with transformers' own 0.02 the head can never become confident.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from fastoss.data.tokenizer import END_OF_TEXT, PAD, STOP_IDS, chat_template, tokenizer_file
from fastoss.run import cache_folder, file_lock, whole_folder, write_json

LAYERS = 4
SETTINGS = {
    "vocab_size": 201088,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "router_aux_loss_coef": 0.9,
    "bos_token_id": 199998,
    "pad_token_id": PAD,
    "eos_token_id": STOP_IDS[0],
}
SCALES = {"embed": 1.0, "head": 0.5, "seed": 20}


def tiny_model_folder() -> Path:
    """The tiny model's folder in the cache, built when it is not there. Safe when two processes ask at once."""
    key = hashlib.sha256(json.dumps([SETTINGS, SCALES], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder() / f"tiny-{key}"
    if not folder.is_dir():
        with file_lock(cache_folder() / f"tiny-{key}.lock"):
            if not folder.is_dir():
                build_tiny_model(folder)
    return folder


def build_tiny_model(folder: Path) -> None:
    """Write config, weights (float32 safetensors), tokenizer and template in the layout of a published gpt-oss."""
    from transformers import GenerationConfig, GptOssConfig, GptOssForCausalLM

    with torch.random.fork_rng():
        model = GptOssForCausalLM(GptOssConfig(**SETTINGS))
    _initialise(model)
    with whole_folder(folder) as beside:
        model.generation_config = GenerationConfig(bos_token_id=SETTINGS["bos_token_id"], eos_token_id=list(STOP_IDS), pad_token_id=PAD)
        model.save_pretrained(beside)
        write_tokenizer(beside)


def write_tokenizer(folder: Path) -> None:
    """The published tokenizer and chat template, as transformers expects them in a model's folder."""
    (folder / "tokenizer.json").write_bytes(tokenizer_file().read_bytes())
    (folder / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    assert PAD == END_OF_TEXT
    write_json(folder / "tokenizer_config.json", settings)


@torch.no_grad()
def _initialise(model: torch.nn.Module) -> None:
    """Random weights, each from a generator of its own name, so that a new kind of parameter moves no other."""
    for name, parameter in sorted(model.named_parameters()):
        seed = int.from_bytes(hashlib.sha256(f"{SCALES['seed']}/{name}".encode()).digest()[:6], "big")
        generator = torch.Generator().manual_seed(seed)
        if "norm" in name:
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        elif name.endswith("sinks"):
            parameter.normal_(0, 1.0, generator=generator)
        elif "embed_tokens" in name:
            parameter.normal_(0, SCALES["embed"], generator=generator)
        elif "lm_head" in name:
            parameter.normal_(0, SCALES["head"], generator=generator)
        else:
            # Linear layers hold (out, in); the fused experts (experts, in, out).
            fan_in = parameter.shape[-2] if parameter.dim() == 3 else parameter.shape[-1]
            parameter.normal_(0, fan_in**-0.5, generator=generator)
