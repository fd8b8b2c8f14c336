"""Examples that share their beginning → trees: one pass over what they share trains all of them. The schedule hands it examples.

The trunk is the example with the longest prompt, as it is. Every other example follows it as far as their tokens agree, and
then hangs off it as a branch: it repeats the last token that they share, so that the token after it is predicted within the
branch and labels shift by one place as everywhere. The repeated token has its old position and sees what it saw before, so it
computes the same. Where tokens agree that only one of the two trains, the trunk trains them: an earlier answer without
reasoning costs two tokens (its `<|return|>`, where the history has `<|end|>`), a call within a chain of tools none at all.

Laid end to end, positions say it all: a segment's first position is the number of trunk tokens it sees, and the latest fork
comes first, so that positions never run on from one segment into the next (`fastoss.model.attention_layout` reads them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from fastoss.config import CHANNELS
from fastoss.data.harmony import IGNORE

if TYPE_CHECKING:
    from fastoss.data.harmony import Example


@dataclass(frozen=True)
class Segment:
    """A trunk (`fork` 0) or a branch: it sees the trunk's first `fork` tokens and itself, and begins at that position.

    All arrays (tokens,): `input_ids` int64; `weights` float32, 0 where there is no loss; `channels` uint8, counting `CHANNELS`
    from 1; `examples` int32, which of the tree's examples trains the token (-1: none does).
    """

    fork: int
    input_ids: numpy.ndarray
    weights: numpy.ndarray
    channels: numpy.ndarray
    examples: numpy.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Tree:
    """Some examples in one: the trunk, then the branches, the latest fork first."""

    segments: tuple[Segment, ...]
    examples: int
    expanded_tokens: int  # of the examples, each on its own

    def __len__(self) -> int:
        """Tokens of the tree, the repeated ones counted."""
        return sum(map(len, self.segments))

    @property
    def saved(self) -> float:
        """Share of the expanded tokens that the tree does without."""
        return 1 - len(self) / self.expanded_tokens

    @property
    def trained_tokens(self) -> int:
        return sum(int((segment.weights > 0).sum()) for segment in self.segments)


def build_tree(examples: Sequence[Example]) -> Tree:
    """Make one tree of the examples of a chat, or of a pair's two (the first is the trunk when their prompts are the same).

    Each example's every trained token is in it once, after exactly the tokens that come before it in the example. Raises
    `ValueError` when they do not even begin with the same token.
    """
    longest = max(range(len(examples)), key=lambda i: (examples[i].prompt_length, -i))
    trunk = segment_of(examples[longest], longest)
    branches = []
    for number, example in enumerate(examples):
        if number == longest:
            continue
        own = segment_of(example, number)
        shared = _shared_tokens(trunk, own)
        if shared == 0:
            raise ValueError("examples of one tree begin with the same token")
        laid = numpy.flatnonzero(own.weights[:shared])
        for values, more in ((trunk.weights, own.weights), (trunk.channels, own.channels), (trunk.examples, own.examples)):
            values[laid] = more[laid]
        if own.weights[shared:].any():
            head = shared - 1
            rest = Segment(head, own.input_ids[head:], own.weights[head:].copy(), own.channels[head:].copy(), own.examples[head:].copy())
            for values, nothing in ((rest.weights, 0), (rest.channels, 0), (rest.examples, -1)):
                values[0] = nothing
            branches.append(rest)
    branches.sort(key=lambda branch: -branch.fork)
    return Tree((trunk, *branches), len(examples), sum(map(len, examples)))


def collate_trees(trees: Sequence[Tree], *, train: bool = True) -> dict[str, numpy.ndarray]:
    """Lay trees end to end in one row, as `fastoss.data.packing.collate` lays examples: the same keys, all (1, tokens).

    `position_ids` begin at 0 in each tree and at its fork in each branch; the first label of every segment is -100. One key is
    more: `examples`, whose token it is, counted over the trees' examples in order (-1: nobody's), to take sums by example.
    `train=False` takes every label away.
    """
    segments = [segment for tree in trees for segment in tree.segments]
    first = numpy.cumsum([0, *(tree.examples for tree in trees)])
    owners = [numpy.where(s.examples < 0, -1, s.examples + first[n]) for n, tree in enumerate(trees) for s in tree.segments]
    ids = numpy.concatenate([segment.input_ids for segment in segments])
    weights = numpy.concatenate([segment.weights for segment in segments]) * numpy.float32(train)
    row = {
        "input_ids": ids,
        "labels": numpy.where(weights > 0, ids, IGNORE),
        "loss_weights": weights,
        "channels": numpy.concatenate([segment.channels for segment in segments]) * numpy.uint8(train),
        "position_ids": numpy.concatenate([numpy.arange(len(segment)) + segment.fork for segment in segments]),
        "examples": numpy.concatenate(owners).astype(numpy.int32),
    }
    return {name: values[None] for name, values in row.items()}


def segment_of(example: Example, number: int = 0) -> Segment:
    """An example as a segment without a fork; `number` is its place in its tree."""
    count = len(example.input_ids)
    weights, channels = numpy.zeros(count, numpy.float32), numpy.zeros(count, numpy.uint8)
    for span in example.spans:
        if span.trained:
            weights[span.start : span.end] = span.weight
            channels[span.start : span.end] = CHANNELS.index(span.channel) + 1 if span.channel else 0
    weights[:1], channels[:1] = 0, 0  # nothing comes before it that could predict it
    examples = numpy.where(weights > 0, number, -1).astype(numpy.int32)
    return Segment(0, numpy.array(example.input_ids, numpy.int64), weights, channels, examples)


def _shared_tokens(trunk: Segment, own: Segment) -> int:
    """How many tokens the two begin with alike, up to the first that both train."""
    length = min(len(trunk), len(own))
    apart = trunk.input_ids[:length] != own.input_ids[:length]
    apart |= (trunk.weights[:length] > 0) & (own.weights[:length] > 0)
    return int(apart.argmax()) if apart.any() else length
