"""SFT through TRL's `SFTTrainer`: fed with our batches, told nothing else, watched at every step.

Import this file only after the model is loaded: Unsloth must be imported before TRL.
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import trl.trainer.sft_trainer
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from fastoss.config import CHANNELS, Recipe
from fastoss.data.harmony import IGNORE, HarmonyRenderer
from fastoss.data.packing import Layout, Schedule, collate
from fastoss.data.store import Examples
from fastoss.errors import RunFailed
from fastoss.model.backend import ModelPlan
from fastoss.model.head import TrainedTokenLoss
from fastoss.run import RunDirectory
from fastoss.training.checkpoint import checkpoint_step, publish_checkpoint, writing_folder
from fastoss.training.progress import Console, MetricsFile, duration, rank, world_size

_BROKEN_HINT = (
    "look at these rows, or begin anew with a lower train.learning_rate (--no-resume --overwrite); the same command goes on from the last checkpoint"
)


_LOGGED = ("loss", *(f"loss_{channel}" for channel in CHANNELS), "learning_rate", "grad_norm", "entropy", "mean_token_accuracy")
_PATIENCE_S = 15.0  # a person should not wait longer for a sign of life, if steps are shorter than that


class ScheduleCollator:
    """Turns the number of a micro-batch into its tensors; the schedule's last `fillers` carry no labels.

    TRL wants a `datasets.Dataset`, so the trainer is given the numbers as one, and this makes the batches.
    """

    def __init__(self, examples: Examples, schedule: Schedule, layout: Layout):
        self.examples, self.schedule, self.layout = examples, schedule, layout

    def __call__(self, items: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        (item,) = items
        number = item["batch"]
        train = number < len(self.schedule.batches) - self.schedule.fillers
        return collate([self.examples[i] for i in self.schedule.batches[number]], self.layout, train=train)


@dataclass
class StopRequest:
    """Set by a signal; every rank learns of it at the end of a step, so that all stop at the same one."""

    signal: int | None = None
    _old: dict[int, Any] = field(default_factory=dict)

    def watch(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._old[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt  # the second one stops at once
        self.signal = number

    def agreed(self, device: torch.device) -> bool:
        if world_size() == 1:
            return self.signal is not None
        flag = torch.tensor([1.0 if self.signal is not None else 0.0], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


@dataclass
class Training:
    """What the trainer needs beside the model: data, schedule, and where things go."""

    recipe: Recipe
    run: RunDirectory
    console: Console
    metrics: MetricsFile
    train: Examples
    schedule: Schedule
    eval: Examples
    eval_batches: list[list[int]]
    layout: Layout
    stop: StopRequest
    total_steps: int

    @property
    def batches_per_step(self) -> int:
        """Micro-batches of one optimizer step, over all ranks."""
        return self.recipe.train.gradient_accumulation_steps * world_size()


def sft_config(recipe: Recipe, run: RunDirectory, plan: ModelPlan, *, recompute: bool, trackers: list[str]) -> SFTConfig:
    """The recipe in TRL's words. Steps, saving and evaluation are decided by our schedule, not by these arguments."""
    train = recipe.train
    gpu = plan.device == "gpu"
    # Unsloth on a GPU fuses head and loss in its own kernels; elsewhere it is ours (see HarmonySFTTrainer).
    loss_type = "nll" if gpu and plan.backend == "unsloth" else "chunked_nll"
    config = SFTConfig(
        output_dir=str(writing_folder(run)),
        per_device_train_batch_size=1,  # one item is the number of a whole micro-batch
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        num_train_epochs=1,  # the schedule holds all epochs
        train_sampling_strategy="sequential",
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        lr_scheduler_kwargs=dict(train.lr_scheduler_kwargs or {}),
        warmup_steps=train.warmup_steps if train.warmup_steps < 1 else int(train.warmup_steps),
        weight_decay=train.weight_decay,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch",
        loss_type=loss_type,
        router_aux_loss_coef=0.0,
        average_tokens_across_devices=True,
        gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if world_size() > 1 and not gpu else None,
        use_cpu=not gpu,
        bf16=gpu and plan.precision != "float32",
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=trackers or "none",
        run_name=recipe.name,
        project=recipe.log.project,
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        push_to_hub=False,
    )
    if world_size() == 1 and config.device.type == "cuda":
        config._n_gpu = 1  # one process, one card: several visible ones would become a DataParallel
    return config


