"""`hf:NAME` and `modelscope:NAME` → files on this machine, pinned to a commit; `sources` reads their rows.

The hub's own libraries fetch and cache, and `datasets` says which files make up a split. It does not read them: in making
a table of them it changes texts (a column of dates becomes times, a key that one row has becomes a null in all others).
"""

from __future__ import annotations

import functools

from fastoss.config import DataSource
from fastoss.data.reading import huggingface, modelscope
from fastoss.data.reading.hub_source import Asked, HubData, NotCached
from fastoss.data.reading.rows import KINDS, kind_of
from fastoss.errors import FastossError


def is_hub(name: str) -> bool:
    return name.startswith(("hf:", "modelscope:"))


def hub_data(source: DataSource) -> HubData:
    """Find a source's files, asking the hub once a process. They are fetched when they are read.

    Raises `NotCached` when there is neither network nor cache, `FastossError` when the hub has no such dataset, split
    or subset, or does not let us read it.
    """
    return _find(_asked(source))


def hub_revision(source: DataSource) -> str | None:
    """The commit that a source stands for now, as the hub or its cache says; None when neither is there."""
    asked = _asked(source)
    try:
        return huggingface.commit_of(asked)[0] if asked.hub == "hf" else _find(asked).commit
    except NotCached:
        return None


def is_cached(source: DataSource) -> bool:
    """Whether a source can be read with no network. Asks none."""
    asked = _asked(source)
    try:
        if asked.hub == "hf":
            data = huggingface.cached(asked)
            return all(data.fetch(file).is_file() for file in data.files)
        folder, files = modelscope.cached_files(asked, "")
        return all((folder / file).is_file() for file in files)
    except FastossError:
        return False


def _asked(source: DataSource) -> Asked:
    hub, _, name = source.source.partition(":")
    return Asked(hub, name, source.revision, source.subset, source.split)


@functools.cache
def _find(asked: Asked) -> HubData:
    data = huggingface.find(asked) if asked.hub == "hf" else modelscope.find(asked)
    for file in data.files:
        if not kind_of(file):
            raise FastossError(f"{file} cannot be read as data", place=asked.place, hint=f"fastoss reads {KINDS}")
    return data
