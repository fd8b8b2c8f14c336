"""The model: built alike everywhere, LoRA where it was named, the same loss whichever way it is computed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from fastoss.config import FormatSettings, LoraSettings, ModelConfig
from fastoss.data.conversation import Conversation, Message
from fastoss.data.harmony import IGNORE, HarmonyRenderer
from fastoss.data.packing import LOSS_MARKS
from fastoss.data.packing import collate as collate_units
from fastoss.data.tokenizer import SPECIAL
from fastoss.errors import FastossError
from fastoss.model import lora as lora_file
from fastoss.model.backend import ModelPlan, attach_lora, load_model, model_source, plan_model, trainer_tokenizer
from fastoss.model.head import CPU_CHUNK, TrainedTokenLoss, token_losses
from fastoss.model.tiny import build_tiny_model, tiny_model_folder

from .conftest import ROWS

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ModelConfig(name="tiny", precision="float32", max_length=256)


def loaded(settings: LoraSettings | None = None, config: ModelConfig = TINY, **arguments):
    plan = plan_model(config, gpu=False)
    model = load_model(config, plan)
    return attach_lora(model, settings or LoraSettings(r=4), plan, **arguments)


def shake(model) -> None:
    """Give lora_B values of its own, so that the adapter changes what the model says."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)


@pytest.fixture(scope="module")
def examples():
    renderer = HarmonyRenderer(FormatSettings())
    made = []
    for row in ROWS:
        history = [m for pair in row["history"] for m in (Message("user", pair[0]), Message("assistant", pair[1]))]
        chat = Conversation((*history, Message("user", row["instruction"]), Message("assistant", row["output"], row.get("thinking"))))
        made.append(renderer.render_examples(chat)[-1])
    return made


@pytest.fixture(scope="module")
def model():
    model, _, _ = loaded()
    shake(model)
    return model


def collate(examples, layout):
    return collate_units([[example] for example in examples], layout)


def by_hand(model, example) -> tuple[torch.Tensor, int]:
    """Summed loss of one example from the model's logits: the token after each place, where it has a label."""
    ids = torch.tensor([example.input_ids])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    targets = torch.tensor(example.labels[1:])
    return F.cross_entropy(logits[:-1], targets, ignore_index=IGNORE, reduction="sum"), int((targets != IGNORE).sum())


def trained_loss(model, batch) -> torch.Tensor:
    """The loss as training computes it: hidden states, then the head on trained tokens."""
    base = model.get_base_model()
    arguments = {key: value for key, value in batch.items() if key not in LOSS_MARKS}
    hidden = base.model(**arguments, use_cache=False).last_hidden_state
    token_loss = TrainedTokenLoss()
    token_loss.mark(batch["loss_weights"], batch["channels"])
    return token_loss.chunked(hidden, base.lm_head.weight, labels=batch["labels"])[0]


def test_tiny_model_is_the_same_each_time(tmp_path):
    folder = tiny_model_folder()
    build_tiny_model(tmp_path / "again")
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()  # noqa: E731
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert digest(folder / name) == digest(tmp_path / "again" / name)


def test_tiny_model_has_the_shape_of_gpt_oss():
    plan = plan_model(TINY, gpu=False)
    model, tokenizer = load_model(TINY, plan), PreTrainedTokenizerFast.from_pretrained(model_source(plan))
    config = model.config
    assert config.vocab_size == 201_088
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert config.num_local_experts >= 4
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["truncate"] is False
    assert model.model.layers[0].self_attn.sinks.abs().sum() > 0
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (200_019, 200_002, 199_999)
    assert config.router_aux_loss_coef == 0.0


def test_the_trainers_tokenizer_begins_ends_and_pads_as_the_models_own():
    plan = plan_model(TINY, gpu=False)
    made, own = trainer_tokenizer(plan), PreTrainedTokenizerFast.from_pretrained(model_source(plan))
    assert len(made) == len(SPECIAL)
    for name in ("bos", "eos", "pad"):
        assert getattr(made, f"{name}_token_id") == getattr(own, f"{name}_token_id"), name
        assert getattr(made, f"{name}_token") == getattr(own, f"{name}_token"), name
    assert {made.convert_ids_to_tokens(token_id) for token_id in SPECIAL} == {own.convert_ids_to_tokens(token_id) for token_id in SPECIAL}
    unsloths = trainer_tokenizer(ModelPlan("unsloth", None, "float32", "cpu"))
    assert len(unsloths) == len(own), "Unsloth looks at more of it"


def test_trained_loss_equals_the_loss_by_hand(model, examples):
    sums = [by_hand(model, example) for example in examples]
    expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    for layout in ("padded", "packed"):
        torch.testing.assert_close(trained_loss(model, collate(examples, layout)), expected, rtol=1e-5, atol=1e-5)


