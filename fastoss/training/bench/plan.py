"""Recipe → contestants of `fastoss bench`: the recipe on each number of processes and the baseline, with one global batch for all.

What every step holds is known before anything runs, from the schedule that training itself follows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastoss.config import HubSettings, LogSettings, Recipe, SampleSettings, load_recipe, resolved_dict
from fastoss.data.dataset import Dataset, build_dataset
from fastoss.data.packing import Layout, Schedule
from fastoss.data.units import Units
from fastoss.errors import FastossError
from fastoss.model.backend import has_gpu, plan_model
from fastoss.run import RunDirectory, write_whole
from fastoss.training.bench.baseline import plan_padded
from fastoss.training.launch import check_gpus
from fastoss.training.train import check_before_launch, plan_batches

BASELINES = ("transformers",)
_LEAST_STEPS = 3  # one to warm up, two to count


@dataclass(frozen=True)
class Work:
    """What the steps of a run hold, over all processes; one entry a step.

    `tokens` go through the model (those of a shared history once), `slots` are they with their padding.
    """

    documents: list[int]
    tokens: list[int]
    trained_tokens: list[int]
    slots: list[int]


@dataclass(frozen=True)
class Contestant:
    """A recipe and the number of processes that run it. `kind` is fastoss or the baseline's name."""

    kind: str
    processes: int
    recipe: Recipe
    work: Work
    layout: str
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.processes}"

    def line(self) -> str:
        """For people: how a step is cut."""
        train = self.recipe.train
        size = f"{train.per_device_train_batch_size} rows" if train.per_device_train_batch_size else f"up to {train.tokens_per_batch:,} tokens"
        steps = len(self.work.tokens)
        cut = f"{self.processes} × {train.gradient_accumulation_steps} micro-batches of {size}, {self.layout}"
        documents, trained = sum(self.work.documents) / steps, sum(self.work.trained_tokens) / steps
        fill = sum(self.work.tokens) / sum(self.work.slots)
        return f"{self.name}: a step is {cut} (fill {fill:.2f}): {documents:,.1f} documents, {trained:,.0f} trained tokens"


def parse_gpus(text: str) -> tuple[int, ...]:
    """`1,2,4` as numbers. `FastossError` for anything else."""
    hint = "write it as --gpus 1,2,4"
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise FastossError("not a list of numbers", place=f"--gpus {text}", hint=hint) from None
    if min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise FastossError("each number of processes once, and from 1 up", place=f"--gpus {text}", hint=hint)
    return numbers


