"""What only a GPU can show. `make gpu` runs these; without a GPU they are skipped. Nobody has run them yet: see docs/log.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from fastoss.config import FormatSettings, LoraSettings, ModelConfig
from fastoss.data.conversation import Conversation, Message
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.packing import LOSS_MARKS, collate
from fastoss.data.trees import build_tree, collate_trees
from fastoss.model import attention_kernels
from fastoss.model.attention_layout import DocumentLayout
from fastoss.model.backend import attach_lora, load_model, plan_model
from fastoss.model.head import TrainedTokenLoss

from .attention_helpers import check_kernel, output_and_gradients, random_inputs, random_layout
from .conftest import ROOT, ROWS, TINY_RECIPE, losses

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
        batch = {key: value.cuda() for key, value in collate([[e] for e in some], "packed").items() if key not in LOSS_MARKS}
        return model.get_base_model().model(**batch, use_cache=False).last_hidden_state[0]

    with torch.no_grad():
        together = hidden(examples)
        apart = torch.cat([hidden([example]) for example in examples])
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)


# --- attention kernels ---------------------------------------------------------------------------------------------------

KERNELS = {"flex": attention_kernels.flex, "flash": attention_kernels.flash, "flash4": attention_kernels.flash4}


def kernel_here(name: str):
    """The kernel, or a skip that says why this machine has none."""
    major, _ = torch.cuda.get_device_capability()
    if name == "flash" and major < 8:
        pytest.skip("FlashAttention needs compute capability 8.0")
    if name == "flash4":
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
        if major not in (9, 10, 11):
            pytest.skip("FlashAttention 4 has a backward pass with sinks on Hopper and Blackwell only")
    return KERNELS[name]


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_equals_the_float64_reference(name, dtype, window):
    """Ragged documents, GQA, odd lengths: output and the gradients of query, key, value and sinks."""
    if dtype == torch.float32 and name != "flex":
        pytest.skip("flash kernels take bf16 and fp16 only")
    for tokens, seed in ((1, 0), (127, 1), (1000, 2), (4096, 3)):
        layout = random_layout(tokens, seed, "cuda")
        for heads, kv_heads in ((64, 8), (4, 4)):
            check_kernel(kernel_here(name), attention_kernels.eager, layout, window, dtype, "cuda", seed, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def test_flex_on_trees_equals_the_float64_reference(dtype, window):
    for tokens, seed in ((200, 1), (1000, 2), (4096, 3)):
        check_kernel(kernel_here("flex"), attention_kernels.eager, random_layout(tokens, seed, "cuda", trees=True), window, dtype, "cuda", seed)


@pytest.mark.parametrize("name", KERNELS)
def test_a_document_on_the_gpu_does_not_change_with_its_neighbours(name):
    """Forward, bit for bit: each document is a problem of its own to these kernels."""
    kernel = kernel_here(name)
    outputs = []
    for seed in (1, 2):
        (q, k, v, _), _ = random_inputs(900, torch.bfloat16, "cuda", seed=seed)
        (own_q, own_k, own_v, own_sinks), _ = random_inputs(384, torch.bfloat16, "cuda", seed=0)
        where = slice(256, 640)  # blocks begin where the document does, so that only its neighbours differ
        with torch.no_grad():
            for tensor, own in ((q, own_q), (k, own_k), (v, own_v)):
                tensor[:, :, where] = own
            layout = DocumentLayout.from_positions(torch.cat([torch.arange(n) for n in (256, 384, 260)])[None].cuda())
            outputs.append(kernel(q, k, v, own_sinks, layout, 128, 0.125)[where])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", KERNELS)
def test_a_layer_waits_for_nothing_and_new_lengths_compile_nothing(name):
    """After two lengths each row is new: no compilation, and no wait of the host for the device."""
    kernel = kernel_here(name)

    def run(layout):
        inputs, upstream = made[layout.tokens]
        for window in (None, 128):
            output_and_gradients(kernel, inputs, upstream, layout, window, 0.125)

    sizes = (1000, 1500, 2048, 3001, 777)
    made = {tokens: random_inputs(tokens, torch.bfloat16, "cuda") for tokens in sizes}
    layouts = [random_layout(tokens, seed, "cuda") for seed, tokens in enumerate(sizes)]
    for layout in layouts[:3]:
        run(layout)
    torch.cuda.synchronize()
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for layout in layouts[3:]:
                run(layout)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def milliseconds(action, repeats: int = 7) -> float:
    """Median time on the device, warmed up."""
    times = []
    for _ in range(3 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[repeats // 2]


def test_kernels_are_faster_than_the_reference(capsys):
    """gpt-oss's shape, 16,384 tokens of chat-like documents, forward and backward: times as ratios to the per-document reference."""
    lines, ratios = [], {}
    for trees in (False, True):
        layout = random_layout(16_384, 0, "cuda", trees=trees)
        inputs, upstream = random_inputs(layout.tokens, torch.bfloat16, "cuda")
        for window in (None, 128):
            base = milliseconds(lambda: output_and_gradients(attention_kernels.eager, inputs, upstream, layout, window, 0.125))  # noqa: B023
            for name in ("flex",) if trees else KERNELS:
                try:
                    kernel = kernel_here(name)
                except pytest.skip.Exception as reason:
                    lines.append(f"{name}: {reason}")
                    continue
                took = milliseconds(lambda: output_and_gradients(kernel, inputs, upstream, layout, window, 0.125))  # noqa: B023
                ratios[name, trees, window] = base / took
                shape = f"{'trees' if trees else 'documents'}, window {window}"
                lines.append(f"{name:6} {shape:24} {took:8.2f} ms, {base / took:5.1f} times as fast as the reference")
    with capsys.disabled():
        print("\n" + "\n".join([torch.cuda.get_device_name(), *lines]))
    assert min(ratios.values()) > 1