def test_marks_are_those_of_one_batch():
    """Without `mark` every trained token weighs 1, whatever the batch before was marked with."""
    hidden, weight, labels = torch.randn(1, 4, 8), torch.randn(20, 8), torch.tensor([[-100, 3, 5, 7]])
    loss = TrainedTokenLoss()
    plain = loss.chunked(hidden, weight, labels=labels)[0]
    loss.mark(torch.tensor([[0.0, 0.25, 0.0, 3.0]]), torch.ones(1, 4, dtype=torch.uint8))
    assert not torch.isclose(loss.chunked(hidden, weight, labels=labels)[0], plain)
    assert torch.equal(loss.chunked(hidden, weight, labels=labels)[0], plain)


class LiveTiles(TorchDispatchMode):
    """The bytes of tensors of at least `size` values that are alive after an operation, at most; views of one memory count once."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.most, self.seen = size, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.size:
            self.seen.append(weakref.ref(result))
        alive = [tensor for tensor in (reference() for reference in self.seen) if tensor is not None]
        self.most = max(self.most, sum({memory.data_ptr(): memory.nbytes() for memory in (t.untyped_storage() for t in alive)}.values()))
        return result


def test_two_tiles_of_logits_are_the_most_there_is():
    """What the plan counts (model/plan.py): a tile's logits and its probabilities, and nothing of the tile before."""
    words = 50_000
    weight, hidden = torch.randn(words, 8), torch.randn(3 * CPU_CHUNK, 8, requires_grad=True)
    with LiveTiles(CPU_CHUNK * words) as live:
        losses, correct, entropy = token_losses(hidden, weight, torch.arange(len(hidden)))
    assert live.most == 2 * CPU_CHUNK * words * 4
    logits = hidden.detach().double() @ weight.double().t()
    torch.testing.assert_close(losses.double(), F.cross_entropy(logits, torch.arange(len(hidden)), reduction="none"), rtol=1e-5, atol=1e-6)
    assert correct == (logits.argmax(1) == torch.arange(len(hidden))).sum()
    torch.testing.assert_close(entropy.double(), torch.distributions.Categorical(logits=logits).entropy().sum(), rtol=1e-5, atol=1e-6)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_padded_and_single_rows_give_the_same_gradient(model, examples):
    total = sum(e.trained_tokens for e in examples)
    packed = gradients(model, trained_loss(model, collate(examples, "packed")))
    padded = gradients(model, trained_loss(model, collate(examples, "padded")))
    model.zero_grad()
    for example in examples:
        (trained_loss(model, collate([example], "packed")) * example.trained_tokens / total).backward()
    single = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(packed) == len(padded) == len(single) > 20
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, padded[name], rtol=1e-3, atol=2e-6)
        torch.testing.assert_close(gradient, single[name], rtol=1e-3, atol=2e-6)


def test_a_packed_document_does_not_see_its_neighbours(model, examples):
    """Documents longer than the window of 128 included: the window must not reach over a border either."""
    renderer = HarmonyRenderer(FormatSettings())
    long = renderer.render_examples(Conversation((Message("user", "word " * 150), Message("assistant", "ok"))))[0]
    one, other = [examples[0], long, examples[1]], [examples[2], long, examples[3]]

    def hidden(batch):
        return model.get_base_model().model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state[0]

    with torch.no_grad():
        alone = hidden(collate([long], "packed"))
        for neighbours in (one, other):
            start = len(neighbours[0])
            together = hidden(collate(neighbours, "packed"))[start : start + len(long)]
            torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-5)


