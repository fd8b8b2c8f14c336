"""The language-model head on trained tokens only, with its gradient, in one pass and without keeping the logits.

gpt-oss has 201,088 tokens: one position's logits are 0.8 MB in float32, and most positions carry no loss. The head is
frozen under LoRA, so its loss needs two matrix products a token (logits, gradient of the hidden state) and nothing
is computed again in the backward pass. TRL's own chunked loss needs three.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK = 256  # positions at a time on a GPU: 206 MB of float32 logits
CPU_CHUNK = 32  # 26 MB: below what malloc gives back to the system each time (256 took 1.25 times as long)


def chunked_cross_entropy_loss(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    chunk_size: int = CHUNK,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: Any = None,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    lm_head_bias: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """Next-token cross-entropy: the signature and results of TRL's `_chunked_cross_entropy_loss`.

    `hidden_states` (batch, tokens, hidden), `lm_head_weight` (vocabulary, hidden), `labels` (batch, tokens) with -100
    where there is no loss. Returns the loss (sum over trained tokens divided by `num_items_in_batch`, or their mean),
    the number of tokens predicted right, the summed entropy in nats, and the number of trained tokens.
    """
    plain = logit_scale == 1.0 and final_logit_softcapping is None and lm_head_bias is None
    assert plain, "gpt-oss's head is a plain product"
    assert not lm_head_weight.requires_grad, "the head is frozen under LoRA"
    if shift_labels is None:
        assert labels is not None
        hidden_states, shift_labels = hidden_states[..., :-1, :], labels[..., 1:]
    flat = shift_labels.reshape(-1)
    trained = (flat != -100).nonzero().squeeze(1)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, trained)
    loss, correct, entropy = _TrainedTokenLoss.apply(hidden, lm_head_weight, flat.index_select(0, trained), chunk_size)
    count = (flat != -100).sum()
    loss = loss / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    return loss, correct, entropy, count


class _TrainedTokenLoss(torch.autograd.Function):
    """Summed cross-entropy of `hidden` (tokens, hidden) against `targets` (tokens,); d loss / d hidden = (softmax - onehot) W."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> Any:
        loss, correct, entropy = (torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(3))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        chunk = CPU_CHUNK if hidden.device.type == "cpu" else chunk
        for start in range(0, hidden.shape[0], chunk):
            part, target = hidden[start : start + chunk], targets[start : start + chunk]
            logits = (part @ weight.to(part.dtype).t()).float()
            chosen = logits.gather(1, target[:, None])
            correct += (logits.argmax(1) == target).sum()
            normaliser = torch.logsumexp(logits, 1, keepdim=True)
            loss += (normaliser - chosen).sum()
            probabilities = (logits - normaliser).exp_()
            entropy += (normaliser.squeeze(1) - torch.linalg.vecdot(probabilities, logits)).sum()
            if gradient is not None:
                probabilities.scatter_add_(1, target[:, None], torch.full_like(chosen, -1.0))
                gradient[start : start + chunk] = probabilities.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct, entropy)
        return loss, correct, entropy

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None
