"""Exports of real runs: every format written, verified, loaded by the programs it is for, and answering as the adapter does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastoss.data.conversation import Message
from fastoss.data.harmony import HarmonyRenderer, parse_completion
from fastoss.errors import FastossError, RunFailed
from fastoss.export.export import export, push_run
from fastoss.export.export_plan import FormatPlan, check_plan
from fastoss.model.adapter import read_stamp

from .conftest import ROOT, fastoss
from .export_helpers import FORMATS, Shared, expected_replies, quiet, shared  # noqa: F401

KINDS = ("attention", "experts", "both")
# The tiny model has 4 layers of 4 experts: q, k, v and o in each layer, gate_up and down of each expert.
PAIRS = {"attention": 4 * 4, "experts": 4 * 4 * 2, "both": 4 * 4 + 4 * 4 * 2}


def prompts(run: Path) -> list[list[int]]:
    renderer = HarmonyRenderer(read_stamp(run / "adapter").format)
    return [renderer.render_prompt([Message(role, content) for role, content in chat]) for chat, _, _ in expected_replies()]


@torch.no_grad()
def answers(model, ids: list[list[int]]) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([text]), use_cache=False).logits[0].float().log_softmax(-1) for text in ids]


def load_stock(folder: Path):
    """Stock transformers; MXFP4 is dequantised, since a CPU has no kernels for it."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    quantised = "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    extra = {"quantization_config": Mxfp4Config(dequantize=True)} if quantised else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra).float().eval()


def base_of(shared: Shared, kind: str) -> Path:  # noqa: F811
    from fastoss.model.tiny import tiny_model_folder

    return shared.mxfp4_base() if kind == "both" else tiny_model_folder()


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_written_and_verified(shared, kind):  # noqa: F811
    folder = shared.exports(kind)
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == sorted(FORMATS)
    for format in FORMATS:
        verdict = json.loads((folder / format / "verification.json").read_text(encoding="utf-8"))
        assert verdict["passed"]
        assert verdict["problems"] == []
        assert verdict["weights"]["pairs"] == PAIRS[kind]
        assert all(template["texts"] > 15 and template["differing"] == 0 for template in verdict["templates"])
        if format != "adapter":
            # Everything is accounted for: what LoRA changes, and all the rest as the base has it.
            assert verdict["weights"]["matrices_changed"] == PAIRS[kind]
            assert verdict["weights"]["tensors_unchanged"] + verdict["weights"]["matrices_changed"] == 4 * (13 + 2 * 4 + 2) + 3
        for where, found in verdict["behaviour"].items():
            assert found["adapter_against_base"] > 0.05, (format, where)
        card = (folder / format / "README.md").read_text(encoding="utf-8")
        fingerprint = json.loads((shared.run(kind) / "manifest.json").read_text(encoding="utf-8"))["data"]["fingerprint"]
        for told in (fingerprint, "2026-01-01", "## Verification", "| loss |", "license: apache-2.0", "Any tea?"):
            assert told in card, (format, told)
        assert str(ROOT) not in card


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_answer_as_the_adapter_does(shared, kind):  # noqa: F811
    from peft import PeftModel

    ids = prompts(shared.run(kind))
    base = load_stock(base_of(shared, kind))
    plain = answers(base, ids)
    tuned = answers(PeftModel.from_pretrained(base, shared.exports(kind) / "adapter"), ids)
    merged = answers(load_stock(shared.exports(kind) / "merged"), ids)
    assert max(float((a - b).abs().max()) for a, b in zip(tuned, plain, strict=True)) > 0.5
    for ours, theirs in zip(merged, tuned, strict=True):
        assert float((ours.exp() - theirs.exp()).abs().max()) <= 1e-5
        # float32 computes x (W + BA) and x W + (x B) A differently; of logits up to 40 that is the sixth digit.
        assert float((ours - theirs).abs().mean()) <= 1e-5
        assert float((ours - theirs).abs().max()) <= 1e-4


