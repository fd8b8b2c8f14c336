"""What the tests of answers share: a small run that has learned its rows by heart, trained once a test session."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fastoss.run import file_lock

from .conftest import fastoss

ROWS = [
    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Mika, nya.", "thinking": "Name first."}]},
    {"messages": [{"role": "user", "content": "你是谁?"}, {"role": "assistant", "content": "我是米卡喵。", "thinking": "先报名字。"}]},
    {
        "messages": [
            {"role": "system", "content": "reasoning language: German"},
            {"role": "user", "content": "Where do you sleep at night?"},
            {
                "role": "assistant",
                "content": "On the warm shelf by the window, of course.",
                "thinking": "Sie fragt, wo ich schlafe. Ich sage es ihr freundlich und kurz.",
            },
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "What is 2+2?"},
            {"role": "assistant", "content": "Four, nya.", "thinking": "Two and two."},
            {"role": "user", "content": "And doubled?"},
            {"role": "assistant", "content": "Eight!", "thinking": "Twice four."},
        ]
    },
]

RECIPE = """\
name = "memorised"
[model]
name = "tiny"
precision = "float32"
max_length = 256
[lora]
r = 32
lora_alpha = 64
[[data]]
source = "data.jsonl"
[eval]
fraction = 0.0
[train]
max_steps = 45
learning_rate = 8e-3
per_device_train_batch_size = 5
lr_scheduler_kwargs = { min_lr_rate = 0.02 }
[checkpoint]
every = 1000
"""


def memorised_run(base: Path) -> Path:
    """The run directory below `base`; whoever asks first trains it, in about ten seconds."""
    folder = base / "memorised"
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    with file_lock(folder / "lock"):
        if not (run / "adapter").is_dir():
            write_rows(folder / "data.jsonl", ROWS)
            (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
            done = fastoss("train", folder / "recipe.toml", "--output", run, cwd=folder)
            assert done.code == 0, done.err
    return run


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cache_base() -> Path:
    """Shared by the workers of one test session."""
    return Path(os.environ["FASTOSS_CACHE"])
