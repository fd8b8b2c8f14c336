"""What a trainer costs beside forward, backward and optimizer, on the CPU (`training_cpu.py`)."""

from __future__ import annotations

import contextlib
import copy
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import QUICKSTART, seconds, spread
from benchmarks.training_packed import loss_of
from fastoss.config import Recipe, load_recipe
from fastoss.model.head import TrainedTokenLoss
from fastoss.run import RunDirectory

# Parts of a step that the bare one does without, by the method of transformers' Trainer that does them.
PARTS = ("get_batch_samples", "floating_point_ops", "_clip_grad_norm", "_maybe_log_save_evaluate")
BARE = ("forward", "backward", "optimizer", "zero_grad")


class _BareSteps:
    """Does the bare step of the same batch, with a copy of the model, after each of the trainer's; and times the trainer's parts."""

    def __init__(self, steps: int, max_grad_norm: float, adam_beta2: float):
        self.steps, self.max_grad_norm, self.adam_beta2 = steps, max_grad_norm, adam_beta2
        self.pairs: list[dict[str, float]] = []
        self.parts: list[Counter[str]] = []
        self.inside: Counter[str] = Counter()
        self.mark: tuple[float, float] | None = None
        self.paused = False
        self.spent = 0.0  # wall seconds in `step`, which some of the trainer's parts call
        self.loss = TrainedTokenLoss(4)

    def begin(self, model: Any, optimizer: Any, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        self.batches = [batch for batch, _ in zip(batches, range(self.steps), strict=False)]
        self.model = copy.deepcopy(model).train()
        self.weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.0, betas=(0.9, self.adam_beta2), weight_decay=0.0)
        for owner, name, label in (
            (model, "forward", "forward"), (model, "train", "model.train"), (model, "zero_grad", "zero_grad"), (optimizer, "step", "optimizer")
        ):  # fmt: skip
            self.watch(owner, name, label)

    def watch(self, owner: Any, name: str, label: str) -> Callable[[], None]:
        """Add the time of the trainer's calls to `inside`; returns what undoes it."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.paused:
                return function(*args, **kwargs)
            begun, spent = time.perf_counter(), self.spent
            try:
                return function(*args, **kwargs)
            finally:
                self.inside[label] += time.perf_counter() - begun - (self.spent - spent)

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, function)

    def step(self, logs: dict[str, float]) -> None:
        """Called at the end of each of the trainer's steps."""
        now = time.perf_counter(), time.process_time()
        self.paused = True
        for group in self.optimizer.param_groups:
            group["lr"] = logs["learning_rate"]
        mean: list[torch.Tensor] = []
        batch = self.batches[len(self.pairs)]

        def forward_and_backward() -> None:
            mean.append(loss_of(self.model, batch, self.loss))
            mean[0].backward()

        def update() -> None:
            self.optimizer.step()
            self.optimizer.zero_grad()

        first = seconds(forward_and_backward)
        torch.nn.utils.clip_grad_norm_(self.weights, self.max_grad_norm)  # so that both train the same; not counted
        bare = [a + b for a, b in zip(first, seconds(update), strict=True)]
        pair = {"difference": abs(mean[0].item() - logs["loss"]) / abs(logs["loss"])}
        if self.mark is not None:
            trainer = [end - start for end, start in zip(now, self.mark, strict=True)]
            accounted = sum(self.inside[name] for name in BARE)
            pair |= {"wall": trainer[0], "cpu": trainer[1], "bare_wall": bare[0], "bare_cpu": bare[1], "accounted": accounted}
            self.parts.append(self.inside.copy())
        self.pairs.append(pair)
        self.inside.clear()
        self.paused = False
        self.mark = time.perf_counter(), time.process_time()
        self.spent += self.mark[0] - now[0]


