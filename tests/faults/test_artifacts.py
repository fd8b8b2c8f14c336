"""Adapters and checkpoints from elsewhere: refused when torn, inert, altered or of another base; nothing in them is ever run; no secret gets out."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastoss.errors import FastossError
from fastoss.model.adapter import base_identity, check_adapter
from fastoss.run import file_digest
from fastoss.training.checkpoint import MANIFEST

from .conftest import CHANGES, Place, Prepared

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(prepared: Prepared, tmp_path: Path) -> Path:
    folder = tmp_path / "copy" / "adapter"
    shutil.copytree(prepared.whole / "adapter", folder)
    return folder


def restamp(adapter: Path, **changes: object) -> None:
    """As if it had been saved like this: checksum and size agree again."""
    path = adapter / "fastoss.json"
    weights = {"bytes": (adapter / WEIGHTS).stat().st_size, "sha256": file_digest(adapter / WEIGHTS)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": weights} | changes))


def rewrite(adapter: Path, change) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file(change(tensors), adapter / WEIGHTS, metadata={"format": "pt"})
    restamp(adapter)


def without(tensors: dict, part: str) -> dict:
    gone = next(name for name in tensors if part in name)
    return {name: tensor for name, tensor in tensors.items() if name != gone}


def _truncate(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-1000])


def _flip(adapter: Path) -> None:
    content = bytearray((adapter / WEIGHTS).read_bytes())
    content[-100] ^= 64
    (adapter / WEIGHTS).write_bytes(content)


BROKEN = {
    "truncated": (_truncate, "the file is torn: "),
    "altered": (_flip, "is not the file that was trained (its checksum differs)"),
    "no safetensors": (lambda a: (a / WEIGHTS).write_bytes(b"hello"), "not a safetensors file, or torn"),
    "empty": (lambda a: (a / WEIGHTS).write_bytes(b""), "not a safetensors file, or torn"),
    "no tensors": (lambda a: rewrite(a, lambda t: {}), "it holds no tensors"),
    "lora_B missing": (lambda a: rewrite(a, lambda t: without(t, "lora_B")), "has no counterpart (1 such tensors)"),
    "lora_A missing": (lambda a: rewrite(a, lambda t: without(t, "lora_A")), "has no counterpart (1 such tensors)"),
    "foreign tensor": (lambda a: rewrite(a, lambda t: t | {"lm_head.weight": torch.ones(2)}), "`lm_head.weight` is not a LoRA tensor"),
    "inert": (
        lambda a: rewrite(a, lambda t: {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in t.items()}),
        "the adapter does nothing: every lora_B is zero",
    ),
    "other tokenizer": (lambda a: restamp(a, tokenizer_sha256="0" * 64), "was trained with another tokenizer"),
    "other template": (lambda a: restamp(a, chat_template_sha256="0" * 64), "was trained with another chat template"),
    "other shape": (
        lambda a: restamp(a, base={"source": "openai/gpt-oss-120b", "config": "0" * 64, "weights": None}),
        "was trained on a model of another shape",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_before_any_model_loads(adapter: Path, prepared: Prepared, commands, name):
    damage, told = BROKEN[name]
    damage(adapter)
    unloadable = "import fastoss.inference.engine as e\ndef load(*a):\n    raise SystemExit('the model was loaded')\ne.load_model = load"
    result = commands.run("chat", adapter, "--prompt", "hi", cwd=prepared.root, prelude=unloadable)
    assert (result.code, told in result.err, "hint: " in result.err) == (2, True, True), result.err
    assert str(adapter) in result.err
    start = ("--set", f"model.adapter={json.dumps(str(adapter))}", "--output", adapter.parent / "next")
    again = commands.run("train", "recipe.toml", *CHANGES, *start, cwd=prepared.root)
    assert (again.code, told in again.err) == (2, True), again.err
    assert not (adapter.parent / "next").exists()
    if name != "other shape":  # doctor does not ask which base there is
        run = adapter.parent / "run"
        shutil.copytree(prepared.whole, run)
        shutil.rmtree(run / "adapter")
        shutil.copytree(adapter, run / "adapter")
        doctor = commands.run("doctor", run, "--strict", cwd=prepared.root)
        assert (doctor.code, told in doctor.out) == (1, True), doctor.out


def test_the_base_is_known_by_its_weights(adapter: Path, cache: Path, tmp_path):
    (tiny,) = cache.glob("tiny-*/")
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    identity = base_identity(str(base))
    restamp(adapter, base=identity)
    check_adapter(adapter, str(base))
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-8] ^= 64  # another fine-tune of the same shape
    weights.write_bytes(content)
    assert base_identity(str(base)) != identity
    with pytest.raises(FastossError, match="are not those that the adapter was trained on"):
        check_adapter(adapter, str(base))


# --- nothing that is found in a file is run -----------------------------------------------------------------------------


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_a_pickle_in_a_checkpoint_is_not_run(place: Place):
    """With its checksum put right, as someone with bad intent would do."""
    mark, path = place.root / "was-run", place.checkpoint(6) / "optimizer.pt"
    torch.save({"state": Evil(mark)}, path)
    manifest = json.loads((place.checkpoint(6) / MANIFEST).read_text())
    manifest["files"]["optimizer.pt"] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    (place.checkpoint(6) / MANIFEST).write_text(json.dumps(manifest))
    result = place.again()
    assert result.code == 1
    assert "weights_only" in result.err or "Weights only" in result.err or "Unsupported" in result.err, result.err
    assert not mark.exists()


def test_code_that_lies_in_a_models_folder_is_not_run(fresh: Place, cache: Path, prepared: Prepared):
    (tiny,) = cache.glob("tiny-*/")
    model, mark = fresh.root / "model", fresh.root / "was-run"
    shutil.copytree(tiny, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}))
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    result = fresh.again("--set", f"model.name={json.dumps(str(model))}", "--set", "train.max_steps=2")
    assert result.code == 0, result.err
    answer = fresh.commands.run("chat", "run", "--prompt", "hi", "--max-new-tokens", "2", cwd=fresh.root)
    assert answer.code == 0, answer.err
    assert not mark.exists()


# --- secrets ------------------------------------------------------------------------------------------------------------

NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_PASSWORD")
SECRETS = {name: f"canary-{name.lower()}-5f1d" for name in NAMES}


def test_no_secret_gets_into_a_file_or_a_message(fresh: Place, prepared: Prepared):
    quiet = {"WANDB_MODE": "offline"}
    done = fresh.again("--set", 'log.trackers=["tensorboard"]', **SECRETS, **quiet)
    failing = "from transformers import Trainer\ndef fail(self, *a, **k):\n    raise RuntimeError('broken')\nTrainer.training_step = fail"
    failed = fresh.commands.run("--debug", "train", "recipe.toml", "--output", "failed", *CHANGES, cwd=fresh.root, prelude=failing, **SECRETS)
    (fresh.root / "hub.toml").write_text((fresh.root / "recipe.toml").read_text().replace('"data.jsonl"', '"hf:nobody/nothing"'))
    offline = fresh.commands.run("--debug", "train", "hub.toml", cwd=fresh.root, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9", **SECRETS)
    assert (done.code, failed.code, offline.code) == (0, 1, 2), done.err + failed.err + offline.err
    texts = {name: result.out + result.err for name, result in (("done", done), ("failed", failed), ("offline", offline))}
    texts |= {str(path): path.read_bytes().decode("latin-1") for path in fresh.root.rglob("*") if path.is_file()}
    assert len(texts) > 20
    found = [(secret, name) for name, text in texts.items() for secret in (*SECRETS.values(), "canary") if secret in text]
    assert found == []
