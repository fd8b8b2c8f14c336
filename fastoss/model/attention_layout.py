"""Positions → who sees whom: the shape of a packed row, worked out once a batch and shared by all layers and kernels.

A row holds documents end to end. Positions alone say how they lie: they rise by one within a segment. A segment that
begins at 0 opens a document and is its trunk. One that begins at p > 0 is a branch of the same document: it sees the
trunk's first p tokens and itself, and no other branch (`fastoss.data.trees` lays branches so that each begins a segment).
So every token sees at most two runs of places, one of its own segment and one of the trunk; a window shortens both from
below. All kernels read their masks from these runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import torch

BLOCK = 128  # tokens of a FlexAttention block, its default


class Runs(NamedTuple):
    """What each token sees: places `own_from` up to itself, and `trunk_from` up to, not including, `trunk_to`. All (tokens,) int32."""

    own_from: torch.Tensor
    trunk_from: torch.Tensor
    trunk_to: torch.Tensor


class Part(NamedTuple):
    """Tokens `first` to `last` of a segment, and the runs of places that hold the keys they see; their document begins at `document`."""

    document: int
    first: int
    last: int
    keys: tuple[tuple[int, int], ...]


@dataclass(eq=False)
class DocumentLayout:
    """How documents lie in a batch of `rows` rows, counted as one row of all its tokens laid end to end.

    `lengths` (of documents, in tokens), `segments` (of each its first place, its end and how many trunk tokens it sees) and
    `has_branches` are known to the host, so that no layer waits for the device.
    `starts` (documents + 1,) are the places where documents begin, and the end; the rest says of each token, (tokens,), where
    its segment begins, where its document begins, and how many trunk tokens its segment sees (0 in a trunk). All int32.
    """

    rows: int
    lengths: tuple[int, ...]
    segments: tuple[tuple[int, int, int], ...]
    has_branches: bool
    starts: torch.Tensor
    segment_from: torch.Tensor
    document_from: torch.Tensor
    fork: torch.Tensor
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_positions(cls, positions: torch.Tensor) -> DocumentLayout:
        """`positions` (rows, tokens) as the model is given them. From tensors of a GPU it has to wait for them, once.

        Raises `ValueError` where a segment begins beyond the end of its trunk: then positions jump, and nobody can say why.
        """
        flat = positions.detach().cpu().numpy().reshape(-1).astype(numpy.int64)
        row_begins = numpy.arange(flat.size) % positions.shape[1] == 0
        begins = row_begins | (numpy.diff(flat, prepend=flat[:1]) != 1)
        first = numpy.flatnonzero(begins)  # places where segments begin
        opens = row_begins[first] | (flat[first] == 0)  # of these, the ones that open a document
        opens |= flat[first] == flat[first[opens]][numpy.cumsum(opens) - 1]  # and those that see nothing of their trunk
        document = numpy.cumsum(opens) - 1
        starts = first[opens]
        trunk_lengths = numpy.diff(numpy.append(first, flat.size))[opens]
        fork = flat[first] - flat[starts][document]
        wrong = numpy.flatnonzero((fork < 0) | (fork > trunk_lengths[document]))
        if wrong.size:
            place = int(first[wrong[0]])
            raise ValueError(f"position {flat[place]} at place {place} follows {flat[place - 1]} and is beyond the trunk of its document")
        segment = numpy.cumsum(begins) - 1
        ends = numpy.append(starts, flat.size)

        def on_device(values: numpy.ndarray) -> torch.Tensor:
            return torch.from_numpy(values.astype(numpy.int32)).to(positions.device, non_blocking=True)

        return cls(
            rows=positions.shape[0],
            lengths=tuple(numpy.diff(ends).tolist()),
            segments=tuple(zip(first.tolist(), [*first[1:].tolist(), flat.size], fork.tolist(), strict=True)),
            has_branches=bool(fork.any()),
            starts=on_device(ends),
            segment_from=on_device(first[segment]),
            document_from=on_device(starts[document][segment]),
            fork=on_device(fork[segment]),
        )

    @classmethod
    def from_padding(cls, mask: torch.Tensor) -> DocumentLayout | None:
        """`mask` (rows, tokens), true where there is a token: each row's tokens are a document, and so is its padding.

        None where the tokens of a row are not in one piece: that is no padding.
        """
        real = mask.detach().cpu().numpy().astype(bool)
        begins = numpy.concatenate([numpy.ones_like(real[:, :1]), real[:, 1:] != real[:, :-1]], 1)
        if (real & begins).sum(1).max(initial=0) > 1:
            return None
        place = numpy.broadcast_to(numpy.arange(real.shape[1]), real.shape)
        positions = place - numpy.maximum.accumulate(numpy.where(begins, place, 0), 1)
        return cls.from_positions(torch.from_numpy(positions)).to(mask.device)

    @property
    def tokens(self) -> int:
        return len(self.fork)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    def to(self, device: Any, *_: Any, non_blocking: bool = False, **__: Any) -> DocumentLayout:
        """The layout on `device`; itself where it is there already."""
        if torch.empty(0, device=device).device == self.starts.device:
            return self
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self, *_: Any) -> DocumentLayout:
        """For a DataLoader that pins what it hands on."""
        return self._each(lambda tensor: tensor.pin_memory())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}  # block masks hold functions, which do not travel

    def _each(self, change: Any) -> DocumentLayout:
        tensors = (change(tensor) for tensor in (self.starts, self.segment_from, self.document_from, self.fork))
        return DocumentLayout(self.rows, self.lengths, self.segments, self.has_branches, *tensors)

    def parts(self, rows: int, window: int | None) -> Iterator[list[Part]]:
        """The work cut up for a kernel that has no mask of its own: of each document its segments, up to `rows` tokens at a time.

        A part has all the keys that one of its tokens sees, and few more: those of one segment, those of the trunk before its fork.
        """
        parts: list[Part] = []
        trunk = 0
        for start, end, fork in self.segments:
            if fork == 0:
                if parts:
                    yield parts
                parts, trunk = [], start
            for first in range(start, end, rows):
                last = min(first + rows, end)
                own_from, trunk_from = start, trunk
                if window is not None:
                    own_from = max(own_from, first - window + 1)
                    trunk_from = max(trunk_from, trunk + fork + first - start - window + 1)
                keys = ((trunk_from, trunk + fork),) if trunk_from < trunk + fork else ()
                parts.append(Part(trunk, first, last, (*keys, (own_from, last))))
        yield parts

    def runs(self, window: int | None) -> Runs:
        """What each token sees in a layer whose window is so many positions, its own counted (None: all before it)."""
        if ("runs", window) not in self._made:
            place = torch.arange(self.tokens, dtype=torch.int32, device=self.fork.device)
            own_from, trunk_from, trunk_to = self.segment_from, self.document_from, self.document_from + self.fork
            if window is not None:
                # A token's position in its document, counted on from the fork: the window counts positions, not places.
                position = self.fork + place - self.segment_from
                own_from = torch.maximum(own_from, place - (window - 1))
                trunk_from = torch.minimum(torch.maximum(trunk_from, self.document_from + position - (window - 1)), trunk_to)
            self._made["runs", window] = Runs(own_from, trunk_from, trunk_to)
        runs: Runs = self._made["runs", window]
        return runs

    def visible(self, window: int | None, rows: slice = slice(None), keys: tuple[tuple[int, int], ...] = ()) -> torch.Tensor:
        """Whether the tokens at the places of `rows` see those in `keys`, runs of places (none: all): (rows, keys) bool."""
        place = torch.arange(self.tokens, device=self.fork.device)
        query, key = place[rows, None], torch.cat([place[slice(*run)] for run in keys])[None] if keys else place[None]
        own_from, trunk_from, trunk_to = (values[rows, None] for values in self.runs(window))
        return ((key >= own_from) & (key <= query)) | ((key >= trunk_from) & (key < trunk_to))

    def block_mask(self, window: int | None) -> Any:
        """The FlexAttention `BlockMask` of a layer with this window; block by block from the runs, with no dense mask on the way.

        One call makes a dozen small kernels and waits for none. Blocks that are seen whole need no mask, the others ask the runs.
        """
        if ("blocks", window) not in self._made:
            self._made["blocks", window] = self._block_mask(window)
        return self._made["blocks", window]

    def _block_mask(self, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        own_from, trunk_from, trunk_to = self.runs(window)
        place = torch.arange(self.tokens, device=own_from.device)
        row, blocks = place // BLOCK, -(-self.tokens // BLOCK)

        def counted(first: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
            """Of how many tokens of each block of rows the run of blocks `first` to `end` holds a block: (blocks, blocks)."""
            steps = torch.zeros(blocks * (blocks + 1), dtype=torch.int32, device=row.device)
            one = torch.ones_like(row, dtype=torch.int32)
            steps.index_add_(0, row * (blocks + 1) + first, one)
            steps.index_add_(0, row * (blocks + 1) + torch.maximum(end, first), -one)
            return steps.view(blocks, blocks + 1).cumsum(1)[:, :blocks]

        def above(value: torch.Tensor) -> torch.Tensor:
            return (value + BLOCK - 1) // BLOCK

        seen = counted(own_from // BLOCK, row + 1)
        whole = counted(above(own_from), (place + 1) // BLOCK)
        if self.has_branches:
            has_trunk = trunk_to > trunk_from
            seen += counted(trunk_from // BLOCK, torch.where(has_trunk, above(trunk_to), 0))
            whole += counted(above(trunk_from), trunk_to // BLOCK)
        full = whole == BLOCK  # a token sees a block whole in one of its runs at most, so this counts tokens

        def documents(_b: Any, _h: Any, query: Any, key: Any) -> Any:
            return (key <= query) & (key >= own_from[query])

        def trees(_b: Any, _h: Any, query: Any, key: Any) -> Any:
            return ((key <= query) & (key >= own_from[query])) | ((key >= trunk_from[query]) & (key < trunk_to[query]))

        # The window is in the tensors and not in the code, so that layers of both kinds share what was compiled.
        return BlockMask.from_kv_blocks(
            *_ordered((seen > 0) & ~full),
            *_ordered(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=trees if self.has_branches else documents,
            seq_lengths=(self.tokens, self.tokens),
        )


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each row of `blocks` (blocks, blocks) bool has, and their numbers first: as `BlockMask` wants them."""
    order = torch.argsort(blocks.to(torch.int8), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
