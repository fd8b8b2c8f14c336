"""Dataset → the micro-batches of a run: what is trained together, in which order, over all ranks and epochs. Needs no torch.

Called by the run itself, its dry run, `fastoss check` and the benchmarks: all of them mean the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastoss.config import Recipe
from fastoss.data.data_report import counted
from fastoss.data.dataset import Dataset
from fastoss.data.packing import BatchRule, Layout, Schedule, plan_schedule
from fastoss.data.store import Examples
from fastoss.data.units import Units, pair_units, single_units, tree_units
from fastoss.errors import FastossError
from fastoss.model.backend import ModelPlan

_FEW_STEPS = 10  # with fewer, a learning rate hardly rises before it falls


def plan_batches(recipe: Recipe, plan: ModelPlan, dataset: Dataset, ranks: int) -> tuple[Layout, Units, Schedule]:
    """What is trained together, and which micro-batches the run will train on, over all ranks and epochs."""
    rule = batch_rule(recipe)
    units = _units(recipe, rule, dataset.train, dataset.weights)
    if rule.tokens and max(units.lengths) > rule.tokens:
        hint = "raise train.tokens_per_batch, or lower model.max_length"
        raise FastossError(f"a pair of {max(units.lengths):,} tokens is longer than a batch", place="train.tokens_per_batch", hint=hint)
    schedule = plan_schedule(
        units.lengths,
        rule,
        epochs=recipe.train.num_train_epochs,
        max_steps=recipe.train.max_steps,
        batches_per_step=recipe.train.gradient_accumulation_steps * ranks,
        ranks=ranks,
        seed=recipe.train.seed,
        weights=units.weights,
    )
    return rule.layout, units, schedule


def _units(recipe: Recipe, rule: BatchRule, examples: Examples, weights: Sequence[float]) -> Units:
    if recipe.method == "dpo":
        return pair_units(examples, weights, trees=rule.layout == "packed")
    if rule.layout == "packed" and rule.tokens:
        return tree_units(examples, weights, rule.tokens)
    return single_units(examples, weights)


def batch_rule(recipe: Recipe) -> BatchRule:
    """By tokens, packed; or by rows, padded, where the recipe says so."""
    rows = recipe.train.per_device_train_batch_size
    return BatchRule("packed", tokens=recipe.train.tokens_per_batch) if rows is None else BatchRule("padded", rows=rows)


def steps_of(schedule: Schedule, recipe: Recipe, ranks: int) -> int:
    """Optimizer steps of a schedule; the last may be smaller than the others."""
    per_step = recipe.train.gradient_accumulation_steps * ranks
    return -(-len(schedule.batches) // per_step)


def batch_lines(recipe: Recipe, layout: Layout, units: Units, total_steps: int, ranks: int) -> list[str]:
    """How the run is cut into steps, and what will not happen within them."""
    train = recipe.train
    size = f"{train.per_device_train_batch_size} rows" if train.per_device_train_batch_size else f"up to {train.tokens_per_batch:,} tokens"
    processes = f" × {ranks} processes" if ranks > 1 else ""
    micro = "1 micro-batch" if train.gradient_accumulation_steps == 1 else f"{train.gradient_accumulation_steps} micro-batches"
    how = "documents packed and kept apart" if layout == "packed" else "rows padded on the right"
    lines = [f"{total_steps:,} steps of {micro}{processes}, {size} each, {how}"]
    if units.saved:
        lines.append(f"chats of several turns as trees, their history computed once: {100 * units.saved:.0f} % fewer tokens")
    lines += few_steps(recipe, total_steps)
    every = recipe.checkpoint.every
    if every != "epoch" and every >= total_steps:
        lines.append(f"note: no checkpoint before the end (checkpoint.every = {every}); a run that is killed starts over")
    if recipe.eval.fraction and recipe.eval.every >= total_steps:
        lines.append(f"note: no evaluation before the end (eval.every = {recipe.eval.every})")
    return lines


def few_steps(recipe: Recipe, total_steps: int) -> list[str]:
    """A note where an optimizer has hardly begun when it ends; none where the recipe itself names the steps."""
    if total_steps >= _FEW_STEPS or recipe.train.max_steps:
        return []
    size = "per_device_train_batch_size" if recipe.train.per_device_train_batch_size else "tokens_per_batch"
    return [f"note: {counted(total_steps, 'step')} teach little: a smaller train.{size} or more train.num_train_epochs make more of them"]


def eval_units(recipe: Recipe, dataset: Dataset) -> Units:
    """What is held out, as it is laid out."""
    weights = [1.0] * len(dataset.eval)
    if recipe.method == "dpo":
        return pair_units(dataset.eval, weights, trees=batch_rule(recipe).layout == "packed")
    return single_units(dataset.eval, weights)


def tokens_by_process(units: Units, schedule: Schedule, ranks: int) -> list[int]:
    """Tokens that each process computes in the whole run, fillers included: micro-batch `i` is that of process `i % ranks`."""
    sizes = [sum(units.lengths[i] for i in members) for members in schedule.batches]
    return [sum(sizes[first::ranks]) for first in range(ranks)]
