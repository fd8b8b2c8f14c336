"""A plan that does not fit → the settings that would, those first that cost the least quality; and a recipe that has them."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastoss.config import Recipe
from fastoss.data.units import Units
from fastoss.errors import FastossError
from fastoss.model.backend import ModelPlan
from fastoss.model.cards import Card
from fastoss.model.plan import MicroBatch, plan_memory
from fastoss.model.plan_constants import constants
from fastoss.model.shape import shape_of
from fastoss.recipe_edit import set_value
from fastoss.run import write_whole
from fastoss.training.planning.run_plan import RunPlan, gib, setting_of

IGNORE_PLAN = "--ignore-plan"


@dataclass(frozen=True)
class Change:
    """A key of the recipe, its value now, the one that saves memory, and what that costs."""

    key: str
    old: Any
    new: Any
    costs: str

    def line(self) -> str:
        return f"{self.key}: {_shown(self.old)} → {_shown(self.new)} ({self.costs})"


@dataclass(frozen=True)
class Fit:
    """The changes with which a recipe fits, and the memory it then takes in bytes; no changes where nothing helps."""

    changes: list[Change]
    bytes: int


# How many rows there are of each size: tokens as it is trained (of a pair both sides), and of its longest example, which max_length is about.
Rows = Counter[tuple[int, int]]


def find_fit(recipe: Recipe, model: ModelPlan, card: Card, units: Units, ranks: int) -> Fit | None:
    """The changes that make a recipe fit on `card`; None where all of them together do not.

    They are tried in the order of what they cost the trained model, each on top of those before it. What turns out not to be
    needed, or not that far, is taken back, the costliest first.
    """
    rows = _rows(recipe, units)
    state, tried = recipe, dict[str, list[list[Change]]]()
    for name, step in _steps(recipe, model, rows, ranks):
        if _needed(state, model, rows, ranks) <= card.memory:
            break
        if found := step(state):
            tried.setdefault(name, []).append(found)
            state = _with(state, found)
    if _needed(state, model, rows, ranks) > card.memory:
        return None
    chosen = {name: steps[-1] for name, steps in tried.items()}
    for name in reversed(tried):
        for milder in ([], *tried[name]):
            less = chosen | {name: milder}
            attempt = recipe
            for changes in less.values():
                attempt = _with(attempt, changes)
            if _is_sound(attempt, rows) and _needed(attempt, model, rows, ranks) <= card.memory:
                chosen, state = less, attempt
                break
    changes = [replace(change, old=_value(recipe, change.key)) for group in chosen.values() for change in group]
    return Fit(changes, _needed(state, model, rows, ranks))


def _rows(recipe: Recipe, units: Units) -> Rows:
    """Of SFT the examples: a chat's tree that a smaller batch cannot hold is trained in pieces."""
    lengths = units.examples.lengths
    if recipe.method != "dpo":
        return Counter((length, length) for length in lengths)
    return Counter(zip(units.lengths, map(max, lengths[::2], lengths[1::2]), strict=True))


