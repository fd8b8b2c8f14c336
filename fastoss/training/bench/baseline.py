"""The baseline of `fastoss bench` as a process: `train` on the very documents of our steps, each in a row of its own and padded.

`python -m fastoss.training.bench.baseline THEIRS.toml OURS.toml RUN [--sample]`, alone or under torchrun.
"""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

from fastoss.config import Recipe, load_recipe
from fastoss.data.dataset import Dataset
from fastoss.data.packing import Layout, Schedule
from fastoss.data.units import Units
from fastoss.errors import FastossError
from fastoss.model.backend import ModelPlan, has_gpu, plan_model
from fastoss.run import RunDirectory
from fastoss.training import train as train_file
from fastoss.training.progress import Console
from fastoss.training.train import plan_batches


def plan_padded(theirs: Recipe, ours: Recipe, dataset: Dataset, ranks: int) -> tuple[Layout, Units, Schedule]:
    """Our schedule with every step's documents in random order, cut into the baseline's micro-batches of alike many rows."""
    (_, units, schedule), (layout, singles, _) = (plan_batches(r, plan_model(r.model, gpu=has_gpu()), dataset, ranks) for r in (ours, theirs))
    assert (layout, len(singles)) == ("padded", len(dataset.train)), "rows are padded, an example each"
    ours_a_step, cuts = (recipe.train.gradient_accumulation_steps * ranks for recipe in (ours, theirs))
    rng = random.Random(f"{theirs.train.seed}/baseline")
    batches: list[list[int]] = []
    for start in range(0, len(schedule.batches), ours_a_step):
        numbers = [number for members in schedule.batches[start : start + ours_a_step] for number in members]
        documents = [example for number in numbers for example in range(int(units.bounds[number]), int(units.bounds[number + 1]))]
        assert len(documents) >= cuts, "every micro-batch has a row"
        rng.shuffle(documents)  # packing leaves them in an order of its own
        ends = [len(documents) * cut // cuts for cut in range(cuts + 1)]
        batches += [documents[first:end] for first, end in itertools.pairwise(ends)]
    return layout, singles, Schedule(batches, [len(batches)], len(batches))


def main(theirs: str, ours: str, run: str, *options: str) -> None:
    recipe, other = load_recipe(theirs), load_recipe(ours)

    def plan(recipe: Recipe, plan: ModelPlan, dataset: Dataset, ranks: int) -> tuple[Layout, Units, Schedule]:
        return plan_padded(recipe, other, dataset, ranks)

    # The one thing in which this is not `fastoss train`. No recipe can say it: packing and rows choose documents differently, and
    # contestants that train on different ones cannot be compared.
    train_file.plan_batches = plan
    train_file.train(recipe, Path(theirs), RunDirectory(Path(run)), sample="--sample" in options, resume=False, overwrite=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except FastossError as error:
        Console().say(str(error))
        sys.exit(error.exit_code)
