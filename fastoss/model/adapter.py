"""What an adapter must say of itself, `fastoss.json` beside its weights: base, format settings, versions, LoRA layout.

With it a chat renders its prompts exactly as training did, and a later version can tell which layout the tensors have.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

import fastoss
from fastoss.config import FormatSettings, ModelConfig
from fastoss.errors import FastossError
from fastoss.run import read_json, write_json

STAMP = "fastoss.json"
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "triton", "unsloth", "unsloth_zoo", "bitsandbytes")


@dataclass(frozen=True)
class AdapterStamp:
    """The base model and the chat format that an adapter was trained with."""

    model: ModelConfig
    format: FormatSettings


def library_versions() -> dict[str, str]:
    """Versions of fastoss and of what it stands on, as installed."""
    versions = {"fastoss": fastoss.__version__}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_stamp(folder: Path, model: ModelConfig, format: FormatSettings, backend: str) -> None:
    content = {
        "model": model.model_copy(update={"adapter": None, "name": _lasting_name(model.name)}).model_dump(mode="json"),
        "format": format.model_dump(mode="json"),
        "backend": backend,
        # PEFT 0.19 turned lora_B of fused experts round; whoever loads or merges must know which one this is.
        "lora_layout": "peft-0.19",
        "versions": library_versions(),
    }
    write_json(folder / STAMP, content)


def _lasting_name(name: str) -> str:
    """A folder's name as it is understood from everywhere."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def read_stamp(folder: Path) -> AdapterStamp:
    """`FastossError` when the adapter was not made by fastoss, or by another version."""
    path = folder / STAMP
    if not path.is_file():
        hint = "fastoss chats with the adapters it trained; others do not say which date and effort they know"
        raise FastossError(f"the adapter has no {STAMP}", place=str(folder), hint=hint)
    content = read_json(path)
    try:
        return AdapterStamp(ModelConfig.model_validate(content["model"]), FormatSettings.model_validate(content["format"]))
    except (KeyError, TypeError, ValidationError):
        raise FastossError("not understood", place=str(path), hint="the adapter was made by another version of fastoss") from None
