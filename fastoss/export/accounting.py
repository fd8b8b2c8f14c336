"""The first part of verification: every LoRA pair is found in the export's weights, and nothing else has changed.

The expected change is computed by PEFT's own formula from the adapter's file, not by the code that merged. Each changed matrix
must be what its format makes of base + change, and everything else must be the base's to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from fastoss.export.adapter_layouts import Adapter
from fastoss.export.base import Base
from fastoss.export.gguf_weights import GgufWeights
from fastoss.export.mxfp4 import bound, dequantise, quantise
from fastoss.terminal import Counting

_STRAY = 1e-3  # share of values that may be rounded to the neighbour: sums in another order tip a few over
_LISTED = 8


class Rounding(Protocol):
    def __call__(self, values: torch.Tensor) -> torch.Tensor: ...


@dataclass
class MatrixCheck:
    """One changed matrix (or one expert of it). `kept` is the share of LoRA's change that is left after rounding (1.0 is all
    of it), `error` the rounding error as a share of the weight's size, both root mean square."""

    tensor: str
    expert: int | None
    kept: float
    error: float
    problem: str | None = None

    @property
    def name(self) -> str:
        return self.tensor if self.expert is None else f"{self.tensor}, expert {self.expert}"


@dataclass
class Accounting:
    """The verdict over all weights of an export."""

    pairs: int = 0
    zero_pairs: int = 0
    matrices: list[MatrixCheck] = field(default_factory=list)
    unchanged: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """The share of LoRA's change that is left, over all matrices that have one."""
        return sum(check.kept for check in self.matrices) / len(self.matrices) if self.matrices else 1.0

    def to_plain(self) -> dict[str, Any]:
        return {
            "passed": not self.problems,
            "pairs": self.pairs,
            "zero_pairs": self.zero_pairs,
            "matrices_changed": len(self.matrices),
            "tensors_unchanged": self.unchanged,
            "change_kept": round(self.kept, 6),
            "largest_error": round(max((check.error for check in self.matrices), default=0.0), 6),
            "problems": self.problems,
            "by_matrix": [{key: _short(value) for key, value in asdict(check).items() if value is not None} for check in self.matrices],
        }


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def account(export: Base | GgufWeights, base: Base, adapter: Adapter, progress: Callable[[str], None]) -> Accounting:
    """Hold every tensor of an export against base and adapter. Problems are listed, not raised."""
    counting = Counting(progress)
    zero = set(adapter.zero_pairs())
    result = Accounting(pairs=adapter.count(), zero_pairs=len(zero), problems=inert_groups(adapter))
    missing, more = _names(export, base)
    result.problems += [f"`{name}` is not in the export" for name in missing] + [f"`{name}` is in the export and not in the base" for name in more]
    for name in [name for name in base.names() if name not in missing]:
        if base.is_experts(name):
            for number in range(base.experts):
                _check_matrix(result, export, base, adapter, name, number, (name, number) in zero)
        elif name in adapter.where:
            _check_matrix(result, export, base, adapter, name, None, (name, None) in zero)
        else:
            _check_same(result, export, base, name)
        if base.is_experts(name):
            counting.at(f"weights of layer {int(name.split('.')[2]) + 1} of {base.layers} compared")
    found = [check for check in result.matrices if check.problem]
    result.problems += [f"{check.name}: {check.problem}" for check in found[:_LISTED]]
    if len(found) > _LISTED:
        result.problems.append(f"… and {len(found) - _LISTED} matrices more")
    return result


def inert_groups(adapter: Adapter) -> list[str]:
    """A problem for attention, or experts, whose every pair is zero: such an adapter has learned nothing there, or lost it."""
    zero, problems = set(adapter.zero_pairs()), []
    for group, names in adapter.groups().items():
        numbers: list[int | None] = [None] if group == "attention" else list(range(adapter.experts))
        if names and all((name, number) in zero for name in names for number in numbers):
            problems.append(f"the adapter is inert: every pair of its {group} is zero, first `{names[0]}`")
    return problems


def _names(export: Base | GgufWeights, base: Base) -> tuple[list[str], list[str]]:
    if isinstance(export, GgufWeights):  # complete by construction
        return [], []
    ours, theirs = set(export.names()), set(base.names())
    return sorted(theirs - ours), sorted(ours - theirs)


def peft_delta(adapter: Adapter, name: str, number: int | None) -> torch.Tensor:
    """The change in float32 as the base stores the matrix, by PEFT's `ParamWrapper.get_delta_weight` where the file is in its layout."""
    where = adapter.where[name]
    if number is None or adapter.layout != "peft":
        return adapter.delta(name, number)
    a, b = (adapter.file.read(key).float() for key in where.keys[0])
    ours = a.reshape(adapter.experts, -1, a.shape[-1])[number : number + 1]
    outs = b.reshape(b.shape[0], -1, adapter.experts)[:, :, number : number + 1]
    return torch.einsum("o r e, e r i -> e i o", outs, ours)[0] * adapter.scale


def rounding(export: Base | GgufWeights, name: str) -> tuple[str, Rounding]:
    """What the export's format does to a matrix (out, in) when it stores it."""
    if isinstance(export, Base):
        if export.is_packed(name):
            return "mxfp4", round_mxfp4
        dtype = export.file.entries[name].dtype
        return str(dtype).removeprefix("torch."), lambda values: values.to(dtype).float()
    kind = export.type_of(name)
    if kind == "MXFP4":
        return "mxfp4", round_mxfp4
    return kind.lower(), ROUNDINGS[kind]


