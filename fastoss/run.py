"""The run directory: where everything of one run lies, and how a file or folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastoss.errors import FastossError


def cache_folder() -> Path:
    """The folder for things that can be made again (tokenizer, tiny model): `FASTOSS_CACHE`, else the XDG cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("FASTOSS_CACHE") or Path(base) / "fastoss")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        hint = "set FASTOSS_CACHE to a folder that can be written"
        raise FastossError(f"the cache folder cannot be made: {problem.strerror}", place=str(folder), hint=hint) from None
    return folder


def sync_file(path: Path) -> None:
    """Make sure a file's bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make sure that names made or renamed in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, sync it and rename it: a reader sees the old file or the new one, never half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
        else:
            sync_folder(path)
    sync_folder(folder)


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder; one that another process takes away meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def move_whole(finished: Path, final: Path) -> None:
    """Give a finished temporary folder its final name, replacing an older one; both lie on one file system."""
    sync_tree(finished)
    old = None
    if final.exists():
        old = final.with_name(f".{final.name}.{os.getpid()}.old")
        os.replace(final, old)
    os.replace(finished, final)
    sync_folder(final.parent)
    if old is not None:
        shutil.rmtree(old)


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that gets the name `final` only when the block ends without an error."""
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        move_whole(beside, final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the operating system's lock on a file; a killed process leaves none. `BlockingIOError` if it may not wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@dataclass(frozen=True)
class RunDirectory:
    """One run, one folder, readable without fastoss. The attributes are the paths in it."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.toml"

    @property
    def resolved_recipe(self) -> Path:
        return self.root / "recipe.resolved.json"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def curves(self) -> Path:
        return self.root / "curves.svg"

    @property
    def curves_png(self) -> Path:
        return self.root / "curves.png"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def profile(self) -> Path:
        return self.root / "profile.json"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def evaluation_replies(self) -> Path:
        return self.root / "evaluation.jsonl"

    @property
    def preferences(self) -> Path:
        """What people preferred in the demo: theirs, not the run's, so it outlives `clear`."""
        return self.root / "preferences.jsonl"

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.resolved_recipe.is_file()

    def is_finished(self) -> bool:
        """Whether the run came to its end: its adapter is there, whole."""
        return (self.adapter / "adapter_model.safetensors").is_file()

    def create(self) -> None:
        """Make the folder. `FastossError` when that is not allowed, or when something else lies there."""
        if self.root.is_dir() and any(self.root.iterdir()) and not self.exists():
            own = {path.name for path in (*self._files(), *self._folders(), *self.root.glob(f"{self.preferences.stem}*"))}
            foreign = [path.name for path in self.root.iterdir() if not path.name.startswith(".") and path.name not in own]
            if foreign:
                hint = "choose another place with --output, or move these files away"
                raise FastossError(f"the folder is not a run, and not empty ({foreign[0]}, …)", place=str(self.root), hint=hint)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / ".lock").touch()
        except OSError as problem:
            hint = "choose another place with --output"
            raise FastossError(f"cannot write: {problem.strerror}", place=str(self.root), hint=hint) from None

    def clear(self) -> None:
        """Remove what a run wrote, and nothing else, so that it starts over."""
        torn = [*self.root.glob(".*.tmp"), *self.root.glob(".*.old")]  # what a kill left of a file or folder
        for path in (*self._folders(), *(path for path in torn if path.is_dir())):
            shutil.rmtree(path, ignore_errors=True)
        for path in (*(path for path in torn if not path.is_dir()), *self._files()):
            path.unlink(missing_ok=True)

    def _folders(self) -> tuple[Path, ...]:
        return (
            self.checkpoints,
            self.adapter,
            self.root / "exports",
            *(self.root / tracker for tracker in ("tensorboard", "wandb", "swanlab", "mlflow")),
        )

    def _files(self) -> tuple[Path, ...]:
        """The resolved recipe comes last: while it is there, the folder is known as a run."""
        evaluated = self.evaluation, self.evaluation_replies
        pictures = self.curves, self.curves_png, self.report
        made = self.metrics, self.samples, self.log, self.profile, self.plan, *pictures, *evaluated
        return self.recipe, self.manifest, *made, self.resolved_recipe

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this run for one process (a tree of ranks holds it through rank 0)."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self.root / ".lock", wait=False))
            except BlockingIOError:
                hint = "wait for it to end, or give this one another place with --output"
                raise FastossError("another process is training in this run directory", place=str(self.root), hint=hint) from None
            yield


def read_lines(path: Path) -> list[str]:
    """The lines of a JSONL file, empty ones left out; a tear of a kill may stand in the last.

    A line feed alone ends a line: `str.splitlines` would also cut at U+2028 or U+0085, which JSON leaves as they are within a text.
    """
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]


def read_json_lines(path: Path) -> list[Any]:
    """The values of a JSONL file that appeared whole. `ValueError` where a line is torn."""
    return [json.loads(line) for line in read_lines(path)]


def read_json(path: Path) -> Any:
    """Read a JSON file of ours. `FastossError` with the place when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FastossError("file not found", place=str(path)) from None
    except (OSError, ValueError) as problem:
        raise FastossError(f"cannot be read: {problem}", place=str(path)) from None
