"""Source → rows: finds a source's files, on this machine or a hub, and reads them piece by piece. Formats take it from here."""

from __future__ import annotations

import difflib
import functools
import glob
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from fastoss.config import DataSource
from fastoss.data.reading.arrow_files import read_parquet
from fastoss.data.reading.csv_files import read_csv
from fastoss.data.reading.hub import NotCached, hub_data, hub_revision, is_cached, is_hub
from fastoss.data.reading.json_files import read_json, read_jsonl
from fastoss.data.reading.rows import KINDS, BadRow, Row, kind_of, shown, spelled
from fastoss.errors import FastossError
from fastoss.run import file_digest

__all__ = [
    "BadRow", "NotCached", "Row", "hub_revision", "is_cached", "read_rows", "shown", "source_identity", "source_notes",
    "source_revisions", "unread_files",
]  # fmt: skip


def read_rows(source: DataSource, *, sample: bool = False) -> Iterator[Row | BadRow]:
    """Yield the rows of a source in file order, at most `max_rows`; files of a folder or glob in the order of their names.

    An unreadable row is yielded as a `BadRow`, so that the caller can count it. Raises `FastossError` when a file is
    missing, is of an unknown kind, is empty, or is something else than its name says; `NotCached` when a hub is needed
    and cannot be reached.
    """
    source = _chosen(source, sample)
    count = 0
    for path, name in _files(source):
        before = count
        try:
            for row in _read_file(path, name, source):
                yield row
                count += 1
                if count == source.max_rows:
                    return
        except (OSError, EOFError, zlib.error) as problem:
            raise _unreadable(problem, name) from None
        if count == before:
            raise FastossError("the file has no rows", place=name)


def _unreadable(problem: Exception, name: str) -> FastossError:
    """What the system says of a file that it cannot open, or a library of one that is damaged."""
    reason = getattr(problem, "strerror", None)
    if reason:
        return FastossError(f"cannot be read: {reason}", place=name)
    reason = (str(problem).splitlines() or [type(problem).__name__])[0]
    return FastossError(f"cannot be read: {reason}", place=name, hint="the file is damaged or cut short: fetch or write it again")


def _read_file(path: Path, name: str, source: DataSource) -> Iterator[Row | BadRow]:
    kind = kind_of(path.name)
    if kind == ".jsonl":
        return read_jsonl(path, name)
    if kind == ".json":
        return read_json(path, name)
    if kind == ".csv":
        return read_csv(path, name, source.columns)
    return read_parquet(path, name)


