"""The reference of DPO: how likely each answer was before training. Computed once, kept beside the tokens, found again by what it depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from fastoss.config import Recipe
from fastoss.data.dataset import Dataset
from fastoss.data.packing import Layout, fill_batches
from fastoss.data.units import Units
from fastoss.model.adapter import library_versions
from fastoss.model.backend import ModelPlan
from fastoss.run import file_digest, write_whole
from fastoss.training.dpo import answer_logps, collate_pairs
from fastoss.training.progress import Console, rank, world_size
from fastoss.training.shared_base import dealt, of_each


def reference_logps(
    model: Any, recipe: Recipe, plan: ModelPlan, dataset: Dataset, units: Units, rule: Any, console: Console, start: Path | None
) -> numpy.ndarray:
    """Log-probabilities in nats of each pair's chosen and rejected answer, (pairs, 2), under the recipe's reference.

    `model` still has the weights that the run starts from; `start` is the adapter they came from. With
    `reference = "adapter_off"` its adapter is switched off meanwhile.
    """
    assert recipe.dpo is not None
    off = recipe.dpo.reference == "adapter_off" or start is None
    key = _key(model, recipe, plan, dataset, units, None if off else start)
    path = dataset.store.folder / f"reference-{key}.npy"
    if all(of_each(path.is_file())) if world_size() > 1 else path.is_file():  # machines have caches of their own
        console.say(f"the reference's log-probabilities are in the cache ({len(units):,} pairs)")
        return numpy.load(path)
    console.say(f"asking the reference ({'the base model' if off else start}) for {len(units):,} pairs …")
    found = torch.zeros(len(units), 2, dtype=torch.float64, device=next(model.parameters()).device)
    batches = fill_batches(range(len(units)), units.lengths, rule)
    training = model.training
    model.eval()
    with torch.no_grad(), model.disable_adapter() if off else contextlib.nullcontext():
        for members, counts in dealt(batches):
            logps = _pair_logps(model, units, members, rule.layout)
            if counts:
                found[list(members)] = logps
    model.train(training)
    if world_size() > 1:
        torch.distributed.all_reduce(found)
    result = found.cpu().numpy()
    if rank() == 0:
        _write(path, result)
    return result


def _pair_logps(model: Any, units: Units, members: Sequence[int], layout: Layout) -> torch.Tensor:
    batch = {name: values.to(next(model.parameters()).device) for name, values in collate_pairs([units[i] for i in members], layout).items()}
    logps, _ = answer_logps(model, batch)
    chosen, rejected = logps.double().sum(1).chunk(2)
    return torch.stack([chosen, rejected], 1)


def _key(model: Any, recipe: Recipe, plan: ModelPlan, dataset: Dataset, units: Units, adapter: Path | None) -> str:
    """A hash of what the values depend on: base, precision, adapter, tokens and which of them, libraries."""
    weights = file_digest(adapter / "adapter_model.safetensors") if adapter else "off"
    told = [
        _base_identity(model, plan), plan.backend, plan.precision, recipe.lora.model_dump(mode="json") if adapter else None, weights,
        dataset.report.fingerprint, hashlib.sha256(units.bounds.tobytes() + units.examples.numbers.tobytes()).hexdigest(), library_versions(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]


def _base_identity(model: Any, plan: ModelPlan) -> list[Any]:
    """The base's configuration, and of a folder its files' names, sizes and times, of a hub's model its commit: cheap, and no two alike."""
    config = model.get_base_model().config
    source = Path(plan.source) if plan.source else None
    files = []
    if source is not None and source.is_dir():
        files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(source.glob("*.safetensors"))]
    return [plan.source, getattr(config, "_commit_hash", None), config.to_json_string(), files]


def _write(path: Path, values: numpy.ndarray) -> None:
    import io

    buffer = io.BytesIO()
    numpy.save(buffer, values)
    write_whole(path, buffer.getvalue())
