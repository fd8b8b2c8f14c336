"""Opening a run directory: whether the run may resume, by what has changed since it began.

The rule, as docs/reliability.md tells it: a change that no learned number can show is free; another model, method or LoRA is
another run; all else (settings, data, number of processes, libraries beyond their last figure) is refused unless the person
insists with --override-resume.
"""

from __future__ import annotations

import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastoss.config import Recipe, recipe_from_resolved, resolved_dict
from fastoss.data.data_report import report_to_plain
from fastoss.data.dataset import Dataset
from fastoss.data.packing import Layout
from fastoss.errors import FastossError, RunFailed
from fastoss.model.adapter import library_versions
from fastoss.model.backend import ModelPlan
from fastoss.run import RunDirectory, read_json, write_json, write_whole
from fastoss.training.checkpoint import checkpoint_step, latest_checkpoint, list_checkpoints, sweep
from fastoss.training.progress import Console, rank, world_size

Kind = Literal["free", "noted", "insist", "another run"]

_FREE = {
    "checkpoint", "log", "samples", "hub", "eval.every", "eval.after", "eval.replies", "train.on_oom", "distributed.ddp_timeout",
    "distributed.host_layers",
}  # fmt: skip
_ANOTHER_RUN = {"method", "model.name", "model.adapter", "lora", "model.precision", "precision"}
_FACTS = {"world_size": "the number of processes", "backend": "the backend", "precision": "the precision", "layout": "the layout of batches"}
# What manifest.json must say of a run that is to go on.
MANIFEST_KEYS = ("versions", "data", "started", "run_id", *_FACTS)


@dataclass(frozen=True)
class Change:
    """One thing that differs between the run as it was begun and as it is asked for now."""

    what: str
    old: Any
    new: Any
    kind: Kind

    def line(self) -> str:
        return self.what if self.old is None and self.new is None else f"{self.what}: {_shown(self.old)} → {_shown(self.new)}"


@contextmanager
def opened(
    run: RunDirectory, recipe: Recipe, recipe_path: Path, facts: dict[str, Any], console: Console, *, resume: bool, overwrite: bool, override: bool
) -> Iterator[bool]:
    """Lock and prepare the run directory (rank 0 alone writes); yields False when the run is finished already."""
    if rank() != 0:
        yield not (resume and run.is_finished())
        return
    run.create()
    with run.lock():
        if run.exists() and not resume:
            if not overwrite:
                hint = "add --overwrite to remove it, or name another place with --output"
                raise FastossError("the run directory holds a run, and --no-resume would start over", place=str(run.root), hint=hint)
            run.clear()
        checkpoint = latest_checkpoint(run, console.say)
        if checkpoint is None and list_checkpoints(run) and not run.is_finished():
            hint = "put back what is missing, or start over with --no-resume --overwrite"
            raise RunFailed("none of this run's checkpoints is whole", place=str(run.checkpoints), hint=hint)
        accepted: list[Change] = []
        if run.exists() and (run.is_finished() or checkpoint):
            accepted = check_same_run(run, recipe, facts, override=override)
        else:
            run.clear()  # nothing was saved that another recipe could not replace
        sweep(run)
        if run.is_finished():
            console.say(f"{run.root} is finished already: its adapter is {run.adapter}")
            yield False
            return
        console.log_to(run.log)
        for change in accepted:
            console.say(f"note: changed since the run was started: {change.line()}")
        write_whole(run.recipe, recipe_path.read_bytes())
        before = read_json(run.manifest) if run.manifest.is_file() else {}
        begun = {
            "run_id": before.get("run_id") or secrets.token_hex(8),  # by which trackers recognise a resumed run
            "trackers": before.get("trackers", {}),  # the ids that the libraries gave it
            "started": [*before.get("started", []), time.strftime("%Y-%m-%dT%H:%M:%S%z")],
            "resumed_after_step": [*before.get("resumed_after_step", []), *([checkpoint_step(checkpoint)] if checkpoint else [])],
            "ends": before.get("ends", []),  # of the starts above; one that was killed has none
            "checkpoints": before.get("checkpoints", []),
            "changed": [*before.get("changed", []), *({"at_step": checkpoint_step(checkpoint), "what": c.line()} for c in accepted if checkpoint)],
        }
        write_json(run.manifest, facts | begun)
        write_json(run.resolved_recipe, resolved_dict(recipe))  # last: a run exists from here on
        yield True


