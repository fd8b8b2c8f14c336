"""What the phases of `gpu_checks.py` share: where they work, how they keep what they find, the checkpoint, and a run of `train`."""

from __future__ import annotations

import gc
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_checkpoint  # beside this file; it lets a checkout be imported that is not installed
from random_checkpoint import GPT_OSS_20B, TINY, ModelShape, checkpoint_bytes, checkpoint_folder, has_checkpoint

from fastoss.config import load_recipe
from fastoss.errors import RunFailed
from fastoss.run import RunDirectory, read_json, read_json_lines, write_json

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9
LORA = {"r": 8, "lora_alpha": 32}


class Skip(Exception):
    """The phase cannot be done here; the message is the reason."""


@dataclass(frozen=True)
class Place:
    """Where a run of this script works: the card, the folders, and the shape that stands for the 20B one in a dry run."""

    work: Path
    results: Path
    card: str
    dry: bool

    @property
    def shape(self) -> ModelShape:
        return TINY if self.dry else GPT_OSS_20B

    def file(self, phase: str) -> Path:
        card = re.sub(r"[^a-z0-9]+", "-", self.card.lower()).strip("-")
        return self.results / f"{card}-{phase}.json"

    def found(self, phase: str) -> dict[str, Any]:
        """What a phase has left so far, whole or not; nothing where it has not run."""
        path = self.file(phase)
        return read_json(path) if path.is_file() else {}


class Record:
    """A phase's JSON. What is noted is on the disk at once: a phase that is killed leaves what it had found."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = read_json(path)

    def note(self, **values: Any) -> None:
        self.values |= values
        write_json(self.path, self.values)


@dataclass(frozen=True)
class Phase:
    """`imports` is what a dry run has imported already when it forks the phase: "unsloth", "trl", or "" for a new process.

    A dry run leaves out every `repeat` but the first, and phases that are `larger` forms of another one: the code is the same.
    """

    name: str
    check: Callable[[Place, Record], None]
    minutes: float
    imports: str = ""
    repeat: int = 1
    larger: bool = False

    @property
    def in_dry_run(self) -> bool:
        return self.repeat == 1 and not self.larger


def write_recipe(path: Path, tables: dict[str, dict[str, Any]], **top: Any) -> Path:
    lines = [f"{key} = {json.dumps(value)}" for key, value in ({"name": "gpu-check"} | top).items()]
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_recipe(place: Place, name: str, tables: dict[str, dict[str, Any]], **top: Any) -> RunDirectory:
    """Run a recipe through the same call as `fastoss train`, in a fresh run directory."""
    from fastoss.training.train import train as train_recipe

    root = place.work / "runs" / name
    shutil.rmtree(root, ignore_errors=True)
    path = write_recipe(place.work / f"{name}.toml", {"lora": LORA, "eval": {"fraction": 0.0}} | tables, **top)
    run = train_recipe(load_recipe(path), path, RunDirectory(root))
    gc.collect()  # the trainer holds itself in cycles, and with it the model
    if not run.is_finished():
        raise RunFailed("the run left no adapter")
    return run


def train_and_note(place: Place, record: Record, model: dict[str, Any], data: dict[str, Any], train: dict[str, Any]) -> RunDirectory:
    """`run_recipe`; notes its losses and the seconds of each step."""
    run = run_recipe(place, record.values["phase"], {"model": model, "[data]": data, "train": train})
    steps = [entry for entry in read_json_lines(run.metrics) if "loss" in entry]
    ends = [0.0, *(entry["seconds"] for entry in steps)]
    seconds = [round(end - start, 3) for start, end in itertools.pairwise(ends)]
    settings = model | {"name": Path(model["name"]).name} | {"recipe": train | LORA}
    record.note(model=settings, losses=[entry["loss"] for entry in steps], step_seconds=seconds)
    return run


def checkpoint(place: Place, record: Record, form: Any) -> Path:
    """The random checkpoint's folder, written when it is not there."""
    folder, size = checkpoint_folder(place.work, place.shape, form), checkpoint_bytes(place.shape, form)
    device = "cpu" if place.dry else "cuda"
    there = has_checkpoint(folder, place.shape, form, device)
    if not there:
        for old in (folder, *place.work.glob(f".{folder.name}.*")):  # another one, or what a killed process left
            shutil.rmtree(old, ignore_errors=True)
        free, needed = shutil.disk_usage(place.work).free, size + 3 * GB  # adapters and optimizer states beside it
        if free < needed:
            raise Skip(f"the checkpoint needs {needed / GB:.0f} GB of disk, {free / GB:.0f} GB are free (--work names another folder)")
        # In a process of its own: this one must not touch the GPU before Unsloth has set up its allocator.
        subprocess.run([sys.executable, random_checkpoint.__file__, str(folder), place.shape.name, form, device], check=True)
    record.note(checkpoint={"shape": place.shape.name, "form": form, "bytes": size, "was_there": there})
    return folder


def compare(place: Place, record: Record, other: str, tolerance: float | None) -> None:
    """Hold the first step's loss against that of another phase on the same batch, where that one was ok."""
    theirs = place.found(other)
    if theirs.get("status") != "ok":
        record.note(compared={"with": other, "relative_difference": None, "reason": f"{other} has no result here"})
        return
    mine, reference = record.values["losses"][0], theirs["losses"][0]
    difference = abs(mine - reference) / abs(reference)
    record.note(compared={"with": other, "loss": mine, "reference": reference, "relative_difference": difference, "tolerance": tolerance})
    if tolerance is not None and difference > tolerance:
        raise RunFailed(f"the first loss is {mine:.4f}, and {reference:.4f} in {other}: {difference:.1%} apart")


def need_memory(place: Place, record: Record, gigabytes: float) -> None:
    free = record.values["gpu_free_gb"]
    if not place.dry and free < gigabytes:
        raise Skip(f"needs {gigabytes:.0f} GB of free GPU memory, {free:.0f} GB were free at the start")


def peak_memory() -> dict[str, float | None]:
    """GB, of this process alone, loading included; None where there is no GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {"peak_allocated_gb": None, "peak_reserved_gb": None}
    return {"peak_allocated_gb": torch.cuda.max_memory_allocated() / GB, "peak_reserved_gb": torch.cuda.max_memory_reserved() / GB}
