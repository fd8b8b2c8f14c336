"""Exports → a hub repository. The folder is finished and verified before the first byte leaves; a push that fails does not affect the export."""

from __future__ import annotations

import os
from pathlib import Path

from fastoss.errors import FastossError, RunFailed
from fastoss.export.merge import Progress
from fastoss.export.verify import RESULT
from fastoss.run import read_json, size_of
from fastoss.terminal import disk_size, working

_LARGE = 5_000_000_000


def check_push(repo: str) -> str:
    """The repository's full name, with the token's owner for `{HF_USER}`. Asked before anything is exported.

    Raises `FastossError` without a token (HF_TOKEN or `hf auth login`; never an argument), or when the hub refuses it.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    place = f"--push {repo}"
    if get_token() is None:
        raise FastossError("no token for the hub", place=place, hint="set HF_TOKEN, or run `hf auth login`")
    if "{HF_USER}" in repo or "/" not in repo:
        try:
            user = os.environ.get("HF_USER") or HfApi().whoami()["name"]
        except Exception as problem:
            raise FastossError(f"the hub does not say whose token it is: {type(problem).__name__}", place=place, hint="check HF_TOKEN") from None
        repo = repo.replace("{HF_USER}", user) if "{HF_USER}" in repo else f"{user}/{repo}"
    try:
        validate_repo_id(repo)
    except HFValidationError as problem:
        raise FastossError(str(problem).splitlines()[0], place=place) from None
    return repo


def push(folder: Path, repo: str, progress: Progress, *, private: bool = True) -> str:
    """Upload a verified export. What was uploaded before is not uploaded again; the address comes back.

    Raises `RunFailed` when the hub fails; the export stays as it is.
    """
    from huggingface_hub import HfApi

    verdict = read_json(folder / RESULT)
    if not verdict.get("passed"):
        raise FastossError("the export's verification failed, it is not pushed", place=str(folder))
    api = HfApi()
    total = size_of(folder)
    progress(f"uploading {folder.name} to {repo} …")
    try:
        with working(f"uploading {disk_size(total)}", draw=False, tell=progress):  # in a terminal the hub's client draws bars
            api.create_repo(repo, private=private, exist_ok=True)
            if total > _LARGE:
                # Keeps its place in .cache/huggingface beside the files, so that the same command resumes after a break.
                api.upload_large_folder(repo_id=repo, folder_path=folder, repo_type="model", print_report=False)
            else:
                api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"fastoss export: {verdict['format']}")
    except Exception as problem:  # whatever the network or the hub raises
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        hint = "the export is whole; run the same push again to resume it: fastoss push"
        raise RunFailed(f"the push failed: {first}", place=repo, hint=hint) from None
    return f"{api.endpoint}/{repo}"
