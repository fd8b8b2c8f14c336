"""Dataset → batches: which examples go into which micro-batch, in which order, and the tensors they become.

The whole schedule of a run is laid out before the first step. So every rank knows it, the number of steps is exact, a
run resumes at any step, and batches never depend on what was trained before.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy

from fastoss.data.harmony import IGNORE
from fastoss.data.tokenizer import PAD
from fastoss.data.trees import build_tree, collate_trees, segment_of

if TYPE_CHECKING:
    import torch

    from fastoss.data.harmony import Example

LOSS_MARKS = ("labels", "loss_weights", "channels", "examples")  # of a batch: what the loss reads and the model does not
# packed: examples end to end in one row, kept apart by their positions; padded: one row an example.
Layout = Literal["packed", "padded"]
_OPEN_BATCHES = 1024  # batches that packing keeps open: chat lengths then fill 99.4 % of 4,096 tokens, 99.9 % of 16,384
_WINDOW = 64  # steps among which batches of like cost are put together
# Tokens whose linear layers cost as much as one query and key pair's attention, forward and backward: 4 · 3.03e9 · 2 FLOP a
# token against 12 full layers · 64 heads · 64 · 2 products · 2 FLOP / 2 (causal) · 3.5 a pair (shared/performance.md's model).
_TOKEN_PER_PAIR = 1 / 70_000


@dataclass(frozen=True)
class BatchRule:
    """How micro-batches are filled: packed, up to `tokens`; or padded, `rows` examples each."""

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
        """How many epochs this number of micro-batches makes."""
        start = 0
        for number, end in enumerate(self.epoch_ends):
            if batches_done < end or number == len(self.epoch_ends) - 1:
                whole = self.last_epoch if number == len(self.epoch_ends) - 1 else end - start
                return number + (min(batches_done, end) - start) / whole
            start = end
        raise AssertionError("a schedule has at least one epoch")


def plan_schedule(
    lengths: Sequence[int],
    rule: BatchRule,
    *,
    epochs: float,
    max_steps: int,
    batches_per_step: int,
    ranks: int,
    seed: int,
    weights: Sequence[float] | None = None,
) -> Schedule:
    """Lay out all epochs. `lengths` are in tokens; a step takes `batches_per_step` micro-batches over all ranks.

    `weights` say how often each example is seen in an epoch: 2.0 twice, 0.5 in every other epoch.

    `max_steps` > 0 ends the run there, with as many epochs as it takes; a fractional epoch takes that share of its
    batches. Each epoch has an order of its own, from `seed` and its number alone.
    """
    batches: list[list[int]] = []
    ends: list[int] = []
    wanted = max_steps * batches_per_step
    number = whole = 0
    while (len(batches) < wanted) if wanted else (number < epochs):
        order = _members(len(lengths), weights, number, seed)
        rng = random.Random(f"{seed}/{number}")
        rng.shuffle(order)
        fresh = fill_batches(order, lengths, rule)
        if rule.rows is None:
            rng.shuffle(fresh)  # filling by length leaves like beside like
        if batches_per_step > 1:
            fresh = _balanced(fresh, lengths, batches_per_step, rng)
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


def _members(count: int, weights: Sequence[float] | None, epoch: int, seed: int) -> list[int]:
    """The examples of an epoch. A fraction of a weight takes turns: over the epochs each example is seen equally often."""
    if weights is None or all(weight == 1.0 for weight in weights):
        return list(range(count))
    members: list[int] = []
    for weight in sorted(set(weights)):
        alike = [index for index in range(count) if weights[index] == weight]
        members += alike * int(weight)
        random.Random(f"{seed}/turns/{weight}").shuffle(alike)
        share = len(alike) * (weight - int(weight))
        members += [alike[i % len(alike)] for i in range(round(epoch * share), round((epoch + 1) * share))]
    return sorted(members)


def _balanced(batches: list[list[int]], lengths: Sequence[int], batches_per_step: int, rng: random.Random) -> list[list[int]]:
    """Batches of like cost in the same step, so that no rank waits long for another. The steps stay in random order.

    What a step holds depends on the batches of a step alone, not on how many ranks share them.
    """
    costs = [sum(lengths[i] + lengths[i] ** 2 * _TOKEN_PER_PAIR for i in members) for members in batches]
    ordered: list[list[int]] = []
    window = _WINDOW * batches_per_step
    for start in range(0, len(batches), window):
        numbers = sorted(range(start, min(start + window, len(batches))), key=lambda n: costs[n])
        ragged = len(numbers) % batches_per_step  # a step that is not full comes last of all
        steps = [numbers[i : i + batches_per_step] for i in range(ragged, len(numbers), batches_per_step)]
        rng.shuffle(steps)
        ordered += [batches[n] for step in [*steps, numbers[:ragged]] for n in step]
    return ordered


def fill_batches(order: Sequence[int], lengths: Sequence[int], rule: BatchRule) -> list[list[int]]:
    """Put examples into micro-batches by the rule. Raises `ValueError` when one alone is longer than `rule.tokens`."""
    if rule.rows is not None:
        return [list(order[i : i + rule.rows]) for i in range(0, len(order), rule.rows)]
    assert rule.tokens is not None, "padded batches are given in rows"
    too_long = [lengths[i] for i in order if lengths[i] > rule.tokens]
    if too_long:
        raise ValueError(f"an example of {max(too_long)} tokens does not fit into a batch of {rule.tokens}")
    return _pack(order, lengths, rule.tokens)


def _pack(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best fit among the open batches; when there are too many, the fullest is closed."""
    closed: list[list[int]] = []
    open_batches: list[list[int]] = []  # by the room that is left, least first; `rooms` alike
    rooms: list[int] = []
    for index in order:
        length = lengths[index]
        best = bisect.bisect_left(rooms, length)
        if best < len(rooms):
            room, members = rooms.pop(best) - length, open_batches.pop(best)
            members.append(index)
        else:
            room, members = budget - length, [index]
        if room == 0:
            closed.append(members)
            continue
        place = bisect.bisect_left(rooms, room)
        rooms.insert(place, room)
        open_batches.insert(place, members)
        if len(rooms) > _OPEN_BATCHES:
            del rooms[0]
            closed.append(open_batches.pop(0))
    return closed + open_batches


