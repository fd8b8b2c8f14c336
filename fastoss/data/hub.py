"""`hf:NAME` and `modelscope:NAME` → files on this machine, pinned to a commit; `sources` reads their rows.

The hub's own libraries fetch and cache, and `datasets` says which files make up a split. It does not read them: in making
a table of them it changes texts (a column of dates becomes times, a key that one row has becomes a null in all others).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from fastoss.config import DataSource
from fastoss.data.rows import KINDS, kind_of
from fastoss.errors import FastossError
from fastoss.run import cache_folder, file_digest, file_lock, read_json, write_json

_TIMEOUT_S = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # what `datasets` reads to tell subsets and splits
_ARCHIVES = (".zip", ".tar", ".tgz", ".rar", ".7z", ".xz", ".bz2", ".lz4")


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
class _Asked:
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
        return _hf_commit(asked)[0] if asked.hub == "hf" else _find(asked).commit
    except NotCached:
        return None


def is_cached(source: DataSource) -> bool:
    """Whether a source can be read with no network. Asks none."""
    asked = _asked(source)
    try:
        if asked.hub == "hf":
            data = _hf_cached(asked)
            return all(data.fetch(file).is_file() for file in data.files)
        folder, files = _modelscope_folder(asked, "")
        return all((folder / file).is_file() for file in files)
    except FastossError:
        return False


def _asked(source: DataSource) -> _Asked:
    hub, _, name = source.source.partition(":")
    return _Asked(hub, name, source.revision, source.subset, source.split)


@functools.cache
def _find(asked: _Asked) -> HubData:
    data = _hf(asked) if asked.hub == "hf" else _modelscope(asked)
    for file in data.files:
        if not kind_of(file):
            raise FastossError(f"{file} cannot be read as data", place=asked.place, hint=f"fastoss reads {KINDS}")
    return data


def _not_cached(asked: _Asked, why: str) -> NotCached:
    hub = "HF_ENDPOINT" if asked.hub == "hf" else "MODELSCOPE_ENDPOINT"
    hint = f"check the network ({hub} names another hub), or read its sample: --sample"
    reason = f" ({why})" if why else ""
    problem = NotCached(f"the dataset is not in the cache, and the hub cannot be reached{reason}", place=asked.place, hint=hint)
    problem.why = why
    return problem


# --- which files make up a split -------------------------------------------------------------------------------------


def _split_of(asked: _Asked, names: Iterable[str], read_card: Callable[[str], bytes]) -> list[str]:
    """The files of a repository that make up the split, by the rules of `datasets` (the card's `configs`, else the files' names).

    It is shown a folder of empty files with these names, so that nothing needs to be fetched to find out.
    """
    with tempfile.TemporaryDirectory() as made:
        # `datasets` knows a dataset that is a script by its file's name, which is the folder's.
        folder = (Path(made) / (asked.name.rpartition("/")[2] or "data")).resolve()
        folder.mkdir()
        for name in names:
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts or name.lower().endswith(_ARCHIVES):
                continue  # it would look into an archive
            content = read_card(name) if name in _CARDS else b""
            if name == "README.md" and not content.startswith(b"---"):
                continue
            folder.joinpath(*parts[:-1]).mkdir(parents=True, exist_ok=True)
            folder.joinpath(*parts).write_bytes(content)
        files = _split_files(asked, folder, Path(made) / "cache")
    if not all(Path(file).is_relative_to(folder) for file in files):
        raise FastossError("its card names files outside of its repository", place=asked.place, hint="download them, and give them as a path")
    return [Path(file).relative_to(folder).as_posix() for file in files]


def _split_files(asked: _Asked, folder: Path, scratch: Path) -> list[str]:
    import datasets
    import yaml  # type: ignore[import-untyped]

    try:
        builder = datasets.load_dataset_builder(str(folder), name=asked.subset, cache_dir=str(scratch))
    except FileNotFoundError:
        raise FastossError("the dataset holds no data files", place=asked.place, hint=f"fastoss reads {KINDS}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, yaml.YAMLError) as problem:
        if "scripts are no longer supported" in str(problem):
            hint = "fastoss runs no code from a hub: download its data files, and give them as a path"
            raise FastossError("the dataset is a script, not files", place=asked.place, hint=hint) from None
        known = re.search(r"\[(.*)\]", str(problem))
        if not known or "onfig" not in str(problem):
            raise FastossError(f"the dataset's card cannot be understood: {_first_line(problem)}", place=asked.place) from None
        names = known[1].replace("'", "")
        fact = f"the dataset has no subset `{asked.subset}`" if asked.subset else "the dataset has several subsets, and none is the default"
        raise FastossError(fact, place=asked.place, hint=f"set subset to one of: {names}") from None
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if asked.split not in splits:
        hint = f"it has {', '.join(splits)}" + ("; max_rows takes the first rows of one" if "[" in asked.split else "")
        raise FastossError(f"the dataset has no split `{asked.split}`", place=asked.place, hint=hint)
    return splits[asked.split]


def _split_in_cache(asked: _Asked, folder: Path) -> list[str]:
    """The split as a folder of the cache has it. What is missing there may stand on the hub: `NotCached`."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    try:
        return _split_of(asked, names, lambda name: (folder / name).read_bytes())
    except FastossError as problem:
        raise _not_cached(asked, f"in the cache, {problem.fact}") from None


