"""Exports that were spoiled on purpose, each in a way that tools around gpt-oss have shipped: verification finds and names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastoss.errors import FastossError, RunFailed
from fastoss.export.accounting import account
from fastoss.export.export import export, verify_export
from fastoss.export.gguf_weights import GgufWeights
from fastoss.export.subject import Subject, load_subject
from fastoss.export.verify import Verification, verify

from .export_helpers import Shared, quiet, shared  # noqa: F401

GATE_UP = "model.layers.2.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"
QUERY = "model.layers.3.self_attn.q_proj.weight"
EXPERT = 1


@pytest.fixture(scope="module")
def subject(shared: Shared) -> Subject:  # noqa: F811
    """The run on a base in MXFP4 with LoRA on attention and experts; what it answers is asked once."""
    return load_subject(str(shared.run("both")), progress=quiet)


@pytest.fixture
def copied(shared: Shared, tmp_path: Path):  # noqa: F811
    def copy(format: str) -> Path:
        shutil.copytree(shared.exports("both") / format, tmp_path / format)
        return tmp_path / format

    return copy


def spoil(folder: Path, change) -> None:
    """Change the tensors of an export's one file in place."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def found(folder: Path, format: str, subject: Subject) -> Verification:
    result = verify(folder, format, subject)
    assert not result.passed
    print("\n".join(result.lines()))
    return result


def without_one_delta(subject: Subject, tensors: dict) -> None:
    tensors[GATE_UP][EXPERT] = subject.base.expert(GATE_UP, EXPERT)


def with_lora_b_turned(subject: Subject, tensors: dict) -> None:
    """lora_B's columns read in the wrong order, as between two versions of a library."""
    a, b = subject.adapter.pair(DOWN)
    turned = b.permute(1, 2, 0).reshape(b.shape[1], -1).reshape(b.shape[1], b.shape[0], -1).transpose(0, 1)
    for number in range(subject.base.experts):
        tensors[DOWN][number] = subject.base.expert(DOWN, number) + subject.adapter.scale * (turned[number] @ a[number]).T


def with_gate_and_up_swapped(subject: Subject, tensors: dict) -> None:
    gate, up = tensors[GATE_UP][..., ::2].clone(), tensors[GATE_UP][..., 1::2].clone()
    tensors[GATE_UP][..., ::2], tensors[GATE_UP][..., 1::2] = up, gate


def with_less_of_it(subject: Subject, tensors: dict) -> None:
    tensors[QUERY] = subject.base.matrix(QUERY) + 0.9 * subject.adapter.delta(QUERY)


def with_a_layer_of_the_base(subject: Subject, tensors: dict) -> None:
    for number in range(subject.base.experts):
        tensors[GATE_UP][number] = subject.base.expert(GATE_UP, number)


def with_another_router(subject: Subject, tensors: dict) -> None:
    tensors["model.layers.0.mlp.router.weight"][0, 0] += 1e-4


def with_a_nan(subject: Subject, tensors: dict) -> None:
    tensors[DOWN][2, 5, 5] = float("nan")


@pytest.mark.parametrize(
    ("change", "named", "told"),
    [
        (without_one_delta, f"{GATE_UP}, expert {EXPERT}", "LoRA's change is missing"),
        (with_lora_b_turned, f"{DOWN}, expert 0", "what changed is not LoRA's change"),
        (with_gate_and_up_swapped, f"{GATE_UP}, expert 0", "what changed is not LoRA's change"),
        (with_less_of_it, QUERY, "LoRA's change is there 0.90 times"),
        (with_a_layer_of_the_base, f"{GATE_UP}, expert 3", "LoRA's change is missing"),
        (with_another_router, "model.layers.0.mlp.router.weight", "LoRA does not touch it"),
        (with_a_nan, f"{DOWN}, expert 2", "NaN or infinite"),
    ],
)
def test_merged_weights_that_are_wrong(subject, copied, change, named, told):
    folder = copied("merged")
    spoil(folder, lambda tensors: change(subject, tensors))
    problems = found(folder, "merged", subject).accounting.problems
    assert any(named in problem and told in problem for problem in problems), problems


@pytest.mark.parametrize("way", ["dropped", "scaled", "swapped"])
def test_requantised_weights_that_are_wrong(subject, copied, way):
    """Rounding to four bits hides nothing: an expert without its change, with 0.9 of it, or with gate and up swapped is named."""
    from fastoss.export.mxfp4 import quantise

    def change(tensors: dict) -> None:
        base, delta = subject.base.expert(GATE_UP, EXPERT), subject.adapter.delta(GATE_UP, EXPERT)
        matrix = {"dropped": base, "scaled": base + 0.9 * delta, "swapped": (base + delta).unflatten(1, (-1, 2)).flip(2).flatten(1)}[way]
        tensors[f"{GATE_UP}_blocks"][EXPERT], tensors[f"{GATE_UP}_scales"][EXPERT] = quantise(matrix.T.contiguous())

    folder = copied("mxfp4")
    spoil(folder, change)
    problems = found(folder, "mxfp4", subject).accounting.problems
    assert any(f"{GATE_UP}, expert {EXPERT}" in problem for problem in problems), problems
    assert len(problems) == 1


