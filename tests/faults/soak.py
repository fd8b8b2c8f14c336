"""`make soak`: kill -9 at forty random moments of a run with a checkpoint each step; resumed, each must end as the unbroken run did.

To the last bit: losses, metrics, weights. Each round is a run of its own, killed a random moment after a random step (or while it
loads, or in its last words), then started again. Results go to benchmarks/results/soak.json as they come.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from fastoss.model.adapter import library_versions
from fastoss.run import RunDirectory, write_json
from fastoss.training.checkpoint import checkpoint_fault, list_checkpoints

from ..commands import Commands
from ..conftest import ROOT, ROWS, TINY_RECIPE, metrics

RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
STEPS = 20
SETTINGS = ("--set", f"train.max_steps={STEPS}", "--set", "checkpoint.every=1", "--set", "checkpoint.keep=2", "--set", 'samples.prompts=["hi"]')


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def round_of(commands: Commands, folder: Path, number: int, rng: random.Random, whole: Path) -> dict[str, object]:
    """One run, killed and started again; what was found."""
    run = folder / f"run-{number}"
    command = ("train", "recipe.toml", "--output", run, *SETTINGS)
    running = commands.start(*command, cwd=folder)
    after_step, delay = rng.randint(-2, STEPS), rng.uniform(0, 0.4)  # below zero: while it loads
    if after_step < 0:
        delay = rng.uniform(0.2, 4)
    while steps_done(run) < after_step:
        time.sleep(0.002)
    time.sleep(delay)
    running.kill()
    killed = running.wait().code == -signal.SIGKILL
    at_step = steps_done(run)
    torn = [path.name for path in list_checkpoints(RunDirectory(run)) if checkpoint_fault(path)]
    begun = time.monotonic()
    again = commands.run(*command, cwd=folder)
    took = time.monotonic() - begun
    equal = again.code == 0 and metrics(run) == metrics(whole)
    name = "adapter/adapter_model.safetensors"
    weights = again.code == 0 and (run / name).read_bytes() == (whole / name).read_bytes()
    left = [path.name for path in run.rglob(".*") if path.name != ".lock"]
    shutil.rmtree(run)
    return {
        "after_step": after_step, "delay_s": round(delay, 3), "was_running": killed, "at_step": at_step, "torn_checkpoints": torn,
        "resumed": again.code,
        "metrics_equal": equal, "weights_equal": weights, "left_over": left, "resume_s": round(took, 2),
    }  # fmt: skip


def as_unbroken(entry: dict[str, object]) -> bool:
    return bool(entry["metrics_equal"] and entry["weights_equal"] and not entry["torn_checkpoints"] and not entry["left_over"])


def main(rounds: int = 40) -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("FASTOSS_CACHE", str(folder / "cache"))
        os.environ["OMP_NUM_THREADS"] = "1"
        (folder / "data.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
        (folder / "recipe.toml").write_text(TINY_RECIPE, encoding="utf-8")
        commands = Commands(folder / "commands")
        whole = folder / "whole"
        for _ in range(2):  # the first also builds the tiny model
            shutil.rmtree(whole, ignore_errors=True)
            assert commands.run("train", "recipe.toml", "--output", whole, *SETTINGS, cwd=folder).code == 0
        costs = json.loads((whole / "manifest.json").read_text())["checkpoints"]
        found = []
        for number in range(rounds):
            found.append(round_of(commands, folder, number, rng, whole))
            print(f"{number + 1}/{rounds}: {json.dumps(found[-1])}", flush=True)
            good = sum(map(as_unbroken, found))
            write_json(RESULTS, {
                "command": "make soak", "versions": library_versions(), "steps": STEPS, "rounds": len(found), "equal_to_the_last_bit": good,
                "checkpoint": {
                    "bytes": costs[-1]["bytes"], "waited_s": statistics.median(cost["waited_s"] for cost in costs),
                    "written_beside_s": statistics.median(cost["written_beside_s"] for cost in costs),
                },
                "found": found,
            })  # fmt: skip
        commands.server.kill()
    print(f"{good} of {rounds} ended as the unbroken run did, to the last bit")
    sys.exit(good != rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
