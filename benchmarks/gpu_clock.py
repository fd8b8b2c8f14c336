"""One clock for every contestant: seconds, tokens, loss and memory of each step of whatever transformers trainer runs inside it."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass
from typing import Any

from gpu_common import GB


@dataclass
class Step:
    """`tokens` without padding, `slots` with it, `trained` those that carry loss; `pairs` of a preference trainer."""

    seconds: float
    tokens: int
    slots: int
    trained: int
    loss: float = float("nan")


class Clock:
    """`with Clock() as clock: …train…`: import Unsloth before it. The trainers themselves stay as they are."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.training_peak_gb: float | None = None
        self.reserved_peak_gb: float | None = None
        self._counts: list[Any] = []
        self._mark = 0.0

    def __enter__(self) -> Clock:
        import transformers.trainer
        from transformers import Trainer, TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                clock._begin()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock._end_step()

            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
                if clock.steps and logs and "loss" in logs:
                    clock.steps[-1].loss = float(logs["loss"])

        original = Trainer.training_step

        @functools.wraps(original)
        def training_step(trainer: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            clock._counts.append(_counts(inputs))
            return original(trainer, model, inputs, *args, **kwargs)

        Trainer.training_step = training_step
        transformers.trainer.DEFAULT_CALLBACKS.append(Callback)
        self._undo = (Trainer, original, transformers.trainer.DEFAULT_CALLBACKS, Callback)
        return self

    def __exit__(self, *problem: object) -> None:
        trainer, original, callbacks, callback = self._undo
        trainer.training_step = original
        callbacks.remove(callback)

    def _begin(self) -> None:
        import torch

        self.steps.clear()
        self._counts.clear()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._mark = time.perf_counter()

    def _end_step(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.training_peak_gb = torch.cuda.max_memory_allocated() / GB
            self.reserved_peak_gb = torch.cuda.max_memory_reserved() / GB
        now = time.perf_counter()
        counts = [[int(value) for value in counted] for counted in self._counts]  # waits for the device: after the time was taken
        self._counts.clear()
        self.steps.append(Step(now - self._mark, *(sum(column) for column in zip(*counts, strict=True))))
        self._mark = time.perf_counter()

    def second_half(self) -> int:
        """The number of the step with which the second of two epochs begins: half of all tokens come before it."""
        half, seen = sum(step.tokens for step in self.steps) / 2, 0
        for number, step in enumerate(self.steps):
            if seen == half:
                return number
            seen += step.tokens
        raise ValueError("no step begins with the second epoch")

    def summary(self, first: int, extra_seconds: float = 0.0) -> dict[str, Any]:
        """Of the steps from number `first` on; `extra_seconds` are spent on the same rows outside of the steps."""
        steps = self.steps[first:]
        taken = [step.seconds for step in steps]
        total = sum(taken) + extra_seconds
        trained = sum(step.trained for step in steps)
        return {
            "tokens_per_second": sum(step.tokens for step in steps) / total,
            "trained_tokens_per_second": trained / total,
            "step_p50": statistics.median(taken),
            "step_p95": sorted(taken)[min(len(taken) - 1, round(0.95 * len(taken)))],
            "steps": len(steps),
            "tokens": sum(step.tokens for step in steps),
            "trained_tokens": trained,
            "fill": sum(step.tokens for step in steps) / sum(step.slots for step in steps),
            "mean_loss": sum(step.loss * step.trained for step in steps) / trained,
            "seconds": total,
            "training_peak_gb": self.training_peak_gb,
            "reserved_peak_gb": self.reserved_peak_gb,
        }


def _counts(inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Tokens, slots and trained tokens of a micro-batch, on its device: nobody waits for them yet."""
    rows = inputs.get("row_input_ids", inputs["input_ids"])  # ours in DPO: the grid of answers is beside what the model reads
    mask = inputs.get("row_attention_mask") if "row_input_ids" in inputs else inputs.get("attention_mask")
    tokens = rows.numel() if mask is None else mask.sum()
    trained = inputs["completion_mask"].sum() if "completion_mask" in inputs else (inputs["labels"][:, 1:] != -100).sum()
    return tokens, rows.numel(), trained
