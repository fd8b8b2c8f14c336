"""Benchmarks of training that need no GPU (`make bench`): ratios, each between two things that train the same tokens to the same loss.

A CPU's absolute times say little; ratios, with the command that made them, go to benchmarks/results/training_cpu.json. `wall` is
what a clock shows, `cpu` the processor time of this process, on which other work on the machine has less influence.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script too

from benchmarks.timing import ROOT
from benchmarks.training_overhead import overhead, walks
from benchmarks.training_packed import packed
from benchmarks.training_processes import ddp, startup
from fastoss.model.adapter import library_versions
from fastoss.run import write_json

RESULTS = ROOT / "benchmarks" / "results" / "training_cpu.json"


def main() -> None:
    """All of them, or those that are named: `python benchmarks/training_cpu.py packed`. Results of the others stay in the file."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    results = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else {}
    rows: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("packed", packed), ("overhead", overhead), ("overhead_one_row", lambda: overhead(rows=1, steps=80)), ("walks", walks), ("ddp", ddp),
        ("startup", startup),
    ]  # fmt: skip
    for name, function in rows:
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        results[name] = function() | {"command": f"python benchmarks/training_cpu.py {name}"}
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        facts = {"command": "make bench", "machine": platform.machine(), "python": sys.version.split()[0], "threads": 1}
        write_json(RESULTS, facts | {"versions": library_versions(), "results": results})


if __name__ == "__main__":
    main()
