"""What every trainer of ours shares: it follows a schedule laid out beforehand, saves whole checkpoints, lets no NaN pass unnoticed.

TRL's trainers are mixed with `ScheduledTrainer` in sft.py.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer

from fastoss.config import Recipe
from fastoss.data.packing import Layout, Schedule, collate
from fastoss.data.units import Units
from fastoss.errors import RunFailed
from fastoss.model.attention_layout import DocumentLayout
from fastoss.model.backend import ModelPlan
from fastoss.run import RunDirectory, read_json
from fastoss.training.checkpoint import MANIFEST, CheckpointWriter, Saving, checkpoint_step, writing_folder
from fastoss.training.disk import disk_full
from fastoss.training.memory import cut, free_memory, is_out_of_memory, memory_line, out_of_memory
from fastoss.training.progress import Console, MetricsFile, rank, world_size
from fastoss.training.shared_base import average_gradients, is_shared_out, same_start
from fastoss.training.signals import StopRequest
from fastoss.training.watchdog import Watchdog

BROKEN_HINT = (
    "look at these rows, or start over with a lower train.learning_rate (--no-resume --overwrite); "
    "run the same command again to resume from the last checkpoint"
)


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
    watchdog: Watchdog
    writer: CheckpointWriter
    total_steps: int
    replies: Callable[[Any, int], dict[str, float]] | None = None  # (model, step) → metrics of the held-out replies
    eval_reference: Any = None  # of DPO: the reference's log-probabilities of the held-out pairs, (pairs, 2)

    def numbers(self) -> datasets.Dataset:
        """The numbers of the micro-batches: TRL wants a `datasets.Dataset`, the collator makes batches of them."""
        return datasets.Dataset.from_dict({"batch": range(len(self.schedule.batches))})

    @property
    def batches_per_step(self) -> int:
        """Micro-batches of one optimizer step, over all ranks."""
        return self.recipe.train.gradient_accumulation_steps * world_size()

    def fill(self, step: int) -> float:
        """The share of a step's room that holds tokens: of the token budget when packed, of the rectangle when padded."""
        real = len(self.schedule.batches) - self.schedule.fillers
        batches = self.schedule.batches[(step - 1) * self.batches_per_step : min(step * self.batches_per_step, real)]
        lengths = [[self.train.lengths[i] for i in members] for members in batches]
        budget = self.recipe.train.tokens_per_batch if self.layout == "packed" else None
        room = sum(budget or len(members) * max(members) for members in lengths)
        return sum(map(sum, lengths)) / room if room else 0.0