@contextlib.contextmanager
def beside_the_trainer(bare: _BareSteps) -> Iterator[None]:
    """Every trainer made in here calls `bare`."""
    import transformers.trainer

    class Callback(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"]
            bare.begin(kwargs["model"], getattr(optimizer, "optimizer", optimizer), iter(kwargs["train_dataloader"]))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                bare.step(logs)

    undo = [bare.watch(transformers.Trainer, name, name) for name in PARTS if hasattr(transformers.Trainer, name)]
    undo.append(bare.watch(torch.Tensor, "backward", "backward"))
    transformers.trainer.DEFAULT_CALLBACKS.append(Callback)
    try:
        yield
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(Callback)
        for restore in undo:
            restore()


def overhead(rows: int = 6, steps: int = 40) -> dict[str, Any]:
    """`train` of the quickstart's recipe: what a step takes beside forward, backward and optimizer. The target: at most 3 % more.

    `accounted` is the share of the trainer's own step that is none of the three. `wall` and `cpu` compare it with a bare loop over a
    copy of the model and the same batches, step by step in turn: noisier, but nothing can hide from it. Clipping the gradient is
    the recipe's, and not in the bare step.
    """
    from fastoss.training.train import train

    changes = ["samples.from_train=0", f"train.max_steps={steps}", f"train.per_device_train_batch_size={rows}", "checkpoint.every=100000"]
    recipe: Recipe = load_recipe(QUICKSTART, [*changes, "data.0.max_rows=200"])
    bare = _BareSteps(steps, recipe.train.max_grad_norm, recipe.train.adam_beta2)
    with tempfile.TemporaryDirectory() as folder, beside_the_trainer(bare):
        train(recipe, QUICKSTART, RunDirectory(Path(folder) / "run"))
    pairs = [pair for pair in bare.pairs if "wall" in pair]
    names = sorted({name for parts in bare.parts for name in parts})
    return {
        "overhead": {
            "accounted": spread([pair["wall"] / pair["accounted"] - 1 for pair in pairs]),
            **{clock: spread([pair[clock] / pair[f"bare_{clock}"] - 1 for pair in pairs]) for clock in ("wall", "cpu")},
        },
        "overhead_ms": 1000 * statistics.median(pair["wall"] - pair["accounted"] for pair in pairs),
        "bare_step_seconds": statistics.median(pair["bare_wall"] for pair in pairs),
        "parts_ms": {name: round(1000 * statistics.median(parts[name] for parts in bare.parts), 3) for name in names},
        "loss_difference": max(pair["difference"] for pair in bare.pairs),
        "rows": rows, "steps": len(pairs), "target": 0.03,
    }  # fmt: skip


def walks(repeats: int = 5) -> dict[str, Any]:
    """What transformers' Trainer does per micro-batch over the modules of the full 20B model, which no GPU makes faster. In ms.

    Without weights (on the meta device), with LoRA on attention and experts: fused, as transformers has them, and an expert a
    Linear, as Unsloth's 4-bit checkpoint has them.
    """
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import GptOssConfig, GptOssForCausalLM

    def split(model: Any) -> None:
        for layer in model.model.layers:
            experts = layer.mlp.experts = nn.Module()
            experts.gate_up_projs = nn.ModuleList([nn.Linear(2880, 5760) for _ in range(32)])
            experts.down_projs = nn.ModuleList([nn.Linear(2880, 2880) for _ in range(32)])

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    each = [f"{name}.{number}" for name in ("gate_up_projs", "down_projs") for number in range(32)]
    results: dict[str, Any] = {"repeats": repeats}
    for form, targets, parameters in (
        ("fused", attention, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]), ("split", [*attention, *each], None)
    ):  # fmt: skip
        with torch.device("meta"):
            model = GptOssForCausalLM(GptOssConfig())
            if form == "split":
                split(model)
            peft = get_peft_model(model, LoraConfig(r=8, target_modules=targets, target_parameters=parameters, task_type="CAUSAL_LM"))
        calls: dict[str, Callable[[], object]] = {
            "model.train": peft.train,
            "floating_point_ops": lambda model=peft: model.num_parameters(exclude_embeddings=True),  # all that it does
            "zero_grad": peft.zero_grad,
        }
        results[form] = {"modules": sum(1 for _ in peft.modules())}
        results[form] |= {name: spread([1000 * seconds(call)[0] for _ in range(repeats)]) for name, call in calls.items()}
    return results
