"""Packed attention with sinks, several ways: from queries, keys, values and a layout to outputs, all the same to rounding.

A sink is one more logit in each head's softmax that takes weight and gives no value. Every kernel takes `query`
(1, heads, tokens, head_dim), `key` and `value` with fewer heads, `sinks` (heads,), the layout of the tokens, the layer's window
(None: all) and the scale of the logits, and returns (tokens, heads, head_dim). `fastoss.model.attention` chooses among them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastoss.model.attention_layout import DocumentLayout

# Queries at a time of the reference. One core, 16 heads, a document of 1,600 tokens, forward and backward: 311 ms with 128 rows at a
# time, 1,167 ms whole; with a window of 128, 83 and 1,136 ms. Rows of 64 to 256 differ by less than what lies beside them.
EAGER_ROWS, GPU_EAGER_ROWS = 128, 1024


def eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    layout: DocumentLayout,
    window: int | None,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """The reference: document by document, exact in any precision. A document's output is the same bits whatever lies beside it.

    A part of a document at a time, with the keys that it sees and few more.
    """
    outputs = []
    splits = (tensor.split(layout.lengths, dim=2) for tensor in (query, key, value))  # its gradient is one copy, a slice's a row of zeros
    for q, k, v, parts in zip(*splits, layout.parts(GPU_EAGER_ROWS if query.is_cuda else EAGER_ROWS, window), strict=True):
        for start, first, last, keys in parts:
            hidden = ~layout.visible(window, slice(first, last), keys)
            bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, torch.finfo(q.dtype).min)
            seen_k, seen_v = (torch.cat([tensor[:, :, a - start : b - start] for a, b in keys], dim=2) for tensor in (k, v))
            outputs.append(eager_with_bias(q[:, :, first - start : last - start], seen_k, seen_v, sinks, bias, scaling, dropout)[0][0])
    return torch.cat(outputs)


def eager_with_bias(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor, bias: torch.Tensor, scaling: float, dropout: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers' gpt-oss computes it; `bias` is added to the logits and broadcasts to (batch, heads, queries, keys).

    Returns the output (batch, queries, heads, head_dim) and the weights (batch, heads, queries, keys). A query that sees nothing
    gets zeros: its sink takes all the weight.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    logits = query @ key.transpose(2, 3) * scaling + bias
    column = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    logits = torch.cat([logits, column], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values  # softmax does so too, but in half precision after rounding
    weights = torch.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]
    weights = torch.nn.functional.dropout(weights, dropout).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights


# --- FlexAttention ----------------------------------------------------------------------------------------------------


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    layout: DocumentLayout,
    window: int | None,
    scaling: float,
    operation: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """FlexAttention over the layout's block mask: documents and trees, any dtype on a GPU; on a CPU without gradients.

    `operation` takes (query, key, value, block_mask, scale) and returns output and log-sum-exp, both with gradients.
    """
    output, lse = (operation or flex_operation)(query, key, value, layout.block_mask(window), scaling)
    # softmax over [logits, sink] = softmax over logits · σ(lse - sink); gradients flow through output and lse alike.
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return (output * share[..., None]).to(value.dtype)[0].transpose(0, 1)


def flex_operation(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_mask: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (1, heads, tokens, head_dim) and log-sum-exp (1, heads, tokens) float32."""
    from torch.nn.attention.flex_attention import AuxRequest

    run = _compiled_flex() if query.is_cuda else _plain_flex()
    output, extra = run(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return output, extra.lse


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Compiled for the first length, and once for any other; rows of one block, trees and evaluation add as many again. At dynamo's
    # limit of 8 variants flex would fall back to the whole score matrix with a mere warning.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention)


@functools.cache
def _plain_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


# --- FlashAttention through torch's own operations -----------------------------------------------------------------------


class FlashOperations(NamedTuple):
    """A flash kernel's two halves, over documents end to end. Tensors are (tokens, heads, head_dim), log-sum-exps (heads, tokens).

    `forward(q, k, v, starts, longest, scale, window)` returns output and log-sum-exp of plain softmax attention, causal within each
    document; `backward(grad, q, k, v, output, lse, starts, longest, scale, window)` the gradients of q, k and v.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


# torch's operations take a window as what lies to the left (127 of a window of 128; -1: all) and to the right. `is_causal` is for
# the case without a window; torch's own `varlen_attn` calls them with these same arguments.
def _aten_forward(q: Any, k: Any, v: Any, starts: torch.Tensor, longest: int, scale: float, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    left = -1 if window is None else window - 1
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, window is None, False, scale=scale, window_size_left=left, window_size_right=0
    )
    return output, lse


def _aten_backward(
    grad: Any, q: Any, k: Any, v: Any, output: Any, lse: Any, starts: torch.Tensor, longest: int, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left = -1 if window is None else window - 1
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # the random state is not read
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, output, lse, starts, starts, longest, longest, 0.0, window is None, *no_dropout,
        scale=scale, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    return dq, dk, dv


ATEN = FlashOperations(_aten_forward, _aten_backward)


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    layout: DocumentLayout,
    window: int | None,
    scaling: float,
    operations: FlashOperations = ATEN,
) -> torch.Tensor:
    """A flash kernel without sinks, made exact with them. Documents only: no flash kernel takes the mask of a tree."""
    assert not layout.has_branches, "a tree needs a block mask"
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output: torch.Tensor = _SinkFlash.apply(*packed, sinks, layout.starts, layout.longest, scaling, window, operations)
    return output


class _SinkFlash(torch.autograd.Function):
    """Flash attention with the sink put in afterwards, exactly.

    With the plain output O and log-sum-exp l, the sink s gives O' = O·σ(l - s) and l' = log(exp l + exp s). FlashAttention's backward
    formula, P = exp(S - l) and dS = P(dP - rowsum(dO·O)), holds for the softmax with sink when it is given O' and l' in their place:
    the sink has value 0, so it adds nothing to a row's sum. So the stock kernel computes dq, dk and dv; and the gradient of s,
    whose probability is exp(s - l'), is -Σ exp(s - l')·rowsum(dO·O').
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
        scale: float,
        window: int | None,
        operations: FlashOperations,
    ) -> torch.Tensor:
        output, lse = operations.forward(q, k, v, starts, longest, scale, window)
        sink = sinks.to(lse.dtype)[:, None]
        output = (output * torch.sigmoid(lse - sink).t()[..., None]).to(output.dtype)
        ctx.save_for_backward(q, k, v, sinks, starts, output, torch.logaddexp(lse, sink))
        ctx.arguments = longest, scale, window
        ctx.operations = operations
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, sinks, starts, output, lse = ctx.saved_tensors
        dq, dk, dv = ctx.operations.backward(grad, q, k, v, output, lse, starts, *ctx.arguments)
        dsinks = None
        if ctx.needs_input_grad[3]:
            upstream = torch.linalg.vecdot(grad.to(lse.dtype), output.to(lse.dtype)).t()
            dsinks = -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * upstream).sum(1).to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None, None, None, None


# --- FlashAttention 4 ----------------------------------------------------------------------------------------------------


def flash4(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor, layout: DocumentLayout, window: int | None, scaling: float
) -> torch.Tensor:
    """FlashAttention 4's own sinks (Hopper, Blackwell), backward included. Documents only.

    UNTESTED: written from the source of flash-attn-4 4.0.0b36 (flash_attn/cute/interface.py), never run; tests/test_gpu.py holds it
    against the reference where it is installed. So it is taken when it is asked for by name.
    """
    assert not layout.has_branches, "a tree needs a block mask"
    output: torch.Tensor
    output, _ = importlib.import_module("flash_attn.cute").flash_attn_varlen_func(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        cu_seqlens_q=layout.starts,
        cu_seqlens_k=layout.starts,
        max_seqlen_q=layout.longest,
        max_seqlen_k=layout.longest,
        softmax_scale=scaling,
        causal=True,
        window_size=(None if window is None else window - 1, None if window is None else 0),
        learnable_sink=sinks,
    )
    return output
