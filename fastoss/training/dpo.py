"""DPO through TRL's `DPOTrainer`: its losses and metrics, fed with log-probabilities that we compute.

A pair is a tree (its prompt computed once, two branches), pairs are packed, log-probabilities come from the head of
model/head.py without keeping logits, and those of the reference were computed once, before the first step.

Import this file only after the model is loaded: Unsloth must be imported before TRL.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
from trl import DPOConfig, DPOTrainer
from trl.models.utils import _ForwardRedirection

from fastoss.config import Recipe
from fastoss.data.harmony import IGNORE, Example, HarmonyRenderer
from fastoss.data.packing import LOSS_MARKS, Layout, collate
from fastoss.errors import RunFailed
from fastoss.model.backend import ModelPlan
from fastoss.model.head import token_losses
from fastoss.run import RunDirectory
from fastoss.training.cadence import Cadence
from fastoss.training.first_batch import check_example, laid_out
from fastoss.training.progress import rank, world_size
from fastoss.training.scheduled import BROKEN_HINT, ScheduledTrainer, Training, common_arguments, one_card
from fastoss.training.shared_base import dealt

Pairs = Sequence[Sequence[Example]]  # each [chosen, rejected]


def dpo_config(recipe: Recipe, run: RunDirectory, plan: ModelPlan, *, recompute: bool) -> DPOConfig:
    """The recipe in TRL's words. Steps, saving and evaluation are decided by our schedule, not by these arguments."""
    assert recipe.dpo is not None
    dpo = recipe.dpo
    return DPOConfig(
        **common_arguments(recipe, run, plan, recompute=recompute),
        beta=dpo.beta,
        loss_type=list(dpo.loss_type),
        loss_weights=list(dpo.loss_weights) if dpo.loss_weights else None,
        label_smoothing=dpo.label_smoothing,
        disable_dropout=recipe.lora.lora_dropout == 0,  # TRL's default would ignore the recipe's dropout without a word
        router_aux_loss_coef=0.0,
        max_length=None,
    )


def collate_pairs(pairs: Pairs, layout: Layout) -> dict[str, torch.Tensor]:
    """Pairs as tensors: what the model reads (`row_…`), and the grid by which TRL knows answers.

    `input_ids` and `completion_mask` (2 · pairs, longest answer + 1): scored tokens of each answer, chosen ones first, after a
    column that stands for the prompt. `scored` (tokens,): where those tokens lie in the rows, in the grid's order.
    """
    batch = collate(pairs, layout)
    ids, marked = batch["input_ids"].flatten(), batch["loss_weights"].flatten() > 0
    if layout == "packed":
        owner = batch["examples"].flatten()
    else:
        owner = torch.arange(batch["input_ids"].shape[0]).repeat_interleave(batch["input_ids"].shape[1])
    answers = [*range(0, 2 * len(pairs), 2), *range(1, 2 * len(pairs), 2)]  # chosen ones, then rejected ones
    places = [(marked & (owner == answer)).nonzero().squeeze(1) for answer in answers]
    width = max(map(len, places)) + 1
    mask = torch.tensor([[0] + [1] * len(where) + [0] * (width - 1 - len(where)) for where in places])
    scored = torch.cat(places)
    grid = torch.zeros_like(mask)
    grid[mask.bool()] = ids[scored]
    rows = {f"row_{name}": values for name, values in batch.items() if name not in LOSS_MARKS}
    return rows | {"input_ids": grid, "completion_mask": mask, "attention_mask": mask, "scored": scored}


