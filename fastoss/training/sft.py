"""SFT through TRL's `SFTTrainer`: fed with our batches, told nothing else, watched at every step.

Import this file only after the model is loaded: Unsloth must be imported before TRL.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import trl.trainer.sft_trainer
from trl import SFTConfig, SFTTrainer

from fastoss.config import CHANNELS, Recipe
from fastoss.data.harmony import IGNORE, HarmonyRenderer
from fastoss.data.packing import collate
from fastoss.errors import RunFailed
from fastoss.model.backend import ModelPlan
from fastoss.model.head import TrainedTokenLoss
from fastoss.run import RunDirectory
from fastoss.training.checkpoint import writing_folder
from fastoss.training.progress import rank, world_size
from fastoss.training.scheduled import BROKEN_HINT, Cadence, ScheduleCollator, ScheduledTrainer, Training


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


class HarmonySFTTrainer(ScheduledTrainer, SFTTrainer):
    """TRL's SFTTrainer with losses weighted by token, and watched by channel."""

    def __init__(self, training: Training, **arguments: Any):
        self.follow(training)
        self.token_loss = TrainedTokenLoss(len(CHANNELS))
        # Same signature and results as TRL's (trl/trainer/sft_trainer.py), two products a token instead of three.
        # To be removed when TRL's own keeps no logits and computes nothing twice; trl is pinned until then.
        trl.trainer.sft_trainer._chunked_cross_entropy_loss = self.token_loss.chunked
        super().__init__(train_dataset=training.numbers(), data_collator=ScheduleCollator(training), **arguments)
        self.add_callback(Cadence(training))

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
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
            raise RunFailed(f"the held-out loss is {loss} at step {self.state.global_step}", hint=BROKEN_HINT)
        metrics = {f"{metric_key_prefix}_loss": loss} | self._channel_losses(f"{metric_key_prefix}_")
        self.log(metrics | {f"{metric_key_prefix}_runtime": time.monotonic() - started})
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


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
