"""MXFP4 written and read: exact where it can be, as near as the format allows elsewhere, and the same to every other library."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastoss.export.base import Base
from fastoss.export.gguf_file import pack_mxfp4
from fastoss.export.mxfp4 import BLOCK, VALUES, bound, dequantise, quantise

from .test_export_layouts import tiny  # noqa: F401

FLOATS = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=200, deadline=None)
@example([0.0] * 31 + [1.4e-45])  # far below the smallest step
@example([7.5] + [0.1] * 31)
@given(st.lists(FLOATS, min_size=BLOCK, max_size=BLOCK))
def test_each_value_is_rounded_within_the_bound(values):
    block = torch.tensor([values])
    blocks, scales = quantise(block)
    assert (blocks.shape, scales.shape) == ((1, 1, 16), (1, 1))
    back = dequantise(blocks, scales)
    assert bool(((back - block).abs() <= bound(block)[..., None].expand(1, 1, BLOCK).flatten(1)).all())
    # No other exponent would have been nearer by more than a hair.
    best = min(
        float((_rounded(block, exponent) - block).square().sum()) for exponent in range(int(scales[0, 0]) - 127 - 2, int(scales[0, 0]) - 127 + 3)
    )
    assert float((back - block).square().sum()) <= best * 1.0001 + 1e-30


def _rounded(block: torch.Tensor, exponent: int) -> torch.Tensor:
    levels = torch.tensor(sorted(set(VALUES))) * 2.0**exponent
    return levels[(block[..., None] - levels).abs().argmin(dim=-1)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=16, max_size=16), st.integers(40, 200))
def test_what_came_from_mxfp4_comes_back_exactly(codes, scale):
    values = dequantise(torch.tensor([[codes]], dtype=torch.uint8), torch.tensor([[scale]], dtype=torch.uint8))
    assert torch.equal(dequantise(*quantise(values)), values)


def test_ties_go_to_the_even_code_and_zero_stays_zero():
    ties = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] + [0.0] * 24])
    assert dequantise(*quantise(ties))[0, :8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert not dequantise(*quantise(torch.zeros(2, 64))).any()
    tiny_values = torch.full((1, 32), 1e-42)  # below MXFP4's smallest step: they vanish, and nothing overflows
    assert not dequantise(*quantise(tiny_values)).any()


def test_transformers_and_ggml_read_the_same_values():
    import gguf
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    matrix = torch.randn(4, 96, 128, generator=torch.Generator().manual_seed(1)) * 0.05  # (experts, out, in)
    blocks, scales = quantise(matrix)
    ours = dequantise(blocks, scales)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # (experts, in, out)
    assert torch.equal(ours.transpose(1, 2), theirs)
    packed = pack_mxfp4(blocks[0], scales[0])
    assert numpy.array_equal(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.MXFP4), ours[0].numpy())


def test_the_error_is_below_that_of_the_plain_rule():
    """OCP's plain rule (the largest value's exponent, less 2) cuts what lies above 6; choosing between two exponents does better."""
    import gguf

    values = torch.randn(512, 2880, generator=torch.Generator().manual_seed(2))
    plain = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.MXFP4), gguf.GGMLQuantizationType.MXFP4)
    error = float((dequantise(*quantise(values)) - values).square().mean())
    assert error < float((torch.from_numpy(plain) - values).square().mean())
    assert math.sqrt(error) == pytest.approx(0.1115, abs=0.002)  # relative to a standard deviation of 1


def test_experts_that_lora_left_alone_keep_their_bytes(tiny, tmp_path):  # noqa: F811
    """On a base in MXFP4, LoRA on one expert matrix changes that matrix; the others are copied bit for bit."""
    from safetensors.torch import load_file, save_file

    from fastoss.export.adapter_layouts import Adapter
    from fastoss.export.merge import Merged, write_mxfp4

    from .export_helpers import quiet, write_mxfp4_base
    from .test_export_layouts import write

    write_mxfp4_base(tmp_path / "base")
    folder = write(tmp_path / "adapter", "peft")
    kept = {key: tensor for key, tensor in load_file(folder / "adapter_model.safetensors").items() if ".layers.2.mlp.experts.base_layer" in key}
    save_file(kept, folder / "adapter_model.safetensors")
    base = Base(tmp_path / "base")
    (tmp_path / "out").mkdir()
    write_mxfp4(Merged(base, Adapter(folder)), tmp_path / "out", "", quiet)
    made = Base(tmp_path / "out")
    for name in base.names():
        if base.is_experts(name):
            same = [torch.equal(base.packed_expert(name, n)[0], made.packed_expert(name, n)[0]) for n in range(4)]
            assert same == [name != "model.layers.2.mlp.experts.gate_up_proj"] * 4
        else:
            assert torch.equal(base.matrix(name), made.matrix(name))


def test_what_lies_beside_the_weights_says_what_they_are(tiny, tmp_path):  # noqa: F811
    """From a base in MXFP4: merged weights are not called quantised, requantised ones are, and no template but the trained one is left."""
    from fastoss.export.adapter_layouts import Adapter
    from fastoss.export.merge import Merged, write_merged, write_mxfp4

    from .export_helpers import quiet, write_mxfp4_base
    from .test_export_layouts import write

    write_mxfp4_base(tmp_path / "base")
    tokenizer = tmp_path / "base" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({"eos_token": "<|return|>", "chat_template": "an older one"}))
    merged = Merged(Base(tmp_path / "base"), Adapter(write(tmp_path / "adapter", "peft")))
    for into, called in ((write_merged, None), (write_mxfp4, "mxfp4")):
        folder = tmp_path / into.__name__
        folder.mkdir()
        into(merged, folder, "the trained one", quiet)
        config = json.loads((folder / "config.json").read_text())
        assert config.get("quantization_config", {}).get("quant_method") == called
        assert config["dtype"] in ("bfloat16", "float32")
        assert json.loads((folder / "tokenizer_config.json").read_text()) == {"eos_token": "<|return|>"}
        assert (folder / "chat_template.jinja").read_text() == "the trained one"
