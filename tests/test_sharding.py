"""A base read by shares holds what the whole one holds. Two processes that train on it are in faults/test_shared_base.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastoss.errors import FastossError
from fastoss.model.sharding import WeightFiles, layers_on_host, whole
from fastoss.model.tiny import tiny_model_folder

from .export_helpers import write_mxfp4_base


def in_halves(folder: Path) -> None:
    """The tiny model in two files with an index, as large models come."""
    tensors = load_file(tiny_model_folder() / "model.safetensors")
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, chosen in files.items():
        save_file({name: tensors[name] for name in chosen}, folder / file)
    index = {"weight_map": {name: file for file, chosen in files.items() for name in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("make", "dtype"), [(in_halves, torch.float32), (in_halves, torch.bfloat16), (write_mxfp4_base, torch.bfloat16)])
def test_shares_make_what_transformers_loads(make, dtype, tmp_path, one_thread):
    from transformers import GptOssForCausalLM, Mxfp4Config

    make(tmp_path)
    packed = make is write_mxfp4_base
    source = tmp_path if packed else tiny_model_folder()
    arguments = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    expected = GptOssForCausalLM.from_pretrained(source, dtype=dtype, **arguments).state_dict()
    files = WeightFiles(tmp_path, torch.device("cpu"))
    for ranks in (2, 3, 5):  # five processes over four experts: the last one has none
        for name, weight in expected.items():
            assert files.shape(name) == tuple(weight.shape)
            rows = -(-len(weight) // ranks)
            shares = [torch.full_like(part, float("nan")) for part in weight.split(rows)]
            shares += [weight.new_empty(0, *weight.shape[1:])] * (ranks - len(shares))
            for rank, share in enumerate(shares):
                files.read_into(share, name, rank * rows)
            assert torch.equal(torch.cat(shares), weight), (ranks, name)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(FastossError, match=r"`lm_head\.weight` is not there"):
        WeightFiles(tmp_path, torch.device("cpu")).shape("lm_head.weight")


def test_layers_on_the_host_are_spread():
    assert layers_on_host(0, 24) == set()
    assert layers_on_host(3, 24) == {7, 15, 23}
    assert layers_on_host(24, 24) == layers_on_host(30, 24) == set(range(24))
    assert all(len(layers_on_host(count, 24)) == count for count in range(25))


def test_a_whole_weight_stays_as_it_is():
    weight = torch.ones(2)
    assert whole(weight) is weight
