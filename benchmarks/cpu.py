"""Benchmarks that need no GPU (`make bench`): each a ratio against what a user would have instead, in one process, in turn.

A CPU's absolute times say little; the ratios (of processor time) are what is kept, with the command that made them, in benchmarks/results/cpu.json.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script too

from benchmarks.timing import REPEATS, ROOT, in_turn
from fastoss.config import DataSource, load_recipe
from fastoss.data.dataset import build_dataset
from fastoss.data.formats.conversations import row_to_conversation
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.packing import BatchRule, plan_schedule
from fastoss.data.reading.sources import Row, read_rows
from fastoss.data.tokenizer import tokenizer_file
from fastoss.model.adapter import library_versions
from fastoss.model.head import TrainedTokenLoss
from fastoss.run import write_json


def head(repeats: int = REPEATS) -> dict[str, Any]:
    """Forward and backward of the loss over 200 trained tokens, hidden 64, the full vocabulary, against TRL's chunked loss at its default."""
    from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _chunked_cross_entropy_loss

    weight = torch.randn(201_088, 64) * 0.5
    hidden = torch.randn(1, 201, 64, requires_grad=True)
    labels = torch.randint(0, 201_088, (1, 201))

    def step(loss: Callable[..., Any]) -> None:
        hidden.grad = None
        loss(hidden, weight, _CHUNKED_LM_HEAD_CHUNK_SIZE, labels=labels)[0].backward()

    return in_turn(lambda: step(TrainedTokenLoss().chunked), lambda: step(_chunked_cross_entropy_loss), repeats)


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Conversations of one to four turns, some with reasoning and a system text, words of the shipped rows, English and Chinese."""
    rng = random.Random(0)
    words = [word for row in shipped_rows() for value in row.columns.values() if isinstance(value, str) for word in value.split()]

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, k=max(3, round(rng.lognormvariate(math.log(mean), 0.7)))))

    rows = []
    for _ in range(count):
        messages = [{"role": "system", "content": text(20)}] if rng.random() < 0.3 else []
        for _ in range(rng.choice([1, 1, 1, 2, 2, 4])):
            thinking = {"thinking": text(60)} if rng.random() < 0.4 else {}
            messages += [{"role": "user", "content": text(40)}, {"role": "assistant", "content": text(80)} | thinking]
        rows.append({"messages": messages})
    return rows


def shipped_rows() -> list[Row]:
    return [row for row in read_rows(DataSource(source=str(ROOT / "recipes" / "data" / "catgirl.jsonl"))) if isinstance(row, Row)]


def tokenising(count: int = 1000, repeats: int = REPEATS) -> dict[str, Any]:
    """Rows in memory to tokens and labels, against TRL's way in one process; and our whole way from the file to the store on disk.

    TRL's is `apply_chat_template(return_assistant_tokens_mask=True)` with its training template through `datasets.map`, as its
    SFTTrainer does with assistant_only_loss. One example a row there, one a turn here, and those are counted as one row.
    """
    import datasets
    from transformers import PreTrainedTokenizerFast
    from trl.chat_template_utils import gptoss_training_chat_template

    rows = chat_rows(count)
    folder = Path(tempfile.mkdtemp())
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "recipe.toml").write_text('name = "bench"\n[model]\nname = "tiny"\n[[data]]\nsource = "rows.jsonl"\ncache = false\n')
    recipe = load_recipe(folder / "recipe.toml")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file()))
    datasets.disable_progress_bars()
    datasets.disable_caching()
    table = datasets.Dataset.from_list(rows)

    def their_row(row: dict[str, Any]) -> dict[str, Any]:
        messages = [{key: value for key, value in message.items() if value is not None} for message in row["messages"]]
        made = tokenizer.apply_chat_template(
            messages, chat_template=gptoss_training_chat_template, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": made["input_ids"], "assistant_masks": made["assistant_masks"]}

    def ours() -> None:
        renderer = HarmonyRenderer(recipe.format)
        for row in rows:
            for example in renderer.render_examples(row_to_conversation(Row(row, "rows.jsonl:1"))):
                _ = example.input_ids, example.labels

    def theirs() -> None:
        table.map(their_row, remove_columns=["messages"])

    try:
        made = build_dataset(recipe)
        result = in_turn(ours, theirs, repeats)
        result["whole_way"] = in_turn(lambda: build_dataset(recipe), theirs, repeats)
    finally:
        shutil.rmtree(folder)
    return {"rows": count, "our_examples": made.report.train_examples + made.report.eval_examples, "our_tokens": made.report.train_tokens} | result


def packing() -> dict[str, Any]:
    """One million chat lengths into batches of 16,384 tokens for 8 processes."""
    rng = random.Random(0)
    lengths = [min(4096, max(16, round(rng.lognormvariate(6.4, 0.8)))) for _ in range(1_000_000)]
    begun = time.perf_counter()
    plan = plan_schedule(lengths, BatchRule("packed", tokens=16384), epochs=1, max_steps=0, batches_per_step=8, ranks=8, seed=0)
    return {"seconds": time.perf_counter() - begun, "fill": sum(lengths) / (16384 * (len(plan.batches) - plan.fillers))}


def million_rows() -> dict[str, Any]:
    """`fastoss check` of 1,000,000 generated rows, in a process and a cache of its own: seconds and peak memory."""
    folder = Path(tempfile.mkdtemp())
    rng = random.Random(0)
    words = [word for row in shipped_rows() for word in str(row.columns["output"]).split()]
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(1_000_000):
            asked, said = (" ".join(rng.choices(words, k=rng.randint(5, most))) for most in (40, 80))
            file.write(json.dumps({"instruction": f"{number} {asked}", "output": said}, ensure_ascii=False) + "\n")
    (folder / "recipe.toml").write_text('name = "million"\n[model]\nname = "tiny"\n[[data]]\nsource = "rows.jsonl"\n')
    command = [sys.executable, "-m", "fastoss", "check", str(folder / "recipe.toml"), "--json"]
    begun = time.perf_counter()
    try:
        with subprocess.Popen(command, env=os.environ | {"FASTOSS_CACHE": str(folder)}, stdout=subprocess.PIPE) as process:
            out = process.communicate()[0]
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        verdict = json.loads(out)
        return {"seconds": time.perf_counter() - begun, "peak_memory_gb": peak * 1024 / 1e9, "tokens": verdict["data"]["train_tokens"]}
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """All of them, or those that are named: `python benchmarks/cpu.py packing`. Results of the others stay in the file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = ROOT / "benchmarks" / "results" / "cpu.json"
    results = json.loads(path.read_text())["results"] if path.is_file() else {}
    for function in (head, tokenising, packing, million_rows):
        if sys.argv[1:] and function.__name__ not in sys.argv[1:]:
            continue
        result = results[function.__name__] = function() | {"command": f"python benchmarks/cpu.py {function.__name__}"}
        ratio = result.get("times_faster")
        said = f"{ratio['median']:.2f} times faster ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else json.dumps(result)
        print(f"{function.__name__}: {said}", flush=True)
    facts = {"command": "make bench", "machine": platform.machine(), "python": sys.version.split()[0], "threads": 1, "versions": library_versions()}
    write_json(path, facts | {"results": results})


if __name__ == "__main__":
    main()
