"""`make gpu` walked from start to end on a CPU, and its random checkpoint held against formulas of its own."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PHASES = [
    "tests", "tiny-unsloth", "tiny-transformers", "make-mxfp4-20b",
    "mxfp4-20b-unsloth-2k", "mxfp4-20b-unsloth-8k", "bf16-20b-transformers", "4bit-20b-unsloth",
]  # fmt: skip
# Without Unsloth its phases fail and say so; CI installs it.
TRAINED = [name for name in PHASES if name.startswith("tiny") or (name.endswith(("2k", "8k", "transformers")))]
FIELDS = {
    "phase", "status", "reason", "dry_run", "card", "driver", "gpu_memory_gb", "gpu_free_gb", "cuda", "versions", "commit", "command",
    "started", "seconds", "losses", "peak_allocated_gb", "peak_reserved_gb",
}  # fmt: skip


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCHMARKS / "gpu_checks.py", *arguments], capture_output=True, text=True, timeout=600)


def load(name: str) -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def record(work: Path, phase: str) -> dict[str, Any]:
    return json.loads((work / "results" / f"cpu-{phase}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_dry_run_from_start_to_end(tmp_path: Path) -> None:
    """One test, since the walk takes a minute and a half: parallel workers would each take it anew."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    before = sorted((BENCHMARKS / "results").rglob("*"))
    done = call("--dry-run", "--work", tmp_path)
    check_records(tmp_path, done, before)
    check_comparisons(tmp_path)
    check_second_call(tmp_path)
    check_weights(tmp_path)


def check_records(work: Path, done: subprocess.CompletedProcess[str], before: list[Path]) -> None:
    """Every phase is ok or says why not, in a record with all its fields, and nothing lies among the real results."""
    logs = "\n".join(path.read_text(errors="replace") for path in work.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert sorted((BENCHMARKS / "results").rglob("*")) == before, "a dry run is no result"
    for phase in PHASES:
        found = record(work, phase)
        assert set(found) >= FIELDS, phase
        assert found["phase"] == phase
        assert found["dry_run"] is True
        assert found["status"] == "ok" or (found["status"] == "skipped" and found["reason"]), found
        assert f"--only {phase} " in found["command"]
        assert found["seconds"] > 0
        assert {"torch", "transformers", "trl", "peft", "python"} <= set(found["versions"])
        assert str(work) not in json.dumps(found), "no private paths in a result"
        if phase in TRAINED:
            assert found["status"] == "ok"
            assert len(found["losses"]) == len(found["step_seconds"]) >= 3
    assert record(work, "4bit-20b-unsloth")["reason"] == "4 bits need a GPU"


def check_comparisons(work: Path) -> None:
    """Two backends see the same first batch, of the size that its name says."""
    for phase in ("tiny-transformers", "bf16-20b-transformers"):
        assert record(work, phase)["compared"]["relative_difference"] < 1e-5, "float32, the same rows"
    assert record(work, "mxfp4-20b-unsloth-2k")["batch_tokens"] in range(2 * 120, 2 * 128 + 1)
    assert record(work, "mxfp4-20b-unsloth-8k")["batch_tokens"] in range(8 * 120, 8 * 128 + 1)


def check_second_call(work: Path) -> None:
    """What was ok is not done again."""
    again = call("--dry-run", "--work", work, "--only", "make-mxfp4-20b", "--only", "mxfp4-20b-unsloth")
    assert again.returncode == 0
    assert again.stdout.count("done before") == 3, again.stdout


def check_weights(work: Path) -> None:
    """What transformers loads from the packed folder is the independent formula below, and so is the bf16 folder."""
    import torch
    from safetensors.torch import load_file
    from transformers import GptOssForCausalLM, Mxfp4Config

    packed, plain = work / "gpt-oss-tiny-random-mxfp4", work / "gpt-oss-tiny-random-bf16"
    model = GptOssForCausalLM.from_pretrained(packed, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True))
    loaded = model.state_dict()
    for layer in range(2):
        files = [load_file(folder / f"model-{layer + 1:05d}-of-00003.safetensors") for folder in (packed, plain)]
        for name in ("gate_up_proj", "down_proj"):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            blocks, scales = files[0][f"{key}_blocks"], files[0][f"{key}_scales"]
            assert len(scales.unique()) == 2
            expected = torch.from_numpy(e2m1_times_scale(blocks.numpy(), scales.numpy())).transpose(1, 2)  # (experts, in, out)
            assert torch.equal(loaded[key].double(), expected)
            assert torch.equal(files[1][key].double(), expected)
    missing = set(loaded) - set(load_index(plain))
    assert not missing


