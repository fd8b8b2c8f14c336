"""Where a base model's weights come from, and in which form they lie there: asked before anything large is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fastoss.data.tokenizer import SPECIAL, TOKENIZER_SHA256
from fastoss.errors import FastossError

VOCABULARY = 200_019  # ids of the tokenizer; the model has some more
_PUBLISHED = {"openai/gpt-oss-20b": "20b", "unsloth/gpt-oss-20b": "20b", "openai/gpt-oss-120b": "120b", "unsloth/gpt-oss-120b": "120b"}


def checkpoint_source(name: str, precision: str, backend: str) -> str:
    """The folder or hub id that holds a model in a precision. OpenAI publishes MXFP4, Unsloth the same in 4 bits."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if backend == "unsloth" and precision == "4bit" and name in _PUBLISHED:
        return f"unsloth/gpt-oss-{_PUBLISHED[name]}-unsloth-bnb-4bit"
    return name


def read_config(source: str) -> dict[str, Any]:
    """A checkpoint's config.json, from its folder, the hub's cache or the hub.

    Raises `FastossError` when it cannot be had, or when it is not of a gpt-oss.
    """
    path = Path(source) / "config.json" if Path(source).is_dir() else _download_config(source)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise FastossError("its config.json cannot be read", place=f"model.name = {source}") from None
    if not isinstance(config, dict) or config.get("model_type") != "gpt_oss":
        config = config if isinstance(config, dict) else {}
        raise FastossError(f"{source} is a `{config.get('model_type')}` model, not gpt_oss", place=f"model.name = {source}")
    if not isinstance(config.get("vocab_size"), int) or config["vocab_size"] < VOCABULARY:
        fact = f"{source} has a vocabulary of {config.get('vocab_size')}, OpenAI's tokenizer needs {VOCABULARY:,}"
        raise FastossError(fact, place=f"model.name = {source}")
    return config


def check_folder(folder: Path) -> None:
    """Refuse a folder without weights, or whose tokenizer is not gpt-oss's: rows would be rendered in ids it does not know."""
    place = f"model.name = {folder}"
    if not any(folder.glob("*.safetensors")):
        raise FastossError("the folder has no *.safetensors", place=place, hint="fastoss reads safetensors only")
    path = folder / "tokenizer.json"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() == TOKENIZER_SHA256:
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ids = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
        same = len(content["model"]["vocab"]) == 199_998 and all(ids.get(name) == number for number, name in SPECIAL.items())
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise FastossError("its tokenizer.json is not gpt-oss's", place=place, hint="fastoss renders with OpenAI's own tokenizer")


def _download_config(source: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    place = f"model.name = {source}"
    try:
        return Path(hf_hub_download(source, "config.json"))
    except RepositoryNotFoundError:
        hint = "check the name; for a private model set HF_TOKEN"
        raise FastossError(f"the hub has no model {source}", place=place, hint=hint) from None
    except HFValidationError:
        raise FastossError("there is no such folder, and it is not a hub id", place=place, hint='for example "openai/gpt-oss-20b"') from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as problem:
        hint = "check the network (HF_ENDPOINT names another hub), or give a local folder as model.name"
        fact = f"{source} is not in the hub's cache, and the hub cannot be reached ({type(problem).__name__})"
        raise FastossError(fact, place=place, hint=hint) from None


def checkpoint_form(config: dict[str, Any], source: str, precision: str, backend: str) -> str:
    """How the weights are stored (`mxfp4`, `bitsandbytes` or `float`), compared with the precision that is asked for.

    Raises `FastossError` where a library would load another precision than the recipe says, without a word.
    """
    form = _stored_form(config)
    place = f"model.precision = {precision}"
    if precision == "4bit" and form == "mxfp4":
        hint = 'set precision = "mxfp4", or name a checkpoint in bf16 or in 4 bits'
        raise FastossError(f"{source} holds MXFP4 weights, which would stay MXFP4", place=place, hint=hint)
    if precision == "mxfp4" and form != "mxfp4":
        raise FastossError(f"{source} does not hold MXFP4 weights", place=place, hint="name the published openai/gpt-oss checkpoint")
    if precision in ("bf16", "float32") and form == "bitsandbytes":
        hint = 'set precision = "4bit", or name a checkpoint in MXFP4 or bf16'
        raise FastossError(f"{source} holds weights in 4 bits", place=place, hint=hint)
    if form == "bitsandbytes" and backend == "transformers":
        hint = 'use backend = "unsloth"'
        raise FastossError("transformers would fill the experts of such a checkpoint with random weights", place=place, hint=hint)
    return form


def native_precision(source: str) -> str:
    """The precision that a checkpoint can be loaded in as it is (for a chat with no recipe)."""
    return {"mxfp4": "mxfp4", "bitsandbytes": "4bit"}.get(_stored_form(read_config(source)), "bf16")


def _stored_form(config: dict[str, Any]) -> str:
    return (config.get("quantization_config") or {}).get("quant_method") or "float"
