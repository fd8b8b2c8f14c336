"""The story of a run: data, model, samples before, training, adapter, samples after. Each step lives in its own file."""

from __future__ import annotations

import shlex
import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastoss import terminal
from fastoss.config import Recipe
from fastoss.data.dataset import Dataset, build_dataset
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.packing import Layout, Schedule, fill_batches
from fastoss.data.units import Units
from fastoss.errors import FastossError, RunFailed, Stopped
from fastoss.model.adapter import check_adapter, write_stamp
from fastoss.model.attention import prove_attention
from fastoss.model.backend import ModelPlan, attach_lora, has_gpu, load_model, model_source, plan_model, ready_for_training, trainer_tokenizer
from fastoss.model.cards import Card, cards_found
from fastoss.model.lora import adapter_folder, check_adapter_settings
from fastoss.run import RunDirectory, read_json, whole_folder, write_json
from fastoss.training.checkpoint import CheckpointWriter, checkpoint_step, latest_checkpoint
from fastoss.training.disk import check_room, disk_full
from fastoss.training.ending import ending, keep_profile
from fastoss.training.launch import check_gpus
from fastoss.training.planning.batches import batch_lines, batch_rule, eval_units, plan_batches, steps_of, tokens_by_process
from fastoss.training.planning.fit import check_fits
from fastoss.training.planning.measure import MemoryMeter
from fastoss.training.planning.run_plan import RunPlan, note_measured, plan_run, write_plan
from fastoss.training.progress import Console, MetricsFile, draw_curves, duration, rank, world_size
from fastoss.training.push import push_adapter, say_before
from fastoss.training.resume import opened, run_facts
from fastoss.training.shared_base import is_shared_out, join_processes, of_each
from fastoss.training.signals import end_with_parent
from fastoss.training.trackers.trackers import Trackers, usable_trackers
from fastoss.training.watchdog import Watchdog

if TYPE_CHECKING:
    from fastoss.training.scheduled import Training


def train(
    recipe: Recipe, recipe_path: Path, run: RunDirectory, *, sample: bool = False, resume: bool = True, overwrite: bool = False,
    override_resume: bool = False, ignore_plan: bool = False, command: str | None = None,
) -> RunDirectory:  # fmt: skip
    """Run a recipe to its end in `run`, or resume it where it stopped; `override_resume` insists on resuming with another recipe or data,
    `ignore_plan` on trying what cannot fit on the card.

    `command` is what the person typed, kept for the report.

    Raises `FastossError` for bad input before the model loads, `RunFailed` when training fails, `Stopped` when a signal
    ended it after saving.
    """
    console = Console()
    end_with_parent()
    plan = plan_model(recipe.model, gpu=has_gpu())
    _check_processes(recipe, plan, world_size())
    start_adapter = _start_adapter(recipe, plan)
    trackers = usable_trackers(recipe.log, console)
    say_before(recipe, console)
    console.say(f"{recipe.name}: {plan.line()}")
    if recipe.distributed.strategy == "fsdp" and world_size() == 1:
        console.say('note: distributed.strategy = "fsdp" shares out nothing in one process (--gpus N)')
    for note in plan.notes:
        console.say(f"note: {note}")
    dataset = build_dataset(recipe, sample=sample, progress=console.say)
    for line in dataset.report.lines():
        console.say(line)
    _check_weights(dataset, plan)
    layout, units, schedule = plan_batches(recipe, plan, dataset, world_size())
    shares = tokens_by_process(units, schedule, world_size())
    facts = run_facts(recipe, plan, dataset, layout) | {"sample": sample, "tokens_by_process": shares}
    with opened(run, recipe, recipe_path, facts, console, resume=resume, overwrite=overwrite, override=override_resume) as unfinished:
        if not unfinished:
            return run
        for line in batch_lines(recipe, layout, units, steps_of(schedule, recipe, world_size()), world_size()):
            console.say(line)
        if world_size() > 1:
            console.say(f"tokens per process: {min(shares):,} to {max(shares):,}, balanced to {min(shares) / max(shares):.1%}")
        needs = plan_run(recipe, plan, dataset, layout, units, schedule, ranks=world_size(), card=_card(plan))
        for line in needs.lines() if needs.card else []:
            console.say(line)
        check_fits(needs, recipe, ignore=ignore_plan)
        if rank() == 0:
            check_room(run, needs.trained, recipe.checkpoint.keep)
            write_plan(run, needs)
        with ending(run, console):
            keep_profile(run, dataset, recipe, command)
            _train_model(recipe, run, plan, needs, dataset, layout, units, schedule, console, trackers, start_adapter)
    if recipe.hub.push and rank() == 0:
        push_adapter(recipe, run, console)
    return run


