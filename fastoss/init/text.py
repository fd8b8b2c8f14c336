"""Settings → the text of a commented recipe. `write.py` chooses them, `load_recipe` reads what comes out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

Method = Literal["sft", "dpo", "reasoning"]

PURPOSES: dict[Method, str] = {
    "sft": "chats: answer as the rows answer",
    "dpo": "preferences: of two answers, prefer the chosen one",
    "reasoning": "chats whose reasoning is in the language that is asked for",
}


@dataclass(frozen=True)
class Settings:
    """What is chosen for one source of rows. Lengths and batches in tokens; `source` as it stands in the recipe.

    `seen` are the lines on the rows, kept as comments. `dropped` says which rows hygiene leaves out, and `over_length` how many are too long.
    """

    name: str
    method: Method
    source: str
    card: str
    seen: tuple[str, ...]
    max_length: int
    tokens_per_batch: int
    accumulation: int
    epochs: int
    held_out: float
    eval_every: int
    log_every: int
    precision: str = "4bit"
    over_length: int = 0
    hygiene: tuple[tuple[str, str, str], ...] = ()  # key, value, why
    columns: tuple[tuple[str, str], ...] = ()  # ours, the file's


def recipe_text(settings: Settings, file: str) -> str:
    """The recipe, ready to be trained and to be edited; `file` is what it will be called."""
    dpo, reasoning = settings.method == "dpo", settings.method == "reasoning"
    return "\n".join(
        [
            f"# {PURPOSES[settings.method].capitalize()}. Written by fastoss init for {settings.card}; change what you like.",
            *(f"#   {line}" for line in settings.seen),
            f"# fastoss check {file} && fastoss train {file}",
            f"# Without a GPU, to see it run: fastoss train {file} --set model.name=tiny --set train.max_steps=5 --output runs/rehearsal",
            f"name   = {_quoted(settings.name)}",
            f"method = {_quoted('dpo' if dpo else 'sft')}",
            "",
            *_model(settings),
            "",
            "[lora]",
            _commented("r = 8", "more can learn more, and takes more memory"),
            f"lora_alpha = {16 if reasoning else 32}",
            _commented('targets = ["attention", "experts"]', "q, k, v, o; and every expert's gate_up and down"),
            *(
                [_commented("expert_layers = [7, 15, 23]", "of 24: the last layer of each third, as in recipes/multilingual-reasoning.toml")]
                if reasoning
                else []
            ),
            "",
            "[[data]]",
            f"source = {_quoted(settings.source)}",
            *_columns(settings),
            "",
            "[format]",
            _commented('reasoning_effort = "medium"', "low | medium | high; a row may set its own"),
            _commented('current_date = "2026-01-01"', "pinned: training and chat see the same date"),
            "",
            *_hygiene(settings),
            *_eval(settings),
            "",
            *_train(settings),
            "",
            *(_dpo() if dpo else []),
            "[checkpoint]",
            _commented("every = 50", "steps; the same command resumes from the last one"),
            "keep = 2",
            "",
            _commented("[samples]", "answered before and after training, so that you see what changed"),
            _commented("from_train = 3", "three of the rows"),
            _commented("prompts = []", "your own questions"),
            "",
            "[log]",
            f"every = {settings.log_every}",
            "",
        ]
    )


def _model(settings: Settings) -> list[str]:
    why = {
        "4bit": "the base in 4 bits: the smallest",
        "mxfp4": "the base as OpenAI publishes it",
        "bf16": "the base unquantised",
    }[settings.precision]
    longer = f"; {settings.over_length:,} longer examples are left out, and counted" if settings.over_length else "; the longest row fits"
    adapter = (
        ['# adapter  = "runs/NAME"             # start from an SFT run: preferences are best learned after SFT'] if settings.method == "dpo" else []
    )
    return [
        "[model]",
        'name       = "openai/gpt-oss-20b"',
        _commented(f"precision  = {_quoted(settings.precision)}", why),
        _commented(f"max_length = {settings.max_length}", f"longest example, in tokens{longer}"),
        *adapter,
    ]


def _columns(settings: Settings) -> list[str]:
    if not settings.columns:
        return []
    named = ", ".join(f"{ours} = {_quoted(theirs)}" for ours, theirs in settings.columns)
    return [_commented(f"columns = {{ {named} }}", "our names for the file's columns")]


def _hygiene(settings: Settings) -> list[str]:
    if not settings.hygiene:
        return []
    return ["[hygiene]", *(_commented(f"{key} = {_quoted(value)}", why) for key, value, why in settings.hygiene), ""]


def _eval(settings: Settings) -> list[str]:
    why = "share of the rows that is held out" if settings.held_out else "with so few rows, all are for training"
    return ["[eval]", _commented(f"fraction = {settings.held_out}", why), _commented(f"every = {settings.eval_every}", "steps")]


def _train(settings: Settings) -> list[str]:
    rate = {"sft": ("1e-4", "2e-4 learns faster, 5e-5 forgets less"), "dpo": ("1e-5", "DPO needs little: 5e-7 to 5e-5"), "reasoning": ("2e-4", "")}
    size = (
        [
            _commented("per_device_train_batch_size = 2", "pairs per micro-batch"),
            _commented(f"gradient_accumulation_steps = {settings.accumulation}", "micro-batches per step"),
        ]
        if settings.method == "dpo"
        else [
            _commented(f"tokens_per_batch = {settings.tokens_per_batch}", "per micro-batch: a smaller one takes less memory"),
            _commented(
                f"gradient_accumulation_steps = {settings.accumulation}", f"a step takes {settings.tokens_per_batch * settings.accumulation:,}"
            ),
        ]
    )
    return [
        "[train]",
        _commented(f"num_train_epochs = {settings.epochs}", "how often each row is seen"),
        _commented(f"learning_rate = {rate[settings.method][0]}", rate[settings.method][1]),
        *size,
        'lr_scheduler_type = "cosine_with_min_lr"',
        "lr_scheduler_kwargs = { min_lr_rate = 0.1 }",
        _commented("warmup_steps = 0.05", "of all steps"),
    ]


def _dpo() -> list[str]:
    return [
        "[dpo]",
        _commented("beta = 0.1", "how strongly it is held to the reference"),
        'loss_type = ["sigmoid"]',
        _commented('reference = "start"', "the model as the run starts"),
        "",
    ]


def _commented(line: str, comment: str) -> str:
    return f"{line:<36} # {comment}" if comment else line


def _quoted(text: str) -> str:
    """A TOML string: JSON's are, but for the one control character that JSON lets stand."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
