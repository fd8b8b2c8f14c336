"""Dataset → units: what the schedule packs. An example alone, or all examples of a chat as one tree, which computes their shared history once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy

from fastoss.data.harmony import Example
from fastoss.data.store import Examples

# Trees need the block-mask kernel where a GPU has a faster one for plain documents: they are used where they save more than that may cost.
_WORTH_IT = 0.1


@dataclass(frozen=True)
class Units(Sequence[list[Example]]):
    """Lists of examples that are trained together, in the order of the data.

    `bounds` (units + 1,) are the first example of each; `lengths` in tokens; `weights` how often an epoch sees each; `saved`
    is the share of tokens that trees do without (0: there are none).
    """

    examples: Examples
    bounds: numpy.ndarray
    lengths: list[int]
    weights: list[float]
    saved: float = 0.0

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> list[Example]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Example]]: ...
    def __getitem__(self, index: int | slice) -> list[Example] | list[list[Example]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return list(self.examples[int(self.bounds[index]) : int(self.bounds[index + 1])])


def single_units(examples: Examples, weights: Sequence[float]) -> Units:
    """Every example alone."""
    return Units(examples, numpy.arange(len(examples) + 1), examples.lengths, list(weights))


def tree_units(examples: Examples, weights: Sequence[float], budget: int) -> Units:
    """The examples of each chat as a tree where it fits into `budget` tokens; all alone, where trees would save too little."""
    alone = single_units(examples, weights)
    store = examples.store
    rows = store.examples["row"][examples.numbers]
    if len(rows) == 0:
        return alone
    first = numpy.flatnonzero(numpy.concatenate([[True], rows[1:] != rows[:-1]]))
    ends = numpy.append(first[1:], len(rows))
    tree_lengths = store.tree_lengths[rows[first]].astype(numpy.int64)
    expanded = numpy.add.reduceat(numpy.array(alone.lengths, numpy.int64), first)
    as_tree = (tree_lengths > 0) & (tree_lengths <= budget) & (tree_lengths < expanded)
    saved = float((expanded - tree_lengths)[as_tree].sum() / expanded.sum())
    if saved < _WORTH_IT:
        return alone
    within = numpy.repeat(as_tree, ends - first) & ~numpy.isin(numpy.arange(len(rows)), first)  # examples that follow in a tree
    bounds = numpy.append(numpy.flatnonzero(~within), len(rows))
    lengths = numpy.array(alone.lengths, numpy.int64)
    lengths[first[as_tree]] = tree_lengths[as_tree]
    kept = bounds[:-1]
    return Units(examples, bounds, lengths[kept].tolist(), [weights[i] for i in kept], saved)


def pair_units(examples: Examples, weights: Sequence[float], *, trees: bool) -> Units:
    """Pairs of a chosen and a rejected answer, each a tree over its prompt, or two rows as long as the longer."""
    lengths = numpy.array(examples.lengths, numpy.int64).reshape(-1, 2)
    if trees:
        taken = examples.store.tree_lengths[examples.store.examples["row"][examples.numbers[::2]]].astype(numpy.int64)
    else:
        taken = 2 * lengths.max(1, initial=0)
    saved = 1 - float(taken.sum() / max(1, lengths.sum())) if trees else 0.0
    return Units(examples, numpy.arange(0, len(examples) + 1, 2), taken.tolist(), list(weights[::2]), saved)
