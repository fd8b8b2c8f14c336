"""Packed against padded on the CPU: the same documents in the same batches, the same loss, and how much faster (`training_cpu.py`)."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import torch

from benchmarks.timing import seconds, spread
from fastoss.config import LoraSettings
from fastoss.data.conversation import Conversation
from fastoss.data.harmony import Example, Span
from fastoss.data.packing import LOSS_MARKS, Layout, collate
from fastoss.model.attention import register_packed_attention
from fastoss.model.backend import ModelPlan, attach_lora
from fastoss.model.head import TrainedTokenLoss, token_losses

# A gpt-oss with the 20B's proportions, for one core: head = 0.19 of the active body, lengths and window an eighth.
VOCABULARY = 1664
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "num_local_experts": 8,
    "num_experts_per_tok": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 16,
    "max_position_embeddings": 131072, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
MEDIAN_LENGTH, LONGEST = 75, 512  # lognormal, an eighth of shared/performance.md's chats: median 600, 99 % up to 4096
SIGMA = math.log(LONGEST / MEDIAN_LENGTH) / 2.326


def small_model() -> Any:
    """Random weights, LoRA on attention and experts; the adapter is not zero, so that its gradients are not either."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SHAPE, attn_implementation=register_packed_attention()))
    model.config.use_cache = False
    model, _, _ = attach_lora(model, LoraSettings(r=8), ModelPlan("transformers", None, "float32", "cpu"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.02)
    return model.train()


def chat_examples(count: int) -> list[Example]:
    """Random tokens of chat length; the last 30 % of each are trained."""
    rng = random.Random(0)
    made = []
    for _ in range(count):
        length = min(LONGEST, max(8, round(rng.lognormvariate(math.log(MEDIAN_LENGTH), SIGMA))))
        start = round(length * 0.7)
        ids = [rng.randrange(3, VOCABULARY) for _ in range(length)]
        made.append(Example(ids, (Span("assistant", "final", start, length, 1.0),), Conversation((), "made:1"), start))
    return made


def forward(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    base = model.get_base_model()
    hidden: torch.Tensor = base.model(**{key: value for key, value in batch.items() if key not in LOSS_MARKS}, use_cache=False).last_hidden_state
    return hidden


def loss_of(model: Any, batch: dict[str, torch.Tensor], loss: TrainedTokenLoss) -> torch.Tensor:
    """As the trainer computes it: the mean over trained tokens."""
    hidden = forward(model, batch)
    loss.mark(batch["loss_weights"], batch["channels"])
    mean: torch.Tensor = loss.chunked(hidden, model.get_base_model().lm_head.weight, labels=batch["labels"])[0]
    return mean


def document_losses(model: Any, batch: dict[str, torch.Tensor], layout: Layout) -> list[float]:
    """The mean loss of each document, in order."""
    with torch.no_grad():
        hidden = forward(model, batch)
    before, labels = hidden[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    places = (labels >= 0).nonzero().squeeze(1)
    losses, *_ = token_losses(before[places], model.get_base_model().lm_head.weight.detach(), labels[places])
    row = places // (batch["labels"].shape[1] - 1)
    numbers = (batch["position_ids"][0] == 0).cumsum(0)[1:][places] if layout == "packed" else row
    return [float(losses[numbers == number].mean()) for number in numbers.unique()]


def packed(rows: int = 8, batches: int = 5, repeats: int = 7) -> dict[str, Any]:
    """Forward, backward and optimizer over the same documents in the same batches, end to end or a row each and padded.

    The target: at least 0.8 / fill times as fast, fill being the share of the padded batches that is no padding.
    """
    model, loss = small_model(), TrainedTokenLoss(4)
    chats = chat_examples(rows * batches)
    units = [[[chat] for chat in chats[start : start + rows]] for start in range(0, len(chats), rows)]
    made = {layout: [collate(unit, layout) for unit in units] for layout in ("packed", "padded")}
    for batch in made["padded"]:
        batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"] == 1, 0)  # the published padding token is no token here
    mine, theirs = ([value for batch in made[layout] for value in document_losses(model, batch, layout)] for layout in ("packed", "padded"))
    assert len(mine) == len(theirs) == len(chats)
    trained = {layout: sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in made[layout]) for layout in made}
    assert trained["packed"] == trained["padded"], "the same trained tokens"
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0)  # the weights stay: every repeat computes the same
    gradients = {}

    def train(layout: str) -> None:
        for batch in made[layout]:
            loss_of(model, batch, loss).backward()
            gradients[layout] = torch.cat([p.grad.flatten() for p in weights])
            optimizer.step()
            optimizer.zero_grad()

    pairs = []
    for number in range(repeats + 1):  # the first to warm up
        order = ("packed", "padded") if number % 2 else ("padded", "packed")
        pairs.append({layout: seconds(lambda layout=layout: train(layout)) for layout in order})
    slots = sum(batch["input_ids"].numel() for batch in made["padded"])
    fill = sum(map(len, chats)) / slots
    times_faster = {clock: spread([pair["padded"][n] / pair["packed"][n] for pair in pairs[1:]]) for n, clock in enumerate(("wall", "cpu"))}
    return {
        "times_faster": times_faster,
        "fill": fill,
        "target": 0.8 / fill,
        "seconds_packed": statistics.median(pair["packed"][0] for pair in pairs[1:]),
        "document_loss_difference": max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True)),
        "gradient_difference": float((gradients["packed"] - gradients["padded"]).norm() / gradients["padded"].norm()),
        "documents": len(chats), "tokens": sum(map(len, chats)), "trained_tokens": trained["packed"], "rows": rows, "repeats": repeats,
    }  # fmt: skip
