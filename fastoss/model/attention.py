"""Attention with sinks for packed rows, as transformers' gpt-oss calls it: finds the row's layout, chooses the kernel.

gpt-oss under stock transformers lets packed documents leak, because its mask builders are not given the positions. Here the
layout of a row (`attention_layout.py`) comes, in this order, from: a `DocumentLayout` in place of the mask; the keyword
`documents` of the model's forward; a padding mask; the positions. Only decoding with a cache, and masks of other people's
making, go through a dense mask.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastoss.errors import FastossError, RunFailed
from fastoss.model import attention_kernels as kernels
from fastoss.model.attention_layout import DocumentLayout

PACKED_SINK_ATTENTION = "fastoss_packed_sink"
KERNEL_VARIABLE = "FASTOSS_ATTENTION"  # a kernel's name, for tests and comparisons
KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "eager": kernels.eager,
    "flex": kernels.flex,
    "flash": kernels.flash,
    "flash4": kernels.flash4,
}


def register_packed_attention() -> str:
    """Make the attention known to transformers; returns its name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_SINK_ATTENTION, packed_sink_attention)
    AttentionMaskInterface.register(PACKED_SINK_ATTENTION, _mask)
    return PACKED_SINK_ATTENTION


def attend_packed(model: Any) -> Any:
    """Let a loaded gpt-oss use this attention, whatever its loader chose. Returns the model.

    Unsloth on a GPU resolves every implementation it does not know to "eager" for gpt-oss, so it is set afterwards.
    """
    model.config._attn_implementation = register_packed_attention()
    return model


@torch.compiler.disable
def packed_sink_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | DocumentLayout | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    documents: DocumentLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer; `query` (batch, heads, tokens, head_dim), `key` and `value` with fewer heads.

    Returns the output (batch, tokens, heads, head_dim), and the weights where there was a dense mask. Not traced by
    torch.compile: the lengths of documents would make it compile anew for each batch.
    """
    if isinstance(attention_mask, torch.Tensor):
        return kernels.eager_with_bias(query, key, value, module.sinks, attention_mask, scaling, dropout)
    batch, heads, tokens, head_dim = query.shape
    layout = attention_mask or documents or _layout_of(kwargs.get("position_ids"), batch, tokens, query.device)
    assert layout.tokens == batch * tokens, f"the layout is of {layout.tokens} tokens, the batch has {batch * tokens}"
    name = choose_kernel(query.device, value.dtype, head_dim, layout.has_branches).kernel
    arguments: dict[str, Any] = {}
    if dropout:  # gpt-oss has none; only the reference knows it
        name, arguments = "eager", {"dropout": dropout}
    if name != "eager":
        query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings may have come in float32
    # Rows end to end: none of a document reaches into the next row.
    query, key, value = (tensor.transpose(0, 1).flatten(1, 2)[None] for tensor in (query, key, value))
    output = KERNELS[name](query, key, value, module.sinks, layout, kwargs.get("sliding_window"), scaling, **arguments)
    return output.reshape(batch, tokens, heads, head_dim), None


class Choice(NamedTuple):
    """A kernel's name, and why it was chosen, for people."""

    kernel: str
    reason: str


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, branches: bool = False) -> Choice:
    """The kernel for tensors of this kind on this machine; `branches`: for rows with trees in them.

    Raises `FastossError` when FASTOSS_ATTENTION names none.
    """
    return _choose(os.environ.get(KERNEL_VARIABLE, ""), device, dtype, head_dim, branches)


@functools.lru_cache(maxsize=64)
def _choose(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int, branches: bool) -> Choice:
    if wanted and wanted not in KERNELS:
        raise FastossError(f'"{wanted}" is not an attention kernel', place=KERNEL_VARIABLE, hint=f"one of {', '.join(KERNELS)}")
    if wanted.startswith("flash") and branches:
        return Choice("flex", f"{KERNEL_VARIABLE} asks for {wanted}, which cannot mask trees")
    if wanted:
        return Choice(wanted, f"{KERNEL_VARIABLE} asks for it")
    if device.type != "cuda":
        return Choice("eager", "no GPU")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return Choice("eager", "the GPU is older than compute capability 8.0")
    if dtype in (torch.bfloat16, torch.float16) and head_dim <= 256 and head_dim % 8 == 0 and not torch.version.hip and not branches:
        return Choice("flash", "torch's own FlashAttention, with the sink put in exactly")
    if importlib.util.find_spec("triton") is None:
        return Choice("eager", "FlexAttention needs Triton, which is not installed")
    return Choice("flex", "trees need a block mask" if branches else "FlashAttention takes neither this dtype nor this head")


