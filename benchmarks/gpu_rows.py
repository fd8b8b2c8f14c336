"""Rows for the phases: real text of the shipped sample, cut so that each row has the length in tokens that is asked for."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from gpu_common import ROOT, Place

from fastoss.config import FormatSettings
from fastoss.data.conversation import Conversation, Message

SAMPLE = ROOT / "recipes" / "data" / "catgirl.jsonl"


def chat_lengths(place: Place, count: int) -> list[int]:
    """Lognormal, median 600 tokens, 99 % up to 4,096, none longer; in a dry run as short as the format allows."""
    median, longest, shortest = (95, 160, 80) if place.dry else (600, 4096, 96)
    sigma = math.log(longest / median) / 2.326
    rng = random.Random(0)
    return [min(longest, max(shortest, round(rng.lognormvariate(math.log(median), sigma)))) for _ in range(count)]


def longest_row(place: Place) -> int:
    return 160 if place.dry else 4096


def _texts() -> list[str]:
    sample = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    return [f"{row['instruction']} {row['output']} " for row in sample]


def _cut(said: list[str], start: int, characters: int) -> str:
    start %= len(said)
    text = "".join(said[start:] + said[:start])
    return (text * (characters // len(text) + 1))[:characters]


def _fit(wanted: int, make: Any) -> tuple[Any, int]:
    """What `make` makes of as many characters as `wanted` tokens allow: (it, its tokens)."""
    low, high = 16, 8 * wanted  # a token holds a character at least, and hardly more than eight
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if make(middle)[1] <= wanted else (low, middle)
    made: tuple[Any, int] = make(low)
    return made


def write_rows(path: Path, wanted: list[int]) -> list[int]:
    """Rows of one turn, a quarter of it prompt; returns their lengths in tokens, as near to `wanted` as text allows."""
    from fastoss.data.harmony import HarmonyRenderer

    renderer, said = HarmonyRenderer(FormatSettings()), _texts()

    def example(start: int, characters: int) -> tuple[dict[str, str], int]:
        text = _cut(said, start, characters)
        asked, thought, answered = text[: characters // 4], text[characters // 4 : characters // 2], text[characters // 2 :]
        messages = (Message("user", asked), Message("assistant", answered, thought))
        return {"instruction": asked, "thinking": thought, "output": answered}, len(renderer.render_examples(Conversation(messages))[0])

    rows = [_fit(tokens, lambda characters, start=number * 7: example(start, characters)) for number, tokens in enumerate(wanted)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row, _ in rows), encoding="utf-8")
    return [tokens for _, tokens in rows]


def write_pairs(path: Path, wanted: list[int]) -> list[int]:
    """Preference pairs whose prompt is three times as long as an answer; returns the lengths of prompt and one answer in tokens."""
    from fastoss.data.harmony import HarmonyRenderer

    renderer, said = HarmonyRenderer(FormatSettings()), _texts()

    def example(start: int, characters: int) -> tuple[dict[str, str], int]:
        fourth = characters // 4
        text = _cut(said, start, characters)
        other = _cut(said, start + 3, fourth)
        messages = (Message("user", text[:-fourth]), Message("assistant", text[-fourth:]))
        row = {"prompt": text[:-fourth], "chosen": text[-fourth:], "rejected": f"No. {other}"}
        return row, len(renderer.render_examples(Conversation(messages))[0])

    rows = [_fit(tokens, lambda characters, start=number * 7: example(start, characters)) for number, tokens in enumerate(wanted)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row, _ in rows), encoding="utf-8")
    return [tokens for _, tokens in rows]
