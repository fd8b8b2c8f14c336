"""Experiment trackers: which of those that a recipe names can record here, and how a run's steps get to them, each once.

`metrics.jsonl` is the truth. It hands each line on as it is written; a resumed run first gives a tracker what a kill took from
it, and leaves out what it holds already. A tracker that fails is dropped with a line: the run continues.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastoss.config import LogSettings, Recipe, resolved_dict
from fastoss.run import RunDirectory, read_json, read_json_lines, write_json
from fastoss.telemetry import no_telemetry
from fastoss.training.progress import Console, rank

# The environment variables without which a tracker would stop and ask; those under which it records without them.
_KEYS = {"wandb": "WANDB_API_KEY", "swanlab": "SWANLAB_API_KEY"}
_OFFLINE = {"wandb": ("WANDB_MODE", ("offline", "disabled")), "swanlab": ("SWANLAB_MODE", ("offline", "local", "disabled"))}
# What "auto" takes for a key where a tracker works on this machine alone without any: the address it is to send to.
_ADDRESSES = {"mlflow": "MLFLOW_TRACKING_URI", "trackio": "TRACKIO_SPACE_ID"}


def usable_trackers(settings: LogSettings, console: Console, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The trackers that can record here; each that cannot is said with what it lacks."""
    if settings.trackers == "auto":
        named = [name for name, variable in {**_KEYS, **_ADDRESSES}.items() if environment.get(variable)]
        console.say(f"trackers: {', '.join(named) if named else 'none has its key set; metrics.jsonl has every step'}")
    else:
        named = list(settings.trackers)
    usable = []
    for name in named:
        key, (variable, modes) = _KEYS.get(name), _OFFLINE.get(name, ("", ()))
        if importlib.util.find_spec(name) is None:
            console.say(f"{name} is skipped: it is not installed (pip install 'fastoss[{name}]')")
        elif key and not environment.get(key) and environment.get(variable) not in modes:
            console.say(f"{name} is skipped: {key} is not set ({variable}={modes[0]} records without it)")
        else:
            usable.append(name)
    return usable


class Trackers:
    """The records of a run that is under way. Rank 0 has them; elsewhere there are none."""

    def __init__(self, names: list[str], recipe: Recipe, run: RunDirectory, console: Console):
        self.console = console
        self.open: dict[str, tuple[Any, dict[str, int]]] = {}  # by name: the record, and the last step of each metric it held
        if rank() != 0 or not names:
            return
        from fastoss.training.trackers.records import RECORDS, Story

        no_telemetry()
        manifest = read_json(run.manifest)
        story = Story(
            root=run.root, project=recipe.log.project, name=recipe.name, run_id=manifest["run_id"], ids=dict(manifest.get("trackers") or {}),
            config={"recipe": _public(recipe), **{key: manifest.get(key) for key in ("versions", "gpu", "world_size", "commit")}},
        )  # fmt: skip
        written = read_json_lines(run.metrics)
        for name in names:
            self._try(name, partial(self._begin, name, RECORDS[name], story, written))
        write_json(run.manifest, read_json(run.manifest) | {"trackers": story.ids})

    def _begin(self, name: str, kind: Callable[[Any], Any], story: Any, written: list[dict[str, Any]]) -> None:
        record = kind(story)
        self.open[name] = (record, record.held())
        for entry in written:
            self._log(name, entry["step"], entry)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand a line of metrics.jsonl on."""
        for name in list(self.open):
            self._try(name, partial(self._log, name, step, values))

    def _log(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        record, held = self.open[name]
        fresh = {key: value for key, value in _scalars(values).items() if step > held.get(key, 0)}
        if fresh:
            record.log(step, fresh)

    def close(self, *, finished: bool) -> None:
        for name in list(self.open):
            self._try(name, partial(self.open[name][0].close, finished))
        self.open.clear()

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as problem:  # whatever a library, a network or a full disk raises
            self.open.pop(name, None)
            first = (str(problem).strip() or "no reason given").splitlines()[0]
            self.console.say(f"note: {name} failed ({type(problem).__name__}: {first}); the run continues without it, metrics.jsonl has every figure")


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """A line's figures under the names that trackers group by: `eval_loss` → `eval/loss`, `loss` → `train/loss`."""
    figures = {key: float(value) for key, value in values.items() if key != "step" and isinstance(value, int | float)}
    return {f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value for key, value in figures.items()}


def _public(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe without the folders of this machine."""
    plain = resolved_dict(recipe)
    for source in (*plain["data"], *plain["eval"]["data"]):
        source["source"] = source["source"] if source["source"].startswith(("hf:", "modelscope:")) else Path(source["source"]).name
        source["sample"] = source["sample"] and Path(source["sample"]).name
    model = plain["model"]
    model["adapter"] = model["adapter"] and Path(model["adapter"]).name
    model["name"] = Path(model["name"]).name if Path(model["name"]).expanduser().is_dir() else model["name"]
    return plain
