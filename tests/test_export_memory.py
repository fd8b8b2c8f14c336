"""Memory while exporting: bounded by a few copies of one matrix, measured on matrices of gpt-oss-20b's real size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastoss.errors import FastossError
from fastoss.export.tensors import Checkpoint, ShardWriter, Wanted, plan_shards, read_header
from fastoss.run import write_json

from .conftest import ROOT

# What a process of its own does: base and adapter from sparse files, merged and requantised, read back and compared. The vocabulary's
# matrices stay out (they pass through in pieces, see below); everything else is one layer of the real model, with fewer experts.
CHILD = r"""
import json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
# Not getrusage: what a process had before its exec, that of the test's own, counts there.
high_water = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
from fastoss.export import base, merge
from fastoss.export.accounting import account
from fastoss.export.adapter_layouts import Adapter
from fastoss.export.export_plan import peak_memory
folder = Path(sys.argv[1])
own = base.Base.names
base.Base.names = lambda self: [name for name in own(self) if ".layers." in name]
original, adapter = base.Base(folder / "base"), Adapter(folder / "adapter")
merged = merge.Merged(original, adapter)
started = high_water()
for name, write in (("merged", merge.write_merged), ("mxfp4", merge.write_mxfp4)):
    (folder / name).mkdir()
    write(merged, folder / name, "", lambda line: None)
    shapes = json.loads((folder / "base" / "config.json").read_text())
    export = base.Base.__new__(base.Base)
    export.folder, export.config, export.experts, export.layers = folder / name, shapes, original.experts, original.layers
    export.file = base.Checkpoint(folder / name)
    result = account(export, original, adapter, lambda line: None)
    assert result.problems == [], result.problems
    assert len(result.matrices) == 2 * original.experts * original.layers + original.layers
peak = high_water()
print(json.dumps({"started": started, "peak": peak, "planned": peak_memory(original, adapter, 0)}))
"""


def sparse(path: Path, tensors: dict[str, tuple[str, list[int]]], values: dict[str, torch.Tensor]) -> None:
    """A safetensors file whose tensors are holes (zeros that take no room), but for some."""
    sizes = {"BF16": 2, "U8": 1, "F32": 4}
    header, place = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = sizes[dtype]
        for axis in shape:
            size *= axis
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        file.truncate(begin + place)
        for name, tensor in values.items():
            file.seek(begin + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def write_real_size(folder: Path, *, layers: int, experts: int, rank: int = 8) -> None:
    """gpt-oss-20b's shapes in MXFP4, with fewer layers and experts, and a LoRA adapter on experts and queries."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from random_checkpoint import ModelShape, checkpoint_specs, published_config

    shape = ModelShape("20b", 2880, 2880, layers, experts, min(4, experts), 64, 8, 64, 201088)
    tensors: dict[str, tuple[str, list[int]]] = {}
    for file in checkpoint_specs(shape, "mxfp4"):
        for name, spec in file.items():
            tensors[name] = ("U8" if spec.kind in ("blocks", "scales") else "BF16", list(spec.size))
    (folder / "base").mkdir(parents=True)
    (folder / "adapter").mkdir()
    sparse(folder / "base" / "model.safetensors", tensors, {})
    write_json(folder / "base" / "config.json", published_config(shape, "mxfp4"))
    (folder / "base" / "tokenizer.json").write_text("{}")
    made = {}
    for layer in range(layers):
        prefix = f"base_model.model.model.layers.{layer}"
        sizes = {".mlp.experts.base_layer": (2880, 5760), ".mlp.experts": (2880, 2880)}
        for name, (into, out) in sizes.items():
            made[f"{prefix}{name}.lora_A.weight"] = torch.full((rank * experts, into), 0.01)
            made[f"{prefix}{name}.lora_B.weight"] = torch.linspace(-1, 1, out)[:, None].expand(out, rank * experts).contiguous()
        made[f"{prefix}.self_attn.q_proj.lora_A.weight"] = torch.full((rank, 2880), 0.01)
        made[f"{prefix}.self_attn.q_proj.lora_B.weight"] = torch.full((4096, rank), 0.01)
    save_file(made, folder / "adapter" / "adapter_model.safetensors")
    targets = [f"{layer}.mlp.experts.{name}" for layer in range(layers) for name in ("gate_up_proj", "down_proj")]
    write_json(
        folder / "adapter" / "adapter_config.json", {"r": rank, "lora_alpha": rank, "target_modules": ["q_proj"], "target_parameters": targets}
    )


