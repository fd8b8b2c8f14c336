"""Contestants that are command lines of their own, where they are installed: ms-swift and Axolotl.

Their environments rarely go together with ours, so all that is asked for is their command on PATH. Nothing can be measured inside
them; the whole command is timed with one epoch and with two, and the difference is an epoch without loading and compiling.
The settings are those of their own gpt-oss examples. Nobody has run them here: what they refuse is the phase's reason.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_common import LORA, Phase, Place, Record, Skip, checkpoint, need_memory
from gpu_contest import _rows
from gpu_rows import longest_row

from fastoss.errors import RunFailed


def swift_command(folder: Path, data: Path, epochs: int, work: Path, longest: int) -> list[str]:
    """`swift sft`, rows of like length together: its guide for gpt-oss packs none. Never run yet."""
    settings = {
        "model": folder, "model_type": "gpt_oss", "template": "gpt_oss", "tuner_type": "lora", "dataset": data, "torch_dtype": "bfloat16",
        "num_train_epochs": epochs, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "learning_rate": 1e-9,
        "lora_rank": LORA["r"], "lora_alpha": LORA["lora_alpha"], "target_modules": "all-linear", "router_aux_loss_coef": 0, "max_length": longest,
        "eval_strategy": "no", "split_dataset_ratio": 0, "save_strategy": "no", "logging_steps": 1, "group_by_length": "true",
        "output_dir": work / "runs" / "swift", "gradient_checkpointing": "true",
    }  # fmt: skip
    parameters = ["--target_parameters", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return ["swift", "sft", *(str(part) for name, value in settings.items() for part in (f"--{name}", value)), *parameters]


def axolotl_command(folder: Path, data: Path, epochs: int, work: Path, longest: int) -> list[str]:
    """`axolotl train`, samples packed, as its example for one card has it. LoRA on experts is not in that example: attention alone."""
    chats = {"path": str(data), "ds_type": "json", "type": "chat_template", "field_thinking": "thinking", "template_thinking_key": "thinking"}
    settings: dict[str, Any] = {
        "base_model": str(folder), "model_quantization_config": "Mxfp4Config", "model_quantization_config_kwargs": {"dequantize": True},
        "plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"],
        "datasets": [chats],
        "dataset_prepared_path": str(work / "axolotl-prepared"), "val_set_size": 0, "output_dir": str(work / "runs" / "axolotl"),
        "sequence_len": longest, "sample_packing": True, "adapter": "lora", "lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"],
        "lora_dropout": 0.0, "lora_target_linear": True, "gradient_accumulation_steps": 4, "micro_batch_size": 1, "num_epochs": epochs,
        "optimizer": "adamw_torch_fused", "lr_scheduler": "constant", "learning_rate": 1e-9, "bf16": True, "tf32": True,
        "flash_attention": True, "gradient_checkpointing": True, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    path = work / f"axolotl-{epochs}.yaml"
    path.write_text(json.dumps(settings, indent=1))  # JSON is YAML
    return ["axolotl", "train", str(path)]


COMMANDS: dict[str, Callable[..., list[str]]] = {"swift": swift_command, "axolotl": axolotl_command}


def epoch_by_difference(command: Callable[[int], Sequence[str | Path]], log: Path) -> dict[str, float]:
    """Seconds of the second epoch: the whole command with two epochs less the same with one.

    Raises `RunFailed` with the command's last line when it fails.
    """
    taken = []
    for epochs in (1, 2):
        begun = time.perf_counter()
        with open(log, "ab") as output:
            code = subprocess.run(command(epochs), stdout=output, stderr=output).returncode
        taken.append(time.perf_counter() - begun)
        if code != 0:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise RunFailed(f"{command(epochs)[0]} ended with {code}: {lines[-1] if lines else 'it said nothing'}")
    return {"seconds_one_epoch": taken[0], "seconds_two_epochs": taken[1], "seconds": taken[1] - taken[0]}


class _MemoryWatch(threading.Thread):
    """The most memory that the card has in use, asked of the driver twice a second, in GB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: float | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.ended.wait(0.5):
            told = subprocess.run(ask, capture_output=True, text=True).stdout.split()
            if told:
                self.peak = max(self.peak or 0.0, float(told[0]) * 2**20 / 1e9)


def contest_of_command(place: Place, record: Record, *, name: str) -> None:
    if shutil.which(name) is None:
        raise Skip(f"the command `{name}` is not on PATH")
    if place.dry:
        raise Skip(f"`{name}` needs a GPU")
    need_memory(place, record, 50)
    folder = checkpoint(place, record, "mxfp4")
    data, lengths = _rows(place, trial=False)
    chats = place.work / "chats-as-messages.jsonl"
    write_messages(data, chats)
    watch = _MemoryWatch()
    watch.start()
    try:
        make = partial(COMMANDS[name], folder, chats)
        found = epoch_by_difference(lambda epochs: make(epochs, place.work, longest_row(place)), place.work / f"{name}.log")
    finally:
        watch.ended.set()
    # Its own template may add or leave out a few tokens a row: counted are ours, of the same texts.
    speed = sum(lengths) / found["seconds"]
    note = "LoRA on attention alone" if name == "axolotl" else "LoRA as ours"
    record.note(**found, tokens_per_second=speed, training_peak_gb=watch.peak, lora=note, tokens=sum(lengths), precision="bf16")


def write_messages(rows: Path, chats: Path) -> None:
    """The same rows in the form that both read: messages, reasoning under `thinking`."""
    lines = []
    for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines()):
        answer = {"role": "assistant", "content": row["output"], "thinking": row["thinking"]}
        lines.append(json.dumps({"messages": [{"role": "user", "content": row["instruction"]}, answer]}, ensure_ascii=False) + "\n")
    chats.write_text("".join(lines), encoding="utf-8")


def phases() -> list[Phase]:
    return [Phase(f"contest-{name}", partial(contest_of_command, name=name), 9) for name in COMMANDS]
