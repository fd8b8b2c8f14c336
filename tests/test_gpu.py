"""What only a GPU can show. `make gpu` runs these; without a GPU they are skipped. Nobody has run them yet: see docs/log.md."""

from __future__ import annotations

import pytest
import torch

from fastoss.config import FormatSettings, LoraSettings, ModelConfig
from fastoss.data.conversation import Conversation, Message
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.packing import LOSS_MARKS, collate
from fastoss.model.backend import attach_lora, load_model, plan_model
from fastoss.model.head import TrainedTokenLoss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")]


def test_head_on_the_gpu_equals_a_float64_reference():
    torch.manual_seed(0)
    hidden = torch.randn(1, 700, 64, device="cuda", requires_grad=True)
    weight = torch.randn(201_088, 64, device="cuda") * 0.5
    labels = torch.randint(0, 201_088, (1, 700), device="cuda")
    labels[:, ::2] = -100
    loss, _, _, count = TrainedTokenLoss().chunked(hidden, weight, labels=labels)
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    reference = torch.nn.functional.cross_entropy((exact[0, :-1] @ weight.double().t()), labels[0, 1:], ignore_index=-100)
    reference.backward()
    assert count == (labels[0, 1:] != -100).sum()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)


def test_packed_documents_stay_apart_on_the_gpu():
    config = ModelConfig(name="tiny", precision="float32", backend="transformers")
    plan = plan_model(config, gpu=True)
    model, _, _ = attach_lora(load_model(config, plan), LoraSettings(r=4), plan)
    renderer = HarmonyRenderer(FormatSettings())
    chats = [(Message("user", "word " * n), Message("assistant", "ok", "hm")) for n in (1, 150, 7)]
    examples = [renderer.render_examples(Conversation(chat))[0] for chat in chats]

    def hidden(some):
        batch = {key: value.cuda() for key, value in collate(some, "packed").items() if key not in LOSS_MARKS}
        return model.get_base_model().model(**batch, use_cache=False).last_hidden_state[0]

    with torch.no_grad():
        together = hidden(examples)
        apart = torch.cat([hidden([example]) for example in examples])
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)