def measured(folder: Path, layers: int, experts: int) -> dict[str, int]:
    write_real_size(folder, layers=layers, experts=experts)
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_peak_is_bounded_by_the_plan(tmp_path):
    """Real matrices (5,760 × 2,880 and the like), two layers of them, merged, requantised, read back and compared."""
    seen = measured(tmp_path / "two", layers=2, experts=1)
    print(seen)
    assert seen["peak"] < seen["planned"]
    assert seen["peak"] - seen["started"] < 1.2e9  # twelve float32 copies of the largest expert matrix are 0.8 GB


def test_the_planned_memory_does_not_grow_with_the_layers(tmp_path):
    """The plan for the real model, from its real shapes (as holes in files): 3 layers need what 24 do; and that is a few GB."""
    from fastoss.export.adapter_layouts import Adapter
    from fastoss.export.base import Base
    from fastoss.export.export_plan import plan_export

    plans = {}
    for layers in (3, 24):
        folder = tmp_path / str(layers)
        write_real_size(folder, layers=layers, experts=32, rank=2)
        plans[layers] = plan_export(Base(folder / "base"), Adapter(folder / "adapter"), ["merged", "mxfp4", "gguf"], "mxfp4", 8 * 48)
    few, all_of_it = plans[3], plans[24]
    assert [plan.memory for plan in few] == [plan.memory for plan in all_of_it]
    merged, mxfp4, gguf = all_of_it
    assert max(merged.memory, mxfp4.memory) < 4e9
    assert gguf.memory < 7e9
    assert 41e9 < merged.disk < 43e9  # openai/gpt-oss-20b in bf16
    assert 13.5e9 < mxfp4.disk < 14.1e9  # and as it is published
    assert abs(gguf.disk - mxfp4.disk) < 0.1e9


def test_large_tensors_pass_in_pieces(tmp_path, monkeypatch):
    import fastoss.export.tensors as module

    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    tensor = torch.randn(301, 33).to(torch.bfloat16)
    save_file({"a": tensor, "b": torch.arange(7)}, tmp_path / "model.safetensors")
    pieces = list(Checkpoint(tmp_path).read_rows("a"))
    assert max(piece.numel() * 2 for piece in pieces) <= 1000
    assert torch.equal(torch.cat(pieces), tensor)


def test_shards_are_what_safetensors_reads(tmp_path):
    tensors = {f"t{i}": torch.randn(10 + i, 8) for i in range(5)} | {"scalar": torch.tensor(3.0)}
    shards = plan_shards((Wanted(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()), limit=900)
    assert len(shards) > 2
    writer = ShardWriter(tmp_path, shards)
    for name, tensor in tensors.items():
        for piece in tensor.split(3) if tensor.dim() else [tensor]:
            writer.write(name, piece)
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    read = Checkpoint(tmp_path)
    assert all(torch.equal(read.read(name), tensor) for name, tensor in tensors.items())
    assert torch.equal(read.read_row("t2", 4), tensors["t2"][4])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: data[:4], "its header is damaged"),
        (lambda data: b"\xff" * 8 + data[8:], "its header is damaged"),
        (lambda data: data[:-1], "it ends within `a`"),
        (lambda data: data.replace(b'"F32"', b'"F99"'), "cannot be read"),
        (lambda data: data.replace(b"[4,4]", b"[4,5]"), "its shape needs"),
    ],
)
def test_a_damaged_shard_is_told_of(tmp_path, spoil, told):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, 4)}, path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(FastossError, match=told):
        read_header(path)


def test_names_with_a_dollar_and_tensors_lost_from_an_index(tmp_path):
    save_file({"model.layers.0.mlp.experts.down_proj$": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FastossError, match="is named literally"):
        Checkpoint(tmp_path)
    (tmp_path / "two").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "two" / "one.safetensors")
    write_json(tmp_path / "two" / "model.safetensors.index.json", {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}})
    with pytest.raises(FastossError, match="is in the index and in no file"):
        Checkpoint(tmp_path / "two")