def collate(units: Sequence[Sequence[Example]], layout: Layout, *, train: bool = True) -> dict[str, torch.Tensor]:
    """Make one micro-batch of tensors. A unit is one example, or (packed) several that become a tree.

    packed: see `collate_trees`; everything has the shape (1, tokens). padded: `input_ids`, `labels` (int64), `loss_weights`
    (float32), `channels` (uint8, counting `CHANNELS` from 1) and `attention_mask`, of shape (examples, longest), padded on the
    right. The first label of each example is -100: no token of its own precedes it. `train=False` takes every label away (a filler).
    """
    import torch

    if layout == "packed":
        batch: dict[str, Any] = collate_trees([build_tree(unit) for unit in units], train=train)
    else:
        rows = [segment_of(example) for unit in units for example in unit]
        width = max(map(len, rows))
        parts = {
            "input_ids": (PAD, [row.input_ids for row in rows]),
            "labels": (IGNORE, [numpy.where(row.weights > 0, row.input_ids, IGNORE) if train else numpy.full(len(row), IGNORE) for row in rows]),
            "loss_weights": (0, [row.weights * numpy.float32(train) for row in rows]),
            "channels": (0, [row.channels * numpy.uint8(train) for row in rows]),
            "attention_mask": (0, [numpy.ones(len(row), numpy.int64) for row in rows]),
        }
        batch = {
            name: numpy.stack([numpy.pad(values, (0, width - len(values)), constant_values=fill) for values in columns])
            for name, (fill, columns) in parts.items()
        }
    return {name: torch.from_numpy(values) for name, values in batch.items()}