def source_identity(source: DataSource, *, sample: bool = False) -> str:
    """What a source holds, as a short text: `sha256:…` over names and contents of files, `hf:NAME@commit/subset/split` of a hub.

    Two sources of one identity give the same rows, wherever they lie. Raises as `read_rows` does.
    """
    source = _chosen(source, sample)
    if is_hub(source.source):
        return f"{source.source}@{hub_data(source).commit}/{source.subset or 'default'}/{source.split}"
    digest = hashlib.sha256()
    files = list(_files(source))
    root = os.path.commonpath([path.parent for path, _ in files])
    for path, name in files:
        try:
            status = path.stat()
            content = _file_digest(path, status.st_size, status.st_mtime_ns, status.st_ino)
        except OSError as problem:
            raise _unreadable(problem, name) from None
        digest.update(os.fsencode(path.relative_to(root)) + f"\0{status.st_size}\0{content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


@functools.lru_cache(maxsize=4096)
def _file_digest(path: Path, size: int, changed_ns: int, number: int) -> str:
    """A hash of a file's content; asked again of an untouched file, it is not read again."""
    return file_digest(path)


def source_revisions(sources: Iterable[DataSource], *, sample: bool = False) -> dict[str, str]:
    """The commit of each hub dataset among the sources, for the manifest."""
    chosen = [_chosen(source, sample) for source in sources]
    return {source.source: hub_data(source).commit for source in chosen if is_hub(source.source)}


def source_notes(source: DataSource, *, sample: bool = False) -> list[str]:
    """What is to be said of how a source was found: a hub that could not be asked, files of a folder that are no data."""
    source = _chosen(source, sample)
    if is_hub(source.source):
        note = hub_data(source).note
        return [note] if note else []
    left = unread_files(source)
    if not left:
        return []
    some = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
    return [f"{len(left)} {'file' if len(left) == 1 else 'files'} of {shown(Path(source.source))} not read, because they are no data files: {some}"]


def unread_files(source: DataSource, *, sample: bool = False) -> list[str]:
    """The files below a source's folder that are passed over because they are no data files, hidden ones aside."""
    source = _chosen(source, sample)
    folder = Path(source.source)
    if is_hub(source.source) or not folder.is_dir():
        return []
    return [spelled(str(path.relative_to(folder))) for path in _below(folder) if not kind_of(path.name)]


def _chosen(source: DataSource, sample: bool) -> DataSource:
    """The source itself, or its sample where that is asked for and named."""
    return source.model_copy(update={"source": source.sample}) if sample and source.sample else source


def _files(source: DataSource) -> Iterator[tuple[Path, str]]:
    """The files of a source, and the names to show for them. A hub's files are fetched one by one, as they are asked for."""
    if is_hub(source.source):
        data = hub_data(source)
        for file in data.files:
            yield data.fetch(file), f"{source.source}@{data.commit[:7]}/{file}"
    else:
        try:
            paths = _local_files(Path(source.source))
        except OSError as problem:  # a folder that may not be entered, a name that is too long
            raise _unreadable(problem, shown(Path(problem.filename or source.source))) from None
        for path in paths:
            yield path, shown(path)


def _below(folder: Path) -> list[Path]:
    """All files below a folder in the order of their names, without what is hidden. `OSError` where a folder may not be read."""
    hidden = (".", "__MACOSX")
    found: list[Path] = []

    def refuse(problem: OSError) -> NoReturn:  # pathlib would pass over it without a word
        raise problem

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(hidden)]
        found += [Path(parent, name) for name in names if not name.startswith(hidden)]
    return sorted(path for path in found if path.is_file())


def _local_files(path: Path) -> list[Path]:
    """The files that a path names: itself, all data files below a folder, or those that a glob matches."""
    if path.is_dir():
        files = [file for file in _below(path) if kind_of(file.name)]
        if not files:
            raise FastossError(f"the folder holds no data file ({KINDS})", place=shown(path))
        return files
    if not path.exists() and any(letter in str(path) for letter in "*?["):
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
        if not files:
            raise FastossError("no file matches", place=shown(path), hint="data paths are relative to the recipe file")
    elif not path.exists():
        raise FastossError("data file not found", place=shown(path), hint=_instead_of(path))
    elif not path.is_file():
        raise FastossError("not a file or folder", place=shown(path))
    else:
        files = [path]
    for file in files:
        if not kind_of(file.name):
            ending = "".join(file.suffixes[-2:]) if file.suffix.lower() in (".gz", ".zst") else file.suffix
            kind = f"a `{ending}` file" if ending else "a file without an extension"
            raise FastossError(f"{kind} cannot be read as data", place=shown(file), hint=f"give {KINDS}")
    return files


def _instead_of(path: Path) -> str:
    """What to do about a file that is not there. Names are compared without their endings: those make all of them alike."""
    if any(part in ("http:", "https:") for part in path.parts):
        return "download it first: only files and hubs are read"
    beside = [entry.name for entry in sorted(path.parent.iterdir()) if kind_of(entry.name) or entry.is_dir()] if path.parent.is_dir() else []
    beside.sort(key=lambda name: name.endswith(path.suffix))  # of two with one stem, the one with our ending is taken
    stems = {name.partition(".")[0].lower(): spelled(name) for name in beside}
    close = difflib.get_close_matches(path.name.partition(".")[0].lower(), stems, n=1, cutoff=0.6)
    return f"did you mean {stems[close[0]]}?" if close else "data paths are relative to the recipe file"
