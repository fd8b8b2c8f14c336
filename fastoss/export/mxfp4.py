"""MXFP4 as openai/gpt-oss stores it: 32 values share a scale (a power of two), two FP4 values (e2m1) a byte.

OCP Microscaling Formats 1.0; the layout is that of OpenAI's checkpoints as transformers reads them: for a matrix that maps
`in` values to `out`, `blocks` is uint8 (out, in / 32, 16), the earlier value in a byte's low half, and `scales` uint8 (out, in / 32),
an exponent plus 127.
"""

from __future__ import annotations

import torch

BLOCK = 32
# The sixteen values of e2m1; the highest bit is the sign.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127
# Between two neighbouring values the nearer is taken; at the middle the one whose last bit is 0 (round half to even).
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_ODD_BELOW = (1, 3, 5)  # middles whose lower neighbour has an odd code: a tie goes up
_CHUNK = 1 << 22  # values at once: what quantising needs in memory does not grow with the matrix


def quantise(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (…, in / 32, 16) and scales (…, in / 32), both uint8, of float32 values (…, in).

    Of a block's two sensible exponents (the largest value just fits, or is cut to 6) the one with the smaller squared error is
    taken. Values that come from MXFP4 come back exactly.
    """
    *front, width = matrix.shape
    assert width % BLOCK == 0, f"{width} values are not a whole number of blocks of {BLOCK}"
    flat = matrix.reshape(-1, BLOCK)
    blocks = torch.empty(flat.shape[0], BLOCK // 2, dtype=torch.uint8)
    scales = torch.empty(flat.shape[0], dtype=torch.uint8)
    rows = _CHUNK // BLOCK
    for first in range(0, flat.shape[0], rows):
        part = flat[first : first + rows].float()
        blocks[first : first + rows], scales[first : first + rows] = _quantise_blocks(part)
    return blocks.reshape(*front, width // BLOCK, BLOCK // 2), scales.reshape(*front, width // BLOCK)


def _quantise_blocks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = values.abs().amax(dim=1)
    _, exponent = torch.frexp(largest)  # largest = m · 2^exponent, 0.5 ≤ m < 1; 4 · 2^s ≤ largest < 8 · 2^s at s = exponent - 3
    low = (exponent - 3).clamp(-_BIAS, 127 - 1)
    # Only where the largest value lies above 6 · 2^s would the next exponent bring anything.
    high = torch.where(largest > torch.ldexp(torch.full_like(largest, 6.0), low), low + 1, low)
    best, error = _codes(values, low)
    other = (high > low).nonzero().flatten()
    if len(other):
        codes, wider = _codes(values[other], high[other])
        better = wider < error[other]
        chosen = other[better]
        best[chosen] = codes[better]
        low[chosen] = high[chosen]
    return best[:, 0::2] | (best[:, 1::2] << 4), (low + _BIAS).to(torch.uint8)


def _codes(values: torch.Tensor, exponent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The four-bit codes at these exponents (blocks, 32), and each block's squared error."""
    scaled = torch.ldexp(values, -exponent[:, None])
    size = scaled.abs()
    code = torch.zeros(values.shape, dtype=torch.uint8)
    for number, middle in enumerate(_MIDDLES):
        code += (size >= middle) if number in _ODD_BELOW else (size > middle)
    taken = torch.tensor(VALUES[:8])[code.int()]
    error = torch.ldexp((size - taken).square().sum(dim=1), 2 * exponent)
    return code | ((scaled < 0).to(torch.uint8) << 3), error


def dequantise(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 values (…, in) of blocks (…, in / 32, 16) and scales (…, in / 32). Nothing is rounded."""
    table = torch.tensor(VALUES)
    low, high = table[(blocks & 15).int()], table[(blocks >> 4).int()]
    values = torch.stack([low, high], dim=-1).flatten(-2)
    return torch.ldexp(values, scales.int()[..., None] - _BIAS).flatten(-2)


def bound(values: torch.Tensor) -> torch.Tensor:
    """The largest error (…, in / 32) that rounding to MXFP4 may make in a block of `values` (…, in): half of the widest step that it may need."""
    largest = values.float().unflatten(-1, (-1, BLOCK)).abs().amax(dim=-1)
    _, exponent = torch.frexp(largest)
    # At the finer exponent s a value is off by 2^s in the widest step, or cut from below 8 to 6; at the coarser by 2 · 2^s.
    return torch.ldexp(torch.full_like(largest, 2.0), (exponent - 3).clamp(min=-_BIAS))