def run_facts(recipe: Recipe, plan: ModelPlan, dataset: Dataset, layout: Layout) -> dict[str, Any]:
    """What the manifest says of a run. The card's name is added when the model is loaded: asking now would set up CUDA before Unsloth does."""
    return {
        "versions": library_versions(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "commit": _commit(),
        "gpu": None,
        "backend": plan.backend,
        "precision": plan.precision,
        "layout": layout,
        "world_size": world_size(),
        "seed": recipe.train.seed,
        "format": recipe.format.model_dump(mode="json"),
        "data": report_to_plain(dataset.report),
    }


def _commit() -> str | None:
    """The commit of the checkout that fastoss runs from, with a plus where files were changed; None where it is installed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed.strip() else "")


def check_same_run(run: RunDirectory, recipe: Recipe, facts: dict[str, Any], *, override: bool = False) -> list[Change]:
    """What has changed and is accepted. Raises `FastossError` for changes that are not, with all of them."""
    changes = changes_since(run, recipe, facts)
    other = [change for change in changes if change.kind == "another run"]
    if other:
        hint = "start over with --no-resume --overwrite, or in another place with --output"
        raise FastossError(
            f"this is a different run from the one in this folder: {_lines([*other, *(c for c in changes if c.kind == 'insist')])}",
            place=str(run.root),
            hint=hint,
        )
    insisted = [change for change in changes if change.kind == "insist"]
    if insisted and not override:
        hint = "--override-resume resumes all the same; --no-resume --overwrite starts over; --output names another place"
        raise FastossError(f"the run was started with other settings: {_lines(insisted)}", place=str(run.root), hint=hint)
    return [change for change in changes if change.kind != "free"]


def changes_since(run: RunDirectory, recipe: Recipe, facts: dict[str, Any]) -> list[Change]:
    """Everything in recipe, data, processes and libraries that differs from what the run directory says.

    Raises `FastossError` where its papers are not of this version of fastoss.
    """
    before = resolved_dict(recipe_from_resolved(read_json(run.resolved_recipe), str(run.resolved_recipe)))
    now = resolved_dict(recipe)
    changes = []
    for section in before:
        if section == "data":
            continue  # its fingerprint tells: a file may be moved
        old, new = before[section], now[section]
        pairs = (
            [(f"{section}.{key}", old[key], new[key]) for key in old] if isinstance(old, dict) and isinstance(new, dict) else [(section, old, new)]
        )
        changes += [Change(key, a, b, _kind(key)) for key, a, b in pairs if a != b]
    manifest = read_json(run.manifest)
    missing = [key for key in MANIFEST_KEYS if key not in manifest]
    if missing:
        hint = "the run was made by another version of fastoss; --output names another place, --no-resume --overwrite starts over"
        raise FastossError(f"`{missing[0]}` is missing", place=str(run.manifest), hint=hint)
    if manifest["data"]["fingerprint"] != facts["data"]["fingerprint"]:
        changes.append(Change("the data has changed", None, None, "insist"))
    changes += [Change(name, manifest[key], facts[key], _kind(key)) for key, name in _FACTS.items() if manifest[key] != facts[key]]
    for name in sorted(manifest["versions"].keys() | facts["versions"].keys()):
        a, b = manifest["versions"].get(name), facts["versions"].get(name)
        if a != b and not _unused(name, facts):
            changes.append(Change(f"the version of {name}", a, b, "noted" if _family(a) == _family(b) else "insist"))
    return changes


def _kind(key: str) -> Kind:
    section = key.split(".")[0]
    if key in _FREE or section in _FREE:
        return "free"
    return "another run" if key in _ANOTHER_RUN or section in _ANOTHER_RUN else "insist"


def _unused(name: str, facts: dict[str, Any]) -> bool:
    """Whether a library is merely installed: the run goes another way."""
    if name.startswith("unsloth"):
        return bool(facts["backend"] != "unsloth")
    return name == "bitsandbytes" and facts["precision"] != "4bit"


def _family(version: str | None) -> list[str]:
    """`2.13.1+cpu` → ["2", "13"]: releases that differ only in the rest fix bugs only."""
    return (version or "").split("+")[0].split(".")[:2]


def _shown(value: Any) -> str:
    return "none" if value is None else repr(value)


def _lines(changes: list[Change]) -> str:
    return "; ".join(change.line() for change in changes)
