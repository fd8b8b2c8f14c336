"""Votes → rows: what visitors prefer becomes a file that `fastoss train` reads with method = "dpo", and what they like one for "sft"."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastoss.config import FormatSettings
from fastoss.data.conversation import Message
from fastoss.data.formats.preferences import row_to_preference
from fastoss.data.formats.text import check_text
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.reading.rows import BadRow, Row
from fastoss.demo.talk import Spoken, Turn
from fastoss.errors import FastossError
from fastoss.run import RunDirectory, file_lock, read_json, read_lines, write_whole


class VoteFile:
    """A JSONL file of rows. Several processes may add to it; a row stands whole in it or not at all."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines()]

    def add(self, row: dict[str, Any]) -> None:
        with self._lock():
            self._write([*self._lines(), _line(row)])

    def remove(self, row: dict[str, Any]) -> None:
        """Take a row back, if it is there: the vote was changed."""
        with self._lock():
            lines = self._lines()
            if _line(row) in lines:
                place = len(lines) - 1 - lines[::-1].index(_line(row))
                self._write(lines[:place] + lines[place + 1 :])

    def _lock(self) -> Any:
        return file_lock(self.path.with_name(f".{self.path.name}.lock"))

    def _lines(self) -> list[str]:
        return read_lines(self.path) if self.path.is_file() else []

    def _write(self, lines: Sequence[str]) -> None:
        try:
            write_whole(self.path, "".join(f"{line}\n" for line in lines))
        except OSError as problem:
            raise FastossError(f"the vote could not be written: {os.strerror(problem.errno or 0)}", place=self.path.name) from None


def pair_row(turn: Turn, chosen: Spoken, rejected: Spoken, limit: int | None = None) -> dict[str, Any]:
    """The row of a preference, as `fastoss train` reads it. `FastossError` where these two answers cannot be trained on, or have
    more than `limit` tokens with their prompt."""
    row: dict[str, Any] = {
        "prompt": [_plain(message) for message in turn.asked],
        "chosen": [_answer(chosen)],
        "rejected": [_answer(rejected)],
    } | _effort(turn)
    for name, answer in (("preferred", chosen), ("other", rejected)):
        if not answer.content.strip():
            raise FastossError(f"the {name} answer has no text: a pair needs two answers")
    try:
        pair = row_to_preference(Row(row, "the vote"))
        for answer in (chosen, rejected):
            check_text(answer.content, "the vote")
            check_text(answer.thinking, "the vote")
    except BadRow as problem:
        raise FastossError(f"this pair cannot be trained on: {problem.fact}") from None
    renderer = HarmonyRenderer(FormatSettings())
    tokens = max(len(renderer.render_last(said)) for said in (pair.chosen, pair.rejected))
    if limit is not None and tokens > limit:
        raise FastossError(f"this pair cannot be trained on: {tokens:,} tokens, and the run takes {limit:,} (model.max_length)")
    return row


def longest_row(run: RunDirectory | None) -> int | None:
    """Tokens of the longest row that a run trains; None where it is no run."""
    return int(read_json(run.resolved_recipe)["model"]["max_length"]) if run else None


def thumb_pairs(turn: Turn, reply: Spoken, vote: str | None, limit: int | None = None) -> list[dict[str, Any]]:
    """The pairs that a thumb on `reply` makes with the earlier tries that have the other one."""
    others = [other for other in turn.before if vote and other.vote not in (None, vote) and other.content != reply.content]
    return [pair_row(turn, *((reply, other) if vote == "up" else (other, reply)), limit) for other in others]


def liked_row(turn: Turn, reply: Spoken) -> dict[str, Any]:
    """The row of an answer that was liked, for SFT."""
    return {"messages": [*(_plain(message) for message in turn.asked), _answer(reply)]} | _effort(turn)


def _plain(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _answer(reply: Spoken) -> dict[str, str]:
    return {"role": "assistant", "content": reply.content} | ({"thinking": reply.thinking} if reply.thinking else {})


def _effort(turn: Turn) -> dict[str, str]:
    return {"reasoning_effort": turn.asking.effort} if turn.asking.effort else {}


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def dpo_recipe(run: RunDirectory, adapter: str, pairs: Path) -> str:
    """A recipe that trains this run further on the pairs beside it: model, LoRA and format are the run's. `adapter` as the run was named."""
    recipe = read_json(run.resolved_recipe)
    model, lora, format = recipe["model"], recipe["lora"], recipe["format"]

    def keys(section: dict[str, Any], *names: str) -> str:
        return "".join(f"{name} = {json.dumps(section[name], ensure_ascii=False)}\n" for name in names if section.get(name) is not None)

    return (
        "# Trains the run further on what visitors of its demo preferred. Written once, by the demo; change it as you like.\n"
        f"# fastoss train {pairs.with_name(_recipe_name(pairs))}\n"
        f'name   = {json.dumps(recipe["name"] + "-dpo", ensure_ascii=False)}\nmethod = "dpo"\n\n'
        f"[model]\n{keys(model, 'name', 'precision', 'max_length', 'backend')}adapter = {json.dumps(adapter, ensure_ascii=False)}\n\n"
        f"[lora]\n{keys(lora, 'r', 'lora_alpha', 'targets', 'expert_layers')}\n"
        f"[[data]]\nsource = {json.dumps(pairs.name, ensure_ascii=False)}\n\n"
        f"[format]\n{keys(format, 'reasoning_effort', 'current_date')}\n"
        "[train]\nnum_train_epochs = 1\nlearning_rate = 1e-5                 # DPO commonly takes 5e-7 to 5e-5\n"
        "per_device_train_batch_size = 2\ngradient_accumulation_steps = 4\n\n"
        '[dpo]\nbeta = 0.1\nreference = "start"\n'
    )


def write_dpo_recipe(run: RunDirectory, adapter: str, pairs: Path) -> Path:
    """Put `dpo_recipe` beside the pairs, if there is none yet. Returns its place."""
    path = pairs.with_name(_recipe_name(pairs))
    if not path.is_file():
        write_whole(path, dpo_recipe(run, adapter, pairs))
    return path


def _recipe_name(pairs: Path) -> str:
    return f"{pairs.stem}-dpo.toml"
