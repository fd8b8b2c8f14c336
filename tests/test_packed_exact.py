"""Packed equals unpacked, document by document, on the embedded tiny model in float32 through both backends: outputs, loss, every LoRA gradient."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastoss.config import LoraSettings, ModelConfig
from fastoss.model import attention_kernels
from fastoss.model.attention_layout import DocumentLayout
from fastoss.model.backend import attach_lora, load_model, plan_model

from .attention_helpers import LORA_TARGETS, random_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-5
VOCABULARY = 201_088
# The tiny model has 16 heads on fewer keys (GQA), and windows of 128 in every other layer.
ROWS = {
    "ragged, lengths of 1, a window across every border": (1, 150, 1, 9, 140, 3),
    "one document": (170,),
    "one document of one token beside another": (1, 5),
}


@pytest.fixture(scope="module", params=["transformers", "unsloth"])
def model(request):
    """With LoRA that has an effect on attention and experts."""
    if request.param == "unsloth" and importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    config = ModelConfig(name="tiny", precision="float32", max_length=256, backend=request.param)
    plan = plan_model(config, gpu=False)
    made, _, _ = attach_lora(load_model(config, plan), LoraSettings(r=4), plan)
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    assert made.config.num_attention_heads > made.config.num_key_value_heads > 1
    assert made.config.sliding_window == 128
    return made.train()


def documents(lengths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 199_998, (n,), generator=random) for n in lengths]


def outputs_and_losses(model, rows: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Hidden states (tokens, hidden) of a packed row, and each document's summed loss; one of a single token trains nothing."""
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    base = model.get_base_model()
    hidden = base.model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False).last_hidden_state[0]
    losses, start = [], 0
    for row in rows:
        if len(row) > 1:
            logits = hidden[start : start + len(row) - 1] @ base.lm_head.weight.t()
            losses.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
        start += len(row)
    return hidden, losses


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ROWS)
def test_a_packed_row_is_its_documents(model, name):
    """Against each document in a pass of its own, with the attention that the backend's own loader gives: eager, of transformers."""
    rows = documents(ROWS[name])
    tokens = sum(map(len, rows))
    hidden, losses = outputs_and_losses(model, rows)
    ours = gradients(model, torch.stack(losses).sum() / tokens)
    config = model.get_base_model().config
    packed = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        alone = [outputs_and_losses(model, [row]) for row in rows]
        theirs = gradients(model, torch.stack([loss for _, made in alone for loss in made]).sum() / tokens)
    finally:
        config._attn_implementation = packed
    torch.testing.assert_close(hidden, torch.cat([states for states, _ in alone]), rtol=TOLERANCE, atol=TOLERANCE)
    for mine, (_, their) in zip(losses, [one for one in alone if one[1]], strict=True):
        torch.testing.assert_close(mine, their[0], rtol=TOLERANCE, atol=0)
    assert {part.split(".lora_")[0].rsplit(".", 1)[-1] for part in theirs} >= {*LORA_TARGETS, "experts"}
    assert ours.keys() == theirs.keys()
    for part, gradient in theirs.items():
        torch.testing.assert_close(ours[part], gradient, rtol=0, atol=TOLERANCE)


def test_a_documents_loss_is_the_same_whatever_lies_beside_it(model):
    """In the whole model to 1e-6: products of other sizes may round otherwise. The kernels themselves are held bit for bit below."""
    own = documents((90,), seed=5)[0]

    def loss(before: int, after: int, seed: int) -> float:
        first, last = documents((before, after), seed)
        with torch.no_grad():
            return outputs_and_losses(model, [first, own, last])[1][1].item()

    one = loss(140, 20, 1)
    assert loss(140, 20, 2) == pytest.approx(one, rel=1e-6)
    assert loss(2, 170, 3) == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("name", ["eager", "flex"])
def test_a_document_is_the_same_bits_beside_other_neighbours(name, window):
    """Its blocks begin where it does, so that only its neighbours differ; flex has its forward on a CPU."""
    (own_q, own_k, own_v, sinks), _ = random_inputs(130, torch.float32, "cpu", heads=4, kv_heads=2, head_dim=16, seed=0)
    layout = DocumentLayout.from_positions(torch.cat([torch.arange(n) for n in (128, 130, 70)])[None])
    where = slice(128, 258)
    outputs = []
    for seed in (1, 2):
        (q, k, v, _), _ = random_inputs(layout.tokens, torch.float32, "cpu", heads=4, kv_heads=2, head_dim=16, seed=seed)
        with torch.no_grad():
            for tensor, own in ((q, own_q), (k, own_k), (v, own_v)):
                tensor[:, :, where] = own
            inputs = [tensor.detach() for tensor in (q, k, v, sinks)]  # or flex would refuse them on a CPU
            outputs.append(getattr(attention_kernels, name)(*inputs, layout, window, 0.25))
    assert torch.equal(outputs[0][where], outputs[1][where])
    assert not torch.equal(outputs[0][:128], outputs[1][:128])
