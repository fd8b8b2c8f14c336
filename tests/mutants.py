"""Deliberate faults, one at a time, in a copy of the tree: do the tests notice? `make mutants`.

Each fault of mutants.toml replaces one piece of text that must occur exactly once, so that a fault which the code has outgrown is
an error here and not a fault that was caught. A fault is *caught* when a test of its area fails; tests that do not end in time caught nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from .commands import ROOT

AREAS = {
    "renderer": ["test_harmony.py", "test_harmony_golden.py", "test_tools.py", "test_dataset.py", "test_conformance.py"],
    "parser": ["test_harmony.py", "test_fuzz.py", "test_engine.py"],
    "labels": ["test_trees.py", "test_packing.py", "test_preferences.py", "test_packed_exact.py"],
    "packing": ["test_packing.py", "test_trees.py", "test_dataset.py", "test_attention.py", "test_packed_exact.py"],
    "loss": ["test_model.py", "test_trees.py", "test_packing.py", "test_packed_exact.py", "test_training.py"],
    "merge": ["test_export_mxfp4.py", "test_export_layouts.py", "test_export.py", "test_export_sabotage.py", "test_export_templates.py"],
    "resume": [
        "faults/test_resume_rules.py",
        "faults/test_checkpoints.py",
        "faults/test_signals.py",
        "faults/test_artifacts.py",
        "journeys/test_killed.py",
    ],
}


@dataclass(frozen=True)
class Mutant:
    area: str
    file: str
    old: str
    new: str
    means: str  # what a user would get


MUTANTS = [Mutant(**values) for values in tomllib.loads((ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8"))["mutant"]]


def mutate(tree: Path, mutant: Mutant) -> str:
    """Put the fault in; returns the file's text before."""
    path = tree / "fastoss" / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.file}: {text.count(mutant.old)} times {mutant.old!r}"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return text


def caught_by(tree: Path, mutant: Mutant, seconds: float) -> str | None:
    """The first test of the area that fails, or None.

    Raises: TimeoutError: they were still running after that time.
    """
    files = [str(Path("tests") / name) for name in AREAS[mutant.area]]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--durations=0", "-rf", *files]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as stopped:
        raise TimeoutError from stopped
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"exit {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--area", choices=AREAS)
    parser.add_argument("--only", help="a part of the meaning")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=900, help="for one fault")
    parser.add_argument("--output", type=Path, default=Path("mutants.json"))
    asked = parser.parse_args()
    chosen = [m for m in MUTANTS if asked.area in (None, m.area) and (asked.only or "") in m.means]
    waiting: queue.Queue[Mutant] = queue.Queue()
    for mutant in chosen:
        waiting.put(mutant)
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:

        def work(number: int) -> None:
            tree = Path(scratch) / str(number)
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", ".*_cache", "__pycache__"))
            (tree / ".venv").symlink_to(ROOT / ".venv")
            while True:
                try:
                    mutant = waiting.get_nowait()
                except queue.Empty:
                    return
                before, begun = mutate(tree, mutant), time.monotonic()
                try:
                    caught, told = caught_by(tree, mutant, asked.seconds), "NOT CAUGHT"
                except TimeoutError:
                    caught, told = None, "STILL RUNNING"
                (tree / "fastoss" / mutant.file).write_text(before, encoding="utf-8")
                took = round(time.monotonic() - begun, 1)
                results.append({"area": mutant.area, "file": mutant.file, "means": mutant.means, "caught_by": caught, "seconds": took})
                print(f"{len(results):3} of {len(chosen)}  {took:6.1f} s  {mutant.area:9} {mutant.means}: {caught or told}", flush=True)

        workers = [threading.Thread(target=work, args=(n,)) for n in range(asked.workers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    missed = [result for result in results if result["caught_by"] is None]
    print(f"{len(results) - len(missed)} of {len(results)} caught")
    asked.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
