"""Benchmarks that need no GPU (`make bench`): each a ratio against what a user would have instead, in one process, in turn.

A CPU's absolute times say little; the ratios are what is kept, with the command that made them, in benchmarks/results/cpu.json.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastoss.config import DataSource, FormatSettings
from fastoss.data.formats import row_to_conversation
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.sources import BadRow, read_rows
from fastoss.data.tokenizer import chat_template, tokenizer_file
from fastoss.model.adapter import library_versions
from fastoss.model.head import chunked_cross_entropy_loss
from fastoss.run import write_json

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 7


def in_turn(ours: Callable[[], object], theirs: Callable[[], object]) -> dict[str, Any]:
    """Time two functions alternately after a warm-up; the ratio is theirs / ours, pair by pair."""
    ours(), theirs()
    pairs = []
    for _ in range(REPEATS):
        times = []
        for function in (ours, theirs):
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
        pairs.append(times)
    ratios = sorted(other / mine for mine, other in pairs)
    return {
        "seconds_ours": statistics.median(mine for mine, _ in pairs),
        "seconds_theirs": statistics.median(other for _, other in pairs),
        "times_faster": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
        "repeats": REPEATS,
    }


def head() -> dict[str, Any]:
    """Forward and backward of the loss over 200 trained tokens, hidden 64, the full vocabulary, against TRL's chunked loss at its default."""
    from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _chunked_cross_entropy_loss

    weight = torch.randn(201_088, 64) * 0.5
    hidden = torch.randn(1, 201, 64, requires_grad=True)
    labels = torch.randint(0, 201_088, (1, 201))

    def step(loss: Callable[..., Any]) -> None:
        hidden.grad = None
        loss(hidden, weight, _CHUNKED_LM_HEAD_CHUNK_SIZE, labels=labels)[0].backward()

    return in_turn(lambda: step(chunked_cross_entropy_loss), lambda: step(_chunked_cross_entropy_loss))


def rendering() -> dict[str, Any]:
    """Shipped rows to token ids, against the official Jinja template and tokenizer through transformers (which makes no labels)."""
    from transformers import PreTrainedTokenizerFast

    renderer = HarmonyRenderer(FormatSettings())
    rows = list(read_rows(DataSource(source=str(ROOT / "recipes" / "data" / "catgirl.jsonl"))))
    chats = [row_to_conversation(row) for row in rows if not isinstance(row, BadRow)]
    examples = [example for chat in chats for example in renderer.render_examples(chat)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file()), chat_template=chat_template())
    dialogues = [
        [{"role": m.role, "content": m.content} | ({"thinking": m.thinking} if m.thinking else {}) for m in example.conversation.messages]
        for example in examples
    ]

    def ours() -> None:
        for chat in chats:
            renderer.render_examples(chat)

    def theirs() -> None:
        for messages in dialogues:
            tokenizer.apply_chat_template(messages, tokenize=True)

    return {"examples": len(examples)} | in_turn(ours, theirs)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {"head_loss_against_trl": head(), "rendering_against_template": rendering()}
    for name, result in results.items():
        ratio = result["times_faster"]
        print(f"{name}: {ratio['median']:.2f} times faster ({ratio['min']:.2f} to {ratio['max']:.2f})")
    facts = {"command": "make bench", "machine": platform.machine(), "python": sys.version.split()[0], "threads": 1, "versions": library_versions()}
    write_json(ROOT / "benchmarks" / "results" / "cpu.json", facts | {"results": results})


if __name__ == "__main__":
    main()