class HarmonySFTTrainer(SFTTrainer):
    """TRL's trainer over a schedule laid out beforehand: whole checkpoints, token-weighted evaluation, no NaN unseen."""

    control: Any  # transformers' TrainerControl

    def __init__(self, training: Training, **arguments: Any):
        self.training = training
        self._micro_batch = 0
        self.token_loss = TrainedTokenLoss(len(CHANNELS))
        # Same signature and results as TRL's (trl/trainer/sft_trainer.py), two products a token instead of three.
        # To be removed when TRL's own keeps no logits and computes nothing twice; trl is pinned until then.
        trl.trainer.sft_trainer._chunked_cross_entropy_loss = self.token_loss.chunked
        numbers = datasets.Dataset.from_dict({"batch": range(len(training.schedule.batches))})
        collator = ScheduleCollator(training.train, training.schedule, training.layout)
        super().__init__(train_dataset=numbers, data_collator=collator, **arguments)
        self.add_callback(_Cadence(training))

    def batch_places(self) -> list[str]:
        """`file:line` of the examples in this rank's current micro-batch."""
        number = self._micro_batch * world_size() + rank()
        batches = self.training.schedule.batches
        return [self.training.train[i].conversation.place for i in batches[number]] if number < len(batches) else []

    def train(self, resume_from_checkpoint: str | None = None, **arguments: Any) -> Any:
        if resume_from_checkpoint is not None:
            self._micro_batch = checkpoint_step(Path(resume_from_checkpoint)) * self.args.gradient_accumulation_steps
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **arguments)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.token_loss.mark(inputs.pop("loss_weights"), inputs.pop("channels"))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor | None:
        """The weights of a whole global batch's trained tokens, summed: with all weights 1 their number."""
        if not batch_samples:
            return None
        total = torch.stack([batch["loss_weights"][..., 1:].sum(dtype=torch.float64) for batch in batch_samples]).sum().to(device)
        if world_size() > 1:
            torch.distributed.all_reduce(total)
        return total.float()

    def _channel_losses(self, prefix: str = "") -> dict[str, float]:
        """Mean loss of each channel's trained tokens since the last call, over all ranks and unweighted."""
        sums = self.token_loss.take_sums().to(self.args.device)
        if world_size() > 1:
            torch.distributed.all_reduce(sums)
        return {f"{prefix}loss_{channel}": (loss / count).item() for channel, (loss, count) in zip(CHANNELS, sums[1:], strict=True) if count > 0}

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            self._refuse(f"the loss is {loss.item()}")
        self._micro_batch += 1
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not torch.isfinite(torch.as_tensor(norm)):
            self._micro_batch -= 1  # the step's last batch is still the one to name
            self._refuse(f"the gradient is {float(norm)}")
        return norm

    def _refuse(self, what: str) -> None:
        step = self.state.global_step + 1
        rows = self.batch_places()
        shown = ", ".join(rows[:5]) + (", …" if len(rows) > 5 else "")
        self.training.metrics.write(step, {"failed": what})
        raise RunFailed(f"{what} at step {step}; rows of the batch: {shown}", hint=_BROKEN_HINT)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.state.epoch = self.training.schedule.epoch(self.state.global_step * self.training.batches_per_step)
        if "loss" in logs:
            logs |= self._channel_losses()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss over the held-out examples, each trained token counted once with its weight, over all ranks."""
        training = self.training
        batches = training.eval_batches[rank() :: world_size()]
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        started = time.monotonic()
        self.token_loss.take_sums()
        with torch.no_grad():
            for members in batches:
                batch = self._prepare_inputs(collate([training.eval[i] for i in members], training.layout))
                weights = batch.pop("loss_weights")
                total = weights[:, 1:].sum(dtype=torch.float64)
                self.token_loss.mark(weights, batch.pop("channels"))
                mean = self.model(**batch, use_cache=False)["loss"]
                sums += torch.stack([mean.double() * total, total])
        if world_size() > 1:
            torch.distributed.all_reduce(sums)
        loss = (sums[0] / sums[1]).item()
        if not math.isfinite(loss):
            raise RunFailed(f"the held-out loss is {loss} at step {self.state.global_step}", hint=_BROKEN_HINT)
        metrics = {f"{metric_key_prefix}_loss": loss} | self._channel_losses(f"{metric_key_prefix}_")
        self.log(metrics | {f"{metric_key_prefix}_runtime": time.monotonic() - started})
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial: Any) -> str:
        return str(writing_folder(self.training.run))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        training = self.training
        Trainer._save_checkpoint(self, model, trial)  # not TRL's, which writes a model card each time
        if world_size() > 1:
            torch.distributed.barrier()
        if rank() == 0:
            publish_checkpoint(training.run, self.state.global_step, training.recipe.checkpoint.keep)
            training.console.say(f"saved checkpoint-{self.state.global_step}")
        if world_size() > 1:
            torch.distributed.barrier()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The adapter alone: the tokenizer (28 MB) does not change, and training_args.bin is a pickle that holds tokens.
        assert output_dir is not None
        broken = [name for name, p in self.model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        if broken:
            raise RunFailed(
                f"{len(broken)} weights are no numbers any more at step {self.state.global_step} ({broken[0]}): not saved", hint=_BROKEN_HINT
            )
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, safe_serialization=True, save_embedding_layers=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The stock way asks torch for the device "cpu:0" when there are several processes, which it does not know.
        if checkpoint is not None:
            for part, name in ((self.optimizer, "optimizer.pt"), (self.lr_scheduler, "scheduler.pt")):
                part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))


class _Cadence(TrainerCallback):
    """When to save, to evaluate, to stop and to speak: from the schedule and the recipe alone."""

    def __init__(self, training: Training):
        self.training = training
        self.started = 0.0
        self.first_step = 0
        self.last = (0.0, 0)  # (time, tokens) at the last line
        lengths = training.train.lengths
        sizes = (sum(lengths[i] for i in members) for members in training.schedule.batches)
        self.tokens = [0, *itertools.accumulate(sizes)]  # after so many micro-batches; Unsloth's trainer counts none itself

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        training, step = self.training, state.global_step
        last = step == training.total_steps
        has_eval = bool(training.eval_batches)
        control.should_evaluate = has_eval and ((last and training.recipe.eval.after) or (not last and step % training.recipe.eval.every == 0))
        stopping = training.stop.agreed(args.device)
        control.should_save = last or stopping or self._is_save_step(step)
        control.should_training_stop = last or stopping

    def _is_save_step(self, step: int) -> bool:
        every = self.training.recipe.checkpoint.every
        if every != "epoch":
            return step % every == 0
        per_step = self.training.batches_per_step
        return any((step - 1) * per_step < end <= step * per_step for end in self.training.schedule.epoch_ends)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "train_runtime" in logs:
            return
        training, step = self.training, state.global_step
        if "eval_loss" in logs:
            training.metrics.write(step, {key: value for key, value in logs.items() if key.startswith("eval_loss")})
            training.console.say(f"step {step:,}/{training.total_steps:,}  held-out loss {logs['eval_loss']:.4f}")
            return
        now = time.monotonic()
        seconds_a_step = (now - self.started) / max(1, step - self.first_step)
        values: dict[str, Any] = {key: logs[key] for key in _LOGGED if key in logs}
        tokens = self.tokens[min(step * training.batches_per_step, len(self.tokens) - 1 - training.schedule.fillers)]
        values["num_tokens"] = tokens
        training.metrics.write(step, values | {"epoch": state.epoch, "seconds": round(now - self.started, 3)})
        quiet_for = now - (self.last[0] or self.started)
        due = step % training.recipe.log.every == 0 or step in (self.first_step + 1, training.total_steps) or quiet_for > _PATIENCE_S
        speed = (tokens - self.last[1]) / (now - self.last[0]) if self.last[0] else 0.0
        pace = f"{speed:,.0f} tok/s  " if speed > 0 else ""
        left = duration(seconds_a_step * (training.total_steps - step))
        line = f"step {step:,}/{training.total_steps:,}  epoch {state.epoch:.2f}  loss {logs.get('loss', float('nan')):.4f}  {pace}{left} left"
        training.console.live(line, keep=due)
        if due:
            self.last = (now, tokens)


def check_first_batch(trainer: HarmonySFTTrainer, renderer: HarmonyRenderer) -> None:
    """Take the batch that the trainer will train on first and hold every id and label against a fresh rendering.

    Raises `RunFailed` naming row and token where they differ: what was shown is what is trained, or nothing is.
    """
    training = trainer.training
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    examples = [training.train[i] for i in training.schedule.batches[rank()]]
    documents = _documents(batch)
    if len(documents) != len(examples):
        raise RunFailed(f"the first batch holds {len(documents)} documents, {len(examples)} were rendered")
    for example, (ids, labels) in zip(examples, documents, strict=True):
        fresh = renderer.render_examples(example.conversation)[-1]
        for what, got, meant in (("token", ids, fresh.input_ids), ("label", labels, fresh.labels)):
            if got != meant:
                place = next((i for i, (a, b) in enumerate(zip(got, meant, strict=False)) if a != b), min(len(got), len(meant)))
                raise RunFailed(f"{what} {place} of the first batch is not what was rendered", place=example.conversation.place)


def _documents(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    if "position_ids" in batch:
        starts = [i for i, p in enumerate(batch["position_ids"][0].tolist()) if p == 0]
        ends = [*starts[1:], len(ids[0])]
        return [(ids[0][a:b], labels[0][a:b]) for a, b in zip(starts, ends, strict=True)]
    lengths = batch["attention_mask"].sum(1).tolist()
    padding = [set(row[n:]) for row, n in zip(labels, lengths, strict=True)]
    assert all(rest <= {IGNORE} for rest in padding), "padding carries loss"
    return [(row[:n], marks[:n]) for row, marks, n in zip(ids, labels, lengths, strict=True)]
