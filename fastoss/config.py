"""The recipe: TOML in, one frozen and fully checked `Recipe` out. Nothing later in the flow reads TOML or guesses a default.

Precedence: defaults < recipe < `--set section.key=value`. Keys carry TRL's and PEFT's own names. Whatever cannot be
honoured is refused here, with file, line and a hint, before anything is loaded.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fastoss.errors import FastossError
from fastoss.recipe_checks import TOKENS_PER_BATCH, cross_check
from fastoss.recipe_errors import RecipeSource, explain
from fastoss.run import RunDirectory, read_json


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _layers(value: Any) -> Any:
    if value == "all":
        return value
    if isinstance(value, list | tuple) and value and all(type(v) is int and v >= 0 for v in value) and len(set(value)) == len(value):
        return tuple(value)
    raise ValueError('should be "all" or a list of layer numbers, each once, such as [7, 15, 23]')


def _interval(value: Any) -> Any:
    if value == "epoch" or (type(value) is int and value >= 1):
        return value
    raise ValueError('should be a number of steps, or "epoch"')


# Unions are checked by hand: pydantic would report one error for each branch.
Layers = Annotated[Literal["all"] | tuple[int, ...], BeforeValidator(_layers)]
Interval = Annotated[int | Literal["epoch"], BeforeValidator(_interval)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Effort = Literal["low", "medium", "high"]


def _date(value: Any) -> Any:
    if type(value) is datetime.date:  # TOML's own dates, written without quotes
        return value.isoformat()
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise ValueError('should be a date such as "2026-01-01"') from None


Date = Annotated[str, BeforeValidator(_date)]
CHANNELS = ("analysis", "commentary", "final")


def _channel_weights(value: Any) -> Any:
    if isinstance(value, list | tuple):
        if len(set(map(str, value))) < len(value):
            raise ValueError("names a channel twice")
        value = dict.fromkeys(value, 1.0)
    if not isinstance(value, dict) or not value:
        raise ValueError('should be a list of channels, such as ["analysis", "final"], or weights, such as { analysis = 0.5, final = 1.0 }')
    unknown = [channel for channel in value if channel not in CHANNELS]
    if unknown:
        raise ValueError(f"names the unknown channel {unknown[0]!r}; the channels are {', '.join(CHANNELS)}")
    if not all(type(weight) in (int, float) and 0 <= weight < float("inf") for weight in value.values()):
        raise ValueError("gives a weight that is not a number from 0 up")
    if not any(value.values()):
        raise ValueError("trains no channel: give one of them a weight above 0")
    return {channel: float(value[channel]) for channel in CHANNELS if channel in value}


ChannelWeights = Annotated[dict[str, float], BeforeValidator(_channel_weights)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Which base model, and in which form it is held in memory."""

    name: str = Field("openai/gpt-oss-20b", min_length=1, description='hub id or local folder of a gpt-oss model, or "tiny" (embedded, no network)')
    precision: Literal["4bit", "mxfp4", "bf16", "float32"] = Field("4bit", description="form of the frozen base weights")
    max_length: int = Field(4096, ge=16, le=131072, description="longest example, in tokens")
    backend: Literal["auto", "unsloth", "transformers"] = Field("auto", description="auto: Unsloth where there is a GPU, transformers elsewhere")
    adapter: str | None = Field(None, description="start from the adapter of this run or folder")


class LoraSettings(_Section):
    """The adapter, in PEFT's words."""

    r: int = Field(8, ge=1, le=1024)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="only for attention: fused experts support no dropout")
    targets: Annotated[tuple[Literal["attention", "experts"], ...], BeforeValidator(_as_tuple)] = Field(
        ("attention", "experts"), min_length=1, description="attention: q, k, v, o; experts: every expert's gate_up and down"
    )
    expert_layers: Layers = Field("all", description='"all", or the layers whose experts are trained, such as [7, 15, 23]')


