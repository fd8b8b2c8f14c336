"""Recipe, data and card → what the run will take: memory, disk, tokens, steps, time. Before anything is loaded, without torch.

`fastoss check`, the dry run and the run itself show the same plan; the run keeps it as plan.json, and adds what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastoss.config import Recipe
from fastoss.data.data_report import counted
from fastoss.data.dataset import Dataset
from fastoss.data.packing import Layout, Schedule
from fastoss.data.units import Units
from fastoss.model.backend import ModelPlan
from fastoss.model.cards import GIB, Card
from fastoss.model.checkpoint_source import read_config
from fastoss.model.plan import MemoryPlan, MicroBatch, Setting, cpu_layer_bytes, plan_memory
from fastoss.model.plan_constants import IDEAL, Constants, constants
from fastoss.model.shape import ModelShape, shape_of
from fastoss.model.speed import Work, as_computed, tokens_a_second
from fastoss.run import RunDirectory, read_json, size_of, write_json
from fastoss.terminal import disk_size, rough_duration
from fastoss.training.planning.batches import steps_of


@dataclass(frozen=True)
class RunPlan:
    """What a run will take. `card` is None on a processor. Bytes, tokens of all epochs and ranks, seconds (None: nobody knows).

    `trained` counts the parameters that are trained. `least` is the memory that no constant could talk away: a card with less cannot do it.
    """

    card: Card | None
    ranks: int
    memory: MemoryPlan
    least: int
    batch_tokens: int
    trained: int
    disk: dict[str, int]
    later: dict[str, int]
    tokens: int
    steps: int
    seconds: float | None
    source: str

    @property
    def fits(self) -> bool:
        return self.card is None or self.memory.card_bytes <= self.card.memory

    @property
    def cannot_fit(self) -> bool:
        """Not even if every estimate were too high."""
        return self.card is not None and self.least > self.card.memory

    @property
    def disk_bytes(self) -> int:
        """What lies there at the end."""
        return sum(self.disk.values())

    def cost(self, price: float) -> float | None:
        """In the currency of `price`, which is for one card an hour."""
        return None if self.seconds is None else self.seconds / 3600 * price * self.ranks

    def to_plain(self) -> dict[str, Any]:
        """plan.json, as the report reads it."""
        return {
            "card": self.card.name if self.card else None,
            "card_bytes": self.card.memory if self.card else None,
            "ranks": self.ranks,
            "components": self.memory.components,
            "peak_bytes": self.memory.peak,
            "beside_bytes": self.memory.beside,
            "least_bytes": self.least,
            "fits": self.fits,
            "other_peaks": self.memory.others,
            "micro_batch_tokens": self.batch_tokens,
            "disk": self.disk,
            "disk_bytes": self.disk_bytes,
            "disk_later": self.later,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "tokens": self.tokens,
            "steps": self.steps,
            "source": self.source,
        }

    def lines(self, price: float | None = None) -> list[str]:
        """For people; GiB, as cards are sold."""
        where = self.card.line() if self.card else "the CPU"
        each = f", each of {self.ranks}" if self.ranks > 1 else ""
        batch = f"a micro-batch of {self.batch_tokens:,} tokens"
        lines = [f"peak memory on {where}{each}: {gib(self.memory.card_bytes)} for {batch} ({self.source})"]
        parts = self.memory.components | ({"CUDA and its libraries": self.memory.beside} if self.memory.beside else {})
        small = [name for name, size in parts.items() if size < self.memory.card_bytes / 100]
        if len(small) > 1:
            parts = {name: size for name, size in parts.items() if name not in small} | {"the rest": sum(parts[name] for name in small)}
        lines += [f"  {name:<34}{gib(size):>9}" for name, size in parts.items()]
        lines += [f"  at another time: {name} {gib(size)}" for name, size in self.memory.others.items()]
        disk = " · ".join(f"{name} {disk_size(size)}" for name, size in self.disk.items())
        later = " · ".join(f"{name} {disk_size(size)}" for name, size in self.later.items())
        lines.append(f"disk: {disk}; if exported: {later}")
        lines.append(f"{self.tokens:,} tokens in {counted(self.steps, 'step')}{self._time(price)}")
        return [*lines, *self.verdict()]

    def _time(self, price: float | None) -> str:
        if self.seconds is None:
            return ""
        text = f", about {rough_duration(self.seconds)} ({self.source})"
        return text if price is None else f"{text}, which costs {self.cost(price):,.2f} at {price:g} for a card and hour"

    def verdict(self) -> list[str]:
        """Whether it fits, in a line."""
        if self.card is None:
            return []
        if self.fits:
            return [f"fits: {gib(self.card.memory - self.memory.card_bytes)} of {gib(self.card.memory)} are left"]
        return [
            f"does not fit: the card has {gib(self.card.memory)}, {gib(self.memory.card_bytes)} are expected, {gib(self.least)} at the very least"
        ]


def plan_run(
    recipe: Recipe, model: ModelPlan, dataset: Dataset, layout: Layout, units: Units, schedule: Schedule, *, ranks: int, card: Card | None
) -> RunPlan:
    """The plan of a run whose batches are laid out. `card` is what it is judged for; None, or a model on the processor: no card."""
    shape, setting = shape_of(recipe.model.name), setting_of(recipe, model, ranks)
    batch = largest_batch(shape, setting, layout, recipe, units, schedule)
    found = constants()
    if model.device == "cpu":
        card = None
    trained = sum(shape.lora_parameters(recipe.lora).values())
    real = schedule.batches[: len(schedule.batches) - schedule.fillers]
    tokens, steps = sum(units.lengths[i] for members in real for i in members), steps_of(schedule, recipe, ranks)
    plan = RunPlan(
        card=card, ranks=ranks, memory=plan_memory(shape, setting, batch, found), least=0, batch_tokens=batch.tokens,
        trained=trained,
        disk=_disk(recipe, trained, steps, len(schedule.epoch_ends)), later=_exports(shape, trained), tokens=tokens, steps=steps, seconds=None,
        source=found.note() if model.device == "gpu" else "in float32",
    )  # fmt: skip
    # With on_oom = "split" a micro-batch may be cut down to its longest document.
    smallest = MicroBatch([max(batch.documents)]) if recipe.train.on_oom == "split" else batch
    least = plan_memory(shape, setting, smallest, replace(IDEAL, cpu_libraries=found.cpu_libraries)).card_bytes
    share = dataset.report.trained_tokens / max(1, dataset.report.train_tokens)
    return replace(plan, least=least, seconds=_seconds(shape, setting, batch, tokens, share, card, found))


def setting_of(recipe: Recipe, model: ModelPlan, ranks: int) -> Setting:
    """What memory depends on in a recipe."""
    shared_out = recipe.distributed.strategy == "fsdp" and ranks > 1  # read by shares, not mapped
    recompute = recipe.train.recompute == "full" or (recipe.train.recompute == "auto" and model.device == "gpu")
    return Setting(
        backend=model.backend, precision=model.precision, device=model.device, lora=recipe.lora, recompute=recompute,
        strategy=recipe.distributed.strategy, ranks=ranks, host_layers=recipe.distributed.host_layers,
        mapped=model.device == "cpu" and not shared_out and _is_float32(model),
    )  # fmt: skip


def _is_float32(model: ModelPlan) -> bool:
    """Whether the checkpoint holds float32, so that its file is mapped and not converted."""
    if model.source is None:
        return True
    if not Path(model.source).is_dir():
        return False
    config = read_config(model.source)
    return "float32" in str(config.get("dtype") or config.get("torch_dtype")) and not config.get("quantization_config")


def largest_batch(shape: ModelShape, setting: Setting, layout: Layout, recipe: Recipe, units: Units, schedule: Schedule) -> MicroBatch:
    """The micro-batch of the schedule that takes the most memory."""
    lengths = units.lengths
    alike = {length: cpu_layer_bytes(shape, setting, [length]) if setting.device == "cpu" else length for length in set(lengths)}
    if layout == "packed":
        members = max(schedule.batches, key=lambda batch: sum(alike[lengths[i]] for i in batch))
        return MicroBatch([lengths[i] for i in members])
    members = max(schedule.batches, key=lambda batch: len(batch) * max(alike[lengths[i]] for i in batch))
    longest = max(lengths[i] for i in members)
    # A pair's length is that of its two rows.
    return MicroBatch([longest // 2] * (2 * len(members)) if recipe.method == "dpo" else [longest] * len(members))


def _disk(recipe: Recipe, trained: int, steps: int, epochs: int) -> dict[str, int]:
    """Of the run directory at its end: 12 bytes a trained parameter for a checkpoint (adapter and AdamW's moments), 4 for the adapter."""
    every = recipe.checkpoint.every
    there = min(recipe.checkpoint.keep, epochs if every == "epoch" else -(-steps // every))
    return {f"{there} checkpoints" if there != 1 else "1 checkpoint": there * 12 * trained, "adapter": 4 * trained}


def _exports(shape: ModelShape, trained: int) -> dict[str, int]:
    """Bytes of each export; a GGUF in MXFP4 is as large as the MXFP4 folder."""
    sizes = {name: sum(shape.weight_bytes(form).values()) for name, form in (("merged", "bf16"), ("mxfp4 or gguf", "mxfp4"))}
    return {"adapter": 4 * trained} | sizes


def _seconds(shape: ModelShape, setting: Setting, batch: MicroBatch, tokens: int, share: float, card: Card | None, found: Constants) -> float | None:
    """About how long the steps take; None where nothing tells (a processor, an unnamed card, a model too small to fill one)."""
    if card is None or not card.flops or shape.total < 1e9:
        return None
    precision = as_computed(setting.precision)
    work = Work(batch.documents, trained=share, micro_batch=batch.tokens, recompute=setting.recompute, rank=setting.lora.r, precision=precision)
    return tokens / (tokens_a_second(shape, work, card)["with_traffic"] * found.speed * setting.ranks)


def write_plan(run: RunDirectory, plan: RunPlan) -> None:
    """Before the model loads. What an earlier start of this run has measured stays."""
    write_json(run.plan, plan.to_plain() | _measured(run))


def _measured(run: RunDirectory) -> dict[str, Any]:
    before = read_json(run.plan) if run.plan.is_file() else {}
    return {"measured": before["measured"]} if "measured" in before else {}


def note_measured(run: RunDirectory, plan: RunPlan, *, peak_bytes: int, seconds: float) -> str:
    """Add what was measured to plan.json; returns the line for people.

    `peak_bytes` as measure.py counts it, `seconds` of this start's steps: earlier starts of a resumed run are added.
    """
    before = _measured(run).get("measured", {"peak_bytes": 0, "seconds": 0.0})
    peak, taken, disk = max(peak_bytes, before["peak_bytes"]), seconds + before["seconds"], size_of(run.root)
    write_json(run.plan, plan.to_plain() | {"measured": {"peak_bytes": peak, "seconds": round(taken, 1), "disk_bytes": disk}})
    time = f"time {rough_duration(plan.seconds)} planned, {rough_duration(taken)} measured; " if plan.seconds is not None else ""
    return (
        f"memory {gib(plan.memory.peak)} planned, {gib(peak)} measured; {time}disk {disk_size(plan.disk_bytes)} planned, {disk_size(disk)} measured"
    )


def gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"
