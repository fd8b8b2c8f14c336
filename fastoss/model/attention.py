"""Attention with sinks for packed rows: documents that share a row do not see each other.

gpt-oss under stock transformers lets packed documents leak: its mask builders are not given the positions. Here a row
without a mask is cut where its positions start again at 0, and each document attends to itself alone, causally, within
the layer's window. Rows with a padding mask, and generation, take transformers' own eager path.
"""

from __future__ import annotations

from typing import Any

import torch

PACKED_SINK_ATTENTION = "fastoss_packed_sink"


def register_packed_attention() -> str:
    """Make the attention known to transformers; returns its name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_SINK_ATTENTION, packed_sink_attention)
    AttentionMaskInterface.register(PACKED_SINK_ATTENTION, _mask)
    return PACKED_SINK_ATTENTION


def packed_sink_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer; `query` (batch, heads, tokens, head_dim), `key` and `value` with fewer heads.

    Without a mask, `position_ids` (batch, tokens) in `kwargs` tell where documents begin. Returns the output
    (batch, tokens, heads, head_dim), and the weights where transformers' own path computed them.
    """
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    if attention_mask is not None:
        return eager_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    positions = kwargs.get("position_ids")
    rows = []
    for row in range(query.shape[0]):
        starts = [0] if positions is None else document_starts(positions[row % positions.shape[0]])
        outputs = []
        for start, end in zip(starts, [*starts[1:], query.shape[2]], strict=True):
            window = kwargs.get("sliding_window")
            bias = _causal_bias(end - start, window, query.dtype, query.device)
            parts = (tensor[row : row + 1, :, start:end] for tensor in (query, key, value))
            outputs.append(eager_attention_forward(module, *parts, bias, scaling=scaling, dropout=dropout)[0])
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows), None


def document_starts(positions: torch.Tensor) -> list[int]:
    """Indices in a row's positions (tokens,) where a document begins; the first token always begins one."""
    starts = (positions == 0).nonzero().flatten().tolist()
    return starts if starts and starts[0] == 0 else [0, *starts]


def _causal_bias(length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(length, length, dtype=dtype, device=device).masked_fill(hidden, torch.finfo(dtype).min)[None, None]


def _mask(batch_size: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    from transformers.masking_utils import eager_mask

    if attention_mask is None and q_length == kv_length:
        return None  # packed_sink_attention cuts the row itself
    return eager_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)
