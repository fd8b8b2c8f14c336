"""Tokens as people see them: each message of an example in its colour, trained spans marked. From the trainer's own ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fastoss.data.harmony import Example
from fastoss.data.tokenizer import decode

_COLOURS = {"system": "90", "developer": "36", "user": "34", "tool": "35", "analysis": "33", "commentary": "35", "final": "32"}


def example_lines(example: Example, *, colour: bool, label: str = "") -> Iterator[str]:
    """Lines for one example: place and counts, then each span; `+` marks trained spans (with their weight, if it is not 1), `·` context.

    `label` says which answer of a pair it is.
    """
    trained: Counter[str] = Counter()
    for span in example.spans:
        if span.trained:
            trained[span.channel or span.role] += span.end - span.start
    shares = f" ({', '.join(f'{name} {count:,}' for name, count in trained.items())})" if trained else ""
    yield f"{example.conversation.place}  {label and label + '  '}{len(example):,} tokens, {example.trained_tokens:,} trained{shares}"
    for span in example.spans:
        name = span.channel or span.role
        weight = f" × {span.weight:g}" if span.trained and span.weight != 1.0 else ""
        head = f"{'+' if span.trained else '·'} {name + weight:<10} {span.end - span.start:>5}  "
        style = f"\033[{'1;' if span.trained else '2;'}{_COLOURS.get(name, '90')}m" if colour else ""
        text = decode(example.input_ids[span.start : span.end]).replace("\r", "␍")  # it would overwrite the line in a terminal
        for number, line in enumerate(text.split("\n")):
            yield f"{head if number == 0 else ' ' * len(head)}{style}{line}{style and chr(27) + '[0m'}"
    yield ""