def common_arguments(recipe: Recipe, run: RunDirectory, plan: ModelPlan, *, recompute: bool) -> dict[str, Any]:
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
        # The watchdog speaks first, and knows more than a collective operation that waited too long.
        "ddp_timeout": 2 * recipe.distributed.ddp_timeout,
        "use_cpu": not gpu,
        "bf16": gpu and plan.precision != "float32",
        "seed": train.seed,
        "data_seed": train.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",  # trackers are told from metrics.jsonl, each step once (trackers.py)
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
        return self.batch(item["batch"], self.training.schedule.batches[item["batch"]])

    def batch(self, number: int, members: Sequence[int]) -> dict[str, Any]:
        """Micro-batch `number`, or those of its members that are given."""
        schedule = self.training.schedule
        train = number < len(schedule.batches) - schedule.fillers
        batch: dict[str, Any] = collate([self.training.train[i] for i in members], self.training.layout, train=train)
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

    data_collator: Any
    model_wrapped: Any

    def follow(self, training: Training) -> None:
        """Call this before the trainer is set up."""
        self.training = training
        self._micro_batch = 0  # of this rank
        self._pieces = 1  # into which each micro-batch is cut, so that it fits into memory
        self._shared_out = is_shared_out(training.recipe)

    def _number(self, micro_batch: int) -> int:
        """This rank's micro-batch in the schedule of all ranks."""
        return micro_batch * world_size() + rank()

    def batch_places(self) -> list[str]:
        """`file:line` of the examples in this rank's current micro-batch."""
        number = self._number(self._micro_batch)
        batches = self.training.schedule.batches
        return [self.training.train[i][0].conversation.place for i in batches[number]] if number < len(batches) else []

    def train(self, resume_from_checkpoint: str | None = None, **arguments: Any) -> Any:
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            self._micro_batch = checkpoint_step(checkpoint) * self.args.gradient_accumulation_steps
            pieces = read_json(checkpoint / MANIFEST)["pieces"]
            self._pieces = pieces[rank()] if len(pieces) == world_size() else 1
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **arguments)  # type: ignore[misc]

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not self._shared_out:  # its shares lie where they belong
            super()._move_model_to_device(model, device)  # type: ignore[misc]

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._shared_out:
            # accelerate puts no DDP around shares, and knows FSDP only where it shares out itself: from it comes the autocast alone.
            self.accelerator.prepare_model(model, evaluation_mode=True)
            same_start(model)
        return super()._wrap_model(model, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.training.writer.check()
        self.training.watchdog.stage(f"in forward and backward of step {self.state.global_step + 1:,}")
        if self.training.recipe.train.on_oom == "split":
            loss = self._fitted_step(model, inputs, num_items_in_batch)
        else:
            loss = self._whole_step(model, inputs, num_items_in_batch)
        if self._shared_out and self._closes_step(self._micro_batch):
            average_gradients(self.model)
        if not torch.isfinite(loss):
            self._refuse(f"the loss is {loss.item()}")
        self._micro_batch += 1
        return loss

    def _whole_step(self, model: Any, inputs: dict[str, Any], items: Any) -> torch.Tensor:
        try:
            loss: torch.Tensor = super().training_step(model, inputs, items)  # type: ignore[misc]
        except Exception as problem:
            if is_out_of_memory(problem):
                raise out_of_memory(self.state.global_step + 1, self._tokens(self._micro_batch), splitting=False) from problem
            raise
        return loss

    def _fitted_step(self, model: Any, inputs: dict[str, Any], items: Any) -> torch.Tensor:
        """A micro-batch whole or in pieces, smaller and smaller until they fit. Losses are sums over `items`, so pieces add up to the whole.

        What a failed backward pass left in the gradients cannot be told apart from what belongs there: the step's earlier
        micro-batches are computed again as well. Gradients are averaged over the ranks by hand, since DDP would wait for each
        other rank at each piece.
        """
        accumulation, now = self.args.gradient_accumulation_steps, self._micro_batch
        first, again = now - now % accumulation, False
        while True:
            sums = self._watched_sums()
            try:
                if again:
                    for earlier in range(first, now):
                        self._step_in_pieces(earlier, items)
                    self._watch_again(sums)  # they were counted before
                loss = self._step_in_pieces(now, items)
                break
            except Exception as problem:
                if not is_out_of_memory(problem):
                    raise
            # Beyond the except block: the error's frames hold on to the tensors that did not fit.
            del inputs
            inputs = {}
            self._watch_again(sums)
            self._cut_smaller(now)
            self.model.zero_grad(set_to_none=True)
            free_memory()
            again = True
        if world_size() > 1 and self._closes_step(now):
            average_gradients(self.model)
        return loss

    def _closes_step(self, micro_batch: int) -> bool:
        """Whether the optimizer follows after this one of this rank."""
        accumulation = self.args.gradient_accumulation_steps
        ragged_end = self._number(micro_batch) + world_size() >= len(self.training.schedule.batches)
        return micro_batch % accumulation == accumulation - 1 or ragged_end

    def _step_in_pieces(self, micro_batch: int, items: Any) -> torch.Tensor:
        number = self._number(micro_batch)
        members = self.training.schedule.batches[number]
        lengths = self.training.train.lengths
        groups = cut(members, [lengths[i] for i in members], self._pieces)
        bare = self.accelerator.unwrap_model(self.model_wrapped)
        losses = [super(ScheduledTrainer, self).training_step(bare, self.data_collator.batch(number, group), items) for group in groups]  # type: ignore[misc]
        return torch.stack(losses).sum()

    def _cut_smaller(self, micro_batch: int) -> None:
        members = self.training.schedule.batches[self._number(micro_batch)]
        step, tokens = self.state.global_step + 1, self._tokens(micro_batch)
        if self._pieces >= len(members):
            raise out_of_memory(step, tokens // len(members), splitting=True)
        self._pieces *= 2
        self.training.console.shout(
            f"note: {tokens:,} tokens did not fit into memory at step {step} ({memory_line()}): "
            f"micro-batches are cut into {self._pieces} from here on; batch and loss stay the same"
        )

    def _tokens(self, micro_batch: int) -> int:
        lengths = [self.training.train.lengths[i] for i in self.training.schedule.batches[self._number(micro_batch)]]
        return sum(lengths) if self.training.layout == "packed" else len(lengths) * max(lengths)

    def _watched_sums(self) -> Any:
        """A copy of what is summed up for the metrics."""
        raise NotImplementedError

    def _watch_again(self, sums: Any) -> None:
        """Go back to such a copy."""
        raise NotImplementedError

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

    def _reply_metrics(self) -> dict[str, float]:
        """What replies to held-out rows are like at this step; nothing on other ranks, which wait."""
        if self.training.replies is None:
            return {}
        self.training.watchdog.stage(f"answering held-out rows after step {self.state.global_step:,}")
        return self.training.replies(self.model, self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.state.epoch = self.training.schedule.epoch(self.state.global_step * self.training.batches_per_step)
        super().log(logs, start_time)  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        return str(writing_folder(self.training.run))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        training, step = self.training, self.state.global_step
        training.watchdog.stage(f"saving checkpoint-{step}")
        begun = time.monotonic()
        training.writer.wait()
        pieces: list[Any] = [self._pieces]
        if world_size() > 1:
            pieces *= world_size()
            torch.distributed.all_gather_object(pieces, self._pieces)
        self._optimizer_copy = None
        try:
            Trainer._save_checkpoint(self, model, trial)  # not TRL's, which writes a model card each time
        except (OSError, RuntimeError) as problem:
            raise disk_full(problem, training.run.root, 0, f"checkpoint-{step}") or problem from None
        if world_size() > 1:
            torch.distributed.barrier()  # every rank has written its random state
        if rank() == 0:
            facts = {
                "world_size": world_size(), "micro_batches": step * training.batches_per_step, "pieces": pieces, "best": training.metrics.best,
                "run_id": read_json(training.run.manifest)["run_id"],
            }  # fmt: skip
            folder = writing_folder(training.run) / f"checkpoint-{step}"
            training.writer.begin(Saving(folder, step, facts, self._optimizer_copy, waited_s=time.monotonic() - begun))
            self._optimizer_copy = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # The optimizer's state is most of a checkpoint: copied here, written while training continues.
        if rank() == 0:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
            self._optimizer_copy = _on_cpu(self.optimizer.state_dict())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The adapter alone: the tokenizer (28 MB) does not change, and training_args.bin is a pickle that holds tokens.
        assert output_dir is not None
        broken = [name for name, p in self.model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        if broken:
            raise RunFailed(
                f"{len(broken)} weights became NaN or infinite at step {self.state.global_step} ({broken[0]}): not saved", hint=BROKEN_HINT
            )
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, safe_serialization=True, save_embedding_layers=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The stock way asks torch for the device "cpu:0" when there are several processes, which it does not know.
        if checkpoint is not None:
            for part, name in ((self.optimizer, "optimizer.pt"), (self.lr_scheduler, "scheduler.pt")):
                part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))


def _on_cpu(state: Any) -> Any:
    """A copy of an optimizer's state that its next step does not change."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, list) else copy.copy(state)