class DataSource(_Section):
    """One source of rows. Paths are relative to the recipe."""

    source: str = Field(
        min_length=1, description="a .jsonl, .json, .csv or .parquet file (or compressed: .gz, .zst), a folder, a glob, hf:NAME or modelscope:NAME"
    )
    split: str = Field("train", description="split of a hub dataset; a local file has none")
    subset: str | None = Field(None, description="subset (configuration) of a hub dataset")
    revision: str | None = Field(None, description="commit, branch or tag of a hub dataset; the commit read is kept in the manifest")
    sample: str | None = Field(None, description="what --sample reads in place of the source")
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "flat", "harmony"] = Field(
        "auto", description="auto: told from the columns of each row"
    )
    columns: dict[str, str] = Field({}, description='our column name = the file\'s, such as { instruction = "question" }')
    weight: float = Field(1.0, gt=0, le=1000, description="how often each row is seen in an epoch; 0.5: every other epoch")
    max_rows: int | None = Field(None, ge=1, description="read at most this many rows, the first ones")
    cache: bool = Field(True, description="false: read and tokenise again")


class Identity(_Section):
    """Fills {{NAME}} and {{AUTHOR}} in rows."""

    name: str = Field(min_length=1)
    author: str = Field(min_length=1)


class FormatSettings(_Section):
    """How conversations become harmony tokens, and which tokens carry loss."""

    reasoning_effort: Effort = "medium"
    current_date: Date = Field("2026-01-01", description="pinned, so that training and inference see the same date")
    train_on: ChannelWeights = Field(
        {"analysis": 1.0, "commentary": 1.0, "final": 1.0},
        description="channels that carry loss, or their weights: { analysis = 0.5, final = 1.0 }; commentary is the channel of tool calls",
    )
    turns: Literal["all", "last"] = Field("all", description="which assistant turns are trained, each as its own example")
    identity: Identity | None = None


class Hygiene(_Section):
    """What happens to rows that are not fit to learn from."""

    malformed: Literal["error", "drop"] = Field("error", description="bad JSON, role, order, null, control tokens, empty answer")
    mojibake: Literal["error", "drop", "keep", "repair"] = Field("error", description="UTF-8 read as Latin-1 (ä½\xa0å¥½ for 你好)")
    empty_reasoning: Literal["keep", "drop", "error"] = Field("keep", description="keep: read as an answer without reasoning")
    over_length: Literal["drop", "truncate_left_turns", "error"] = "drop"
    duplicates: Literal["keep", "drop", "error"] = "keep"
    near_duplicates: Literal["keep", "drop", "error"] = Field("keep", description="alike but for case, spaces and punctuation")
    leakage: Literal["error", "drop", "keep"] = Field("error", description="a training row that is also in [[eval.data]]")


class EvalSettings(_Section):
    """The held-out part of the data."""

    fraction: float = Field(0.02, ge=0, lt=1, description="share of the rows that is held out, chosen by content hash; 0 with [[eval.data]]")
    data: Annotated[tuple[DataSource, ...], BeforeValidator(_as_tuple)] = Field(
        (), description="separate sources for evaluation, instead of a share of the rows"
    )
    every: int = Field(50, ge=1, description="steps between evaluations")
    after: bool = Field(True, description="evaluate once more after the last step")
    replies: int = Field(0, ge=0, le=1000, description="held-out rows answered at each evaluation, up to samples.max_new_tokens each; 0: none")


class TrainSettings(_Section):
    """Optimisation, in TRL's words."""

    num_train_epochs: float = Field(3, gt=0, le=10_000)
    max_steps: int = Field(0, ge=0, description="0: by epochs; above 0: the run ends after this many optimizer steps")
    learning_rate: float = Field(1e-4, gt=0)
    tokens_per_batch: int | None = Field(None, ge=16, description="tokens of one micro-batch; 16384 if neither this nor the next is given")
    per_device_train_batch_size: int | None = Field(None, ge=1, description="rows of one micro-batch, in place of tokens_per_batch")
    gradient_accumulation_steps: int = Field(1, ge=1)
    lr_scheduler_type: Literal["cosine_with_min_lr", "cosine", "linear", "constant", "constant_with_warmup"] = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, float] | None = Field(None, description="cosine_with_min_lr: { min_lr_rate = 0.1 } unless given")
    warmup_steps: float = Field(0.05, ge=0, description="a whole number of steps, or a share of all steps when below 1")
    weight_decay: float = Field(0.0, ge=0)
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    recompute: Literal["none", "full", "auto"] = Field("auto", description="gradient checkpointing; auto: full on a GPU, none without")
    on_oom: Literal["error", "split"] = "error"
    seed: int = Field(42, ge=0)


DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft"
]  # fmt: skip


class DpoSettings(_Section):
    """Preferences, in TRL's words."""

    beta: float = Field(0.1, gt=0)
    loss_type: Annotated[tuple[DpoLoss, ...], BeforeValidator(_as_tuple)] = Field(
        ("sigmoid",), min_length=1, description="TRL's losses, added up; sft: cross-entropy of the chosen answer"
    )
    loss_weights: Annotated[tuple[float, ...], BeforeValidator(_as_tuple)] | None = Field(None, description="one for each loss; 1 unless given")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs that may be labelled the wrong way round (robust, exo_pair)")
    reference: Literal["start", "adapter_off"] = Field(
        "start", description="start: the adapter that the run starts from; adapter_off: the base model"
    )
    score_on: Annotated[tuple[Literal["analysis", "commentary", "final"], ...], BeforeValidator(_as_tuple)] = Field(
        ("analysis", "commentary", "final"), min_length=1, description="channels whose tokens make an answer's log-probability"
    )


class CheckpointSettings(_Section):
    every: Interval = Field(50, description='steps, or "epoch"; also at the end and on a signal')
    keep: int = Field(2, ge=1)


class SampleSettings(_Section):
    """Questions answered before and after training, so that people see what changed."""

    prompts: Strings = ()
    from_train: int = Field(0, ge=0, description="this many training examples are asked as well, and their replies compared word for word")
    max_new_tokens: int = Field(256, ge=1)


TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio", "mlflow")


def _trackers(value: Any) -> Any:
    if value == "auto":
        return value
    if not isinstance(value, list | tuple):
        raise ValueError('should be "auto" or a list of trackers, such as ["tensorboard"]')
    unknown = [name for name in value if name not in TRACKERS]
    if unknown:
        raise ValueError(f"names the unknown tracker {unknown[0]!r}; the trackers are {', '.join(TRACKERS)}")
    return tuple(dict.fromkeys(value))


TrackerNames = Annotated[Literal["auto"] | tuple[Literal["tensorboard", "wandb", "swanlab", "trackio", "mlflow"], ...], BeforeValidator(_trackers)]


class LogSettings(_Section):
    every: int = Field(5, ge=1, description="steps between lines on the terminal; metrics.jsonl and trackers get every step")
    trackers: TrackerNames = Field((), description='where the metrics are recorded as well; "auto": the trackers whose key is set in the environment')
    project: str = "fastoss"


class DistributedSettings(_Section):
    strategy: Literal["ddp", "zero2", "zero3", "fsdp"] = "ddp"
    host_layers: int = Field(
        0, ge=0, description="with fsdp: decoder layers whose share waits in the host's memory, which frees the card and costs time"
    )
    ddp_timeout: int = Field(
        1800, ge=5, description="seconds that a process may keep the others waiting before the run ends, with a line that names it"
    )


class HubSettings(_Section):
    push: bool = Field(False, description="upload the adapter with a model card after training, when HF_TOKEN is set")
    repo: str | None = Field(None, description="the repository, such as \"{HF_USER}/catgirl\"; the token's owner and the recipe's name unless given")


class Recipe(_Section):
    """A whole recipe, resolved: every value is the one the run uses."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run goes to runs/<name>")
    method: Literal["sft", "dpo"] = "sft"
    model: ModelConfig = ModelConfig()
    lora: LoraSettings = LoraSettings()
    data: Annotated[tuple[DataSource, ...], BeforeValidator(_as_tuple)] = Field(min_length=1)
    format: FormatSettings = FormatSettings()
    hygiene: Hygiene = Hygiene()
    eval: EvalSettings = EvalSettings()
    train: TrainSettings = TrainSettings()
    dpo: DpoSettings | None = None
    checkpoint: CheckpointSettings = CheckpointSettings()
    samples: SampleSettings = SampleSettings()
    log: LogSettings = LogSettings()
    distributed: DistributedSettings = DistributedSettings()
    hub: HubSettings = HubSettings()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, validate and cross-check a recipe.

    `overrides` are `section.key=value` strings whose values are TOML (a bare word is a string). Data paths come back
    absolute, defaults filled in. Raises `FastossError` with `file:line`, the nearest key and a hint.
    """
    path = Path(path)
    source, table = RecipeSource.read(path)
    for override in overrides:
        _apply_override(table, override, source)
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as problems:
        raise explain(problems, source, Recipe) from None
    cross_check(recipe, source)
    return _resolve(recipe, path.parent)