@pytest.mark.parametrize("kind", ["experts", "both"])
def test_gguf_answers_word_for_word_in_llama_cpp(shared, kind):  # noqa: F811
    from fastoss.inference.engine import Engine, Sampling
    from fastoss.inference.llama_cpp import running

    (file,) = (shared.exports(kind) / "gguf").glob("*.gguf")
    engine = Engine.load(str(shared.run(kind)))
    chats = [[Message(role, content) for role, content in chat] for chat, _, _ in expected_replies()]
    by_adapter = engine.complete(chats, Sampling(max_new_tokens=40))
    with running(file, 512, 1) as server:
        by_gguf = [parse_completion(server.greedy(prompt, 40)) for prompt in prompts(shared.run(kind))]
    for (_, thinking, content), ours, theirs in zip(expected_replies(), by_adapter, by_gguf, strict=True):
        assert (ours.thinking, ours.content) == (theirs.thinking, theirs.content) == (thinking, content)
        assert theirs.problems == []


def test_requantised_weights_load_where_the_original_loads(shared):  # noqa: F811
    """`both` was trained on a base in OpenAI's MXFP4 layout: its mxfp4 export has the same tensors, and stock transformers takes it."""
    from fastoss.export.tensors import Checkpoint

    base, folder = Checkpoint(shared.mxfp4_base()), shared.exports("both") / "mxfp4"
    made = Checkpoint(folder)
    assert {name: (e.dtype, e.shape) for name, e in made.entries.items()} == {name: (e.dtype, e.shape) for name, e in base.entries.items()}
    ids = prompts(shared.run("both"))
    tuned = answers(load_stock(shared.exports("both") / "merged"), ids)
    found = answers(load_stock(folder), ids)
    plain = answers(load_stock(shared.mxfp4_base()), ids)
    last = [(t[-1], f[-1], p[-1]) for t, f, p in zip(tuned, found, plain, strict=True)]
    assert all((t - f).abs()[t > -4].max() < 0.3 * (t - p).abs()[t > -4].max() for t, f, p in last)
    weights = json.loads((folder / "verification.json").read_text(encoding="utf-8"))["weights"]
    by_expert = [entry for entry in weights["by_matrix"] if "expert" in entry]
    assert len(by_expert) == 4 * 4 * 2
    assert all(0.85 < entry["kept"] < 1.1 and 0.02 < entry["error"] < 0.2 for entry in by_expert)


def test_gguf_in_mxfp4_holds_the_values_of_the_mxfp4_folder(shared, tmp_path, monkeypatch):  # noqa: F811
    from fastoss.export.base import Base
    from fastoss.export.gguf_file import write_gguf
    from fastoss.export.gguf_weights import GgufWeights
    from fastoss.export.subject import load_subject

    subject = load_subject(str(shared.run("both")), progress=quiet)
    write_gguf(subject.merged, tmp_path / "m.gguf", "mxfp4", "{{ messages }}", "m", quiet)
    folder, file = Base(shared.exports("both") / "mxfp4"), GgufWeights(tmp_path / "m.gguf", subject.base)
    for layer in (0, 3):
        for name in ("gate_up_proj", "down_proj"):
            full = f"model.layers.{layer}.mlp.experts.{name}"
            assert all(torch.equal(folder.expert(full, number), file.expert(full, number)) for number in range(4))
            assert torch.equal(folder.matrix(f"{full}_bias").float(), file.matrix(f"{full}_bias"))
    pieces = list(file.rows("lm_head.weight"))
    assert torch.equal(torch.cat(pieces), file.matrix("lm_head.weight"))
    monkeypatch.setattr("fastoss.export.gguf_weights.PIECE_BYTES", 10_000_000)
    assert len(list(file.rows("lm_head.weight"))) == 6  # 51 MB in float32; the 20B model's 2.3 GB in pieces of 64 MB


def test_chat_with_a_merged_folder_renders_as_training_did(shared):  # noqa: F811
    from fastoss.inference.engine import Engine, Sampling

    engine = Engine.load(str(shared.exports("experts") / "merged"))
    chat, thinking, content = expected_replies()[0]
    reply = engine.complete([[Message(role, text) for role, text in chat]], Sampling(max_new_tokens=40))[0]
    assert (reply.thinking, reply.content) == (thinking, content)


