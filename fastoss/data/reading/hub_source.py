"""What a recipe asks of a hub, and what a hub answers; which files made up a split is recorded, for a day without network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastoss.errors import FastossError
from fastoss.run import cache_folder, file_lock, read_json, write_json


class NotCached(FastossError):
    """A hub dataset is not on this machine, and the hub cannot be reached: a note for `check`, an error for `train`.

    `why` is what stands between us and the hub.
    """

    why = ""

    def note(self) -> str:
        return f"note: {self.place}: {self.fact}" + (f"\nhint: {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class HubData:
    """The files of one split of a dataset at one commit, by their names in its repository, and how to get one.

    `commit` is the commit's hash. ModelScope tells none: there it is a hash of the files' hashes. `note` says when the
    hub could not be asked and the cache was taken.
    """

    commit: str
    files: tuple[str, ...]
    fetch: Callable[[str], Path]
    note: str | None = None


@dataclass(frozen=True)
class Asked:
    """What a source asks of a hub."""

    hub: str
    name: str
    revision: str | None
    subset: str | None
    split: str

    @property
    def place(self) -> str:
        return f"{self.hub}:{self.name}"

    @property
    def record(self) -> Path:
        return cache_folder() / "hub" / f"{self.hub}--{quote(self.name, safe='')}.json"

    def key(self, commit: str) -> str:
        return "/".join(quote(part, safe="") for part in (commit, self.subset or "", self.split))


def not_cached(asked: Asked, why: str) -> NotCached:
    hub = "HF_ENDPOINT" if asked.hub == "hf" else "MODELSCOPE_ENDPOINT"
    hint = f"check the network ({hub} names another hub), or read its sample: --sample"
    reason = f" ({why})" if why else ""
    problem = NotCached(f"the dataset is not in the cache, and the hub cannot be reached{reason}", place=asked.place, hint=hint)
    problem.why = why
    return problem


def first_line(problem: BaseException) -> str:
    return (str(problem) or type(problem).__name__).strip().splitlines()[0]


def recorded(asked: Asked, commit: str) -> dict[str, Any]:
    """Which files made up the split when the hub was there: so that they are the same without it."""
    try:
        entry = read_json(asked.record).get(asked.key(commit), {})
    except (FastossError, AttributeError):
        return {}
    return entry if isinstance(entry, dict) else {}


def record(asked: Asked, commit: str, entry: dict[str, Any]) -> None:
    with file_lock(asked.record.with_suffix(".lock")):
        try:
            entries = dict(read_json(asked.record))
        except (FastossError, TypeError, ValueError):
            entries = {}
        if entries.get(asked.key(commit)) != entry:
            write_json(asked.record, {**entries, asked.key(commit): entry})
