"""A run is killed, its recipe changed, refused, put right, finished, exported, verified, and told about in its report."""

from __future__ import annotations

import json

import pytest

from ..conftest import ROWS, TINY_RECIPE, losses
from ..faults.conftest import SLOW
from .steps import kill_after, opened_report, screen

RECIPE = TINY_RECIPE.replace('"test"', '"long"').replace("max_steps = 4", "max_steps = 12").replace("every = 100", "every = 2") + (
    "[log]\nevery = 1\n[samples]\nfrom_train = 2\nmax_new_tokens = 24\n"
)
PARTED = RECIPE.replace("fraction = 0.0", "fraction = 0.25\nevery = 4")


@pytest.fixture
def commands():
    from ..conftest import _commands

    return _commands()


def test_from_a_kill_to_a_verified_export(journey, browser, commands):
    journey.write("rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    journey.write("long.toml", PARTED.replace("data.jsonl", "rows.jsonl"))
    run = journey.directory("long")
    running = commands.start("train", "long.toml", cwd=journey.home, prelude=SLOW)
    kill_after(running, run.root / "checkpoints" / "checkpoint-6")
    before = losses(run.root)
    assert len(before) >= 6

    # Two processes would make the global batch twice as large; another learning rate is another run's. Nothing is touched by asking.
    kept = {path: path.stat().st_mtime_ns for path in sorted(run.root.rglob("*")) if path.is_file() and path.name != ".lock"}
    doubled = journey.run("fastoss train long.toml --gpus 2", code=2)
    assert "the run was started with other settings" in doubled.err
    assert "processes" in doubled.err
    changed = journey.run("fastoss train long.toml --set train.learning_rate=1e-3 --set train.gradient_accumulation_steps=2", code=2)
    for word in ("learning_rate", "0.005", "0.001", "gradient_accumulation_steps", "--override-resume"):
        assert word in changed.err, changed.err
    touched = [path.name for path in kept if path.stat().st_mtime_ns != kept[path]]
    assert touched == []
    assert "checkpoint-6" in journey.run("fastoss doctor runs/long").out

    resumed = journey.run("fastoss train long.toml")
    assert "from checkpoint-6" in resumed.err
    assert len(losses(run.root)) == 12
    assert losses(run.root)[:6] == before[:6]

    journey.run("fastoss export runs/long --format adapter --format merged")
    for name in ("adapter", "merged"):
        journey.run(f"fastoss verify runs/long/exports/{name} --against runs/long")
    # One value of the written weights is changed: verification must see it.
    weights = sorted((run.root / "exports" / "merged").glob("*.safetensors"))[0]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 0x40
    weights.write_bytes(content)
    journey.run("fastoss verify runs/long/exports/merged --against runs/long", code=1)

    journey.run("fastoss evaluate runs/long --max-new-tokens 16")
    journey.run("fastoss report runs/long")
    with opened_report(browser, run.root / "report.html") as report:
        told = report.inner_text("body")
        assert "killed" in told or "cut off" in told, told[:2000]
        assert "after step 6" in told or "step 6" in told
        assert "Held-out rows" in told
        screen(report, "killed-report")