class PairCollator:
    """Turns the number of a micro-batch into its tensors, with the reference's log-probabilities."""

    def __init__(self, training: Training):
        self.training = training
        self.reference: numpy.ndarray | None = None  # (pairs, 2), set before the first batch

    def __call__(self, items: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        (item,) = items
        return self.batch(item["batch"], self.training.schedule.batches[item["batch"]])

    def batch(self, number: int, members: Sequence[int]) -> dict[str, torch.Tensor]:
        """Micro-batch `number`, or those of its pairs that are given."""
        training = self.training
        batch = collate_pairs([training.train[i] for i in members], training.layout) | reference_of(self.reference, members)
        # A filler's loss counts nothing: every rank has as many batches.
        batch["counts"] = torch.tensor(float(number < len(training.schedule.batches) - training.schedule.fillers))
        return batch


def reference_of(reference: numpy.ndarray | None, members: Sequence[int]) -> dict[str, torch.Tensor]:
    assert reference is not None, "the reference's log-probabilities come first"
    chosen, rejected = torch.from_numpy(reference[list(members)]).float().unbind(1)
    return {"ref_chosen_logps": chosen.clone(), "ref_rejected_logps": rejected.clone()}


def answer_logps(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (2 · pairs, longest answer) of the scored tokens, 0 beside them, and the mean entropy. `model` is the PEFT model."""
    base = model.get_base_model()
    rows = {name.removeprefix("row_"): values for name, values in batch.items() if name.startswith("row_")}
    hidden = base.model(**rows, use_cache=False).last_hidden_state
    scored = batch["scored"]
    before = hidden.reshape(-1, hidden.shape[-1]).index_select(0, scored - 1)
    losses, _, entropy = token_losses(before, base.get_output_embeddings().weight, rows["input_ids"].flatten().index_select(0, scored))
    mask = batch["completion_mask"][:, 1:].bool()
    return torch.zeros_like(mask, dtype=losses.dtype).masked_scatter(mask, -losses), entropy / len(scored)


class HarmonyDPOTrainer(ScheduledTrainer, DPOTrainer):
    """TRL's DPOTrainer over packed pairs. A loss is a mean over the pairs of a whole step, however they are laid out."""

    loss_types: Any
    loss_weights: Any

    def __init__(self, training: Training, **arguments: Any):
        self.follow(training)
        one_card(arguments["args"])
        self.collator = PairCollator(training)
        # A reference model that is none: TRL would add a copy of the adapter to the model, and we know its answers already.
        super().__init__(ref_model=torch.nn.Module(), train_dataset=training.numbers(), data_collator=self.collator, **arguments)
        self.ref_model = None
        self.precompute_ref_logps = True
        self._forward_redirection = _ForwardRedirection()
        self.use_liger_kernel = True  # the way in which TRL asks for log-probabilities and not for logits: ours
        self.model_accepts_loss_kwargs = True  # a step's loss is divided by its pairs, not by its micro-batches
        self._sft_weight = sum(w for kind, w in zip(self.loss_types, self.loss_weights, strict=True) if kind == "sft")
        kept = [(kind, w) for kind, w in zip(self.loss_types, self.loss_weights, strict=True) if kind != "sft"]
        self.loss_types, self.loss_weights = [kind for kind, _ in kept], [w for _, w in kept]
        self._sums: dict[str, dict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self.add_callback(Cadence(training))

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # numbers of micro-batches

    def _get_per_token_logps_and_entropies(self, model: Any, model_kwargs: Any, input_ids: torch.Tensor, completion_mask: torch.Tensor) -> Any:
        batch = {**model_kwargs, "completion_mask": completion_mask}
        logps, entropy = answer_logps(self.accelerator.unwrap_model(model), batch)
        self._logps = logps
        return logps, torch.full_like(logps, float(entropy)), None

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor | None:
        """Pairs, and scored tokens of chosen answers, of a whole step over all ranks."""
        if not batch_samples:
            return None
        sums = [batch["counts"] * torch.tensor([_pairs(batch), float(_chosen_tokens(batch))], dtype=torch.float64) for batch in batch_samples]
        total = torch.stack(sums).sum(0).to(device)
        if world_size() > 1:
            torch.distributed.all_reduce(total)
        return total

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        counts = inputs.pop("counts")
        inputs = dict(inputs)
        pairs, tokens = num_items_in_batch if num_items_in_batch is not None else (_pairs(inputs), _chosen_tokens(inputs))
        mode = "train" if self.model.training else "eval"
        with self._on_this_rank():
            mean = super().compute_loss(model, inputs)
        loss = mean * (_pairs(inputs) / pairs)
        if self._sft_weight:
            loss = loss - self._sft_weight * self._logps[: len(self._logps) // 2].sum() / tokens
        self._note(mode, inputs, float(counts), mean)
        return (loss * counts * world_size()).float()

    @contextlib.contextmanager
    def _on_this_rank(self) -> Iterator[None]:
        # TRL gathers its metrics over ranks, which hold different numbers of pairs: `log` sums them up instead.
        accelerator = self.accelerator
        accelerator.gather = accelerator.gather_for_metrics = lambda values: values
        try:
            yield
        finally:
            del accelerator.gather, accelerator.gather_for_metrics

    def _note(self, mode: str, inputs: dict[str, Any], counts: float, mean: torch.Tensor) -> None:
        sums, pairs = self._sums[mode], _pairs(inputs) * counts
        for name, values in self._metrics[mode].items():
            if name not in ("num_tokens", "entropy"):
                sums[name] += values[-1] * pairs
        self._metrics[mode].clear()
        sums["loss"] += float(mean.detach()) * pairs
        if self._sft_weight:
            chosen = self._logps[: len(self._logps) // 2].detach()
            sums["sft"] -= float(chosen.sum()) * counts
            sums["chosen_tokens"] += _chosen_tokens(inputs) * counts
        sums["pairs"] += pairs

    def _watched_sums(self) -> Any:
        return copy.deepcopy(self._sums)

    def _watch_again(self, sums: Any) -> None:
        self._sums = copy.deepcopy(sums)
        self._metrics["train"].clear()

    def _means(self, mode: str) -> dict[str, float]:
        """TRL's metrics as means over pairs since the last call, over all ranks."""
        sums = self._sums[mode]
        names = sorted(sums)
        total = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self.args.device)
        self._sums[mode] = defaultdict(float)
        if world_size() > 1 and names:
            torch.distributed.all_reduce(total)
        values = dict(zip(names, total.tolist(), strict=True))
        pairs = values.pop("pairs", 0.0) or 1.0
        tokens = values.pop("chosen_tokens", 0.0)
        means = {name: value / (tokens if name == "sft" else pairs) for name, value in values.items()}
        if "sft" in means:
            means["loss"] += self._sft_weight * means["sft"]
        if "rewards/chosen" in means:
            # How far the model has gone from the reference: mean log-ratio of both answers, in nats.
            means["kl_proxy"] = (means["rewards/chosen"] + means["rewards/rejected"]) / (2 * self.beta)
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: value for name, value in self._means("train").items() if name != "loss"}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and metrics over the held-out pairs, each counted once, over all ranks."""
        training = self.training
        self.model.eval()
        started = time.monotonic()
        self._means("eval")
        with torch.no_grad():
            for done, (members, counts) in enumerate(dealt(training.eval_batches)):
                training.watchdog.stage(f"evaluating after step {self.state.global_step:,}, batch {done + 1}")
                batch = collate_pairs([training.eval[i] for i in members], training.layout) | reference_of(training.eval_reference, members)
                self.compute_loss(self.model, self._prepare_inputs(batch | {"counts": torch.tensor(float(counts))}))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._means("eval").items()}
        loss = metrics[f"{metric_key_prefix}_loss"]
        if not math.isfinite(loss):
            raise RunFailed(f"the held-out loss is {loss} at step {self.state.global_step}", hint=BROKEN_HINT)
        metrics |= self._reply_metrics()
        self.log(metrics | {f"{metric_key_prefix}_runtime": time.monotonic() - started})
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def check_first_pairs(trainer: HarmonyDPOTrainer, renderer: HarmonyRenderer) -> None:
    """Take the batch that the trainer will train on first and hold both answers of each pair against a fresh rendering.

    Every id of prompt and answer, which tokens are scored, in the order in which TRL sums them: chosen ones, then rejected
    ones. The tokens before an answer are those that ask for it. Raises `RunFailed` naming row and token where they differ.
    """
    training = trainer.training
    assert training.recipe.dpo is not None
    scored = dict.fromkeys(training.recipe.dpo.score_on, 1.0)
    renderer = HarmonyRenderer(renderer.format.model_copy(update={"train_on": scored}))
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    rows = {name.removeprefix("row_"): values for name, values in batch.items() if name.startswith("row_")}
    ids = rows["input_ids"].flatten()
    labels = torch.full_like(ids, IGNORE).index_copy(0, batch["scored"], ids[batch["scored"]]).view_as(rows["input_ids"])
    laid = laid_out(rows | {"labels": labels})
    summed = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    pairs = [training.train[i] for i in training.schedule.batches[rank()]]
    if (len(laid), len(summed)) != (len(pairs) if training.layout == "packed" else 2 * len(pairs), 2 * len(pairs)):
        raise RunFailed(f"the first batch holds {len(laid)} documents and {len(summed)} answers of {len(pairs)} pairs")
    for number, pair in enumerate(pairs):
        for side, example in enumerate(pair):
            said = example.conversation
            fresh = renderer.render_last(said)
            check_example(fresh, laid[number] if training.layout == "packed" else laid[2 * number + side])
            asked = renderer.render_prompt(said.messages[:-1], said.reasoning_effort, said.tools, said.current_date)
            meant = [label for label in fresh.labels if label != IGNORE]
            if fresh.input_ids[: fresh.prompt_length] != asked or summed[number + side * len(pairs)] != meant:
                name = ("chosen", "rejected")[side]
                raise RunFailed(f"the {name} answer of the first batch is not what was rendered, or not what answers its prompt", place=said.place)


def _pairs(batch: dict[str, torch.Tensor]) -> int:
    return len(batch["ref_chosen_logps"])


def _chosen_tokens(batch: dict[str, torch.Tensor]) -> int:
    return int(batch["completion_mask"][: _pairs(batch)].sum())
