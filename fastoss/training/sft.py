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
from fastoss.training.cadence import Cadence
from fastoss.training.first_batch import check_example, laid_out
from fastoss.training.progress import rank, world_size
from fastoss.training.scheduled import BROKEN_HINT, ScheduleCollator, ScheduledTrainer, Training, common_arguments, one_card
from fastoss.training.shared_base import dealt


def sft_config(recipe: Recipe, run: RunDirectory, plan: ModelPlan, *, recompute: bool) -> SFTConfig:
    """The recipe in TRL's words. Steps, saving and evaluation are decided by our schedule, not by these arguments."""
    return SFTConfig(
        **common_arguments(recipe, run, plan, recompute=recompute),
        # Unsloth on a GPU fuses head and loss in its own kernels; elsewhere it is ours (see HarmonySFTTrainer).
        loss_type="nll" if plan.device == "gpu" and plan.backend == "unsloth" else "chunked_nll",
        router_aux_loss_coef=0.0,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


class HarmonySFTTrainer(ScheduledTrainer, SFTTrainer):
    """TRL's SFTTrainer with losses weighted by token, and watched by channel."""

    def __init__(self, training: Training, **arguments: Any):
        self.follow(training)
        one_card(arguments["args"])
        self.token_loss = TrainedTokenLoss(len(CHANNELS))
        # Same signature and results as TRL's (trl/trainer/sft_trainer.py), two products a token instead of three.
        # To be removed when TRL's own keeps no logits and computes nothing twice; trl is pinned until then.
        trl.trainer.sft_trainer._chunked_cross_entropy_loss = self.token_loss.chunked
        super().__init__(train_dataset=training.numbers(), data_collator=ScheduleCollator(training), **arguments)
        self.add_callback(Cadence(training))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.token_loss.mark(inputs.pop("loss_weights"), inputs.pop("channels"))
        inputs.pop("examples", None)  # whose token it is: for sums by example
        if "documents" in inputs:
            inputs["documents"] = inputs["documents"].to(inputs["input_ids"].device)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor | None:
        """The weights of a whole global batch's trained tokens, summed: with all weights 1 their number."""
        if not batch_samples:
            return None
        total = torch.stack([batch["loss_weights"][..., 1:].sum(dtype=torch.float64) for batch in batch_samples]).sum().to(device)
        if world_size() > 1:
            torch.distributed.all_reduce(total)
        return total.float()

    def _watched_sums(self) -> Any:
        return self.token_loss.sums.clone()

    def _watch_again(self, sums: Any) -> None:
        self.token_loss.sums = sums.clone()

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
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        started = time.monotonic()
        self.token_loss.take_sums()
        with torch.no_grad():
            for done, (members, counts) in enumerate(dealt(training.eval_batches)):
                training.watchdog.stage(f"evaluating after step {self.state.global_step:,}, batch {done + 1}")
                batch = self._prepare_inputs(collate([training.eval[i] for i in members], training.layout, train=counts))
                batch.pop("examples", None)
                weights = batch.pop("loss_weights")
                total = weights[:, 1:].sum(dtype=torch.float64)
                self.token_loss.mark(weights, batch.pop("channels"))
                mean = self.model(**batch, use_cache=False)["loss"]
                if counts:
                    sums += torch.stack([mean.double() * total, total])
        if world_size() > 1:
            torch.distributed.all_reduce(sums)
        loss = (sums[0] / sums[1]).item()
        if not math.isfinite(loss):
            raise RunFailed(f"the held-out loss is {loss} at step {self.state.global_step}", hint=BROKEN_HINT)
        metrics = {f"{metric_key_prefix}_loss": loss} | self._channel_losses(f"{metric_key_prefix}_") | self._reply_metrics()
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
    units = [training.train[i] for i in training.schedule.batches[rank()]]
    laid = laid_out(batch)
    if training.layout == "padded":
        units = [[example] for unit in units for example in unit]
    if len(laid) != len(units):
        raise RunFailed(f"the first batch holds {len(laid)} documents, {len(units)} were rendered")
    for unit, segments in zip(units, laid, strict=True):
        trained = 0
        for example in unit:
            fresh = renderer.render_last(example.conversation)
            trained += sum(label != IGNORE for label in fresh.labels)
            check_example(fresh, segments)
        marked = sum(label != IGNORE for _, _, labels in segments for label in labels)
        if marked != trained:
            fact = f"the first batch trains {marked} tokens of a row, {trained} were rendered"
            raise RunFailed(fact, place=unit[0].conversation.place)