def e2m1_times_scale(blocks: numpy.ndarray, scales: numpy.ndarray) -> numpy.ndarray:
    """OCP Microscaling Formats 1.0, bit by bit in float64: sign, two bits of exponent (bias 1), one of mantissa; E8M0 scale."""
    values = numpy.empty((*scales.shape, 32))
    for half, bits in enumerate((blocks & 15, blocks >> 4)):
        sign, exponent, mantissa = (bits >> 3) & 1, ((bits >> 1) & 3).astype(int), bits & 1
        size = numpy.where(exponent == 0, mantissa * 0.5, (1 + mantissa * 0.5) * 2.0 ** (exponent - 1))
        values[..., half::2] = (1 - 2.0 * sign) * size
    return (values * 2.0 ** (scales.astype(int) - 127)[..., None]).reshape(*scales.shape[:2], -1)


def load_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_the_20b_shape_is_the_published_one() -> None:
    made = load("random_checkpoint")
    sizes = {name: spec.size for file in made.checkpoint_specs(made.GPT_OSS_20B, "mxfp4") for name, spec in file.items()}
    assert len(sizes) == 24 * 19 + 3  # llama.cpp counts 459 tensors in the published model
    assert sizes["model.layers.23.mlp.experts.gate_up_proj_blocks"] == (32, 5760, 90, 16)
    assert sizes["model.layers.23.mlp.experts.gate_up_proj_scales"] == (32, 5760, 90)
    assert sizes["model.layers.0.mlp.experts.down_proj_blocks"] == (32, 2880, 90, 16)
    assert sizes["model.layers.0.mlp.experts.down_proj_bias"] == (32, 2880)
    assert sizes["model.layers.0.self_attn.sinks"] == (64,)
    values = [spec.size for file in made.checkpoint_specs(made.GPT_OSS_20B, "bf16") for spec in file.values()]
    assert sum(int(numpy.prod(size)) for size in values) == 20_914_757_184  # parameters of openai/gpt-oss-20b
    assert round(made.checkpoint_bytes(made.GPT_OSS_20B, "mxfp4") / 1e9, 1) == 13.8


def test_a_phase_over_its_limit_is_stopped_and_says_so(tmp_path: Path) -> None:
    checks = load("gpu_checks")
    (tmp_path / "results").mkdir()
    place = checks.Place(tmp_path, tmp_path / "results", "cpu", dry=True)
    phase = next(p for p in checks.PHASES if p.name == "tiny-unsloth")
    ended = checks.run_phase(phase, place, {"gpu_free_gb": None}, limit_s=0.2)
    assert ended["status"] == "failed"
    assert "limit" in ended["reason"]


def test_a_failed_phase_keeps_its_reason_and_does_not_stop_the_next(tmp_path: Path) -> None:
    checks = load("gpu_checks")
    (tmp_path / "results").mkdir()
    phases_file = load("gpu_phases")
    place = checks.Place(tmp_path, tmp_path / "results", "cpu", dry=True)
    phases = [phases_file.Phase(name, phases_file.make_mxfp4, 1) for name in ("no-such-phase", "make-mxfp4-20b")]
    assert checks._run_all(phases, place, {"card": "cpu", "gpu_free_gb": None}, again=False, minutes=None) == 1
    assert record(tmp_path, "no-such-phase")["status"] == "failed"
    assert record(tmp_path, "no-such-phase")["reason"]
    assert record(tmp_path, "make-mxfp4-20b")["status"] == "ok"


def test_list_and_unknown_names() -> None:
    assert [line.split()[0] for line in call("--list").stdout.splitlines()] == PHASES
    wrong = call("--only", "nonsense")
    assert wrong.returncode == 2
    assert "nonsense" in wrong.stderr


def test_without_a_gpu_the_real_run_is_refused() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = call()
    assert done.returncode == 2
    assert "--dry-run" in done.stderr
