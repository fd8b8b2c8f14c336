"""A repository's files → those of a split, by the rules of `datasets`. It is asked for names alone: it does not read the rows."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from fastoss.data.reading.hub_source import Asked, first_line, not_cached
from fastoss.data.reading.rows import KINDS
from fastoss.errors import FastossError

_CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # what `datasets` reads to tell subsets and splits
_ARCHIVES = (".zip", ".tar", ".tgz", ".rar", ".7z", ".xz", ".bz2", ".lz4")


def split_of(asked: Asked, names: Iterable[str], read_card: Callable[[str], bytes]) -> list[str]:
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


def _split_files(asked: Asked, folder: Path, scratch: Path) -> list[str]:
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
            raise FastossError(f"the dataset's card cannot be understood: {first_line(problem)}", place=asked.place) from None
        names = known[1].replace("'", "")
        fact = f"the dataset has no subset `{asked.subset}`" if asked.subset else "the dataset has several subsets, and none is the default"
        raise FastossError(fact, place=asked.place, hint=f"set subset to one of: {names}") from None
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if asked.split not in splits:
        hint = f"it has {', '.join(splits)}" + ("; max_rows takes the first rows of one" if "[" in asked.split else "")
        raise FastossError(f"the dataset has no split `{asked.split}`", place=asked.place, hint=hint)
    return splits[asked.split]


def split_in_cache(asked: Asked, folder: Path) -> list[str]:
    """The split as a folder of the cache has it. What is missing there may stand on the hub: `NotCached`."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    try:
        return split_of(asked, names, lambda name: (folder / name).read_bytes())
    except FastossError as problem:
        raise not_cached(asked, f"in the cache, {problem.fact}") from None
