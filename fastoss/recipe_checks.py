"""Cross-checks of a recipe: keys that contradict each other, and settings that cannot be honoured. Called by `load_recipe`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastoss.errors import FastossError
from fastoss.recipe_errors import RecipeSource

if TYPE_CHECKING:
    from fastoss.config import DataSource, DpoSettings, Recipe

TOKENS_PER_BATCH = 16384  # where the recipe names neither tokens nor rows of a batch

# Settings of the design that this version cannot honour yet: refused, never ignored.
_NOT_YET: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (
        ("distributed", "strategy"),
        "zero2",
        'use strategy = "ddp": ZeRO-2 keeps all weights on every card too, and LoRA has little else (docs/scaling.md)',
    ),
    (("distributed", "strategy"), "zero3", 'use strategy = "fsdp", which shares out the same (docs/scaling.md)'),
)

_GPT_OSS_NAME = re.compile(r"gpt[-_]?oss", re.IGNORECASE)
_SCHEDULER_KEYS = {"cosine_with_min_lr": {"min_lr", "min_lr_rate", "num_cycles"}, "cosine": {"num_cycles"}}


def cross_check(recipe: Recipe, source: RecipeSource) -> None:
    """Refuse what is well-formed but cannot be meant or honoured. Raises `FastossError` with file, line and hint."""

    def refuse(key: tuple[str, ...], fact: str, hint: str | None = None) -> None:
        raise FastossError(fact, place=source.place(key), hint=hint)

    # What was written is refused for what it says, before what this version cannot do yet.
    if recipe.dpo is not None and recipe.method == "sft":
        refuse(("dpo",), '`[dpo]` belongs to method = "dpo", and this recipe says method = "sft"', "remove the section, or change the method")
    if recipe.dpo is not None:
        _check_dpo(recipe.dpo, refuse)
    for key, value, hint in _NOT_YET:
        have: Any = recipe
        for part in key:
            have = getattr(have, part)
        if have == value:
            shown = "true" if value is True else f'"{value}"'
            refuse(key, f"`{'.'.join(key)} = {shown}` is not available in this version", hint)

    _check_model_name(recipe.model.name, refuse)
    if recipe.model.backend == "transformers" and recipe.model.precision == "mxfp4" and recipe.model.name != "tiny":
        hint = 'use precision = "bf16", or backend = "unsloth"'
        refuse(("model", "precision"), "transformers cannot train on packed MXFP4 weights", hint)

    if recipe.distributed.strategy == "fsdp":
        _check_shared_out(recipe, refuse)
    elif recipe.distributed.host_layers:
        hint = 'set strategy = "fsdp", or remove it'
        refuse(("distributed", "host_layers"), 'under strategy = "ddp" every card holds the whole base', hint)

    lora, train = recipe.lora, recipe.train
    if len(set(lora.targets)) != len(lora.targets):
        refuse(("lora", "targets"), "a target is named twice")
    if lora.lora_dropout and "experts" in lora.targets:
        hint = 'set lora_dropout = 0.0, or targets = ["attention"]'
        refuse(("lora", "lora_dropout"), "LoRA on fused experts supports no dropout", hint)
    if lora.expert_layers != "all" and "experts" not in lora.targets:
        refuse(("lora", "expert_layers"), '`expert_layers` is given, but "experts" is not among the targets', 'targets = ["attention", "experts"]')
    layers = _layers(recipe.model.name)
    if layers and lora.expert_layers != "all" and max(lora.expert_layers) >= layers:
        fact = f"`expert_layers` names layer {max(lora.expert_layers)}, {recipe.model.name} has {layers}"
        refuse(("lora", "expert_layers"), fact, f"the layers are 0 to {layers - 1}")

    if train.tokens_per_batch is not None and train.per_device_train_batch_size is not None:
        hint = "keep one: tokens_per_batch fills batches by tokens, per_device_train_batch_size by rows"
        refuse(("train", "per_device_train_batch_size"), "`tokens_per_batch` and `per_device_train_batch_size` contradict each other", hint)
    if train.per_device_train_batch_size is None and (train.tokens_per_batch or TOKENS_PER_BATCH) < recipe.model.max_length:
        fact = f"a batch of {train.tokens_per_batch or TOKENS_PER_BATCH:,} tokens cannot hold a row of max_length {recipe.model.max_length:,}"
        key = ("train", "tokens_per_batch") if train.tokens_per_batch else ("model", "max_length")
        refuse(key, fact, "raise tokens_per_batch, or lower model.max_length")
    if train.warmup_steps >= 1 and train.warmup_steps != int(train.warmup_steps):
        refuse(("train", "warmup_steps"), f"{train.warmup_steps} is neither a whole number of steps nor a share below 1")
    unknown = set(train.lr_scheduler_kwargs or {}) - _SCHEDULER_KEYS.get(train.lr_scheduler_type, set())
    if unknown:
        known = ", ".join(sorted(_SCHEDULER_KEYS.get(train.lr_scheduler_type, set()))) or "none"
        fact = f"`{min(unknown)}` is not a setting of the {train.lr_scheduler_type} schedule"
        refuse(("train", "lr_scheduler_kwargs"), fact, f"it knows: {known}")
    needs_floor = train.lr_scheduler_type == "cosine_with_min_lr" and train.lr_scheduler_kwargs is not None
    if needs_floor and not {"min_lr", "min_lr_rate"} & set(train.lr_scheduler_kwargs or {}):
        refuse(("train", "lr_scheduler_kwargs"), "cosine_with_min_lr needs min_lr or min_lr_rate", "{ min_lr_rate = 0.1 }")

    for section, sources in ((("data",), recipe.data), (("eval", "data"), recipe.eval.data)):
        for number, data in enumerate(sources):
            _check_source(data, (*section, str(number)), refuse)
    for number, data in enumerate(recipe.eval.data):
        if data.weight != 1.0:
            refuse(("eval", "data", str(number), "weight"), "`weight` is for training: each held-out row counts once", "remove it")
    if recipe.eval.data and recipe.eval.fraction and "fraction" in recipe.eval.model_fields_set:
        hint = "keep one: rows of their own, or a share of the training rows"
        refuse(("eval", "fraction"), "`eval.fraction` and `[[eval.data]]` contradict each other", hint)
    if recipe.hub.repo is not None and not recipe.hub.push:
        refuse(("hub", "repo"), "`hub.repo` is given, but `hub.push` is false", "remove it")
    if recipe.hub.repo is not None and not re.fullmatch(r"((\{HF_USER\}|[\w.-]+)/)?[\w.-]+", recipe.hub.repo):
        refuse(("hub", "repo"), f"`{recipe.hub.repo}` is not a repository name", 'for example "{HF_USER}/catgirl"')


def _check_shared_out(recipe: Recipe, refuse: Any) -> None:
    """What cannot be had of a base that is shared out over the processes."""
    model, fsdp = recipe.model, 'distributed.strategy = "fsdp"'
    if model.backend != "transformers":
        place = ("distributed", "strategy") if model.backend == "auto" else ("model", "backend")
        refuse(place, 'distributed.strategy = "fsdp" needs plain transformers', 'set model.backend = "transformers"')
    if model.precision not in ("bf16", "float32"):
        hint = 'set model.precision = "bf16"; in 4 bits or MXFP4 the base fits each card: strategy = "ddp"'
        refuse(("model", "precision"), f"{fsdp} shares out a base in bf16 or float32, not in {model.precision}", hint)
    if recipe.train.on_oom == "split":
        hint = 'set train.on_oom = "error"; smaller micro-batches take less memory: train.tokens_per_batch'
        refuse(("train", "on_oom"), f"{fsdp} cannot cut a micro-batch in one process alone: each forward pass is one of all", hint)
    layers, waiting = _layers(model.name), recipe.distributed.host_layers
    if layers and waiting > layers:
        refuse(("distributed", "host_layers"), f"{waiting} layers are to wait on the host, {model.name} has {layers}")


def _check_dpo(dpo: DpoSettings, refuse: Any) -> None:
    if set(dpo.loss_type) == {"sft"}:
        refuse(("dpo", "loss_type"), '"sft" alone compares no answers', 'add it to another: ["sigmoid", "sft"]; or use method = "sft"')
    if len(set(dpo.loss_type)) < len(dpo.loss_type):
        refuse(("dpo", "loss_type"), "a loss is named twice")
    if dpo.loss_weights is not None and len(dpo.loss_weights) != len(dpo.loss_type):
        refuse(("dpo", "loss_weights"), f"{len(dpo.loss_weights)} weights for {len(dpo.loss_type)} losses", "give one for each, in their order")
    if "exo_pair" in dpo.loss_type and dpo.label_smoothing == 0:
        refuse(("dpo", "label_smoothing"), '"exo_pair" needs label_smoothing above 0', "its paper recommends 0.001")


def _check_source(data: DataSource, key: tuple[str, ...], refuse: Any) -> None:
    hub = data.source.startswith(("hf:", "modelscope:"))
    for name, standard in (("split", "train"), ("subset", None), ("revision", None)):
        if not hub and getattr(data, name) != standard:
            hint = "remove `split`, or name the file of that split" if name == "split" else f"remove `{name}`"
            refuse((*key, name), f"a local file has no {name}s", hint)
    if hub and not data.source.partition(":")[2].strip():
        refuse((*key, "source"), f"`{data.source}` names no dataset", "for example hf:HuggingFaceH4/Multilingual-Thinking")


def _layers(name: str) -> int | None:
    """How many layers a model has, where that is known before it is loaded. Tiny stands in for the others."""
    config = Path(name).expanduser() / "config.json"
    if config.is_file():
        count = json.loads(config.read_text(encoding="utf-8")).get("num_hidden_layers")
        return count if isinstance(count, int) else None
    sizes = [count for size, count in (("gpt-oss-20b", 24), ("gpt-oss-120b", 36)) if size in name.lower()]
    return sizes[0] if sizes else None


def _check_model_name(name: str, refuse: Any) -> None:
    if name == "tiny":
        return
    try:
        folder = Path(name).expanduser()
    except RuntimeError:  # ~ of a user who is not here
        refuse(("model", "name"), f"there is no folder {name}")
        return
    if folder.is_dir():
        try:
            model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            refuse(("model", "name"), f"the folder {name} has no readable config.json", "name the folder that holds the model's files")
        if model_type != "gpt_oss":
            refuse(
                ("model", "name"), f"{name} holds a `{model_type}` model", "fastoss trains the gpt-oss family, whose harmony format it is made for"
            )
    elif name.startswith(("/", "./", "../", "~")):
        refuse(("model", "name"), f"there is no folder {name}")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        refuse(("model", "name"), f"`{name}` is neither a hub id (owner/name), nor a folder, nor tiny", 'for example "openai/gpt-oss-20b"')
    elif not _GPT_OSS_NAME.search(name):
        refuse(
            ("model", "name"), f"`{name}` is not of the gpt-oss family", 'for example "openai/gpt-oss-20b", or a local folder of that architecture'
        )
