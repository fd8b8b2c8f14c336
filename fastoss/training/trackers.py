"""Experiment trackers through transformers' own integrations. One that has no key is skipped with a line; the run goes on."""

from __future__ import annotations

import importlib.util
import os

from fastoss.config import LogSettings
from fastoss.errors import FastossError
from fastoss.run import RunDirectory
from fastoss.training.progress import Console

# The environment variable without which a tracker would stop and ask; None where it works locally.
_KEYS = {"wandb": "WANDB_API_KEY", "swanlab": "SWANLAB_API_KEY", "tensorboard": None, "trackio": None, "mlflow": None}
_OFFLINE = {"wandb": ("WANDB_MODE", ("offline", "disabled")), "swanlab": ("SWANLAB_MODE", ("local", "offline", "disabled"))}


def prepare_trackers(settings: LogSettings, run: RunDirectory, console: Console) -> list[str]:
    """The trackers that can record here, as transformers' `report_to`. `FastossError` when one is not installed."""
    usable: list[str] = []
    for name in settings.trackers:
        if importlib.util.find_spec(name) is None:
            hint = f"pip install 'fastoss[{name}]', or remove it from log.trackers"
            raise FastossError(f"{name} is not installed", place="log.trackers", hint=hint)
        key = _KEYS[name]
        variable, modes = _OFFLINE.get(name, ("", ()))
        if key and not os.environ.get(key) and os.environ.get(variable) not in modes:
            console.say(f"{name} is skipped: {key} is not set ({variable}={modes[0]} records without it)")
            continue
        usable.append(name)
    if usable:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.root / "tensorboard"))  # else beside checkpoints that move
    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.setdefault(variable, settings.project)  # read by transformers' integrations when the trainer starts
    return usable