def plan_contestants(recipe: Recipe, *, sample: bool, gpus: Sequence[int], baseline: str | None, steps: int, repeats: int) -> list[Contestant]:
    """The recipe for each number of processes, with one global batch for all; last the baseline. Raises `FastossError`."""
    import torch

    if recipe.method != "sft":
        raise FastossError(f'`method = "{recipe.method}"` cannot be measured yet', place="fastoss bench", hint="measure an SFT recipe")
    if steps < _LEAST_STEPS or repeats < 1:
        fact = f"at least {_LEAST_STEPS} steps (the first is not counted) and one repeat"
        raise FastossError(fact, place=f"--steps {steps} --repeats {repeats}")
    if baseline is not None and baseline not in BASELINES:
        raise FastossError(f'"{baseline}" is not a baseline', place="--baseline", hint=f"it can be {', '.join(BASELINES)}")
    gpus = sorted(parse_gpus(",".join(map(str, gpus))))
    for processes in gpus:
        check_gpus(processes, available=torch.cuda.device_count())
    accumulation = recipe.train.gradient_accumulation_steps
    uneven = [processes for processes in gpus if accumulation % processes]
    if uneven:
        count = f"{accumulation} micro-batch{'es' * (accumulation > 1)} a step"
        fact = f"{count} cannot be shared by {uneven[0]} processes: the effective batch would change"
        hint = f"--set train.gradient_accumulation_steps={math.lcm(*gpus) * -(-accumulation // math.lcm(*gpus))}, on every number of processes"
        raise FastossError(fact, place="train.gradient_accumulation_steps", hint=hint)
    dataset = build_dataset(recipe, sample=sample)
    plan, ours = plan_model(recipe.model, gpu=has_gpu()), []
    for processes in gpus:
        shortened = _shortened(recipe, steps, accumulation // processes)
        ours.append(_contestant("fastoss", shortened, processes, plan_batches(shortened, plan, dataset, processes)))
    theirs = [_baseline(baseline, ours[0], dataset)] if baseline else []
    for contestant in (*ours, *theirs):
        check_before_launch(contestant.recipe, RunDirectory(Path("runs")), contestant.processes, sample=sample)
    return [*ours, *theirs]


def _shortened(recipe: Recipe, steps: int, accumulation: int) -> Recipe:
    """The recipe for this number of steps, with nothing between them: no evaluation, checkpoint, sample, tracker or push."""
    changes = {
        "train": recipe.train.model_copy(update={"max_steps": steps, "gradient_accumulation_steps": accumulation}),
        "eval": recipe.eval.model_copy(update={"every": steps + 1, "after": False}),
        "checkpoint": recipe.checkpoint.model_copy(update={"every": steps + 1}),
        "samples": SampleSettings(),
        "log": LogSettings(),
        "hub": HubSettings(),
    }
    return recipe.model_copy(update=changes)


def _baseline(name: str, ours: Contestant, dataset: Dataset) -> Contestant:
    """The same model, LoRA, and documents in each step through transformers, a row a document and padded.

    A micro-batch takes as many rows as fit into our token budget when all are the longest, so that memory is alike; rows keep a
    random order, as trainers have it by default.
    """
    recipe, notes = ours.recipe, []
    train, model = recipe.train, recipe.model.model_copy(update={"backend": name})
    if train.tokens_per_batch is None:
        hint = "give the recipe tokens_per_batch in place of per_device_train_batch_size"
        raise FastossError(f"the recipe trains padded rows itself, as {name} does", place="--baseline", hint=hint)
    if recipe.model.precision == "mxfp4" and recipe.model.name != "tiny":
        model = model.model_copy(update={"precision": "bf16"})
        notes.append(f"{name} cannot train on packed MXFP4 weights: the baseline holds them in bf16")
    most = -(-max(ours.work.documents) // ours.processes)
    rows = max(1, train.tokens_per_batch // max(dataset.train.lengths))
    accumulation = max(1, min(-(-most // rows), min(ours.work.documents) // ours.processes))
    changes = {"tokens_per_batch": None, "per_device_train_batch_size": -(-most // accumulation), "gradient_accumulation_steps": accumulation}
    changed = recipe.model_copy(update={"model": model, "train": train.model_copy(update=changes)})
    planned = plan_padded(changed, recipe, dataset, ours.processes)
    return _contestant(name, changed, ours.processes, planned, notes)


def _contestant(kind: str, recipe: Recipe, processes: int, planned: tuple[Layout, Units, Schedule], notes: Sequence[str] = ()) -> Contestant:
    layout, units, schedule = planned
    work = Work([], [], [], [])
    per_step = recipe.train.gradient_accumulation_steps * processes
    for start in range(0, len(schedule.batches), per_step):
        batches = schedule.batches[start : start + per_step]
        examples = [[example for number in members for example in units[number]] for members in batches]
        tokens = [sum(units.lengths[number] for number in members) for members in batches]
        padded = [len(batch) * max(map(len, batch)) for batch in examples]
        work.documents.append(sum(map(len, examples)))
        work.tokens.append(sum(tokens))
        work.trained_tokens.append(sum(span.end - span.start for batch in examples for e in batch for span in e.spans if span.trained))
        work.slots.append(sum(padded if layout == "padded" else tokens))
    plan = plan_model(recipe.model, gpu=has_gpu())
    return Contestant(kind, processes, recipe, work, layout, (*notes, *plan.notes))


def write_recipe(path: Path, recipe: Recipe) -> None:
    """A resolved recipe as a TOML file that `fastoss train` takes."""

    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{json.dumps(key)} = {inline(item)}" for key, item in value.items() if item is not None) + " }"
        if isinstance(value, list):
            return "[" + ", ".join(map(inline, value)) + "]"
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's strings and numbers are TOML's too

    plain = {key: value for key, value in resolved_dict(recipe).items() if value is not None}
    sections = {key: value for key, value in plain.items() if isinstance(value, dict)}
    lines = [f"{key} = {inline(value)}" for key, value in plain.items() if key not in sections]
    for name, values in sections.items():
        lines += ["", f"[{name}]", *(f"{key} = {inline(value)}" for key, value in values.items() if value is not None)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(lines) + "\n")
    assert resolved_dict(load_recipe(path)) == resolved_dict(recipe), f"{path} is not the recipe that was planned"
