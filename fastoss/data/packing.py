"""Dataset → batches: which examples go into which micro-batch, in which order, and the tensors they become.

The whole schedule of a run is laid out before the first step. So every rank knows it, the number of steps is exact, a
run resumes at any step, and batches never depend on what was trained before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastoss.data.harmony import IGNORE
from fastoss.data.tokenizer import PAD

if TYPE_CHECKING:
    import torch

    from fastoss.data.harmony import Example

# packed: examples end to end in one row, kept apart by their positions; padded: one row an example.
Layout = Literal["packed", "padded"]
_OPEN_BATCHES = 32  # batches that packing keeps open: more fill better, fewer keep the shuffled order


@dataclass(frozen=True)
class BatchRule:
    """How micro-batches are filled: up to `tokens` (padding counted), or `rows` examples each."""

    layout: Layout
    tokens: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Schedule:
    """Every micro-batch of a run, as indices into the examples.

    `epoch_ends` are numbers of micro-batches; the last epoch may be cut short, whole it would have `last_epoch`.
    """

    batches: list[list[int]]
    epoch_ends: list[int]
    last_epoch: int
    fillers: int = 0  # batches at the end that no loss is taken from, so that every rank has as many

    def epoch(self, batches_done: int) -> float:
        """How many epochs so many micro-batches make."""
        start = 0
        for number, end in enumerate(self.epoch_ends):
            if batches_done < end or number == len(self.epoch_ends) - 1:
                whole = self.last_epoch if number == len(self.epoch_ends) - 1 else end - start
                return number + (min(batches_done, end) - start) / whole
            start = end
        raise AssertionError("a schedule has at least one epoch")


def plan_schedule(
    lengths: Sequence[int], rule: BatchRule, *, epochs: float, max_steps: int, batches_per_step: int, ranks: int, seed: int
) -> Schedule:
    """Lay out all epochs. `lengths` are in tokens; a step takes `batches_per_step` micro-batches over all ranks.

    `max_steps` > 0 ends the run there, with as many epochs as it takes; a fractional epoch takes that share of its
    batches. Each epoch has an order of its own, from `seed` and its number alone.
    """
    batches: list[list[int]] = []
    ends: list[int] = []
    wanted = max_steps * batches_per_step
    number = whole = 0
    while (len(batches) < wanted) if wanted else (number < epochs):
        order = list(range(len(lengths)))
        rng = random.Random(f"{seed}/{number}")
        rng.shuffle(order)
        fresh = fill_batches(order, lengths, rule)
        if rule.rows is None:
            rng.shuffle(fresh)  # filling by length leaves like beside like
        whole = len(fresh)
        if not wanted and epochs - number < 1:
            fresh = fresh[: max(1, round(len(fresh) * (epochs - number)))]
        batches += fresh
        ends.append(len(batches))
        number += 1
    if wanted:
        batches = batches[:wanted]
        ends[-1] = len(batches)
    fillers = -len(batches) % ranks
    shortest = min(range(len(lengths)), key=lengths.__getitem__)
    return Schedule(batches + [[shortest]] * fillers, ends, whole, fillers)


def fill_batches(order: Sequence[int], lengths: Sequence[int], rule: BatchRule) -> list[list[int]]:
    """Put examples into micro-batches by the rule. Raises `ValueError` when one alone is longer than `rule.tokens`."""
    if rule.rows is not None:
        return [list(order[i : i + rule.rows]) for i in range(0, len(order), rule.rows)]
    assert rule.tokens is not None
    too_long = [lengths[i] for i in order if lengths[i] > rule.tokens]
    if too_long:
        raise ValueError(f"an example of {max(too_long)} tokens does not fit into a batch of {rule.tokens}")
    return _pack(order, lengths, rule.tokens) if rule.layout == "packed" else _pad(order, lengths, rule.tokens)


def _pack(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best fit among a window of open batches; when the window is full, the fullest batch is closed."""
    closed: list[list[int]] = []
    open_batches: list[tuple[int, list[int]]] = []  # (room left, members)
    for index in order:
        length = lengths[index]
        fitting = [i for i, (room, _) in enumerate(open_batches) if room >= length]
        if fitting:
            best = min(fitting, key=lambda i: open_batches[i][0])
            room, members = open_batches[best]
            members.append(index)
            open_batches[best] = (room - length, members)
        else:
            if len(open_batches) == _OPEN_BATCHES:
                fullest = min(range(len(open_batches)), key=lambda i: open_batches[i][0])
                closed.append(open_batches.pop(fullest)[1])
            open_batches.append((budget - length, [index]))
    return closed + [members for _, members in open_batches]


def _pad(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of like length together, as many as fit with their padding."""
    batches: list[list[int]] = []
    members: list[int] = []
    for index in sorted(order, key=lambda i: lengths[i]):  # stable: among equals the shuffled order stands
        if members and lengths[index] * (len(members) + 1) > budget:
            batches.append(members)
            members = []
        members.append(index)
    return [*batches, members]


def collate(examples: Sequence[Example], layout: Layout, *, train: bool = True) -> dict[str, torch.Tensor]:
    """Make one micro-batch of int64 tensors.

    packed: `input_ids`, `labels`, `position_ids` of shape (1, tokens); positions start again at 0 with each example,
    and the first label of each is -100, since no token of its own precedes it.
    padded: `input_ids`, `labels`, `attention_mask` of shape (examples, longest), padded on the right.
    `train=False` takes every label away (a filler).
    """
    import torch

    def labels_of(example: Example) -> list[int]:
        return example.labels if train else [IGNORE] * len(example)

    if layout == "packed":
        ids = [i for example in examples for i in example.input_ids]
        labels = [i for example in examples for i in labels_of(example)]
        positions = [p for example in examples for p in range(len(example))]
        return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), "position_ids": torch.tensor([positions])}
    width = max(map(len, examples))
    rows = [(example, width - len(example)) for example in examples]
    return {
        "input_ids": torch.tensor([example.input_ids + [PAD] * gap for example, gap in rows]),
        "labels": torch.tensor([labels_of(example) + [IGNORE] * gap for example, gap in rows]),
        "attention_mask": torch.tensor([[1] * len(example) + [0] * gap for example, gap in rows]),
    }