def check_before_launch(recipe: Recipe, run: RunDirectory, gpus: int, *, nodes: int = 1, sample: bool = False, ignore_plan: bool = False) -> None:
    """Find bad input before any process is started: `gpus` here, on each of `nodes` machines. Raises `FastossError`."""
    import torch

    check_gpus(gpus, available=torch.cuda.device_count())
    plan = plan_model(recipe.model, gpu=has_gpu())
    _check_processes(recipe, plan, gpus * nodes)
    _start_adapter(recipe, plan)
    dataset = build_dataset(recipe, sample=sample)
    if plan.device == "gpu":
        ranks = gpus * nodes
        needs = plan_run(recipe, plan, dataset, *plan_batches(recipe, plan, dataset, ranks), ranks=ranks, card=_card(plan))
        check_fits(needs, recipe, ignore=ignore_plan)


def _card(plan: ModelPlan) -> Card | None:
    """The smallest card that this process may use, without setting up CUDA before Unsloth does."""
    return min(cards_found(), key=lambda card: card.memory, default=None) if plan.device == "gpu" else None


def _check_processes(recipe: Recipe, plan: ModelPlan, processes: int) -> None:
    # An expert that no token of a rank chose gets no gradient there, and DDP waits for it (Unsloth's split 4-bit experts).
    if processes > 1 and plan.backend == "unsloth" and plan.precision == "4bit" and "experts" in recipe.lora.targets:
        hint = 'use precision = "mxfp4" or "bf16", or targets = ["attention"]'
        raise FastossError("LoRA on 4-bit experts cannot be trained in several processes", place="lora.targets", hint=hint)


def _check_weights(dataset: Dataset, plan: ModelPlan) -> None:
    # Unsloth's own loss on a GPU knows trained tokens and others, and no weights between.
    weights = dataset.store.spans["weight"]
    if plan.backend == "unsloth" and plan.device == "gpu" and len(set(weights[weights > 0].tolist())) > 1:
        hint = 'use model.backend = "transformers", or one weight for all'
        raise FastossError("weights of channels and messages are not available through Unsloth on a GPU yet", place="format.train_on", hint=hint)


def _start_adapter(recipe: Recipe, plan: ModelPlan) -> Path | None:
    """The adapter that `model.adapter` names, checked as far as its files tell."""
    if recipe.model.adapter is None:
        return None
    folder = adapter_folder(recipe.model.adapter)
    check_adapter_settings(folder, recipe.lora)
    check_adapter(folder, model_source(plan))
    return folder


