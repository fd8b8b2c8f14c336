"""`fastoss check`: a recipe judged for a card, whether or not this machine has one. Reads no weights, needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastoss.config import Recipe, load_recipe
from fastoss.data.dataset import Dataset
from fastoss.errors import FastossError
from fastoss.model.backend import NEEDS_GPU, plan_model
from fastoss.model.cards import card_for, cards_found
from fastoss.training.planning.batches import few_steps, plan_batches
from fastoss.training.planning.fit import Fit, find_fit, fit_lines, write_fit
from fastoss.training.planning.run_plan import RunPlan, plan_run


@dataclass(frozen=True)
class Outlook:
    """A plan, and the settings that would fit where it does not. `price` is for a card and hour, in any currency; `notes` are for people."""

    plan: RunPlan
    fit: Fit | None
    price: float | None
    notes: list[str]

    def lines(self) -> list[str]:
        lines = self.plan.lines(self.price)
        if self.plan.card is not None and not self.plan.fits:
            lines += fit_lines(self.fit, self.plan.card)
        return lines + self.notes

    def to_plain(self) -> dict[str, Any]:
        changes = [{"key": c.key, "old": c.old, "new": c.new, "costs": c.costs} for c in self.fit.changes] if self.fit else None
        fit = {"changes": changes, "peak_bytes": self.fit.bytes} if self.fit else None
        cost = None if self.price is None else self.plan.cost(self.price)
        return self.plan.to_plain() | {"would_fit": fit, "price": self.price, "cost": cost}


def judge(recipe: Recipe, dataset: Dataset, *, card: str | None = None, price: float | None = None, ranks: int = 1) -> Outlook:
    """The outlook of a recipe for the card that is named, else the one found, else one of 24 GB.

    The tiny model is judged for the processor, unless there is a GPU or a card is named. Raises `FastossError` for an unknown card.
    """
    found = card_for(card)
    gpu = card is not None or bool(cards_found()) or (recipe.model.name != "tiny" and recipe.model.precision in NEEDS_GPU)
    model = plan_model(recipe.model, gpu=gpu, installed=False)
    layout, units, schedule = plan_batches(recipe, model, dataset, ranks)
    plan = plan_run(recipe, model, dataset, layout, units, schedule, ranks=ranks, card=found)
    fit = None
    if plan.card is not None and not plan.fits:
        fit = find_fit(recipe, model, plan.card, units, ranks)
    return Outlook(plan, fit, price, few_steps(recipe, plan.steps))


def write_fitting(outlook: Outlook, recipe_path: Path, overrides: list[str]) -> list[str]:
    """`--fit`: the recipe that fits beside the one that does not, `NAME-fit.toml`; returns the lines that say so.

    Raises `FastossError` when nothing fits, or when there is such a file.
    """
    if outlook.plan.fits:
        return ["--fit has nothing to change: it fits as it is"]
    if outlook.fit is None:
        assert outlook.plan.card is not None
        raise FastossError(f"no setting of a recipe makes it fit on {outlook.plan.card.line()}", place=str(recipe_path), hint="name a larger --card")
    path = write_fit(recipe_path.with_name(f"{recipe_path.stem}-fit.toml"), outlook.fit, recipe_path)
    changed = {change.key for change in outlook.fit.changes}
    overrides = [override for override in overrides if override.partition("=")[0].strip() not in changed]  # these it holds, made to fit
    try:
        load_recipe(path, overrides)
    except FastossError:
        path.unlink()
        raise
    note = [f"  what --set said ({', '.join(overrides)}) is not in it: say it again"] if overrides else []
    return [f"wrote {path}, which has", *(f"  {change.line()}" for change in outlook.fit.changes), *note]