def round_mxfp4(values: torch.Tensor) -> torch.Tensor:
    return dequantise(*quantise(values))


def round_q8_0(values: torch.Tensor) -> torch.Tensor:
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.contiguous().numpy(), kind), kind))


ROUNDINGS: dict[str, Rounding] = {
    "F32": lambda values: values,
    "F16": lambda values: values.to(torch.float16).float(),
    "BF16": lambda values: values.to(torch.bfloat16).float(),
    "Q8_0": round_q8_0,
    "MXFP4": round_mxfp4,
}


def _check_matrix(result: Accounting, export: Base | GgufWeights, base: Base, adapter: Adapter, name: str, number: int | None, is_zero: bool) -> None:
    changed = name in adapter.where
    if number is None:
        weight, have = base.matrix(name).float(), export.matrix(name).float()
    else:
        # The formats' blocks run along the inputs.
        weight, have = base.expert(name, number).T, export.expert(name, number).T
    if have.shape != weight.shape:
        result.problems.append(f"`{name}` is {list(have.shape)}, the base has {list(weight.shape)}")
        return
    delta = None
    if changed:
        delta = peft_delta(adapter, name, number)
        delta = delta if number is None else delta.T
    kind, round_as = rounding(export, name)
    left_alone = not changed and kind == "mxfp4" and base.is_packed(name)  # its bytes are copied
    expected = weight + delta if delta is not None else weight
    wanted = weight if left_alone else round_as(expected)
    problem = _compare(have, wanted, expected, weight, delta, kind)
    kept = 1.0
    if delta is not None and not is_zero:
        size = delta.double().square().sum()
        kept = float(1 + ((have - expected).double() * delta.double()).sum() / size) if size > 0 else 1.0
    error = float((have - expected).square().mean().sqrt() / weight.square().mean().sqrt().clamp(min=1e-30))
    if changed:
        result.matrices.append(MatrixCheck(name, number, kept, error, problem))
    else:
        result.unchanged += 1
        if problem:
            result.problems.append(f"{name}{'' if number is None else f', expert {number}'}: {problem} (LoRA does not touch it)")


def _compare(
    have: torch.Tensor, wanted: torch.Tensor, expected: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor | None, kind: str
) -> str | None:
    """What is wrong with a matrix, in words, or None. `wanted` is what the format makes of `expected` = base + LoRA's change."""
    if not bool(torch.isfinite(have).all()):
        return "it holds values that are NaN or infinite"
    scale = float(expected.abs().max())
    # Two ways to sum the same products differ in the last bits of float32.
    off = (have - wanted).abs() > 4e-6 * scale
    share = float(off.float().mean())
    allowed = 0.0 if kind == "float32" or delta is None else _STRAY
    if kind == "mxfp4":
        limit = bound(expected)[..., None].expand(*expected.shape[:-1], -1, 32).flatten(-2)
        if bool(((have - expected).abs() > limit * 1.001).any()):
            return _describe(have, expected, weight, delta, f"a block is off by more than {kind} rounds")
    if share <= allowed:
        return None
    return _describe(have, expected, weight, delta, f"{share:.1%} of its values are not base + LoRA's change in {kind}")


def _describe(have: torch.Tensor, expected: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor | None, fact: str) -> str:
    """The fact with a likely cause: how much of LoRA's change is there."""
    if delta is None or not delta.any():
        return fact
    there = (have - weight).double()
    share = float((there * delta.double()).sum() / delta.double().square().sum())
    rest = float((there - share * delta.double()).norm() / delta.double().norm())
    if abs(share) < 0.02 and rest < 0.5:
        return f"{fact}: LoRA's change is missing"
    if rest < 0.1 and abs(share - 1) > 0.01:
        return f"{fact}: LoRA's change is there {share:.2f} times"
    return f"{fact}: what changed is not LoRA's change (it is found {share:.2f} times, with {rest:.1f} times its size beside it)"


def _check_same(result: Accounting, export: Base | GgufWeights, base: Base, name: str) -> None:
    """A tensor that LoRA does not touch, piece by piece."""
    result.unchanged += 1
    _, round_as = rounding(export, name)
    pieces = [export.matrix(name)] if len(base.shape(name)) < 2 or name.endswith("_bias") else export.rows(name)
    theirs = _Queue(iter(pieces))
    for ours in base.rows(name):
        if not torch.equal(theirs.take(len(ours)).float(), round_as(ours.float())):
            result.problems.append(f"`{name}` is not the base's, and LoRA does not touch it")
            return


class _Queue:
    """Rows of one side's pieces, handed out in the other side's numbers."""

    def __init__(self, pieces: Iterator[torch.Tensor]):
        self.pieces, self.kept = pieces, torch.empty(0)

    def take(self, count: int) -> torch.Tensor:
        parts, missing = [], count
        while missing:
            if not len(self.kept):
                self.kept = next(self.pieces, torch.empty(0))
                if not len(self.kept):
                    break
            parts.append(self.kept[:missing])
            self.kept = self.kept[missing:]
            missing -= len(parts[-1])
        return torch.cat(parts) if parts else torch.empty(0)