def _kept(recipe: Recipe, rows: Rows) -> Counter[int]:
    """By their tokens the rows that max_length leaves, shortened where the recipe has them shortened."""
    limit, shortens = recipe.model.max_length, recipe.hygiene.over_length == "truncate_left_turns"
    kept = Counter[int]()
    for (size, longest), count in rows.items():
        if longest <= limit or shortens:
            kept[size if longest <= limit else size * limit // longest] += count
    return kept or Counter({limit: 1})


def _smallest_batch(recipe: Recipe, rows: Rows) -> int:
    """The tokens that a batch must hold: a row of max_length, as the recipe's own check wants it, and each pair."""
    return max(recipe.model.max_length, *_kept(recipe, rows))


def _is_sound(recipe: Recipe, rows: Rows) -> bool:
    tokens = recipe.train.tokens_per_batch
    return tokens is None or tokens >= _smallest_batch(recipe, rows)


def _steps(recipe: Recipe, model: ModelPlan, rows: Rows, ranks: int) -> list[tuple[str, Callable[[Recipe], list[Change]]]]:
    longest = max(length for _, length in rows)

    def recompute(state: Recipe) -> list[Change]:
        on = state.train.recompute == "full" or (state.train.recompute == "auto" and model.device == "gpu")
        return [] if on else [Change("train.recompute", state.train.recompute, "full", "no quality; by arithmetic two fifths more time")]

    def smaller_batch(state: Recipe) -> list[Change]:
        """Half of it (of an odd number of rows a single one), and as much more accumulation: the same global batch."""
        train, per_step = state.train, state.train.gradient_accumulation_steps
        count = train.per_device_train_batch_size or 1
        parts = count if train.tokens_per_batch is None and count % 2 else 2
        more = Change("train.gradient_accumulation_steps", per_step, parts * per_step, "the same batch in more pieces")
        if train.tokens_per_batch is None:
            return [] if count < 2 else [Change("train.per_device_train_batch_size", count, count // parts, "no quality"), more]
        half = train.tokens_per_batch // 2
        if half < _smallest_batch(state, rows):
            return []
        return [Change("train.tokens_per_batch", train.tokens_per_batch, half, "no quality, a little speed"), more]

    def more_on_host(state: Recipe) -> list[Change]:
        waiting, layers = state.distributed.host_layers, shape_of(recipe.model.name).layers
        if state.distributed.strategy != "fsdp" or ranks == 1 or waiting >= layers:
            return []
        return [Change("distributed.host_layers", waiting, min(waiting + 2, layers), "no quality, traffic between host and card")]

    def unused_length(state: Recipe) -> list[Change]:
        """max_length above the longest row only keeps the batch from getting smaller."""
        length = -(-longest // 64) * 64
        if recipe.method == "dpo" or length >= state.model.max_length:
            return []
        return [Change("model.max_length", None, length, "no row is as long")]

    def shorter(state: Recipe) -> list[Change]:
        length = state.model.max_length // 2
        over = sum(count for (_, longest), count in rows.items() if longest > length)
        if length < 512 or over == rows.total() or (over and recipe.hygiene.over_length == "error"):
            return []
        return [Change("model.max_length", state.model.max_length, length, f"{over:,} of {rows.total():,} rows are longer")]

    def fewer_layers(state: Recipe) -> list[Change]:
        layers = shape_of(recipe.model.name).layers
        if "experts" not in state.lora.targets or state.lora.expert_layers != "all" or layers < 8:
            return []
        thirds = [layers // 3 - 1, 2 * layers // 3 - 1, layers - 1]
        return [Change("lora.expert_layers", "all", thirds, "experts of three layers learn")]

    def packed(state: Recipe) -> list[Change]:
        if state.model.precision not in ("bf16", "float32") or model.backend != "unsloth" or Path(recipe.model.name).is_dir():
            return []
        return [Change("model.precision", None, "mxfp4", "the base as OpenAI publishes it")]

    def four_bits(state: Recipe) -> list[Change]:
        split_experts = ranks > 1 and "experts" in state.lora.targets  # see _check_processes in train.py
        if state.model.precision == "4bit" or recipe.model.name == "tiny" or model.backend != "unsloth" or split_experts:
            return []
        return [Change("model.precision", None, "4bit", "the base in 4 bits")]

    def lower_rank(state: Recipe) -> list[Change]:
        return [] if state.lora.r <= 4 else [Change("lora.r", state.lora.r, max(4, state.lora.r // 2), "the adapter can learn less")]

    batch = [("batch", smaller_batch)] * 6
    plain = [("layers", fewer_layers), ("precision", packed), ("precision", four_bits)]
    return [
        ("recompute", recompute),
        *batch,
        ("length", unused_length),
        *batch,
        *[("host", more_on_host)] * 12,
        *plain,
        *[("rank", lower_rank)] * 3,
        *[("length", shorter), *batch] * 3,
    ]


def _with(recipe: Recipe, changes: list[Change]) -> Recipe:
    for change in changes:
        section, key = change.key.split(".")
        value = tuple(change.new) if isinstance(change.new, list) else change.new
        part = getattr(recipe, section).model_copy(update={key: value})
        recipe = recipe.model_copy(update={section: part})
    return recipe


def _value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _needed(recipe: Recipe, model: ModelPlan, rows: Rows, ranks: int) -> int:
    """Bytes on the card with a full micro-batch."""
    kept = _kept(recipe, rows)
    longest = max(kept)
    if recipe.train.tokens_per_batch is not None:
        tokens = min(max(recipe.train.tokens_per_batch, longest), sum(size * count for size, count in kept.items()))
    else:
        tokens = longest * min(recipe.train.per_device_train_batch_size or 1, kept.total())
    changed = ModelPlan(model.backend, model.source, _precision(recipe, model), model.device)
    shape, setting = shape_of(recipe.model.name), setting_of(recipe, changed, ranks)
    return plan_memory(shape, setting, MicroBatch([tokens]), constants()).card_bytes


def _precision(recipe: Recipe, model: ModelPlan) -> str:
    """The recipe's; the tiny model's own where it stands for another."""
    return model.precision if recipe.model.name == "tiny" else recipe.model.precision


def fit_lines(fit: Fit | None, card: Card) -> list[str]:
    """What would fit, line by line."""
    if fit is None:
        return [f"nothing that --fit may change makes it fit on {card.line()} (it changes neither the model nor lora.targets): take a larger card"]
    return [f"it would fit ({gib(fit.bytes)}) with", *(f"  {change.line()}" for change in fit.changes)]


def check_fits(plan: RunPlan, recipe: Recipe, *, ignore: bool) -> None:
    """Refuse a run that cannot fit on its card. `FastossError`, before the model is loaded."""
    if not plan.cannot_fit or ignore:
        return
    assert plan.card is not None
    fact = f"the run cannot fit on this card: {plan.card.line()}, at the very least it takes {gib(plan.least)}"
    hint = f"fastoss check RECIPE --fit writes a recipe that fits; {IGNORE_PLAN} tries it all the same"
    raise FastossError(fact, place=recipe.name, hint=hint)


def write_fit(path: Path, fit: Fit, recipe_path: Path) -> Path:
    """The recipe with the changes in it, as a new file at `path`, comments kept. Raises `FastossError` when there is one."""
    if path.exists():
        raise FastossError("the file exists already", place=str(path), hint="move it away: --fit overwrites no file")
    text = recipe_path.read_text(encoding="utf-8-sig")
    for change in fit.changes:
        text = set_value(text, change.key, change.new, place=str(recipe_path))
    tomllib.loads(text)
    write_whole(path, text)
    return path


def _shown(value: Any) -> str:
    return "not set" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
