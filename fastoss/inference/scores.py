"""How likely a model finds given answers: losses by channel, and log-probabilities of pairs. Evaluation asks under the engine's turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastoss.data.conversation import Conversation
from fastoss.data.harmony import Example, HarmonyRenderer
from fastoss.inference.engine import Engine
from fastoss.model.head import token_losses

Sums = dict[str, tuple[float, int]]


def channel_losses(engine: Engine, conversations: Sequence[Conversation], *, tuned: bool) -> list[Sums]:
    """Of each conversation's last answer, by channel: summed loss in nats, and tokens. Headers and ends count, as in training."""
    found = []
    for example in _examples(engine.renderer, conversations):
        losses = _losses(engine, example, tuned)
        sums: Sums = {}
        for span in example.spans:
            if span.start >= example.prompt_length and span.channel:
                part = losses[span.start - example.prompt_length : span.end - example.prompt_length]
                total, count = sums.get(span.channel, (0.0, 0))
                sums[span.channel] = (total + float(part.double().sum()), count + len(part))
        found.append(sums)
    return found


def answer_logps(engine: Engine, conversations: Sequence[Conversation], channels: Sequence[str], *, tuned: bool) -> list[float]:
    """The log-probability in nats of each conversation's last answer, over the named channels."""
    sums = channel_losses(engine, conversations, tuned=tuned)
    return [-sum(entry[channel][0] for channel in channels if channel in entry) for entry in sums]


def _examples(renderer: HarmonyRenderer, conversations: Sequence[Conversation]) -> list[Example]:
    return [renderer.render_last(conversation) for conversation in conversations]


def _losses(engine: Engine, example: Example, tuned: bool) -> torch.Tensor:
    """Cross-entropy in nats of each token after the prompt, (tokens,)."""
    model: Any = engine.model.get_base_model() if engine.has_adapter else engine.model  # LoRA sits in its layers and stays
    ids = torch.tensor([example.input_ids], device=engine.model.device)
    with torch.no_grad(), engine.switched(tuned):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, example.prompt_length - 1 : -1]
        losses, _, _ = token_losses(hidden, model.lm_head.weight, ids[0, example.prompt_length :])
    return losses
