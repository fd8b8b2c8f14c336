"""gpt-oss in float32, a matrix at a time: what a set of weights answers, on a machine that could never hold the whole model.

Verification asks base, adapter and exports for the log-probabilities of the same tokens. Matrices are read when their layer is
computed and forgotten after it, so the 20B model needs under 3 GB; the arithmetic is that of transformers' `modeling_gpt_oss`
(a test holds both against each other). Slow by design: seconds a layer, a few dozen short texts at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from fastoss.export.adapter_layouts import Adapter
from fastoss.export.base import Base
from fastoss.terminal import Counting

_LIMIT, _ALPHA = 7.0, 1.702  # gpt-oss's clamped swiglu (transformers, `GptOssExperts`)


class Weights(Protocol):
    """Matrices by their names in a bf16 checkpoint; experts one by one, (in, out)."""

    config: dict[str, Any]
    layers: int
    experts: int

    def matrix(self, name: str) -> torch.Tensor: ...

    def expert(self, name: str, number: int) -> torch.Tensor: ...

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """A matrix in pieces along its first axis: those of the vocabulary are too large to hold."""
        ...


class Adapted:
    """A base with its adapter beside it, not merged: x W + scale · (x A) B, as PEFT computes it while a model is trained."""

    def __init__(self, base: Base, adapter: Adapter):
        self.base, self.adapter = base, adapter
        self.config, self.layers, self.experts = base.config, base.layers, base.experts

    def matrix(self, name: str) -> torch.Tensor:
        return self.base.matrix(name)

    def expert(self, name: str, number: int) -> torch.Tensor:
        return self.base.expert(name, number)

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        return self.base.rows(name)

    def beside(self, name: str, x: torch.Tensor, number: int | None) -> torch.Tensor | float:
        """What LoRA adds to `x` (tokens, in) times this weight."""
        if name not in self.adapter.where:
            return 0.0
        pair = self.adapter.pair(name)
        a, b = (pair.a, pair.b) if number is None else (pair.a[number], pair.b[number])
        return self.adapter.scale * (x @ a.T @ b.T)


@torch.no_grad()
def log_probabilities(
    weights: Weights, texts: Sequence[Sequence[int]], wanted: Sequence[range], progress: Callable[[str], None]
) -> list[torch.Tensor]:
    """For each text the log-probabilities (len(wanted), vocabulary) of the token that follows each wanted position, in float32."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    plain = {key: value for key, value in weights.config.items() if key != "quantization_config"}
    config = GptOssConfig(**plain)
    rotary = GptOssRotaryEmbedding(config)
    embedding = _rows(weights, "model.embed_tokens.weight", sorted({token for text in texts for token in text}))
    states = [torch.stack([embedding[token] for token in text]) for text in texts]
    turns = []
    for text in texts:
        cos, sin = rotary(states[0], torch.arange(len(text))[None])
        turns.append((cos[0], sin[0]))
    counting = Counting(progress)
    for layer in range(weights.layers):
        states = _layer(weights, config, layer, states, turns)
        counting.at(f"layer {layer + 1} of {weights.layers}")
    scored = torch.cat([state[list(positions)] for state, positions in zip(states, wanted, strict=True)])
    scored = _norm(scored, weights.matrix("model.norm.weight"), config.rms_norm_eps)
    logits = torch.empty(len(scored), config.vocab_size)
    for first, piece in _pieces(weights, "lm_head.weight"):
        logits[:, first : first + len(piece)] = scored @ piece.float().T
    return list(torch.log_softmax(logits, dim=-1).split([len(positions) for positions in wanted]))


def _layer(weights: Weights, config: Any, layer: int, states: list[torch.Tensor], turns: list[Any]) -> list[torch.Tensor]:
    prefix = f"model.layers.{layer}"
    read = lambda name: weights.matrix(f"{prefix}.{name}").float()  # noqa: E731
    lengths = [len(state) for state in states]
    x = torch.cat(states)
    normed = _norm(x, read("input_layernorm.weight"), config.rms_norm_eps)
    q, k, v = (_linear(weights, f"{prefix}.self_attn.{name}_proj", normed) for name in "qkv")
    window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
    sinks = read("self_attn.sinks")
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), turns, strict=True)
    attended = torch.cat([_attend(*part, sinks, config, window) for part in parts])
    x = x + _linear(weights, f"{prefix}.self_attn.o_proj", attended)
    normed = _norm(x, read("post_attention_layernorm.weight"), config.rms_norm_eps)
    return list((x + _experts(weights, config, prefix, normed)).split(lengths))


def _linear(weights: Weights, stem: str, x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, weights.matrix(f"{stem}.weight").float(), weights.matrix(f"{stem}.bias").float())
    return y + weights.beside(f"{stem}.weight", x, None) if isinstance(weights, Adapted) else y


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: Any, sinks: torch.Tensor, config: Any, window: int | None) -> torch.Tensor:
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

    tokens, width, group = len(q), config.head_dim, config.num_attention_heads // config.num_key_value_heads
    q, k, v = (part.view(1, tokens, -1, width).transpose(1, 2) for part in (q, k, v))
    q, k = apply_rotary_pos_emb(q, k, turn[0][None], turn[1][None])
    k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))
    scores = (q @ k.transpose(2, 3)) * width**-0.5
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    scores = scores.masked_fill(hidden, float("-inf"))
    # The sink is one more score that takes its share of the attention and gives nothing.
    shares = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, tokens, 1)], dim=-1).softmax(dim=-1)[..., :-1]
    return (shares @ v).transpose(1, 2).reshape(tokens, -1)


def _experts(weights: Weights, config: Any, prefix: str, x: torch.Tensor) -> torch.Tensor:
    router = F.linear(x, weights.matrix(f"{prefix}.mlp.router.weight").float(), weights.matrix(f"{prefix}.mlp.router.bias").float())
    best, chosen = router.topk(config.num_experts_per_tok, dim=-1)
    share = best.softmax(dim=-1)
    out = torch.zeros_like(x)
    biases = {name: weights.matrix(f"{prefix}.mlp.experts.{name}_bias").float() for name in ("gate_up_proj", "down_proj")}
    for number in chosen.unique().tolist():
        token, slot = (chosen == number).nonzero(as_tuple=True)
        both = _expert(weights, f"{prefix}.mlp.experts.gate_up_proj", number, x[token]) + biases["gate_up_proj"][number]
        gate, up = both[:, ::2].clamp(max=_LIMIT), both[:, 1::2].clamp(-_LIMIT, _LIMIT)
        inner = (up + 1) * gate * torch.sigmoid(gate * _ALPHA)
        result = _expert(weights, f"{prefix}.mlp.experts.down_proj", number, inner) + biases["down_proj"][number]
        out.index_add_(0, token, result * share[token, slot, None])
    return out


def _expert(weights: Weights, name: str, number: int, x: torch.Tensor) -> torch.Tensor:
    y = x @ weights.expert(name, number)
    return y + weights.beside(name, x, number) if isinstance(weights, Adapted) else y


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight.float() * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon))


def _rows(weights: Weights, name: str, wanted: list[int]) -> dict[int, torch.Tensor]:
    rows: dict[int, torch.Tensor] = {}
    for first, piece in _pieces(weights, name):
        rows |= {row: piece[row - first].float() for row in wanted if first <= row < first + len(piece)}
    return rows


def _pieces(weights: Weights, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of a large matrix."""
    first = 0
    for piece in weights.rows(name):
        yield first, piece
        first += len(piece)
