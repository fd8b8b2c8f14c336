"""The language-model head on trained tokens only, with its gradient, in one pass and without keeping the logits.

gpt-oss has 201,088 tokens: one position's logits are 0.8 MB in float32, and most positions carry no loss. The head is
frozen under LoRA, so its loss needs two matrix products a token (logits, gradient of the hidden state) and nothing
is computed again in the backward pass. TRL's own chunked loss needs three.
"""

from __future__ import annotations

from typing import Any

import torch

from fastoss.model.sharding import whole

CHUNK = 256  # positions at a time on a GPU: 206 MB of float32 logits
CPU_CHUNK = 32  # 26 MB: below what malloc gives back to the system each time (256 took 1.25 times as long)


class TrainedTokenLoss:
    """Next-token cross-entropy where labels are, each token scaled by its weight, and watched channel by channel.

    TRL hands labels to its loss function, but neither weights nor channels: `mark` takes those of the next batch, and
    `chunked` stands in for TRL's `_chunked_cross_entropy_loss`. Unmarked, every trained token weighs 1.
    """

    def __init__(self, channels: int = 3):
        self.sums = torch.zeros(channels + 1, 2, dtype=torch.float64)  # by channel (0: none): summed loss in nats, tokens
        self._marks: tuple[torch.Tensor, torch.Tensor] | None = None

    def mark(self, weights: torch.Tensor, channels: torch.Tensor) -> None:
        """`weights` and `channels` of the next batch's labels, both (batch, tokens)."""
        self._marks = weights, channels

    def take_sums(self) -> torch.Tensor:
        """Loss and tokens by channel since the last call, (channels + 1, 2)."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums

    def chunked(
        self,
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
        """The signature and results of TRL's `_chunked_cross_entropy_loss`.

        `hidden_states` (batch, tokens, hidden), `lm_head_weight` (vocabulary, hidden), `labels` (batch, tokens) with -100
        where there is no loss. Returns the loss (weighted sum over trained tokens divided by `num_items_in_batch`, or by
        their weights' sum), the number of tokens predicted right, the summed entropy in nats, and the number of trained tokens.
        """
        plain = logit_scale == 1.0 and final_logit_softcapping is None and lm_head_bias is None
        assert plain, "gpt-oss's head is a plain product"
        assert not lm_head_weight.requires_grad, "the head is frozen under LoRA"
        assert labels is not None, "labels come unshifted"
        flat = labels[..., 1:].reshape(-1)
        trained = (flat != -100).nonzero().squeeze(1)
        hidden = hidden_states[..., :-1, :].reshape(-1, hidden_states.shape[-1]).index_select(0, trained)
        if self._marks is None:
            weights, channels = torch.ones(len(trained), device=hidden.device), torch.zeros(len(trained), dtype=torch.uint8)
        else:
            weights, channels = (mark[..., 1:].reshape(-1).to(trained.device).index_select(0, trained) for mark in self._marks)
        self._marks = None
        losses, correct, entropy = token_losses(hidden, lm_head_weight, flat.index_select(0, trained), chunk_size)
        self._note(losses.detach(), channels)
        loss = (weights * losses).sum()
        total = weights.sum()
        loss = loss / (total.clamp(min=torch.finfo(total.dtype).tiny) if num_items_in_batch is None else num_items_in_batch)
        return loss, correct, entropy, (flat != -100).sum()

    def _note(self, losses: torch.Tensor, channels: torch.Tensor) -> None:
        self.sums = self.sums.to(losses.device)
        pairs = torch.stack([losses.double(), torch.ones_like(losses, dtype=torch.float64)], 1)
        self.sums.index_add_(0, channels.to(device=losses.device, dtype=torch.long), pairs)


def token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats of each of `hidden` (tokens, hidden) against `targets` (tokens,): minus its log-probability.

    Returns the losses (tokens,) in float32, how many targets are the likeliest token, and the summed entropy. Only the losses have a
    gradient. A head that is shared out over processes (sharding.py) is fetched here, once: the backward pass does without it.
    """
    losses, correct, entropy = _TokenLosses.apply(hidden, whole(weight), targets, chunk)
    return losses, correct, entropy


class _TokenLosses(torch.autograd.Function):
    """d loss_t / d hidden_t = (softmax - onehot) W: a row for each token, kept from the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> Any:
        correct, entropy = (torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(2))
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        chunk = CPU_CHUNK if hidden.device.type == "cpu" else chunk
        # Two tiles are all there is: each step works in place, in the memory of the step before.
        tiles = torch.empty(2, min(chunk, len(hidden)), len(weight), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            part, target = (values[start : start + chunk] for values in (hidden, targets))
            logits, probabilities = tiles[:, : len(part)]
            if part.dtype == torch.float32:
                torch.mm(part, weight.to(part.dtype).t(), out=logits)
            else:
                logits.copy_(part @ weight.to(part.dtype).t())
            correct += (logits.argmax(1) == target).sum()
            logits -= logits.amax(1, keepdim=True)
            torch.exp(logits, out=probabilities)
            total = probabilities.sum(1, keepdim=True)
            normaliser, chosen = total.log(), logits.gather(1, target[:, None])
            losses[start : start + chunk] = (normaliser - chosen).squeeze(1)
            probabilities /= total
            entropy += (normaliser.squeeze(1) - logits.mul_(probabilities).sum(1)).sum()
            if gradient is not None:
                probabilities.scatter_add_(1, target[:, None], torch.full_like(chosen, -1.0))
                gradient[start : start + chunk] = probabilities.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct, entropy)
        return losses, correct, entropy

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None
