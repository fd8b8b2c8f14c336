"""The story of an export: plan, merge, write, verify, card, push. A format appears under its name verified, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastoss.config import recipe_of_run
from fastoss.errors import FastossError, RunFailed
from fastoss.export.adapter_layouts import WEIGHTS, write_adapter
from fastoss.export.card import card
from fastoss.export.export_plan import check_plan, plan_export
from fastoss.export.gguf_file import Quantization, check_quantization, write_gguf
from fastoss.export.merge import Progress, write_companions, write_merged, write_mxfp4
from fastoss.export.ollama import MODELFILE, modelfile
from fastoss.export.subject import Subject, load_subject
from fastoss.export.templates import export_template
from fastoss.export.upload import check_push, push
from fastoss.export.verify import FORMATS, RESULT, Verification, format_of, threads, verify
from fastoss.inference.llama_cpp import check_llama_cpp
from fastoss.model.adapter import STAMP, library_versions
from fastoss.run import RunDirectory, file_digest, file_lock, read_json, whole_folder, write_json, write_whole

_OWN_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.(?P<pid>\d+)\.(tmp|old)$")


def export(
    name: str, formats: Sequence[str], *, output: Path | None = None, quantization: str = "mxfp4", push_to: str | None = None,
    base: str | None = None, dry_run: bool = False, progress: Progress,
) -> list[Path]:  # fmt: skip
    """Export a run (or an adapter's folder) in some formats, each into `<output>/<format>`; the folders come back.

    Raises `FastossError` for bad input or a machine too small, before anything is written, and `RunFailed` when writing fails or
    the verification does: then nothing lies under the final name.
    """
    formats = _check_formats(formats)
    kind = check_quantization(quantization)
    if "gguf" in formats:
        _check_gguf()
    repo = check_push(push_to) if push_to and not dry_run else None
    started = time.monotonic()
    subject = load_subject(name, base=base, progress=progress)
    final = output or (subject.run.root / "exports" if subject.run else subject.adapter.folder.parent / "exports")
    places = {format: final / format for format in formats}
    scored = sum(len(question.reply) for question in subject.questions)
    plans = plan_export(subject.base, subject.adapter, formats, kind, scored)
    progress(f"{len(subject.adapter.names())} weights changed by LoRA, merged in float32 into {subject.source}")
    for plan in plans:
        progress(f"plan: {plan.line()}")
    check_plan(plans, final)
    if dry_run:
        return []
    done = []
    with _opened(final), threads():
        for format, place in places.items():
            _check_place(place)
            done.append(_export_one(subject, format, kind, place, progress))
    progress(f"exported and verified in {time.monotonic() - started:.0f} s")
    for folder in done if repo else []:
        assert repo is not None
        progress(f"pushed: {push(folder, repo if len(done) == 1 else f'{repo}-{folder.name}', progress)}")
    return done


def _export_one(subject: Subject, format: str, quantization: Quantization, place: Path, progress: Progress) -> Path:
    try:
        with whole_folder(place) as folder:
            _write(subject, format, quantization, folder, progress)
            result = verify(folder, format, subject)
            for line in result.lines():
                progress(f"{format}: {line}")
            _check_verdict(result, place)
            write_json(
                folder / RESULT, result.to_plain() | {"adapter_sha256": file_digest(subject.adapter.folder / WEIGHTS), "versions": library_versions()}
            )
            write_whole(folder / "README.md", card(subject, result))
    except OSError as problem:
        hint = "make room, or name another place with --output" if problem.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise RunFailed(f"the export cannot be written: {problem.strerror or problem}", place=str(place), hint=hint) from problem
    return place


def _write(subject: Subject, format: str, quantization: Quantization, folder: Path, progress: Progress) -> None:
    template = export_template(subject.stamp.format)
    if format == "adapter":
        write_adapter(subject.adapter, folder)
        write_companions(subject.base, folder, subject.base.config, template)
        (folder / "config.json").unlink()  # beside an adapter it would make the folder look like a whole model
        _name_base(folder, subject)
    elif format == "merged":
        write_merged(subject.merged, folder, template, progress)
    elif format == "mxfp4":
        write_mxfp4(subject.merged, folder, template, progress)
    else:
        title = subject.recipe.name if subject.recipe else subject.adapter.folder.name
        file = f"model-{quantization}.gguf"
        write_gguf(subject.merged, folder / file, quantization, template, title, progress)
        write_whole(folder / MODELFILE, modelfile(file, subject.stamp.format, max(8192, subject.stamp.model.max_length)))
    write_json(folder / STAMP, _stamp(subject, format, folder))


def _stamp(subject: Subject, format: str, folder: Path) -> dict[str, Any]:
    """Base, format settings, versions and layout: what a chat with the export, and a later version of fastoss, must know."""
    kept: dict[str, Any] = {}
    if format == "adapter":
        told, weights = read_json(subject.adapter.folder / STAMP), folder / WEIGHTS
        kept = {key: told[key] for key in ("base", "tokenizer_sha256", "chat_template_sha256", "backend") if key in told}
        kept["weights"] = {"bytes": weights.stat().st_size, "sha256": file_digest(weights)}
    return kept | {
        "model": subject.stamp.model.model_copy(update={"name": subject.source, "adapter": None}).model_dump(mode="json"),
        "format": subject.stamp.format.model_dump(mode="json"),
        "export": format,
        "lora_layout": "peft" if format == "adapter" else None,
        "versions": library_versions(),
    }


def _name_base(folder: Path, subject: Subject) -> None:
    """The adapter's config names the original base, not a folder of this machine's cache."""
    path = folder / "adapter_config.json"
    if not subject.source.startswith(("/", ".")):
        write_json(path, read_json(path) | {"base_model_name_or_path": subject.source})


def _check_verdict(result: Verification, place: Path) -> None:
    if not result.passed:
        problems = result.all_problems()
        raise RunFailed(f"the verification failed: {problems[0]}", place=str(place), also=problems[1:6], hint="nothing was left under this name")


def _check_formats(formats: Sequence[str]) -> list[str]:
    wanted = list(dict.fromkeys(formats))
    for format in wanted:
        if format not in FORMATS:
            raise FastossError("there is no such format", place=f"--format {format}", hint=f"one or several of {', '.join(FORMATS)}")
    if not wanted:
        raise FastossError("no format", place="--format", hint=f"one or several of {', '.join(FORMATS)}")
    return wanted


def _check_gguf() -> None:
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise FastossError("the gguf library is not installed", place="--format gguf", hint="pip install 'fastoss[gguf]'")
    check_llama_cpp("--format gguf", "is verified")


def _check_place(place: Path) -> None:
    """An older export may be replaced, nothing else."""
    if place.exists() and any(place.iterdir()) and not (place / RESULT).is_file():
        raise FastossError("the folder holds something other than an export", place=str(place), hint="name another place with --output")


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[None]:
    """Hold the exports' folder for one process, and remove what a killed one left there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise FastossError(f"cannot write: {problem.strerror}", place=str(folder), hint="name another place with --output") from None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder / ".lock", wait=False))
        except BlockingIOError:
            raise FastossError(
                "another process is exporting to this folder", place=str(folder), hint="wait for it, or choose another --output"
            ) from None
        for path in folder.iterdir():
            found = _OWN_TEMPORARY.match(path.name)
            if found and path.is_dir() and found["name"] in FORMATS and not _is_running(int(found["pid"])):
                shutil.rmtree(path, ignore_errors=True)
        yield


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def verify_export(path: Path, against: str, *, base: str | None = None, progress: Progress) -> Verification:
    """Verify an export that lies there. Raises `FastossError` when there is none, or nothing to hold it against."""
    if not path.exists():
        raise FastossError("there is no such folder", place=str(path), hint="name a folder such as runs/<name>/exports/merged")
    format = format_of(path)
    if format == "gguf":
        _check_gguf()
    subject = load_subject(against, base=base, progress=progress)
    with threads():
        return verify(path, format, subject)


def push_run(name: str, formats: Sequence[str], repo: str | None, *, progress: Progress) -> list[str]:
    """Push the exports that a run has (or those of these formats), verified before. `FastossError` when there are none."""
    root = Path(name).expanduser()
    if (root / RESULT).is_file():
        found = [root]
    else:
        found = [root / "exports" / format for format in (_check_formats(formats) if formats else FORMATS)]
        missing = [folder for folder in found if formats and not (folder / RESULT).is_file()]
        if missing:
            raise FastossError("it has not been exported", place=str(missing[0]), hint=f"fastoss export {name} --format {missing[0].name}")
        found = [folder for folder in found if (folder / RESULT).is_file()]
    if not found:
        raise FastossError("there is no export to push", place=name, hint=f"fastoss export {name} --format merged")
    for folder in found if (root / "adapter" / WEIGHTS).is_file() else []:
        if read_json(folder / RESULT).get("adapter_sha256") != file_digest(root / "adapter" / WEIGHTS):
            hint = f"fastoss export {name} --format {folder.name}"
            raise FastossError("the run was trained again after it was exported", place=str(folder), hint=hint)
    wanted = repo or _recipe_repo(root)
    if wanted is None:
        raise FastossError("no repository", place="--repo", hint="name one, or set hub.repo in the recipe")
    full = check_push(wanted)
    return [push(folder, full if len(found) == 1 else f"{full}-{folder.name}", progress) for folder in found]


def _recipe_repo(root: Path) -> str | None:
    recipe = recipe_of_run(RunDirectory(root))
    return recipe.hub.repo if recipe else None