def test_kernels_agree_in_the_model(monkeypatch):
    """The tiny model in float32: loss and LoRA gradients of a packed row with trees by FlexAttention, against the reference."""
    config = ModelConfig(name="tiny", precision="float32", backend="transformers")
    plan = plan_model(config, gpu=True)
    model, _, _ = attach_lora(load_model(config, plan), LoraSettings(r=4), plan)
    renderer = HarmonyRenderer(FormatSettings())
    chat = tuple(m for n in (5, 150, 40) for m in (Message("user", "word " * n), Message("assistant", "ok " * n, "hm")))
    trees = [build_tree(renderer.render_examples(Conversation(chat))), build_tree(renderer.render_examples(Conversation(chat[:2])))]
    batch = {name: torch.from_numpy(values).cuda() for name, values in collate_trees(trees).items()}
    results = []
    for kernel in ("eager", "flex"):
        monkeypatch.setenv("FASTOSS_ATTENTION", kernel)
        model.zero_grad()
        hidden = model.get_base_model().model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
        loss = TrainedTokenLoss().chunked(hidden, model.get_base_model().lm_head.weight, labels=batch["labels"])[0]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# --- memory ---------------------------------------------------------------------------------------------------------------

LIMITED = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv.pop(1)))
from fastoss.cli import main
try:
    main()
finally:
    print("peak", torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory, file=sys.stderr)
"""


def test_a_card_that_is_too_small_trains_on_the_same_loss_in_pieces(tmp_path):
    """The allocator's own limit, below what whole micro-batches reserve: `error` says so, `split` goes on with the very same batch."""
    rows = [{"instruction": f"Question {n}? " + "word " * 200, "input": "", "output": "answer " * 20} for n in range(64)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.toml").write_text(
        'name = "small"\n[model]\nname = "tiny"\nprecision = "float32"\nmax_length = 1024\nbackend = "transformers"\n'
        '[[data]]\nsource = "data.jsonl"\n'
        "[eval]\nfraction = 0.0\n[train]\nmax_steps = 3\ntokens_per_batch = 16384\n"
    )

    def run(name: str, share: float, *changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, str(share), "train", "recipe.toml", "--output", name, *changes]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)

    whole = run("whole", 1.0)
    assert whole.returncode == 0, whole.stderr
    share = 0.8 * float(re.search(r"peak ([\d.e-]+)", whole.stderr)[1])
    full = run("full", share)
    assert (full.returncode, "memory is full at step 1" in full.stderr) == (1, True), full.stderr
    split = run("split", share, "--set", "train.on_oom=split")
    assert (split.returncode, "micro-batches are cut into" in split.stderr) == (0, True), split.stderr
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has no two GPUs")
def test_two_cards_with_half_a_base_each_train_what_two_whole_ones_train(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(TINY_RECIPE, encoding="utf-8")
    fsdp = "distributed.strategy=fsdp"
    settings = {"ddp": (), "fsdp": (fsdp,), "host": (fsdp, "distributed.host_layers=2")}
    for name, changes in settings.items():
        pairs = [part for change in ("model.backend=transformers", "train.recompute=full", *changes) for part in ("--set", change)]
        command = [sys.executable, "-m", "fastoss", "train", "recipe.toml", "--output", name, "--gpus", "2", *pairs]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name in ("fsdp", "host"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "ddp"), rel=1e-4)
        told = json.loads((tmp_path / name / "manifest.json").read_text())
        assert max(told["base_bytes_by_process"]) < 0.501 * told["base_bytes"]