def _first_line(problem: BaseException) -> str:
    return (str(problem) or type(problem).__name__).strip().splitlines()[0]


def _recorded(asked: _Asked, commit: str) -> dict[str, Any]:
    """Which files made up the split when the hub was there: so that they are the same without it."""
    try:
        entry = read_json(asked.record).get(asked.key(commit), {})
    except (FastossError, AttributeError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _record(asked: _Asked, commit: str, entry: dict[str, Any]) -> None:
    with file_lock(asked.record.with_suffix(".lock")):
        try:
            entries = dict(read_json(asked.record))
        except (FastossError, TypeError, ValueError):
            entries = {}
        if entries.get(asked.key(commit)) != entry:
            write_json(asked.record, {**entries, asked.key(commit): entry})


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _hf(asked: _Asked) -> HubData:
    commit, note = _hf_commit(asked)
    if note or _offline():
        return _hf_cached(asked, commit, note)
    fetch = functools.partial(_hf_fetch, asked, commit)
    files = _recorded(asked, commit).get("files")
    if not files:
        try:
            _hf_ask(asked)
        except NotCached as problem:
            with contextlib.suppress(NotCached):
                return _hf_cached(asked, commit)
            raise problem from None
        from huggingface_hub import HfApi

        with _hf_errors(asked):
            names = HfApi().list_repo_files(asked.name, repo_type="dataset", revision=commit)
        files = _split_of(asked, names, lambda name: fetch(name).read_bytes())
        _record(asked, commit, {"files": files})
    return HubData(commit, tuple(files), fetch, note)


@functools.cache
def _hf_commit(asked: _Asked) -> tuple[str, str | None]:
    """The commit of a branch or tag, and a note when the hub could not be asked for it."""
    if asked.revision and _COMMIT.fullmatch(asked.revision):
        return asked.revision, None
    if _offline():
        return _hf_cached_commit(asked, "offline (HF_HUB_OFFLINE)")
    try:
        return _hf_ask(asked), None
    except NotCached as problem:
        return _hf_cached_commit(asked, problem.why)


@functools.cache
def _hf_ask(asked: _Asked) -> str:
    """Ask the hub for the commit, once and not patiently: the downloads that follow try again for half a minute."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    _quiet()
    with _hf_errors(asked):
        commit: str = HfApi().dataset_info(asked.name, revision=asked.revision, timeout=_TIMEOUT_S).sha
        with contextlib.suppress(EntryNotFoundError):
            # Tells whether we may read it, and leaves the branch's commit in the hub's cache for the day without network.
            hf_hub_download(asked.name, "README.md", repo_type="dataset", revision=asked.revision or "main")
    return commit


def _hf_fetch(asked: _Asked, commit: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    _quiet()
    with _hf_errors(asked):
        return Path(hf_hub_download(asked.name, file, repo_type="dataset", revision=commit))


def _quiet() -> None:
    """Progress bars are for people: none where stderr is a file."""
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _hf_cache(asked: _Asked) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"datasets--{asked.name.replace('/', '--')}"


def _hf_cached_commit(asked: _Asked, why: str) -> tuple[str, str | None]:
    """The commit of a branch or tag when it was last seen; for the main branch else the newest in the cache."""
    folder = _hf_cache(asked)
    reference = folder / "refs" / (asked.revision or "main")
    if reference.is_file():
        commit, what = reference.read_text().strip(), "as it was last seen"
    else:
        snapshots = sorted((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
        if asked.revision or not snapshots:
            raise _not_cached(asked, why)
        commit, what = snapshots[-1].name, "the newest in the cache"
    return commit, f"{asked.place} is read at commit {commit[:7]}, {what}: {why}"


def _hf_cached(asked: _Asked, commit: str | None = None, note: str | None = None) -> HubData:
    """The split from the cache alone: as recorded, else as the snapshot has it that another tool fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if commit is None:
        full = asked.revision is not None and _COMMIT.fullmatch(asked.revision)
        commit, note = (asked.revision or "", None) if full else _hf_cached_commit(asked, "")
    files = _recorded(asked, commit).get("files")
    if not files:
        folder = _hf_cache(asked) / "snapshots" / commit
        if not folder.is_dir():
            raise _not_cached(asked, "")
        files = _split_in_cache(asked, folder)
        note = "; ".join(filter(None, [note, f"its split `{asked.split}` is taken to be the {len(files)} of its files that the cache holds"]))

    def fetch(file: str) -> Path:
        try:
            return Path(hf_hub_download(asked.name, file, repo_type="dataset", revision=commit, local_files_only=True))
        except LocalEntryNotFoundError:
            raise _not_cached(asked, f"{file} is missing in the cache") from None

    return HubData(commit, tuple(files), fetch, note)


@contextlib.contextmanager
def _hf_errors(asked: _Asked) -> Iterator[None]:
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
        raise _not_cached(asked, type(problem.__cause__ or problem).__name__) from None
    except errors.EntryNotFoundError as problem:
        raise FastossError(f"the hub has not all its files: {_first_line(problem)}", place=asked.place) from None
    except errors.HfHubHTTPError as problem:
        status = problem.response.status_code if problem.response is not None else 0
        if status in (401, 403):
            raise FastossError(f"the hub does not let us read it ({status})", place=asked.place, hint=private) from None
        raise _not_cached(asked, f"it answers {status}") from None
    except (httpx.HTTPError, ConnectionError, TimeoutError) as problem:
        raise _not_cached(asked, type(problem).__name__) from None


# --- ModelScope ------------------------------------------------------------------------------------------------------


def _modelscope(asked: _Asked) -> HubData:
    hub = _modelscope_hub(asked)
    revision = asked.revision or "master"
    try:
        with _modelscope_errors(asked, hub):
            endpoint = hub.HubApi().resolve_endpoint_for_read(asked.name, repo_type="dataset")
            api = hub.HubApi(endpoint=endpoint)
            listed = {entry.path: entry for entry in api.list_repo_files(asked.name, "dataset", revision=revision) if entry.type != "tree"}
    except NotCached as problem:
        return _modelscope_cached(asked, problem.why)

    def fetch(file: str) -> Path:
        # The cache is named by branch: with size and hash an older file is seen as such, and fetched again.
        told = {"expected_sha256": listed[file].sha256, "file_size": listed[file].size}
        bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with _modelscope_errors(asked, hub), bars:
            return Path(api.download_file(asked.name, "dataset", file, revision=revision, **told))

    files = _split_of(asked, listed, lambda name: fetch(name).read_bytes())
    _record(asked, revision, {"files": files})
    return HubData(_content_hash({file: listed[file].sha256 or listed[file].blob_id for file in files}), tuple(files), fetch)


def _content_hash(hashes: dict[str, str]) -> str:
    """What stands for a commit: one hash over the files' names and SHA-256."""
    return hashlib.sha256("".join(f"{file}\0{hashes[file]}\n" for file in sorted(hashes)).encode()).hexdigest()


def _modelscope_folder(asked: _Asked, why: str) -> tuple[Path, list[str]]:
    """The folder in ModelScope's cache, and the split's files in it."""
    hub = _modelscope_hub(asked)
    revision = asked.revision or "master"
    try:
        folder = Path(hub.HubApi().download_repo(asked.name, "dataset", revision=revision, local_files_only=True))
    except hub.CacheNotFound:
        raise _not_cached(asked, why) from None
    return folder, _recorded(asked, revision).get("files") or _split_in_cache(asked, folder)


def _modelscope_cached(asked: _Asked, why: str) -> HubData:
    folder, files = _modelscope_folder(asked, why)
    hashes = {}
    for file in files:
        if not (folder / file).is_file():
            raise _not_cached(asked, f"{file} is missing in the cache")
        hashes[file] = file_digest(folder / file)
    return HubData(_content_hash(hashes), tuple(files), lambda file: folder / file, f"{asked.place} is read from the cache: {why}")


def _modelscope_hub(asked: _Asked) -> Any:
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
def _modelscope_errors(asked: _Asked, hub: Any) -> Iterator[None]:
    private = "check the name; for a private one set MODELSCOPE_API_TOKEN"
    try:
        yield
    except hub.NotExistError:
        what = f"no revision `{asked.revision}` of " if asked.revision else "no dataset "
        raise FastossError(f"the hub has {what}{asked.name}", place=asked.place, hint=private) from None
    except (hub.AuthenticationError, hub.PermissionDeniedError):
        raise FastossError("the hub does not let us read it", place=asked.place, hint=private) from None
    except hub.InvalidParameter as problem:
        raise FastossError(f"the hub does not understand the name: {_first_line(problem)}", place=asked.place, hint="owner/name") from None
    except (hub.HubError, ConnectionError, TimeoutError) as problem:
        raise _not_cached(asked, type(problem).__name__) from None
