"""Keeps a tracker's failure away from the training. Imported when the model is loaded, since transformers' trainer comes with it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fastoss.training.progress import Console


class Guarded(TrainerCallback):
    """A tracker that may fail: it is then left out with a line, and the run goes on; metrics.jsonl has every figure."""

    def __init__(self, tracker: Any, console: Console):
        self.tracker: Any = tracker
        self.console = console

    def _hand_on(self, event: str, *arguments: Any, **keywords: Any) -> Any:
        if self.tracker is None:
            return None
        try:
            return getattr(self.tracker, event)(*arguments, **keywords)
        except Exception as problem:
            name = type(self.tracker).__name__.removesuffix("Callback")
            self.console.say(f"note: {name} failed ({type(problem).__name__}: {problem}); the run goes on without it, metrics.jsonl has every figure")
            self.tracker = None
            return None


def _event(name: str) -> Any:
    def handle(self: Guarded, *arguments: Any, **keywords: Any) -> Any:
        return self._hand_on(name, *arguments, **keywords)

    return handle


for _name in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(Guarded, _name, _event(_name))


def guard_trackers(trainer: Any, console: Console) -> None:
    """Put a guard around every tracker that transformers has added to a trainer."""
    handler = trainer.callback_handler
    kinds = tuple(set(INTEGRATION_TO_CALLBACK.values()))
    handler.callbacks = [Guarded(callback, console) if isinstance(callback, kinds) else callback for callback in handler.callbacks]