def _train_model(
    recipe: Recipe, run: RunDirectory, plan: ModelPlan, needs: RunPlan, dataset: Dataset, layout: Layout, units: Units, schedule: Schedule,
    console: Console, trackers: list[str], start_adapter: Path | None,
) -> None:  # fmt: skip
    watchdog = Watchdog(run, recipe.distributed.ddp_timeout, console.shout)
    watchdog.stage("loading the model")
    watchdog.start()
    meter = MemoryMeter(plan, recipe.method)
    model = _load_with_lora(recipe, run, plan, console, watchdog, start_adapter)

    # From here on: Unsloth, if it is used, has been imported, and TRL may be.
    from fastoss.training.samples import Samples
    from fastoss.training.scheduled import Training
    from fastoss.training.signals import StopRequest

    checkpoint = latest_checkpoint(run)
    samples = Samples(recipe, run, dataset, console)
    samples.answer_before(model, plan, checkpoint_step(checkpoint) if checkpoint else 0)
    stop = StopRequest()
    rule = batch_rule(recipe)
    held_out = eval_units(recipe, dataset)
    training = Training(
        recipe=recipe, run=run, console=console, metrics=MetricsFile(run.metrics, checkpoint_step(checkpoint) if checkpoint else 0),
        train=units, schedule=schedule, eval=held_out, eval_batches=fill_batches(range(len(held_out)), held_out.lengths, rule),
        layout=layout, stop=stop, watchdog=watchdog, writer=CheckpointWriter(run, recipe.checkpoint.keep, console.say),
        total_steps=steps_of(schedule, recipe, world_size()), replies=samples.answer_during if recipe.eval.replies else None,
    )  # fmt: skip
    trainer = _make_trainer(training, plan, dataset, model, start_adapter)
    _agree_on_checkpoint(checkpoint_step(checkpoint) if checkpoint else 0)
    if checkpoint:
        console.say(f"resuming from {checkpoint.name}")
    records = Trackers(trackers, recipe, run, console)
    training.metrics.follow = records.log
    begun = time.monotonic()
    stop.watch()  # after the trackers, which have handlers of their own
    watchdog.watch()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        training.writer.wait()
    except Exception as problem:
        records.close(finished=False)
        stop.restore(ended_well=False)
        draw_curves(run, console)
        raise _told(problem, trainer, run) from problem
    records.close(finished=trainer.state.global_step == training.total_steps)
    stop.restore(ended_well=True)
    watchdog.rest()
    draw_curves(run, console)
    _note_saving(run, training.writer.costs)
    measured = partial(note_measured, run, needs, peak_bytes=meter.peak_bytes(), seconds=time.monotonic() - begun)
    if trainer.state.global_step < training.total_steps:
        if rank() == 0:
            measured()
        raise Stopped(f"saved at step {trainer.state.global_step:,} of {training.total_steps:,}; run the same command again to resume from there")
    first = checkpoint_step(checkpoint) + 1 if checkpoint else 1
    console.say(f"trained steps {first:,} to {training.total_steps:,} in {duration(time.monotonic() - begun)}")
    watchdog.stage("asking the last questions")
    samples.answer_after(model, plan)  # before the adapter, whose presence says that the run is finished
    _save_adapter(trainer, recipe, run, plan)
    watchdog.stop()
    if rank() == 0:
        console.say(measured())
    console.say(f"adapter: {run.adapter}\ntry it: fastoss chat {shlex.quote(str(run.root))}{samples.suggestion()}")


def _load_with_lora(recipe: Recipe, run: RunDirectory, plan: ModelPlan, console: Console, watchdog: Watchdog, start_adapter: Path | None) -> Any:
    """The base with LoRA attached, its attention kernels checked."""
    started = time.monotonic()
    console.say(f"loading {plan.source or 'the tiny model'} …")
    with terminal.working("loading the model", draw=plan.source is None, tell=console.say):  # libraries draw bars for a checkpoint
        if is_shared_out(recipe):
            join_processes(recipe, plan)
        model = load_model(recipe.model, plan, shared_out=recipe.distributed if is_shared_out(recipe) else None)
    recompute = _recomputes(recipe, plan)
    model, counts, notes = attach_lora(model, recipe.lora, plan, adapter=start_adapter, recompute=recompute, seed=recipe.train.seed)
    console.say(f"loaded in {duration(time.monotonic() - started)}; {counts.line()}")
    if is_shared_out(recipe):
        _note_shares(model, run, console)
    if rank() == 0 and plan.device == "gpu":
        _note_card(run)
    watchdog.stage("checking the attention kernels")
    console.say(prove_attention(model))
    for note in notes:
        console.say(f"note: {note}")
    return model


def _recomputes(recipe: Recipe, plan: ModelPlan) -> bool:
    """Gradient checkpointing: as the recipe says, else on a GPU."""
    return recipe.train.recompute == "full" or (recipe.train.recompute == "auto" and plan.device == "gpu")


