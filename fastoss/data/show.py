"""Tokens as people see them: each message of an example in its colour, trained spans marked. From the trainer's own ids."""

from __future__ import annotations

from collections.abc import Iterator

from fastoss.data.harmony import Example
from fastoss.data.tokenizer import decode

_COLOURS = {"system": "90", "developer": "36", "user": "34", "analysis": "33", "final": "32", None: "90"}


def example_lines(example: Example, *, colour: bool) -> Iterator[str]:
    """Lines for one example: place and counts, then each span; `+` marks trained spans, `·` context."""
    yield f"{example.conversation.place}  {len(example):,} tokens, {example.trained_tokens:,} trained"
    for span in example.spans:
        text = decode(example.input_ids[span.start : span.end])
        name = span.channel or span.role
        head = f"{'+' if span.trained else '·'} {name:<9} {span.end - span.start:>5}  "
        style = f"\033[{'1;' if span.trained else '2;'}{_COLOURS.get(name, '90')}m" if colour else ""
        for number, line in enumerate(text.split("\n")):
            yield f"{head if number == 0 else ' ' * len(head)}{style}{line}{style and chr(27) + '[0m'}"
    yield ""
