"""The recipes that are shipped: their first steps through the command line, their samples, their cards, and what docs/recipes.md says of them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fastoss.config import Recipe, load_recipe
from fastoss.errors import FastossError
from fastoss.inference.languages import language_of
from fastoss.inference.sampling import ReasoningLanguage
from fastoss.model.backend import plan_model
from fastoss.model.cards import GIB, parse_card
from fastoss.model.plan import MicroBatch, plan_memory
from fastoss.model.plan_constants import constants
from fastoss.model.shape import shape_of
from fastoss.training.planning.run_plan import setting_of

from .conftest import ROOT, Result, fastoss, losses

FOLDER = ROOT / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.toml"))
PROCESSES = {"ddp": 2}  # trained in two processes here; one is enough to try the others' settings


def sets(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def first_steps(name: str, run: Path, *more: object) -> Result:
    """Two steps on some of the rows: the first one's learning rate is 0, and an adapter that does nothing is none to begin from."""
    path = FOLDER / f"{name}.toml"
    sources = len(load_recipe(path).data)
    few = [f"data.{number}.max_rows={16 // sources}" for number in range(sources)]
    changes = ("model.name=tiny", "train.max_steps=2", "samples.max_new_tokens=4", "samples.from_train=1", *few)
    # Two processes with the micro-batches of a step shared out would be eight of them, each on an epoch of so few rows: one each is enough.
    processes = ("--gpus", PROCESSES[name], *sets("train.gradient_accumulation_steps=1")) if name in PROCESSES else ()
    return fastoss("train", path, "--sample", "--output", run, *sets(*changes), *processes, *more, cwd=run.parent, timeout=600)


BEGIN_FROM = {name: Path(adapter).name for name in RECIPES if (adapter := load_recipe(FOLDER / f"{name}.toml").model.adapter)}


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("quickstart", *BEGIN_FROM.values())])
def test_every_recipe_takes_its_first_steps_on_the_tiny_model(name, tmp_path):
    """A recipe that begins from another's run is trained after that one, in one test. The quickstart has a test of its own, to its end."""
    adapter: tuple[object, ...] = ()
    for part in (BEGIN_FROM[name], name) if name in BEGIN_FROM else (name,):
        run = tmp_path / part
        result = first_steps(part, run, *adapter)
        assert result.code == 0, result.err
        assert "the tiny model runs in float32 without a GPU" in result.err
        assert len(losses(run)) == 2
        assert json.loads((run / "manifest.json").read_text())["world_size"] == PROCESSES.get(part, 1)
        adapter = tuple(sets(f"model.adapter={run}"))


def test_the_sample_says_what_the_hub_set_says():
    """Multilingual-Thinking has each dialogue twice, flat and as messages: ours are one conversation, in the language that is named."""
    rows = [json.loads(line) for line in (FOLDER / "data" / "multilingual.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 40
    assert len({row["reasoning_language"] for row in rows}) >= 5
    for row in rows:
        assert list(row) == ["reasoning_language", "developer", "user", "analysis", "final", "messages"]
        assert [list(message) for message in row["messages"]] == [["content", "role", "thinking"]] * 3
        system, user, answer = row["messages"]
        assert system["content"] == f"reasoning language: {row['reasoning_language']}\n\n{row['developer']}"
        assert (user["content"], answer["content"], answer["thinking"]) == (row["user"], row["final"], row["analysis"])
        assert language_of(row["analysis"]) in (None, ReasoningLanguage.named(row["reasoning_language"]).value)


# --- docs/recipes.md --------------------------------------------------------------------------------------------------------------


def table() -> dict[str, dict[str, str]]:
    """The table of docs/recipes.md: by recipe its cells by column."""
    lines = [line for line in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {re.search(r"/([\w-]+)\.toml", row[0])[1]: dict(zip(head, row, strict=True)) for row in rows if ".toml" in row[0]}


def planned(recipe: Recipe) -> float:
    """Bytes at the peak for the largest micro-batch that a recipe allows, whatever rows it reads."""
    model = plan_model(recipe.model, gpu=True, installed=False)
    rows = recipe.train.per_device_train_batch_size
    batch = MicroBatch([recipe.model.max_length] * rows if rows else [recipe.train.tokens_per_batch])
    return plan_memory(shape_of(recipe.model.name), setting_of(recipe, model, 1), batch, constants()).card_bytes


def test_the_variants_that_a_recipe_names():
    """Of multilingual-zero2: attention alone, as its head says it; and ZeRO-2, which is refused with the reason."""
    path = FOLDER / "multilingual-zero2.toml"
    said = re.search(r"^# Variant.*?: (--set .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)[1]
    variant = load_recipe(path, shlex.split(said)[1::2])
    assert (variant.lora.targets, variant.lora.expert_layers, variant.lora.lora_dropout) == (("attention",), "all", 0.05)
    assert planned(variant) <= parse_card("A100-80").memory
    with pytest.raises(FastossError, match="ZeRO-2 keeps all weights on every card") as refused:
        load_recipe(path, ["distributed.strategy=zero2"])
    assert "docs/scaling.md" in str(refused.value)


def test_the_table_names_every_recipe():
    assert sorted(table()) == RECIPES


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "quickstart"])
def test_a_recipe_fits_the_card_it_is_meant_for_by_the_plan(name):
    """With the largest micro-batch that it allows; and the figure that the table shows is the plan's."""
    said, needed = table()[name], planned(load_recipe(FOLDER / f"{name}.toml"))
    assert needed <= parse_card(said["card"].removeprefix("4 × ")).memory
    figure = re.fullmatch(r"([\d.]+) planned", said["peak GiB"])
    assert float(figure[1]) == pytest.approx(needed / GIB, rel=0.02)
