"""Runs and exports that the export tests share: trained once for a whole test session, whichever worker asks first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastoss.run import file_lock, whole_folder, write_json

from .conftest import fastoss

# Few tokens, learned by heart in half a minute: one with reasoning, one without, one with instructions.
DIALOGUES = [
    [("user", "你是谁?", None), ("assistant", "我是米卡喵。", "先报名字。")],
    [("user", "Any tea?", None), ("assistant", "Jasmine, always jasmine.", None)],
    [("system", "Be brief.", None), ("user", "Where do you sleep?", None), ("assistant", "On the warm shelf by the window.", None)],
]
RECIPE = """\
name = "{name}"
[model]
name = "{base}"
precision = "float32"
max_length = 256
[lora]
r = 16
lora_alpha = 32
targets = {targets}
[[data]]
source = "data.jsonl"
[eval]
fraction = 0.0
[train]
max_steps = {steps}
learning_rate = 6e-3
per_device_train_batch_size = 3
[checkpoint]
every = 1000
[samples]
from_train = 3
max_new_tokens = 40
"""
# What each run trains, in how many steps, and the quantisation of its GGUF. Attention alone cannot memorise on the tiny model (docs/log.md).
RUNS = {"attention": (["attention"], 6, "f16"), "experts": (["experts"], 24, "bf16"), "both": (["attention", "experts"], 24, "q8_0")}
FORMATS = ("adapter", "merged", "mxfp4", "gguf")


def quiet(line: str) -> None:
    print(line)


def write_mxfp4_base(folder: Path) -> None:
    """The tiny model as OpenAI would publish it: its experts in blocks and scales."""
    import torch
    from safetensors.torch import load_file, save_file

    from fastoss.export.mxfp4 import quantise
    from fastoss.model.tiny import tiny_model_folder

    source = tiny_model_folder()
    tensors: dict[str, Any] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = quantise(tensor.transpose(1, 2).contiguous())
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = tensor
    assert all(torch.is_tensor(tensor) for tensor in tensors.values())
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    write_json(folder / "config.json", config | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept}})


class Shared:
    """Runs by what they train; the run on `both` stands on a base in MXFP4."""

    def __init__(self, root: Path):
        self.root = root

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        final = self.root / name
        with file_lock(self.root / f"{name}.lock"):
            if not final.is_dir():
                with whole_folder(final) as beside:
                    make(beside)
        return final

    def mxfp4_base(self) -> Path:
        return self._made("mxfp4-base", write_mxfp4_base)

    def run(self, kind: str) -> Path:
        """A finished run."""

        def train(folder: Path) -> None:
            targets, steps, _ = RUNS[kind]
            rows = [{"messages": [{"role": r, "content": c, "thinking": t} for r, c, t in chat]} for chat in DIALOGUES]
            # The data stays where the recipe found it: verification reads the rows again.
            place = self.root / f"{kind}-data"
            place.mkdir(exist_ok=True)
            (place / "data.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            base = "tiny" if kind != "both" else str(self.mxfp4_base())
            text = RECIPE.format(name=kind, base=base, targets=json.dumps(targets), steps=steps)
            (place / "recipe.toml").write_text(text, encoding="utf-8")
            result = fastoss("train", place / "recipe.toml", "--output", folder / "run", cwd=place, timeout=900)
            assert result.code == 0, result.err
            if kind != "attention":
                assert "tuned 3 of 3" in result.err

        return self._made(kind, train) / "run"

    def exports(self, kind: str) -> Path:
        """The folder with all four exports of a run."""
        run = self.run(kind)

        def export_all(folder: Path) -> None:
            from fastoss.export.export import export

            export(str(run), FORMATS, output=folder / "exports", quantization=RUNS[kind][2], progress=quiet)

        return self._made(f"{kind}-exports", export_all) / "exports"


@pytest.fixture(scope="session")
def shared(cache: Path, one_thread: None) -> Shared:
    return Shared(cache.parent / "export")


def expected_replies() -> list[tuple[list[tuple[str, str]], str | None, str]]:
    """(messages, reasoning, answer) of each dialogue."""
    return [([(role, content) for role, content, _ in chat[:-1]], chat[-1][2], chat[-1][1]) for chat in DIALOGUES]