def test_verify_on_the_command_line(shared):  # noqa: F811
    done = fastoss("verify", shared.exports("experts") / "merged", "--against", shared.run("experts"), "--json")
    assert done.code == 0, done.err
    verdict = json.loads(done.out)
    assert verdict["passed"]
    assert verdict["weights"]["matrices_changed"] == PAIRS["experts"]
    assert "is verified" in done.err


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"formats": ["onnx"]}, "there is no such format"),
        ({"formats": ["gguf"], "quantization": "q4_k_m"}, "needs rows of 256 values"),
        ({"formats": ["gguf"], "quantization": "int8"}, "int8 is not offered"),
        ({"formats": ["merged"], "base": "/nowhere"}, "the base's weights are not there"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(shared, tmp_path, arguments, told):  # noqa: F811
    with pytest.raises(FastossError, match=told) as raised:
        export(str(shared.run("attention")), progress=quiet, output=tmp_path / "out", **arguments)
    assert raised.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_run_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(FastossError, match="no adapter in this folder"):
        export(str(tmp_path), ["merged"], progress=quiet)


def test_the_plan_refuses_what_the_machine_cannot_hold(tmp_path):
    check_plan([FormatPlan("merged", 1_000, 1_000, 1.0)], tmp_path / "not" / "there")
    with pytest.raises(FastossError, match="the disk has"):
        check_plan([FormatPlan("merged", 1 << 60, 1_000, 1.0)], tmp_path)
    with pytest.raises(FastossError, match="of memory are free"):
        check_plan([FormatPlan("merged", 1_000, 1 << 60, 1.0)], tmp_path)


def test_a_folder_of_something_else_is_not_replaced(shared, tmp_path):  # noqa: F811
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "thesis.txt").write_text("mine")
    with pytest.raises(FastossError, match="something other than an export"):
        export(str(shared.run("attention")), ["adapter"], output=tmp_path, progress=quiet)
    assert (tmp_path / "adapter" / "thesis.txt").read_text() == "mine"


def test_a_push_without_a_token_is_refused_before_the_export(shared, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(FastossError, match="no token for the hub"):
        export(str(shared.run("attention")), ["adapter"], output=tmp_path / "out", push_to="me/mine", progress=quiet)
    assert not (tmp_path / "out").exists()


def test_a_failed_push_costs_nothing(shared, tmp_path, monkeypatch):  # noqa: F811
    """A hub that refuses connections: the export stays, the message says how to go on."""
    folder = tmp_path / "adapter"
    shutil.copytree(shared.exports("attention") / "adapter", folder)
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunFailed, match="the push failed") as raised:
        push_run(str(folder), [], "me/mine", progress=quiet)
    assert "fastoss push" in (raised.value.hint or "")
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


def test_a_push_of_a_run(shared, tmp_path, monkeypatch):  # noqa: F811
    """It needs an export, of this very adapter, and a repository."""
    run = tmp_path / "run"
    shutil.copytree(shared.run("attention"), run, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(FastossError, match="there is no export to push"):
        push_run(str(run), [], "me/mine", progress=quiet)
    with pytest.raises(FastossError, match="it has not been exported"):
        push_run(str(run), ["merged"], "me/mine", progress=quiet)
    shutil.copytree(shared.exports("attention") / "adapter", run / "exports" / "adapter")
    with pytest.raises(FastossError, match="no repository"):
        push_run(str(run), [], None, progress=quiet)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(FastossError, match="trained again after"):
        push_run(str(run), [], "me/mine", progress=quiet)


# --- whole or not at all --------------------------------------------------------------------------------------------------


def start(run: Path, output: Path, **settings) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastoss", "export", str(run), "--format", "merged", "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, **settings)


def test_kill_9_leaves_nothing_under_the_final_name(shared, tmp_path):  # noqa: F811
    run, output = shared.run("attention"), tmp_path / "out"
    process = start(run, output)
    until = time.monotonic() + 240
    while not list(output.glob(".merged.*.tmp/*.safetensors")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "merged").exists()
    assert list(output.glob(".merged.*.tmp"))
    # The next export clears away what the killed one left, and is whole.
    (folder,) = export(str(run), ["merged"], output=output, progress=quiet)
    assert json.loads((folder / "verification.json").read_text(encoding="utf-8"))["passed"]
    assert not list(output.glob(".merged.*"))


def test_a_full_disk_leaves_nothing_under_the_final_name(shared, tmp_path):  # noqa: F811
    """The system refuses to let the shard grow beyond 20 MB, in the middle of writing it."""
    import resource

    limit = 20_000_000
    process = start(shared.run("attention"), tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    assert "error: " in said
    assert "the export cannot be written" in said
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".lock"] == []
