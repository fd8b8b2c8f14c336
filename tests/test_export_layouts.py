"""Adapters in every layout that libraries have written for gpt-oss: told apart, read alike, converted into what stock PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastoss.config import FormatSettings, ModelConfig
from fastoss.errors import FastossError
from fastoss.export.adapter_layouts import Adapter, check_adapter
from fastoss.export.base import Base
from fastoss.export.merge import Merged
from fastoss.export.stock import check_peft_places
from fastoss.model.adapter import write_stamp

from .conftest import fastoss

EXPERTS, RANK, HIDDEN, INNER, LAYERS = 4, 3, 64, 256, 4
PREFIX = "base_model.model.model.layers.{}."


def pairs(seed: int = 0) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """Random pairs by layer and matrix: experts (experts, r, in) and (experts, out, r); queries (r, in) and (out, r)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator) * 0.1  # noqa: E731
    made = {}
    for layer in range(LAYERS):
        made[layer, "q_proj"] = draw(RANK, HIDDEN), draw(256, RANK)
        made[layer, "gate_up_proj"] = draw(EXPERTS, RANK, HIDDEN), draw(EXPERTS, 2 * INNER, RANK)
        made[layer, "down_proj"] = draw(EXPERTS, RANK, INNER), draw(EXPERTS, HIDDEN, RANK)
    return made


def write(folder: Path, layout: str, *, seed: int = 0, stamp: bool = False, config: dict | None = None, untrained: int | None = None) -> Path:
    """The same adapter as another library would have saved it. `untrained`: an expert that no token reached."""
    tensors: dict[str, torch.Tensor] = {}
    for (layer, name), (a, b) in pairs(seed).items():
        prefix = PREFIX.format(layer)
        if name == "q_proj":
            keys = {f"{prefix}self_attn.q_proj": (a, b)}
        else:
            if untrained is not None:
                b = b.clone()
                b[untrained] = 0
            if layout == "split":
                stem = f"{prefix}mlp.experts.{name.removesuffix('_proj')}_projs"
                keys = {f"{stem}.{number}": (a[number], b[number]) for number in range(EXPERTS)}
            else:
                outs = b.transpose(0, 1).flatten(1) if layout == "grouped" else b.permute(1, 2, 0).flatten(1)
                fused = (a.flatten(0, 1), outs)
                if layout == "swapped":
                    fused = (b.transpose(1, 2).flatten(0, 1), a.permute(2, 1, 0).flatten(1))
                keys = {f"{prefix}mlp.experts" + (".base_layer" if name == "gate_up_proj" else ""): fused}
        for stem, (left, right) in keys.items():
            tensors |= {f"{stem}.lora_A.weight": left.contiguous(), f"{stem}.lora_B.weight": right.contiguous()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [f"{layer}.mlp.experts.{name}" for layer in range(LAYERS) for name in ("gate_up_proj", "down_proj")]
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | (config or {})), encoding="utf-8")
    if stamp:
        from fastoss.model.tiny import tiny_model_folder

        write_stamp(folder, ModelConfig(name="tiny", precision="float32"), FormatSettings(), "transformers", str(tiny_model_folder()))
    return folder


@pytest.fixture(scope="session")
def tiny(cache) -> Base:
    from fastoss.model.tiny import tiny_model_folder

    return Base(tiny_model_folder())


def same_change(adapter: Adapter, expected: Adapter) -> None:
    assert set(adapter.names()) == set(expected.names())
    for name in expected.names():
        for expert in range(EXPERTS) if "experts" in name else [None]:
            torch.testing.assert_close(adapter.delta(name, expert), expected.delta(name, expert), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["swapped", "grouped", "split"])
def test_every_layout_means_the_same_change(tmp_path, tiny, layout):
    expected = Adapter(write(tmp_path / "peft", "peft"))
    adapter = Adapter(write(tmp_path / layout, layout), "grouped" if layout == "grouped" else None)
    assert adapter.layout == layout
    same_change(adapter, expected)
    # Read as what it is not, the grouped one would be another model of the same shape.
    if layout == "grouped":
        wrong = Adapter(tmp_path / layout)
        assert wrong.layout == "peft"
        name = "model.layers.0.mlp.experts.gate_up_proj"
        assert not torch.allclose(wrong.delta(name, 1), expected.delta(name, 1), atol=1e-3)
    lines = check_adapter(tmp_path / layout, adapter.layout if layout == "grouped" else None, tmp_path / "converted")
    assert any(layout in line for line in lines)
    converted = Adapter(tmp_path / "converted")
    assert converted.layout == "peft"
    same_change(converted, expected)
    assert check_peft_places(tmp_path / "converted", tiny) == []