def _make_trainer(training: Training, plan: ModelPlan, dataset: Dataset, model: Any, start_adapter: Path | None) -> Any:
    """TRL's trainer for the method, its first batch compared with a fresh rendering."""
    recipe, run, renderer = training.recipe, training.run, HarmonyRenderer(training.recipe.format)
    recompute, processing_class = _recomputes(recipe, plan), trainer_tokenizer(plan)
    trainer: Any
    if recipe.method == "dpo":
        from fastoss.training.dpo import HarmonyDPOTrainer, check_first_pairs, dpo_config
        from fastoss.training.reference import reference_logps

        arguments = dpo_config(recipe, run, plan, recompute=recompute)
        trainer = HarmonyDPOTrainer(training, model=model, args=arguments, processing_class=processing_class)
        ask = partial(reference_logps, model, recipe, plan, dataset, rule=batch_rule(recipe), console=training.console, start=start_adapter)
        trainer.collator.reference = ask(units=training.train)
        training.eval_reference = ask(units=training.eval) if len(training.eval) else None
        check_first = check_first_pairs
    else:
        from fastoss.training.sft import HarmonySFTTrainer, check_first_batch, sft_config

        arguments = sft_config(recipe, run, plan, recompute=recompute)
        trainer = HarmonySFTTrainer(training, model=model, args=arguments, processing_class=processing_class)
        check_first = check_first_batch
    trainer.pop_callback(_printer())
    ready_for_training(model, plan)  # Unsloth's trainer leaves it answering
    check_first(trainer, renderer)
    return trainer


def _note_card(run: RunDirectory) -> None:
    import torch

    write_json(run.manifest, read_json(run.manifest) | {"gpu": torch.cuda.get_device_name()})


def _note_shares(model: Any, run: RunDirectory, console: Console) -> None:
    """What each process holds of the base, as it is measured: said, and into the manifest."""
    from fastoss.model.sharding import held_bytes

    held, waiting, whole = held_bytes(model)
    shares = of_each(held)
    on_host = f", {terminal.size(waiting)} of it in the host's memory" if waiting else ""
    console.say(f"the base is shared out: each of {len(shares)} processes holds {terminal.size(max(shares))} of {terminal.size(whole)}{on_host}")
    if rank() == 0:
        write_json(run.manifest, read_json(run.manifest) | {"base_bytes_by_process": shares, "base_bytes": whole})


def _note_saving(run: RunDirectory, costs: list[dict[str, Any]]) -> None:
    """What the checkpoints of this start cost, into the manifest."""
    if rank() == 0 and costs:
        manifest = read_json(run.manifest)
        write_json(run.manifest, manifest | {"checkpoints": [*manifest.get("checkpoints", []), *costs]})


def _told(problem: Exception, trainer: Any, run: RunDirectory) -> Exception:
    """A fault of the machine in words that say what to do; anything else as it is."""
    full = disk_full(problem, run.root, 0, "the run")
    if full is not None:
        return full
    step = trainer.state.global_step + 1
    if world_size() > 1 and any(name in str(problem) for name in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")):
        return RunFailed(
            f"process {rank()} lost contact with another one in step {step}", hint="run the same command again to resume from the last checkpoint"
        )
    return problem


def _agree_on_checkpoint(step: int) -> None:
    """Every rank must resume from the same step: on a slow shared disk one might not see the newest checkpoint."""
    import torch

    if world_size() > 1:
        steps: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise RunFailed(f"the processes see different checkpoints (steps {steps})", hint="start the same command again")


def _save_adapter(trainer: Any, recipe: Recipe, run: RunDirectory, plan: ModelPlan) -> None:
    if rank() == 0:
        with whole_folder(run.adapter) as folder:
            trainer._save(str(folder))
            write_stamp(folder, recipe.model, recipe.format, plan.backend, model_source(plan))
        shutil.rmtree(run.checkpoints / ".writing", ignore_errors=True)


def _printer() -> type:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
