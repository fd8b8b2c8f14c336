"""When a run saves, evaluates, stops and logs: decided at the end of each step, from the schedule and the recipe alone."""

from __future__ import annotations

import itertools
import time
from typing import Any

from transformers import TrainerCallback

from fastoss.config import CHANNELS
from fastoss.inference.measures import REPLY_MEASURES
from fastoss.training.memory import memory_in_use
from fastoss.training.progress import duration
from fastoss.training.scheduled import Training

_LOGGED = (
    "loss", *(f"loss_{channel}" for channel in CHANNELS), "learning_rate", "grad_norm", "entropy", "mean_token_accuracy",
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "kl_proxy", "sft",
)  # fmt: skip
_REPLIES = tuple(measure.name for measure in REPLY_MEASURES)
_PATIENCE_S = 15.0  # a person should not wait longer for a sign of life, if steps are shorter than that


class Cadence(TrainerCallback):
    """The callback that decides, and writes a step's figures down."""

    def __init__(self, training: Training):
        self.training = training
        self.started = 0.0
        self.first_step = 0
        self.step_took = [0.0, 0.0]  # when the step began and ended: what lies between steps is no training
        self.last = (0.0, 0)  # (time, tokens) at the last line
        lengths = training.train.lengths
        sizes = (sum(lengths[i] for i in members) for members in training.schedule.batches)
        self.tokens = [0, *itertools.accumulate(sizes)]  # after so many micro-batches; Unsloth's trainer counts none itself

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()
        self.first_step = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_took[0] = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_took[1] = time.monotonic()
        training, step = self.training, state.global_step
        last = step == training.total_steps
        has_eval = bool(training.eval_batches)
        control.should_evaluate = has_eval and ((last and training.recipe.eval.after) or (not last and step % training.recipe.eval.every == 0))
        training.watchdog.stage(f"at the end of step {step:,}, hearing whether to stop")
        stopping = training.stop.agreed(args.device)
        control.should_save = last or stopping or self._is_save_step(step)
        control.should_training_stop = last or stopping

    def _tokens_after(self, step: int) -> int:
        """Tokens of the run's first `step` steps, over all ranks, without fillers."""
        return self.tokens[min(step * self.training.batches_per_step, len(self.tokens) - 1 - self.training.schedule.fillers)]

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
            training.metrics.write(step, {key: logs[key] for name in (*_LOGGED, *_REPLIES) if (key := f"eval_{name}") in logs})
            said = f"step {step:,}/{training.total_steps:,}  held-out loss {logs['eval_loss']:.4f}"
            said += f"  replies in the right format {logs['eval_well_formed']:.0%}" if "eval_well_formed" in logs else ""
            training.console.say(said, "evaluation", step=step, steps=training.total_steps, eval_loss=logs["eval_loss"])
            return
        now = time.monotonic()
        seconds_a_step = (now - self.started) / max(1, step - self.first_step)
        values: dict[str, Any] = {key: logs[key] for key in _LOGGED if key in logs}
        tokens = self._tokens_after(step)
        values |= {"num_tokens": tokens, "fill": round(training.fill(step), 4), "epoch": state.epoch, "seconds": round(now - self.started, 3)}
        begun, ended = self.step_took
        if ended > begun:
            values["tokens_per_second"] = round((tokens - self._tokens_after(step - 1)) / (ended - begun), 1)
        training.metrics.write(step, values | memory_in_use())
        quiet_for = now - (self.last[0] or self.started)
        due = step % training.recipe.log.every == 0 or step in (self.first_step + 1, training.total_steps) or quiet_for > _PATIENCE_S
        speed = (tokens - self.last[1]) / (now - self.last[0]) if self.last[0] else 0.0
        pace = f"{speed:,.0f} tok/s  " if speed > 0 else ""
        left = seconds_a_step * (training.total_steps - step)
        line = (
            f"step {step:,}/{training.total_steps:,}  epoch {state.epoch:.2f}  loss {logs.get('loss', float('nan')):.4f}  {pace}{duration(left)} left"
        )
        known: dict[str, Any] = {key: values[key] for key in ("epoch", "loss", "tokens_per_second") if key in values}
        told: dict[str, Any] = {"step": step, "steps": training.total_steps, **known, "seconds_left": round(left, 1)}
        training.console.live(line, keep=due, kind="step", **told)
        if due:
            self.last = (now, tokens)
