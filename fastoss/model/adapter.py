"""What an adapter says about itself, `fastoss.json` beside its weights: base, format settings, versions, LoRA layout, checksums.

With it a chat renders its prompts exactly as training did, a later version can tell which layout the tensors have, and an adapter
that is torn, does nothing, or belongs to another base is refused before any model is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import fastoss
from fastoss.config import FormatSettings, ModelConfig
from fastoss.data.tokenizer import TEMPLATE_SHA256, TOKENIZER_SHA256
from fastoss.errors import FastossError
from fastoss.model.checkpoint_source import read_config
from fastoss.run import file_digest, read_json, write_json

STAMP = "fastoss.json"
WEIGHTS = "adapter_model.safetensors"
_TRAIN_AGAIN = "copy it again from where it was trained, or train again"
# Of a config.json, what makes tensors fit; publishers of the same model differ in the rest.
_SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "sliding_window",
)  # fmt: skip
_SAMPLED = 1 << 16
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


def write_stamp(folder: Path, model: ModelConfig, format: FormatSettings, backend: str, source: str) -> None:
    """Write fastoss.json beside an adapter's weights. `source` is the folder or hub id of the base they were trained on."""
    weights = folder / WEIGHTS
    content = {
        "base": base_identity(source, weights=model.name != "tiny") | ({"source": "tiny"} if model.name == "tiny" else {}),
        "tokenizer_sha256": TOKENIZER_SHA256,
        "chat_template_sha256": TEMPLATE_SHA256,
        "weights": {"bytes": weights.stat().st_size, "sha256": file_digest(weights)},
        "model": model.model_copy(update={"adapter": None, "name": _lasting_name(model.name)}).model_dump(mode="json"),
        "format": format.model_dump(mode="json"),
        "backend": backend,
        # Experts' pairs have had other layouts under the same names (export/adapter_layouts.py): whoever merges must know which this is.
        "lora_layout": "peft",
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


def check_adapter(folder: Path, source: str | None = None) -> None:
    """Refuse an adapter that is torn, does nothing, or was trained with another base, tokenizer or chat template.

    `source` is the folder or hub id of the base it is to be put on, where that is known. Raises `FastossError`; loads no model.
    """
    place = str(folder)
    tensors = read_tensor_table(folder / WEIGHTS)
    content = read_json(folder / STAMP) if (folder / STAMP).is_file() else {}
    told = content.get("weights")
    if told and file_digest(folder / WEIGHTS) != told["sha256"]:
        raise FastossError(f"{WEIGHTS} is not the file that was trained (its checksum differs)", place=place, hint=_TRAIN_AGAIN)
    unpaired = sorted(name for name in tensors if "lora_A" in name and name.replace("lora_A", "lora_B") not in tensors)
    unpaired += sorted(name for name in tensors if "lora_B" in name and name.replace("lora_B", "lora_A") not in tensors)
    if unpaired:
        raise FastossError(f"`{unpaired[0]}` has no counterpart ({len(unpaired)} such tensors)", place=place, hint=_TRAIN_AGAIN)
    strange = sorted(name for name in tensors if "lora_A" not in name and "lora_B" not in name)
    if strange or not tensors:
        raise FastossError(f"`{strange[0]}` is not a LoRA tensor" if strange else "it holds no tensors", place=place, hint=_TRAIN_AGAIN)
    if _is_inert(folder / WEIGHTS, tensors):
        hint = "it was saved before a first step that changed anything; train longer, or with a learning rate above 0"
        raise FastossError("the adapter does nothing: every lora_B is zero, its replies would be the base model's", place=place, hint=hint)
    for key, ours, what in (
        ("tokenizer_sha256", TOKENIZER_SHA256, "tokenizer"), ("chat_template_sha256", TEMPLATE_SHA256, "chat template")
    ):  # fmt: skip
        if key in content and content[key] != ours:
            hint = f"it was trained by fastoss {content.get('versions', {}).get('fastoss')}: use that version"
            raise FastossError(f"the adapter was trained with another {what}", place=place, hint=hint)
    if source is not None and "base" in content:
        _check_base(content["base"], source, place)


def _check_base(told: dict[str, Any], source: str, place: str) -> None:
    now = base_identity(source, weights=told.get("weights") is not None)
    if told["config"] != now["config"]:
        fact = f"the adapter was trained on a model of another shape than {source}"
    elif told.get("weights") and now["weights"] and told["source"] == now["source"] and told["weights"] != now["weights"]:
        fact = f"the weights in {source} are not those that the adapter was trained on"
    else:
        return
    raise FastossError(fact, place=place, hint=f"its base is {told['source']}")


def base_identity(source: str, *, weights: bool = True) -> dict[str, Any]:
    """Which base a folder or hub id holds: a hash of its shape and, of a folder, of its weights' names, sizes, tables and ends.

    Reads a few hundred kB, not the weights: a fine-tuned copy differs at the ends of its shards as surely as elsewhere.
    """
    config = {key: value for key, value in read_config(source).items() if key in _SHAPE}
    folder = Path(source)
    digest = None
    if weights and folder.is_dir():
        sha = hashlib.sha256()
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            sha.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                sha.update(file.read(_SAMPLED))
                file.seek(max(0, size - _SAMPLED))
                sha.update(file.read(_SAMPLED))
        digest = sha.hexdigest()
    return {"source": source, "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(), "weights": digest}


def read_tensor_table(path: Path) -> dict[str, dict[str, Any]]:
    """Names, types, shapes and places of a safetensors file's tensors. `FastossError` when the file is torn or is none."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError
            table: dict[str, dict[str, Any]] = json.loads(file.read(length))
        table.pop("__metadata__", None)
        needed = 8 + length + max((entry["data_offsets"][1] for entry in table.values()), default=0)
    except FileNotFoundError:
        raise FastossError("file not found", place=str(path)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise FastossError("not a safetensors file, or torn", place=str(path), hint=_TRAIN_AGAIN) from None
    if size != needed:
        raise FastossError(f"the file is torn: {size:,} of {needed:,} bytes", place=str(path), hint=_TRAIN_AGAIN)
    return table


def _is_inert(path: Path, tensors: dict[str, dict[str, Any]]) -> bool:
    """Whether every lora_B is zero in every bit but the sign: read as bytes, so that no library is needed."""
    with open(path, "rb") as file:
        start = 8 + struct.unpack("<Q", file.read(8))[0]
        for name, entry in tensors.items():
            if "lora_B" in name:
                begin, end = entry["data_offsets"]
                file.seek(start + begin)
                if file.read(end - begin).strip(b"\x00\x80"):
                    return False
    return True