def kernel_line(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What a run's log says about its attention."""
    plain, trees = (choose_kernel(device, dtype, head_dim, branches) for branches in (False, True))
    line = f"attention: {plain.kernel} ({plain.reason})"
    return line if trees.kernel == plain.kernel else f"{line}; trees: {trees.kernel} ({trees.reason})"


def prove_attention(model: Any) -> str:
    """Hold the kernels that this model will use against the reference, on random documents and a tree; returns the line for the log.

    Output and every gradient, on the model's own device, with its dtype, heads and window. Raises `RunFailed` when a kernel is
    wrong there: what nobody has tried on a card must not train on it unseen.
    """
    parameter = next(model.parameters())
    config = model.config
    device, dtype, head_dim = parameter.device, parameter.dtype if parameter.dtype.is_floating_point else torch.bfloat16, config.head_dim
    if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, 333, head_dim) for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)]
    documents = torch.cat([torch.arange(n) for n in (1, 300, 32)])
    tree = torch.cat([torch.arange(200), 150 + torch.arange(100), 20 + torch.arange(33)])
    for positions in (documents, tree):
        layout = DocumentLayout.from_positions(positions[None]).to(device)
        name = choose_kernel(device, dtype, head_dim, layout.has_branches).kernel
        if name == "eager":
            continue
        for window in (None, config.sliding_window):
            inputs = [torch.randn(1, *shape, generator=generator).to(device) for shape in shapes]
            sinks = torch.randn(config.num_attention_heads, generator=generator).to(device)
            given = torch.randn(1, 333, config.num_attention_heads, head_dim, generator=generator).to(device)
            results = []
            for kernel, kind in ((name, dtype), ("eager", torch.float32)):
                leaves = [tensor.to(kind).requires_grad_() for tensor in (*inputs, sinks)]
                output = KERNELS[kernel](*leaves, layout, window, head_dim**-0.5)
                results.append([output, *torch.autograd.grad(output, leaves, given.reshape(output.shape).to(output.dtype))])
            for ours, exact in zip(*results, strict=True):
                error = ((ours.float() - exact).norm() / exact.norm()).item()
                if not error < _PROOF:
                    fact = f"the attention kernel `{name}` is wrong on this machine (off by {error:.1e} of the norm)"
                    raise RunFailed(fact, place=str(device), hint=f"set {KERNEL_VARIABLE}=eager, which is slow and right, and tell us")
    return kernel_line(device, dtype, head_dim)


_PROOF = 0.03  # relative error that half precision may make


_latest: tuple[weakref.ref[torch.Tensor], int, DocumentLayout] | None = None


def _layout_of(positions: torch.Tensor | None, batch: int, tokens: int, device: torch.device) -> DocumentLayout:
    """The layout that the model's `position_ids` (rows or 1, tokens) tell; made once a forward pass.

    Every layer of a pass is given the same tensor of positions, in a checkpoint's second pass too: it is known again.
    """
    global _latest
    if positions is None:
        return DocumentLayout.from_positions(torch.arange(tokens).expand(batch, tokens)).to(device)
    version = 0 if positions.is_inference() else positions._version  # counts changes in place
    if _latest is not None:
        known, known_version, layout = _latest
        if known() is positions and known_version == version and layout.rows == batch:
            return layout
    layout = DocumentLayout.from_positions(positions.expand(batch, tokens)).to(device)
    _latest = weakref.ref(positions), version, layout
    return layout


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | DocumentLayout | None:
    """transformers' mask interface: a layout where a whole batch is seen at once, a dense mask (batch, 1, queries, keys) elsewhere."""
    from transformers.masking_utils import eager_mask

    whole = q_length == kv_length and isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    if whole and not use_vmap:  # vmap: somebody's own mask function
        if attention_mask is None:
            return None  # the attention itself is given the positions
        layout = DocumentLayout.from_padding(attention_mask)
        if layout is not None:
            return layout
    return eager_mask(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, use_vmap=use_vmap, **kwargs)
