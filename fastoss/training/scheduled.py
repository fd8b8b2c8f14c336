"""What every trainer of ours shares: it follows a schedule laid out beforehand, saves whole checkpoints, lets no NaN pass unseen.

TRL's trainers are mixed with `ScheduledTrainer` in sft.py.
"""

from __future__ import annotations

import itertools
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer, TrainerCallback

from fastoss.config import CHANNELS, Recipe
from fastoss.data.packing import Layout, Schedule, collate
from fastoss.data.units import Units
from fastoss.errors import RunFailed
from fastoss.model.attention_layout import DocumentLayout
from fastoss.model.backend import ModelPlan
from fastoss.run import RunDirectory
from fastoss.training.checkpoint import checkpoint_step, publish_checkpoint, writing_folder
from fastoss.training.progress import Console, MetricsFile, duration, rank, world_size

BROKEN_HINT = (
    "look at these rows, or begin anew with a lower train.learning_rate (--no-resume --overwrite); the same command goes on from the last checkpoint"
)
_LOGGED = (
    "loss", *(f"loss_{channel}" for channel in CHANNELS), "learning_rate", "grad_norm", "entropy", "mean_token_accuracy",
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "kl_proxy", "sft",
)  # fmt: skip
_PATIENCE_S = 15.0  # a person should not wait longer for a sign of life, if steps are shorter than that


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
    train: Units
    schedule: Schedule
    eval: Units
    eval_batches: list[list[int]]
    layout: Layout
    stop: StopRequest
    total_steps: int
    eval_reference: Any = None  # of DPO: the reference's log-probabilities of the held-out pairs, (pairs, 2)

    def numbers(self) -> datasets.Dataset:
        """The numbers of the micro-batches: TRL wants a `datasets.Dataset`, the collator makes batches of them."""
        return datasets.Dataset.from_dict({"batch": range(len(self.schedule.batches))})

    @property
    def batches_per_step(self) -> int:
        """Micro-batches of one optimizer step, over all ranks."""
        return self.recipe.train.gradient_accumulation_steps * world_size()


def common_arguments(recipe: Recipe, run: RunDirectory, plan: ModelPlan, *, recompute: bool, trackers: list[str]) -> dict[str, Any]:
    """What all of TRL's configurations are told alike."""
    train = recipe.train
    gpu = plan.device == "gpu"
    return {
        "output_dir": str(writing_folder(run)),
        "per_device_train_batch_size": 1,  # one item is the number of a whole micro-batch
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "num_train_epochs": 1,  # the schedule holds all epochs
        "train_sampling_strategy": "sequential",
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "lr_scheduler_kwargs": dict(train.lr_scheduler_kwargs or {}),
        "warmup_steps": train.warmup_steps if train.warmup_steps < 1 else int(train.warmup_steps),
        "weight_decay": train.weight_decay,
        "adam_beta2": train.adam_beta2,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_torch",
        "average_tokens_across_devices": True,
        "gradient_checkpointing": recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if recompute else None,
        "ddp_find_unused_parameters": False,
        "ddp_backend": "gloo" if world_size() > 1 and not gpu else None,
        "use_cpu": not gpu,
        "bf16": gpu and plan.precision != "float32",
        "seed": train.seed,
        "data_seed": train.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": trackers or "none",
        "run_name": recipe.name,
        "project": recipe.log.project,
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
        "remove_unused_columns": False,
        "push_to_hub": False,
    }


def one_card(arguments: Any) -> None:
    """One process, one card: several visible ones would become a DataParallel."""
    if world_size() == 1 and arguments.device.type == "cuda":
        arguments._n_gpu = 1


class ScheduleCollator:
    """Turns the number of a micro-batch into its tensors; the schedule's last `fillers` carry no labels."""

    def __init__(self, training: Training):
        self.training = training

    def __call__(self, items: list[dict[str, int]]) -> dict[str, Any]:
        (item,) = items
        number, schedule = item["batch"], self.training.schedule
        train = number < len(schedule.batches) - schedule.fillers
        batch: dict[str, Any] = collate([self.training.train[i] for i in schedule.batches[number]], self.training.layout, train=train)
        if "position_ids" in batch:  # made here, where no layer waits for the device
            batch["documents"] = DocumentLayout.from_positions(batch["position_ids"])
        return batch


class ScheduledTrainer:
    """Mixed in before one of TRL's trainers: micro-batches by number, faults named by row, checkpoints whole or not at all."""

    training: Training
    control: Any  # transformers' TrainerControl
    model: Any
    state: Any
    args: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any

    def follow(self, training: Training) -> None:
        """Call this before the trainer is set up."""
        self.training = training
        self._micro_batch = 0

    def batch_places(self) -> list[str]:
        """`file:line` of the examples in this rank's current micro-batch."""
        number = self._micro_batch * world_size() + rank()
        batches = self.training.schedule.batches
        return [self.training.train[i][0].conversation.place for i in batches[number]] if number < len(batches) else []

    def train(self, resume_from_checkpoint: str | None = None, **arguments: Any) -> Any:
        if resume_from_checkpoint is not None:
            self._micro_batch = checkpoint_step(Path(resume_from_checkpoint)) * self.args.gradient_accumulation_steps
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **arguments)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            self._refuse(f"the loss is {loss.item()}")
        self._micro_batch += 1
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        if not torch.isfinite(torch.as_tensor(norm)):
            self._micro_batch -= 1  # the step's last batch is still the one to name
            self._refuse(f"the gradient is {float(norm)}")
        return norm

    def _refuse(self, what: str) -> None:
        step = self.state.global_step + 1
        rows = self.batch_places()
        shown = ", ".join(rows[:5]) + (", …" if len(rows) > 5 else "")
        self.training.metrics.write(step, {"failed": what})
        raise RunFailed(f"{what} at step {step}; rows of the batch: {shown}", hint=BROKEN_HINT)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.state.epoch = self.training.schedule.epoch(self.state.global_step * self.training.batches_per_step)
        super().log(logs, start_time)  # type: ignore[misc]

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
                f"{len(broken)} weights are no numbers any more at step {self.state.global_step} ({broken[0]}): not saved", hint=BROKEN_HINT
            )
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, safe_serialization=True, save_embedding_layers=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The stock way asks torch for the device "cpu:0" when there are several processes, which it does not know.
        if checkpoint is not None:
            for part, name in ((self.optimizer, "optimizer.pt"), (self.lr_scheduler, "scheduler.pt")):
                part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))


class Cadence(TrainerCallback):
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
            training.metrics.write(step, {key: logs[key] for name in _LOGGED if (key := f"eval_{name}") in logs})
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
