"""`--dry-run`: what a recipe would do, with no model loaded and no GPU needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastoss.config import Recipe, resolved_dict
from fastoss.data.dataset import build_dataset
from fastoss.data.reading.sources import NotCached
from fastoss.errors import FastossError
from fastoss.model.backend import NEEDS_GPU, has_gpu, plan_model
from fastoss.run import RunDirectory
from fastoss.training.checkpoint import latest_checkpoint, list_checkpoints
from fastoss.training.planning.batches import batch_lines, plan_batches, steps_of
from fastoss.training.planning.outlook import judge
from fastoss.training.resume import check_same_run, run_facts


def dry_run_lines(recipe: Recipe, run: RunDirectory, *, sample: bool, gpus: int) -> Iterator[str]:
    """What `train` would do in words, then the resolved recipe as JSON."""
    # A recipe made for a GPU is judged for one, here or elsewhere.
    gpu = has_gpu() or (recipe.model.name != "tiny" and recipe.model.precision in NEEDS_GPU)
    plan = plan_model(recipe.model, gpu=gpu, installed=has_gpu())
    try:
        dataset = build_dataset(recipe, sample=sample)
    except NotCached as missing:
        dataset = None
        unseen = missing.note()
    yield f"would train {plan.line()}"
    if gpu and not has_gpu():
        yield "this machine has no GPU: train it on one that has, or here with --set model.name=tiny"
    yield from (f"note: {note}" for note in plan.notes)
    lora = recipe.lora
    experts = f" (of layers: {lora.expert_layers})" if "experts" in lora.targets else ""
    yield f"LoRA r {lora.r}, alpha {lora.lora_alpha:g}, on {' and '.join(lora.targets)}{experts}"
    if dataset is None:
        yield unseen
    else:
        yield from dataset.report.lines()
        layout, units, schedule = plan_batches(recipe, plan, dataset, gpus)
        yield from batch_lines(recipe, layout, units, steps_of(schedule, recipe, gpus), gpus)
        yield from judge(recipe, dataset, ranks=gpus).lines()
        yield f"run directory: {run.root} ({_state(recipe, run, run_facts(recipe, plan, dataset, layout) | {'world_size': gpus})})"
    yield ""
    yield json.dumps(resolved_dict(recipe), indent=2, ensure_ascii=False)


def _state(recipe: Recipe, run: RunDirectory, facts: dict[str, Any]) -> str:
    whole = latest_checkpoint(run, contents=False)
    if not run.is_finished() and whole is None and list_checkpoints(run):
        return "would be refused, none of its checkpoints is whole"
    if not run.exists() or not (run.is_finished() or whole):
        return "would start"
    try:
        check_same_run(run, recipe, facts)
    except FastossError as refusal:
        return f"would be refused, {refusal.fact}"
    return "is finished already" if run.is_finished() else "would resume"
