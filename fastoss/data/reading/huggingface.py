"""Datasets of the Hugging Face hub, pinned to a commit, fetched and cached by its own library."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from fastoss.data.reading.hub_source import Asked, HubData, NotCached, first_line, not_cached, record, recorded
from fastoss.data.reading.hub_splits import split_in_cache, split_of
from fastoss.errors import FastossError

_TIMEOUT_S = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


def find(asked: Asked) -> HubData:
    commit, note = commit_of(asked)
    if note or _offline():
        return cached(asked, commit, note)
    fetch = functools.partial(_fetch, asked, commit)
    files = recorded(asked, commit).get("files")
    if not files:
        try:
            _ask(asked)
        except NotCached as problem:
            with contextlib.suppress(NotCached):
                return cached(asked, commit)
            raise problem from None
        from huggingface_hub import HfApi

        with _errors(asked):
            names = HfApi().list_repo_files(asked.name, repo_type="dataset", revision=commit)
        files = split_of(asked, names, lambda name: fetch(name).read_bytes())
        record(asked, commit, {"files": files})
    return HubData(commit, tuple(files), fetch, note)


@functools.cache
def commit_of(asked: Asked) -> tuple[str, str | None]:
    """The commit of a branch or tag, and a note when the hub could not be asked for it."""
    if asked.revision and _COMMIT.fullmatch(asked.revision):
        return asked.revision, None
    if _offline():
        return _cached_commit(asked, "offline (HF_HUB_OFFLINE)")
    try:
        return _ask(asked), None
    except NotCached as problem:
        return _cached_commit(asked, problem.why)


@functools.cache
def _ask(asked: Asked) -> str:
    """Ask the hub for the commit, once and not patiently: the downloads that follow try again for half a minute."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    _quiet()
    with _errors(asked):
        commit: str = HfApi().dataset_info(asked.name, revision=asked.revision, timeout=_TIMEOUT_S).sha
        with contextlib.suppress(EntryNotFoundError):
            # Tells whether we may read it, and leaves the branch's commit in the hub's cache for the day without network.
            hf_hub_download(asked.name, "README.md", repo_type="dataset", revision=asked.revision or "main")
    return commit


def _fetch(asked: Asked, commit: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    _quiet()
    with _errors(asked):
        return Path(hf_hub_download(asked.name, file, repo_type="dataset", revision=commit))


def _quiet() -> None:
    """Progress bars are for people: none where stderr is a file."""
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _cache(asked: Asked) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"datasets--{asked.name.replace('/', '--')}"


def _cached_commit(asked: Asked, why: str) -> tuple[str, str | None]:
    """The commit of a branch or tag when it was last seen; for the main branch else the newest in the cache."""
    folder = _cache(asked)
    reference = folder / "refs" / (asked.revision or "main")
    if reference.is_file():
        commit, what = reference.read_text().strip(), "as it was last seen"
    else:
        snapshots = sorted((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
        if asked.revision or not snapshots:
            raise not_cached(asked, why)
        commit, what = snapshots[-1].name, "the newest in the cache"
    return commit, f"{asked.place} is read at commit {commit[:7]}, {what}: {why}"


def cached(asked: Asked, commit: str | None = None, note: str | None = None) -> HubData:
    """The split from the cache alone: as recorded, else as the snapshot has it that another tool fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if commit is None:
        full = asked.revision is not None and _COMMIT.fullmatch(asked.revision)
        commit, note = (asked.revision or "", None) if full else _cached_commit(asked, "")
    files = recorded(asked, commit).get("files")
    if not files:
        folder = _cache(asked) / "snapshots" / commit
        if not folder.is_dir():
            raise not_cached(asked, "")
        files = split_in_cache(asked, folder)
        note = "; ".join(filter(None, [note, f"its split `{asked.split}` is taken to be the {len(files)} of its files that the cache holds"]))

    def fetch(file: str) -> Path:
        try:
            return Path(hf_hub_download(asked.name, file, repo_type="dataset", revision=commit, local_files_only=True))
        except LocalEntryNotFoundError:
            raise not_cached(asked, f"{file} is missing in the cache") from None

    return HubData(commit, tuple(files), fetch, note)


@contextlib.contextmanager
def _errors(asked: Asked) -> Iterator[None]:
    """What the hub's library raises, as a place, a fact and a hint. `NotCached` when there is no way to the hub."""
    import httpx
    from huggingface_hub import errors

    private = "check the name; for a private or gated one set HF_TOKEN to a token that may read it"
    try:
        yield
    except errors.GatedRepoError:
        hint = "ask for access on its page, then set HF_TOKEN to a token of that account"
        raise FastossError("the dataset is gated", place=asked.place, hint=hint) from None
    except errors.RevisionNotFoundError:
        hint = "set revision to a commit, branch or tag of it, or leave it out"
        raise FastossError(f"the dataset has no revision `{asked.revision}`", place=asked.place, hint=hint) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise FastossError(f"the hub has no dataset {asked.name}", place=asked.place, hint=private) from None
    except errors.LocalEntryNotFoundError as problem:
        raise not_cached(asked, type(problem.__cause__ or problem).__name__) from None
    except errors.EntryNotFoundError as problem:
        raise FastossError(f"the hub has not all its files: {first_line(problem)}", place=asked.place) from None
    except errors.HfHubHTTPError as problem:
        status = problem.response.status_code if problem.response is not None else 0
        if status in (401, 403):
            raise FastossError(f"the hub does not let us read it ({status})", place=asked.place, hint=private) from None
        raise not_cached(asked, f"it answers {status}") from None
    except (httpx.HTTPError, ConnectionError, TimeoutError) as problem:
        raise not_cached(asked, type(problem).__name__) from None
