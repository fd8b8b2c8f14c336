"""Datasets of ModelScope, fetched and cached by its own small library; a hash of the files' hashes stands for the commit that it does not tell."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastoss.data.reading.hub_source import Asked, HubData, NotCached, first_line, not_cached, record, recorded
from fastoss.data.reading.hub_splits import split_in_cache, split_of
from fastoss.errors import FastossError
from fastoss.run import file_digest


def find(asked: Asked) -> HubData:
    hub = _library(asked)
    revision = asked.revision or "master"
    try:
        with _errors(asked, hub):
            endpoint = hub.HubApi().resolve_endpoint_for_read(asked.name, repo_type="dataset")
            api = hub.HubApi(endpoint=endpoint)
            listed = {entry.path: entry for entry in api.list_repo_files(asked.name, "dataset", revision=revision) if entry.type != "tree"}
    except NotCached as problem:
        return _cached(asked, problem.why)

    def fetch(file: str) -> Path:
        # The cache is named by branch: with size and hash an older file is seen as such, and fetched again.
        told = {"expected_sha256": listed[file].sha256, "file_size": listed[file].size}
        bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with _errors(asked, hub), bars:
            return Path(api.download_file(asked.name, "dataset", file, revision=revision, **told))

    files = split_of(asked, listed, lambda name: fetch(name).read_bytes())
    record(asked, revision, {"files": files})
    return HubData(_content_hash({file: listed[file].sha256 or listed[file].blob_id for file in files}), tuple(files), fetch)


def _content_hash(hashes: dict[str, str]) -> str:
    """What stands for a commit: one hash over the files' names and SHA-256."""
    return hashlib.sha256("".join(f"{file}\0{hashes[file]}\n" for file in sorted(hashes)).encode()).hexdigest()


def cached_files(asked: Asked, why: str) -> tuple[Path, list[str]]:
    """The folder in ModelScope's cache, and the split's files in it."""
    hub = _library(asked)
    revision = asked.revision or "master"
    try:
        folder = Path(hub.HubApi().download_repo(asked.name, "dataset", revision=revision, local_files_only=True))
    except hub.CacheNotFound:
        raise not_cached(asked, why) from None
    return folder, recorded(asked, revision).get("files") or split_in_cache(asked, folder)


def _cached(asked: Asked, why: str) -> HubData:
    folder, files = cached_files(asked, why)
    hashes = {}
    for file in files:
        if not (folder / file).is_file():
            raise not_cached(asked, f"{file} is missing in the cache")
        hashes[file] = file_digest(folder / file)
    return HubData(_content_hash(hashes), tuple(files), lambda file: folder / file, f"{asked.place} is read from the cache: {why}")


def _library(asked: Asked) -> Any:
    """ModelScope's package: the small `modelscope-hub`, which `modelscope` stands upon as well."""
    try:
        hub = importlib.import_module("modelscope_hub")
    except ImportError:
        hint = "pip install 'fastoss[modelscope]'"
        raise FastossError("ModelScope's package is not installed", place=asked.place, hint=hint) from None
    if "MODELSCOPE_LOG_LEVEL" not in os.environ:
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)  # it tells each request
    return hub


@contextlib.contextmanager
def _errors(asked: Asked, hub: Any) -> Iterator[None]:
    private = "check the name; for a private one set MODELSCOPE_API_TOKEN"
    try:
        yield
    except hub.NotExistError:
        what = f"no revision `{asked.revision}` of " if asked.revision else "no dataset "
        raise FastossError(f"the hub has {what}{asked.name}", place=asked.place, hint=private) from None
    except (hub.AuthenticationError, hub.PermissionDeniedError):
        raise FastossError("the hub does not let us read it", place=asked.place, hint=private) from None
    except hub.InvalidParameter as problem:
        raise FastossError(f"the hub does not understand the name: {first_line(problem)}", place=asked.place, hint="owner/name") from None
    except (hub.HubError, ConnectionError, TimeoutError) as problem:
        raise not_cached(asked, type(problem).__name__) from None