def stock_loss():
    """TRL's function from a fresh copy of its file: a trainer made before in this process has put ours in its place."""
    import trl.trainer.sft_trainer as known

    spec = importlib.util.spec_from_file_location("trl.trainer.stock_sft_trainer", known.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh._chunked_cross_entropy_loss


def test_head_equals_trls_own():
    torch.manual_seed(0)
    weight = torch.randn(5000, 32)
    labels = torch.randint(0, 5000, (3, 50))
    labels[:, ::3] = IGNORE
    results = []
    for function in (TrainedTokenLoss().chunked, stock_loss()):
        hidden = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for items in (None, 77):
            loss, correct, entropy, count = function(hidden, weight, 16, labels=labels, num_items_in_batch=items)
            loss.backward()
        results.append((loss.detach(), correct, entropy.detach(), count, hidden.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-4, atol=1e-5)


def test_head_weighs_tokens_and_watches_channels():
    torch.manual_seed(0)
    weight, labels = torch.randn(500, 16), torch.randint(0, 500, (2, 40))
    labels[:, :10] = IGNORE
    weights, channels = torch.rand(2, 40), torch.randint(1, 4, (2, 40), dtype=torch.uint8)
    token_loss = TrainedTokenLoss()
    gradients = []
    for ours in (True, False):
        hidden = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        trained = labels[:, 1:] != IGNORE
        each = F.cross_entropy((hidden[:, :-1] @ weight.t())[trained], labels[:, 1:][trained], reduction="none")
        scale = weights[:, 1:][trained]
        expected = (each * scale).sum() / scale.sum()
        token_loss.mark(weights, channels)
        loss = token_loss.chunked(hidden, weight, 7, labels=labels)[0] if ours else expected
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        loss.backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    sums = token_loss.take_sums()
    for channel in (1, 2, 3):
        here = channels[:, 1:][trained] == channel
        torch.testing.assert_close(sums[channel], torch.stack([each[here].double().sum(), here.sum().double()]), rtol=1e-5, atol=1e-5)
    assert token_loss.take_sums().sum() == 0


def test_head_with_nothing_to_train_is_zero():
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    loss, *_ = TrainedTokenLoss().chunked(hidden, torch.randn(10, 8), labels=torch.full((1, 4), IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().sum() == 0


# --- LoRA --------------------------------------------------------------------------------------------------------------


def trained_layers(model, part: str) -> set[int]:
    return {int(n.split(".layers.")[1].split(".")[0]) for n, p in model.named_parameters() if p.requires_grad and part in n}


@pytest.mark.parametrize("backend", ["transformers", "unsloth"])
@pytest.mark.parametrize(
    ("settings", "attention", "experts"),
    [
        (LoraSettings(r=4), {0, 1, 2, 3}, {0, 1, 2, 3}),
        (LoraSettings(r=4, targets=("attention",)), {0, 1, 2, 3}, set()),
        (LoraSettings(r=4, targets=("experts",), expert_layers=(1, 3)), set(), {1, 3}),
        (LoraSettings(r=4, expert_layers=(2,)), {0, 1, 2, 3}, {2}),
    ],
)
def test_lora_reaches_what_was_named_and_nothing_else(backend, settings, attention, experts):
    if backend == "unsloth":
        pytest.importorskip("unsloth", reason="Unsloth is not installed")
    model, counts, notes = loaded(settings, ModelConfig(name="tiny", precision="float32", backend=backend))
    assert trained_layers(model, "self_attn") == attention
    assert trained_layers(model, "mlp") == experts
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.attention + counts.experts == trained
    assert (counts.attention > 0, counts.experts > 0) == (bool(attention), bool(experts))
    assert notes == []


def test_layers_of_a_deeper_model_are_mapped_on_tiny_and_refused_elsewhere():
    settings = LoraSettings(r=4, expert_layers=(7, 15, 23))
    _, _, (note,) = loaded(settings)
    assert note == "expert_layers [7, 15, 23] of 24 layers stand for [0, 2, 3] of the tiny model's 4"
    with pytest.raises(FastossError, match="names layer 7, the model has 4"):
        lora_file.chosen_expert_layers(settings, 4, tiny=False)


def test_target_that_matches_nothing_is_refused(monkeypatch):
    """A checkpoint with other names would silently train attention alone."""
    monkeypatch.setattr(lora_file, "EXPERT_PARAMETERS", ("gate_up_proj_renamed",))
    with pytest.raises(FastossError, match=r'LoRA on "experts" did not reach what was named: layers \[0, 1, 2, 3\] got none'):
        loaded()


def test_half_an_expert_is_refused(monkeypatch):
    monkeypatch.setattr(lora_file, "EXPERT_PARAMETERS", ("gate_up_proj",))
    with pytest.raises(FastossError, match=r'LoRA on "experts" has .* parameters, .* some were not reached'):
        loaded()


def test_adapter_of_another_shape_is_refused(tmp_path):
    model, _, _ = loaded(LoraSettings(r=4, targets=("attention",)))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(FastossError, match=r"the adapter has r 4, the recipe 8"):
        loaded(LoraSettings(r=8, targets=("attention",)), adapter=tmp_path)
    with pytest.raises(FastossError, match="the adapter's tensors are not the recipe's"):
        loaded(LoraSettings(r=4), adapter=tmp_path)


def test_adapter_comes_back(tmp_path, model, examples):
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again, _, _ = loaded(adapter=tmp_path)
    batch = collate(examples[:2], "padded")
    assert trained_loss(again, batch).item() == trained_loss(model, batch).item()


def test_adapter_loads_in_plain_peft(tmp_path, model, examples):
    from peft import PeftModel
    from transformers import GptOssForCausalLM

    model.save_pretrained(tmp_path, save_embedding_layers=False)
    plain = PeftModel.from_pretrained(GptOssForCausalLM.from_pretrained(tiny_model_folder(), attn_implementation="eager"), tmp_path)
    ids = torch.tensor([examples[0].input_ids])
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


# --- backends and precisions ---------------------------------------------------------------------------------------------


def test_unsloth_and_transformers_give_the_same_loss(examples):
    pytest.importorskip("unsloth", reason="Unsloth is not installed")
    batch = collate(examples, "padded")
    values = []
    for backend in ("unsloth", "transformers"):
        model, _, _ = loaded(config=ModelConfig(name="tiny", precision="float32", backend=backend))
        shake(model)
        loss = trained_loss(model, batch)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        values.append((loss.item(), norm.item()))
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("precision", ["4bit", "mxfp4", "bf16"])
def test_precisions_that_need_a_gpu(precision):
    config = ModelConfig(name="openai/gpt-oss-20b", precision=precision)
    with pytest.raises(FastossError, match=rf'"{precision}" needs a GPU') as caught:
        plan_model(config, gpu=False)
    assert "--set model.name=tiny" in caught.value.hint
    plan = plan_model(ModelConfig(name="tiny", precision=precision), gpu=False)
    assert plan.precision == "float32"
    assert "runs in float32 without a GPU" in plan.notes[0]


def test_plan_for_a_gpu():
    plan = plan_model(ModelConfig(), gpu=True, installed=False)
    assert (plan.backend, plan.precision, plan.source) == ("unsloth", "4bit", "unsloth/gpt-oss-20b-unsloth-bnb-4bit")
    assert plan_model(ModelConfig(precision="mxfp4"), gpu=True, installed=False).source == "openai/gpt-oss-20b"


def broken_folder(tmp_path, **changes):
    for path in tiny_model_folder().iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    config = json.loads((tiny_model_folder() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    return ModelConfig(name=str(tmp_path), precision="float32", backend="transformers")


def test_folder_with_another_vocabulary_tokenizer_or_form(tmp_path):
    config = broken_folder(tmp_path)
    plan_model(config, gpu=False)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {}}, "added_tokens": []}')
    with pytest.raises(FastossError, match=r"its tokenizer\.json is not gpt-oss's"):
        plan_model(config, gpu=False)
    (tmp_path / "tokenizer.json").unlink()
    for changes, fact in (
        ({"vocab_size": 452}, "has a vocabulary of 452"),
        ({"model_type": "llama"}, "is a `llama` model"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "holds weights in 4 bits"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(json.loads((tiny_model_folder() / "config.json").read_text()) | changes))
        with pytest.raises(FastossError, match=fact):
            plan_model(config, gpu=False)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt_oss", "vocab_size": 201088, "quantization_config": {"quant_method": "mxfp4"}})
    )
    with pytest.raises(FastossError, match="holds MXFP4 weights, which would stay MXFP4"):
        plan_model(ModelConfig(name=str(tmp_path), precision="4bit", backend="unsloth"), gpu=True, installed=False)


def test_folder_whose_weights_cannot_be_read(tmp_path):
    config = broken_folder(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()[:1000]
    weights.unlink()
    with pytest.raises(FastossError, match=r"the folder has no \*\.safetensors"):
        plan_model(config, gpu=False)
    weights.write_bytes(content)
    with pytest.raises(FastossError, match="the weights cannot be read"):
        load_model(config, plan_model(config, gpu=False))


def test_missing_unsloth_on_a_gpu_machine(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FastossError, match="Unsloth is not installed") as caught:
        plan_model(ModelConfig(), gpu=True)
    assert "fastoss[unsloth]" in caught.value.hint


def test_four_bit_model_trains_and_its_adapter_reloads(tmp_path, examples):
    """bitsandbytes on the CPU: attention in NF4 (the fused experts stay as they are), through our own loading code."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = ModelConfig(name=str(tiny_model_folder()), precision="4bit", backend="transformers")
    plan = plan_model(config, gpu=False)
    assert "puts attention into 4 bits" in plan.notes[0]

    def four_bit(adapter=None):
        base = load_model(config, plan)
        kinds = {type(module).__name__ for name, module in base.named_modules() if name.endswith("q_proj")}
        assert kinds == {"Linear4bit"}
        assert type(base.lm_head).__name__ == "Linear"
        return attach_lora(base, LoraSettings(r=4), plan, adapter=adapter)[0]

    batch = collate(examples, "padded")
    model = four_bit()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = trained_loss(model, batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.2
    model.eval()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with torch.no_grad():
        expected = trained_loss(model, batch)
        assert trained_loss(four_bit(tmp_path).eval(), batch).item() == expected.item()
