"""Whole commands on the CPU: two processes beside one, and how long a person waits for the first sign of life (`training_cpu.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.timing import QUICKSTART, ROOT, spread
from fastoss.run import RunDirectory

_DDP_RECIPE = """\
name = "ddp"
[model]
name = "tiny"
precision = "float32"
max_length = 512
[[data]]
source = "{data}"
[eval]
fraction = 0.0
[train]
tokens_per_batch = 512
"""


def ddp(steps: int = 8, repeats: int = 3, warm_up: int = 2) -> dict[str, Any]:
    """The tiny model on one process, on two with gloo, and as two runs beside each other that know nothing of one another.

    The last is what two cores of this machine can do at all, so `of_ceiling` is what DDP leaves of it. The target, 0.95, is for cards.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.toml"
        recipe.write_text(_DDP_RECIPE.format(data=QUICKSTART.parent / "data" / "catgirl.jsonl"))

        def start(run: str, processes: int, accumulation: int) -> subprocess.Popen[bytes]:
            changes = ["--set", f"train.max_steps={steps}", "--set", f"train.gradient_accumulation_steps={accumulation}"]
            command = [sys.executable, "-m", "fastoss", "train", recipe, "--output", folder / run, *changes]
            return subprocess.Popen([*command, *(["--gpus", str(processes)] if processes > 1 else [])], cwd=ROOT, stderr=subprocess.DEVNULL)

        def rates(*running: tuple[str, subprocess.Popen[bytes]]) -> tuple[float, list[float]]:
            """Tokens a second, of all runs together, and the first's losses."""
            for _, process in running:
                assert process.wait() == 0, process.args
            entries = [[json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()] for run, _ in running]
            counted = [(steps[warm_up - 1], steps[-1]) for steps in entries]
            speed = sum((last["num_tokens"] - first["num_tokens"]) / (last["seconds"] - first["seconds"]) for first, last in counted)
            return speed, [entry["loss"] for entry in entries[0]]

        taken, apart = [], 0.0
        for repeat in range(repeats):
            result = {}
            for mode in ("one", "beside", "ddp") if repeat % 2 == 0 else ("ddp", "beside", "one"):
                names = [f"{mode}-{repeat}-{number}" for number in range(2 if mode == "beside" else 1)]
                result[mode] = rates(*[(run, start(run, *((2, 1) if mode == "ddp" else (1, 2)))) for run in names])
            apart = max(apart, *(abs(a - b) / abs(a) for a, b in zip(result["one"][1], result["ddp"][1], strict=True)))
            taken.append({mode: speed for mode, (speed, _) in result.items()})
    return {
        "efficiency": spread([speeds["ddp"] / (2 * speeds["one"]) for speeds in taken]),
        "ceiling": spread([speeds["beside"] / (2 * speeds["one"]) for speeds in taken]),
        "of_ceiling": spread([speeds["ddp"] / speeds["beside"] for speeds in taken]),
        "loss_difference": apart,
        "cores": os.cpu_count(), "load_average": os.getloadavg(), "steps": steps, "repeats": repeats, "target": 0.95,
    }  # fmt: skip


def startup(repeats: int = 3) -> dict[str, Any]:
    """Seconds that a person waits: for help, for `check` of the shipped recipe with an empty and a filled cache, for the first step.

    Beside each stands what Python needs for the libraries alone.
    """

    def wait(*arguments: str, **environment: str) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT, env=os.environ | environment)
        return time.perf_counter() - begun

    def first_step(cache: str) -> float:
        """From the command to its first line in metrics.jsonl."""
        with tempfile.TemporaryDirectory() as folder:
            run = RunDirectory(Path(folder) / "run")
            changes = ["--set", "train.max_steps=1", "--set", "samples.from_train=0"]
            command = [sys.executable, "-m", "fastoss", "train", str(QUICKSTART), "--output", str(run.root), *changes]
            begun = time.perf_counter()
            with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"FASTOSS_CACHE": cache}, stderr=subprocess.DEVNULL) as process:
                while not (run.metrics.is_file() and run.metrics.stat().st_size) and process.poll() is None:
                    time.sleep(0.01)
                took = time.perf_counter() - begun
            assert process.returncode == 0, "the quickstart's first step"
        return took

    check = ("-m", "fastoss", "check", "recipes/catgirl.toml")
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            taken["help"].append(wait("-m", "fastoss", "--help"))
            taken["import_typer"].append(wait("-c", "import typer"))
            taken["check_cold"].append(wait(*check, FASTOSS_CACHE=cache))
            taken["check_warm"].append(wait(*check, FASTOSS_CACHE=cache))
            taken["first_step_cold"].append(first_step(cache))
            taken["first_step_warm"].append(first_step(cache))
            taken["import_trl_and_peft"].append(wait("-c", "import torch, transformers, peft; from trl import SFTTrainer"))
    return {"seconds": {name: spread(values) for name, values in taken.items()}, "repeats": repeats, "target_help": 0.3, "target_check": 10}