def recipe_schema() -> str:
    """The JSON Schema of the recipe, for editors that complete and check TOML."""
    schema = Recipe.model_json_schema()
    schema["title"] = "fastoss recipe"
    return json.dumps(schema, indent=2, ensure_ascii=False)


def resolved_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values, as it is written into the run directory."""
    return recipe.model_dump(mode="json")


def recipe_from_resolved(values: dict[str, Any], place: str) -> Recipe:
    """The recipe back from the run directory. `FastossError` when another version of fastoss wrote it."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as problems:
        first = problems.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FastossError(f"`{key}`: {first['msg']}", place=place, hint="the run was made by another version of fastoss") from None


def recipe_of_run(run: RunDirectory) -> Recipe | None:
    """The recipe that a run was started with; None where the folder is no run."""
    path = run.resolved_recipe
    return recipe_from_resolved(read_json(path), str(path)) if path.is_file() else None


def _apply_override(table: dict[str, Any], override: str, source: RecipeSource) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        hint = "write it as --set section.key=value, for example --set train.learning_rate=2e-4"
        raise FastossError("not of the form section.key=value", place=f"--set {override}", hint=hint)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *parents, last = key.split(".")
    where: Any = table
    for part in parents:
        if isinstance(where, list) and part.isdigit() and int(part) < len(where):
            where = where[int(part)]
        elif isinstance(where, dict):
            where = where.setdefault(part, {})
        if not isinstance(where, dict | list):
            raise FastossError(f"`{part}` is a value, not a section", place=f"--set {override}")
    if not isinstance(where, dict):
        hint = f"name the entry by its number: --set {'.'.join(parents)}.0.{last}=…"
        raise FastossError(f"`{'.'.join(parents)}` is a list", place=f"--set {override}", hint=hint)
    where[last] = value
    source.overridden[tuple(key.split("."))] = f"--set {override}"


def _resolve(recipe: Recipe, folder: Path) -> Recipe:
    """Fill in the defaults that depend on other keys, and make data paths absolute."""

    def absolute(source: str | None) -> str | None:
        if source is None or source.startswith(("hf:", "modelscope:")):
            return source
        try:
            if "\0" in source:
                raise ValueError("it holds a NUL")
            return os.path.abspath(folder / Path(source).expanduser())  # a link keeps its own name, and its ending
        except (OSError, RuntimeError, ValueError) as problem:
            raise FastossError(f"not a path: {problem}", place=f"data source {source!r}") from None

    train = recipe.train
    changes: dict[str, Any] = {}
    if train.per_device_train_batch_size is None and train.tokens_per_batch is None:
        changes["tokens_per_batch"] = TOKENS_PER_BATCH
    if train.lr_scheduler_kwargs is None:
        changes["lr_scheduler_kwargs"] = {"min_lr_rate": 0.1} if train.lr_scheduler_type == "cosine_with_min_lr" else {}

    def located(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        return tuple(d.model_copy(update={"source": absolute(d.source), "sample": absolute(d.sample)}) for d in sources)

    eval_changes: dict[str, Any] = {"data": located(recipe.eval.data)}
    if recipe.eval.data and "fraction" not in recipe.eval.model_fields_set:
        eval_changes["fraction"] = 0.0
    if recipe.method == "dpo" and recipe.dpo is None:
        return _resolve(recipe.model_copy(update={"dpo": DpoSettings()}), folder)
    changed = {"train": train.model_copy(update=changes), "eval": recipe.eval.model_copy(update=eval_changes), "data": located(recipe.data)}
    return recipe.model_copy(update=changed)