def test_gguf_with_gate_and_up_swapped(subject, copied):
    from fastoss.export.gguf_reader import GgufFile

    folder = copied("gguf")
    (path,) = folder.glob("*.gguf")
    file = GgufFile(path)
    gate, up = file.tensors["blk.2.ffn_gate_exps.weight"], file.tensors["blk.2.ffn_up_exps.weight"]
    data = {tensor.name: file.read(tensor).tobytes() for tensor in (gate, up)}
    with open(path, "r+b") as handle:
        for tensor, other in ((gate, up), (up, gate)):
            handle.seek(tensor.start)
            handle.write(data[other.name])
    problems = account(GgufWeights(path, subject.base), subject.base, subject.adapter, quiet).problems
    assert any(f"{GATE_UP}, expert 0" in problem for problem in problems), problems


@pytest.mark.parametrize(("format", "pattern"), [("adapter", "*.safetensors"), ("merged", "*.safetensors"), ("gguf", "*.gguf")])
def test_a_file_that_broke_off(subject, copied, format, pattern):
    folder = copied(format)
    (path,) = folder.glob(pattern)
    size = path.stat().st_size
    with open(path, "r+b") as handle:
        handle.truncate(size - 100_000)
    problems = found(folder, format, subject).all_problems()
    assert any(path.name in problem and "it ends within `" in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("format", "name", "old", "new", "told"),
    [
        ("merged", "chat_template.jinja", "2026-01-01", "2026-01-02", "in training '01"),
        ("adapter", "chat_template.jinja", "<|channel|>final<|message|>", "<|channel|>final <|message|>", "token "),
    ],
)
def test_a_template_that_was_altered(subject, copied, format, name, old, new, told):
    folder = copied(format)
    (path,) = folder.glob(name)
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode()))
    result = found(folder, format, subject)
    problems = [problem for check in result.templates for problem in check.problems]
    assert problems
    assert all("token " in problem and told in problem for problem in problems[:1]), problems


def test_templates_of_a_gguf_that_were_altered(subject, copied):
    """The one within the file (its date), and the Modelfile's (an empty line less after the instructions)."""
    folder = copied("gguf")
    (path,) = folder.glob("*.gguf")
    content = path.read_bytes()
    assert content.count(b"2026-01-01") == 1
    path.write_bytes(content.replace(b"2026-01-01", b"2026-02-01"))
    modelfile = (folder / "Modelfile").read_text(encoding="utf-8")
    (folder / "Modelfile").write_text(modelfile.replace("{{ .System }}\n\n{{ end }}", "{{ .System }}\n{{ end }}"), encoding="utf-8")
    by_name = {check.name: check for check in found(folder, "gguf", subject).templates}
    assert all("in training '01" in by_name[name].problems[0] for name in ("GGUF (Jinja)", "llama.cpp"))
    assert by_name["Modelfile (Go)"].differing == 4  # one of the recipe's rows has instructions, and three of the built-in chats
    assert "token " in by_name["Modelfile (Go)"].problems[0]


def test_an_adapter_with_another_pair(subject, copied):
    folder = copied("adapter")
    key = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"  # down's, as stock PEFT nests them
    spoil(folder, lambda tensors: tensors.__setitem__(key, tensors[key].flip(1).contiguous()))
    problems = found(folder, "adapter", subject).all_problems()
    assert any(DOWN in problem and "not the run's" in problem for problem in problems), problems


def test_an_inert_adapter_is_not_exported(shared, tmp_path):  # noqa: F811
    """Every lora_B zero: it trains nothing, loads everywhere and would pass any comparison of answers."""
    run = tmp_path / "run"
    shutil.copytree(shared.run("both"), run, ignore=shutil.ignore_patterns("checkpoints"))
    (path,) = (run / "adapter").glob("*.safetensors")
    tensors = load_file(path)
    save_file({key: tensor * 0 if "lora_B" in key and "experts" in key else tensor for key, tensor in tensors.items()}, path)
    with pytest.raises(FastossError, match="is not the file that was trained"):
        export(str(run), ["merged"], progress=quiet)
    stamp = json.loads((run / "adapter" / "fastoss.json").read_text(encoding="utf-8"))
    del stamp["weights"]  # an adapter from before it was stamped
    (run / "adapter" / "fastoss.json").write_text(json.dumps(stamp), encoding="utf-8")
    with pytest.raises(RunFailed, match=r"the adapter is inert: every pair of its experts is zero, first `model\.layers\.0\.mlp") as raised:
        export(str(run), ["merged"], progress=quiet)
    assert raised.value.exit_code == 1
    assert not (run / "exports" / "merged").exists()


def test_an_export_of_another_run(shared):  # noqa: F811
    result = verify_export(shared.exports("both") / "adapter", str(shared.run("experts")), progress=quiet)
    assert not result.passed
    with pytest.raises(FastossError, match="there is no export"):
        verify_export(shared.run("both") / "checkpoints", str(shared.run("both")), progress=quiet)


def test_a_verdict_that_failed_is_not_pushed(copied, monkeypatch):
    from fastoss.export.export import push_run

    folder = copied("adapter")
    verdict = json.loads((folder / "verification.json").read_text(encoding="utf-8"))
    (folder / "verification.json").write_text(json.dumps(verdict | {"passed": False}), encoding="utf-8")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(FastossError, match="it is not pushed"):
        push_run(str(folder), [], "me/mine", progress=quiet)


def test_the_base_is_told_from_a_tuned_model(subject):
    """The questions do show training: base and adapter are far apart on them, so equal answers mean something."""
    assert subject.effect > 1.0
    assert len(subject.questions) == 3
    assert torch.cat(subject.answers.values).shape[1] == 20