def test_our_reading_is_what_peft_computes(tmp_path, tiny):
    """Each delta against PEFT's own, on a real model with the adapter attached."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = write(tmp_path / "adapter", "peft")
    adapter = Adapter(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32), folder)
    merged = Merged(tiny, adapter)
    plain = dict(AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32).named_parameters())
    tuned = dict(model.merge_and_unload().named_parameters())
    changed = 0
    for name in tiny.names():
        experts = [merged.expert(name, number) for number in range(EXPERTS)] if tiny.is_experts(name) else []
        ours = torch.stack(experts) if experts else merged.matrix(name)
        torch.testing.assert_close(ours, tuned[name], rtol=0, atol=2e-6)
        changed += not torch.equal(tuned[name], plain[name])
    assert changed == len(adapter.names()) == 3 * LAYERS


def test_the_command_tells_and_converts(tmp_path):
    folder = write(tmp_path / "old", "swapped", config={"peft_version": "0.19.1"})
    done = fastoss("adapter", "check", folder, "--convert", tmp_path / "new")
    assert done.code == 0, done.err
    assert "layout: swapped" in done.out
    assert "would read it wrongly" in done.out
    again = "\n".join(check_adapter(tmp_path / "new"))
    assert "layout: peft" in again
    assert "stock PEFT loads it as it is" in again
    with pytest.raises(FastossError, match="no adapter in this folder"):
        check_adapter(tmp_path)
    with pytest.raises(FastossError, match="there is no such layout"):
        check_adapter(folder, "sideways")


def test_grouped_columns_are_told_by_an_expert_that_was_never_trained(tmp_path):
    unsloth = {"auto_mapping": {"unsloth_fixed": True}}
    assert Adapter(write(tmp_path / "grouped", "grouped", config=unsloth, untrained=2)).layout == "grouped"
    assert Adapter(write(tmp_path / "peft", "peft", config=unsloth, untrained=2)).layout == "peft"
    # Without one there is no telling, and it says so.
    with pytest.raises(FastossError, match="cannot be told"):
        Adapter(write(tmp_path / "unknown", "grouped", config=unsloth))
    assert Adapter(write(tmp_path / "stamped", "peft", config=unsloth, stamp=True)).layout == "peft"


@pytest.mark.parametrize("matrix", ["gate_up_proj", "down_proj"])
def test_experts_of_some_layers_and_one_matrix(tmp_path, matrix):
    """A lone fused pair carries no sign of which matrix it is but the config's targets: in gpt-oss-20b's shapes it could be either."""
    folder = write(tmp_path / "adapter", "peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = ".layers.2.mlp.experts" + (".base_layer" if matrix == "gate_up_proj" else "")
    kept = {key.replace(".base_layer", ""): tensor for key, tensor in tensors.items() if f"{stem}.lora_" in key}
    save_file(kept, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": [f"2.mlp.experts.{matrix}"]}), encoding="utf-8")
    assert Adapter(folder).names() == [f"model.layers.2.mlp.experts.{matrix}"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda t: t.__setitem__("base_model.model.lm_head.lora_A.weight", torch.ones(3, 64)),
            "is not a LoRA weight of gpt-oss's attention or experts",
        ),
        (lambda t: t.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"), "has no other half"),
    ],
)
def test_tensors_that_belong_to_no_pair_are_not_dropped(tmp_path, spoil, told):
    folder = write(tmp_path / "adapter", "peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(FastossError, match=told):
        Adapter(folder)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"rank_pattern": {"q_proj": 4}}, {"modules_to_save": ["lm_head"]}])
def test_options_that_change_the_meaning_are_refused(tmp_path, option):
    with pytest.raises(FastossError, match="is not understood"):
        Adapter(write(tmp_path / "adapter", "peft", config=option))


def test_rslora_and_an_adapter_of_another_model(tmp_path, tiny):
    adapter = Adapter(write(tmp_path / "adapter", "peft", config={"use_rslora": True}))
    assert adapter.scale == pytest.approx(6 / 3**0.5)
    folder = write(tmp_path / "wide", "peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {key: torch.ones(RANK, 2880)}, folder / "adapter_model.safetensors")
    with pytest.raises(FastossError, match=r"the adapter's change of `model\.layers\.0\.self_attn\.q_proj\.weight` is \[256, 2880\]"):
        Merged(tiny, Adapter(folder))


def test_a_bf16_weight_is_rounded_once(tmp_path, tiny):
    """The change is added in float32: written in bf16, the sum is as near as bf16 gets, and small changes are not lost on the way."""
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((tiny.folder / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    weights = {name: tensor.bfloat16() for name, tensor in load_file(tiny.folder / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors")
    adapter = Adapter(write(tmp_path / "adapter", "peft"))
    merged = Merged(Base(base), adapter)
    plain, experts = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.experts.down_proj"
    for ours, weight, delta in (
        (merged.matrix(plain), weights[plain], adapter.delta(plain)),
        (merged.expert(experts, 2), weights[experts][2], adapter.delta(experts, 2)),
    ):
        assert ours.dtype == torch.float32
        exact = weight.double() + delta.double()
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-8)
        assert torch.equal(ours.bfloat16(), exact.float().bfloat16())
        assert not torch.equal(ours.bfloat16(), weight + delta.bfloat16()), "rounding twice would show"
