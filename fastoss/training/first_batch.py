"""The first batch, as the trainer gets it, compared with a fresh rendering: what was shown is what is trained, or nothing is. SFT and DPO use it."""

from __future__ import annotations

import torch

from fastoss.data.harmony import IGNORE, Example
from fastoss.errors import RunFailed

Laid = tuple[int, list[int], list[int]]  # how many trunk tokens come before it, ids, labels


def check_example(fresh: Example, segments: list[Laid]) -> None:
    """An example is the trunk's beginning, or that and a branch: with its very labels, or with none where another trains them."""
    (_, trunk, trunk_labels), *_ = segments
    place = 0
    for fork, ids, labels in segments:
        got = ids if fork == 0 else trunk[:fork] + ids
        marks = labels if fork == 0 else trunk_labels[: fork + 1] + labels[1:]
        apart = [i for i, meant in enumerate(fresh.input_ids) if i >= len(got) or got[i] != meant]
        wrong = [i for i, meant in enumerate(fresh.labels) if i < len(marks) and meant != IGNORE and marks[i] != meant]
        if not apart and not wrong:
            return
        place = max(place, min(apart + wrong))
    raise RunFailed(f"token {place} of the first batch, or its label, is not what was rendered", place=fresh.conversation.place)


def laid_out(batch: dict[str, torch.Tensor]) -> list[list[Laid]]:
    """The batch's documents, each as its trunk and branches."""
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    if "position_ids" not in batch:
        lengths = batch["attention_mask"].sum(1).tolist()
        padding = [set(row[n:]) for row, n in zip(labels, lengths, strict=True)]
        assert all(rest <= {IGNORE} for rest in padding), "padding carries loss"
        return [[(0, row[:n], marks[:n])] for row, marks, n in zip(ids, labels, lengths, strict=True)]
    positions = batch["position_ids"][0].tolist()
    starts = [i for i, p in enumerate(positions) if i == 0 or p != positions[i - 1] + 1]
    documents: list[list[Laid]] = []
    for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
        segment = (positions[start], ids[0][start:end], labels[0][start:end])
        if positions[start] == 0:
            documents.append([segment])
        else:
            documents[-1].append(segment)
    return documents
