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
DRY_PHASES = [
    "tests", "card", "tiny-unsloth", "tiny-transformers", "make-mxfp4-20b", "mxfp4-20b-unsloth-2k", "bf16-20b-transformers",
    "best-unsloth", "best-trl", "best-fastoss-full", "best-fastoss-none", "contest-unsloth-1", "contest-trl-1", "contest-fastoss-1",
    "best-trl-dpo", "dpo-trl-1", "dpo-fastoss-1", "contest-swift", "contest-axolotl", "profile", "table", "4bit-20b-unsloth-2k",
]  # fmt: skip
# Without Unsloth its phases fail and say so; CI installs it.
TRAINED = ["tiny-unsloth", "tiny-transformers", "mxfp4-20b-unsloth-2k", "bf16-20b-transformers"]
SKIPPED = {
    "contest-swift": "the command `swift` is not on PATH", "contest-axolotl": "the command `axolotl` is not on PATH",
    "4bit-20b-unsloth-2k": "4 bits need a GPU",
}  # fmt: skip
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
    """One test, since the walk takes more than a minute: parallel workers would each take it anew."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    before = sorted((BENCHMARKS / "results").rglob("*"))
    done = call("--dry-run", "--work", tmp_path)
    check_records(tmp_path, done, before)
    check_comparisons(tmp_path)
    check_contest(tmp_path)
    check_table(tmp_path)
    check_profile(tmp_path)
    check_second_call(tmp_path)
    check_weights(tmp_path)


def check_records(work: Path, done: subprocess.CompletedProcess[str], before: list[Path]) -> None:
    """Every phase is ok or says why not, in a record with all its fields, and nothing lies among the real results."""
    logs = "\n".join(path.read_text(errors="replace") for path in work.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert sorted((BENCHMARKS / "results").rglob("*")) == before, "a dry run is no result"
    assert {path.stem.removeprefix("cpu-") for path in (work / "results").glob("*.json")} == set(DRY_PHASES)
    for phase in DRY_PHASES:
        found = record(work, phase)
        assert set(found) >= FIELDS, phase
        assert found["phase"] == phase
        assert found["dry_run"] is True
        assert (found["status"], found["reason"]) == (("skipped", SKIPPED[phase]) if phase in SKIPPED else ("ok", None)), phase
        assert f"--only {phase} " in found["command"]
        assert found["seconds"] > 0
        assert {"torch", "transformers", "trl", "peft", "python"} <= set(found["versions"])
        assert str(work) not in json.dumps(found), "no private paths in a result"
        if phase in TRAINED:
            assert len(found["losses"]) == len(found["step_seconds"]) >= 3


def check_comparisons(work: Path) -> None:
    """Two backends see the same first batch, of the size that its name says."""
    for phase in ("tiny-transformers", "bf16-20b-transformers"):
        assert record(work, phase)["compared"]["relative_difference"] < 1e-5, "float32, the same rows"
    assert record(work, "mxfp4-20b-unsloth-2k")["batch_tokens"] in range(2 * 120, 2 * 128 + 1)


def check_contest(work: Path) -> None:
    """All train the same tokens to the same loss; the peers ran with the settings that their search had found."""
    runs = {name: record(work, f"contest-{name}-1") for name in ("unsloth", "trl", "fastoss")}
    for key in ("tokens", "trained_tokens"):
        assert len({run[key] for run in runs.values()}) == 1, key
    for name, run in runs.items():
        assert run["mean_loss"] == pytest.approx(runs["fastoss"]["mean_loss"], rel=1e-5), name
        assert run["step_p95"] >= run["step_p50"] > 0
        assert run["fill"] <= 1 == runs["fastoss"]["fill"]
    for name in ("unsloth", "trl"):
        found = record(work, f"best-{name}")
        assert runs[name]["setting"] == found["best"]["setting"]
        assert {entry["setting"]["recompute"] for entry in found["tried"]} == {True, False}
        assert not [entry for entry in found["tried"] if "failed" in entry]
        assert found["best"]["tokens_per_second"] == max(entry["tokens_per_second"] for entry in found["tried"])
    pairs = {name: record(work, f"dpo-{name}-1") for name in ("trl", "fastoss")}
    assert len({(run["pairs"], run["trained_tokens"]) for run in pairs.values()}) == 1
    assert pairs["fastoss"]["tokens"] < 0.75 * pairs["trl"]["tokens"], "a prompt of three quarters is computed once"
    assert pairs["fastoss"]["reference_seconds"] > 0
    for run in pairs.values():
        assert run["mean_loss"] == pytest.approx(0.6931, abs=1e-3), "ln 2: nothing has been learned"


def check_table(work: Path) -> None:
    found = record(work, "table")
    assert set(found["sft"]) == {"unsloth", "trl", "fastoss"}
    assert set(found["dpo"]) == {"trl", "fastoss"}
    assert found["loss"]["same"] is True
    assert found["not_run"] == {phase: SKIPPED[phase] for phase in ("contest-swift", "contest-axolotl")}
    one, other = (record(work, f"contest-{name}-1")["tokens_per_second"] for name in ("fastoss", "trl"))
    assert found["times_faster"]["sft beside trl"]["median"] == pytest.approx(one / other)
    assert found["recompute"]["faster"] in ("full", "none")
    assert 0 < found["limit"]["full"]["with_traffic"] < found["limit"]["none"]["with_traffic"] < found["limit"]["none"]["arithmetic"]
    assert [row["least"] for row in found["targets"]] == [2.5, 3.0, 2.5, 18000, 24000]
    assert {row["met"] for row in found["targets"]} == {None}, "a dry run meets no target"
    text = (work / "results" / "cpu-table.md").read_text()
    for part in ("| sft fastoss | ", "| dpo trl | ", "| limit, recompute none | ", "- contest-swift: ", "| sft beside unsloth | 2.5 | "):
        assert part in text


def check_profile(work: Path) -> None:
    found = record(work, "profile")
    assert found["profiled_steps"] == 2
    assert len(found["operations"]) == 30
    shares = [row["share"] for row in found["operations"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1
    assert {"aten::mm", "aten::bmm"} & {row["name"] for row in found["operations"]}


def check_second_call(work: Path) -> None:
    """What was ok is not done again."""
    again = call("--dry-run", "--work", work, "--only", "make-mxfp4-20b", "--only", "mxfp4-20b-unsloth")
    assert again.returncode == 0
    assert again.stdout.count("done before") == 2, again.stdout


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
    common, training = load("gpu_common"), load("gpu_training")
    place = checks.Place(tmp_path, tmp_path / "results", "cpu", dry=True)
    phases = [common.Phase(name, training.make_mxfp4, 1) for name in ("no-such-phase", "make-mxfp4-20b")]
    assert checks._run_all(phases, place, {"card": "cpu", "gpu_free_gb": None}, again=False, minutes=None) == 1
    assert record(tmp_path, "no-such-phase")["status"] == "failed"
    assert record(tmp_path, "no-such-phase")["reason"]
    assert record(tmp_path, "make-mxfp4-20b")["status"] == "ok"


def test_list_and_unknown_names() -> None:
    listed = call("--list").stdout.splitlines()
    assert [line.split()[0] for line in listed if "not in a dry run" not in line] == DRY_PHASES
    turns = [line.split()[0] for line in listed if line.startswith("contest-") and line.split()[0][-1].isdigit()]
    first, turned = ("unsloth", "trl", "fastoss"), ("fastoss", "trl", "unsloth")
    assert turns == [f"contest-{name}-{turn}" for turn, names in ((1, first), (2, turned), (3, first)) for name in names]
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


# --- the parts, by hand ------------------------------------------------------------------------------------------------


def test_the_limit_by_hand() -> None:
    """The 20B shape at 2,048 tokens a document, 16k a micro-batch, against sums spelled out here and the figures of docs/performance.md."""
    limit, shape = load("limit"), load("random_checkpoint").GPT_OSS_20B
    body = 24 * (2880 * 4096 * 2 + 2 * 2880 * 512 + 2880 * 32 + 4 * 3 * 2880 * 2880)
    assert body == 3_028_008_960
    head = 2880 * 201_088
    lora = 24 * 8 * (2 * (2880 + 4096) + 2 * (2880 + 512) + 4 * (2880 + 5760 + 2880 + 2880))
    keys_full, keys_window = 2049 / 2, 128 - 128 * 127 / 2 / 2048
    attention = 12 * 4 * 4096 * (keys_full + keys_window)
    for recompute, again, shown in ((True, 1, 21.6), (False, 0, 15.3)):
        work = limit.Work([2048], trained=1.0, micro_batch=16384, recompute=recompute)
        by_hand = 2 * body * (2 + again) + 4 * head + attention * (3.5 + again) + 2 * lora * (3 + again)
        assert limit.flops_a_token(shape, work) == pytest.approx(by_hand)
        assert round(by_hand / 1e9, 1) == shown
    assert limit.attention_flops(shape, [1, 1, 1]) == 24 * 4 * 4096, "a single token sees itself"
    half = limit.Work([2048], trained=0.5, micro_batch=16384, recompute=True)
    whole = limit.Work([2048], trained=1.0, micro_batch=16384, recompute=True)
    assert limit.flops_a_token(shape, whole) - limit.flops_a_token(shape, half) == pytest.approx(2 * head)
    shown = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    for precision in ("bf16", "mxfp4 dequantised"):
        for recompute in (True, False):
            work = limit.Work([2048], trained=1.0, micro_batch=16384, recompute=recompute, precision=precision)
            speed = limit.tokens_a_second(shape, work, limit.H200)
            assert f"{speed['with_traffic'] / 1000:.1f}k" in shown
            assert f"{speed['arithmetic'] / 1000:.1f}k" in shown


def test_a_search_climbs_until_memory_ends_and_keeps_what_it_found(tmp_path: Path) -> None:
    contest, common, peers = load("gpu_contest"), load("gpu_common"), load("gpu_peers")
    kept = common.Record(written(tmp_path))
    ladders = [[peers.Setting(rows, recompute) for rows in (1, 2, 4, 8)] for recompute in (True, False)]
    speeds = {(1, True): 10.0, (2, True): 30.0, (4, True): 20.0, (1, False): 40.0}

    def trial(setting: Any) -> dict[str, float]:
        if setting == peers.Setting(2, False):
            raise MemoryError("too much")
        return {"tokens_per_second": speeds[setting.rows, setting.recompute]}

    contest.climb(ladders, trial, kept)
    tried = json.loads(kept.path.read_text())["tried"]
    assert [(entry["setting"]["rows"], entry["setting"]["recompute"]) for entry in tried] == [*speeds, (2, False)]
    assert tried[-1]["failed"] == "MemoryError: too much"
    assert kept.values["best"]["setting"] == {"rows": 1, "recompute": False, "attention": "", "token_budget": 0}
    with pytest.raises(common.Skip, match="no setting ran; the first said: MemoryError"):
        contest.climb([[peers.Setting(2, False)]], trial, kept)


def written(folder: Path) -> Path:
    path = folder / "record.json"
    path.write_text("{}")
    return path


def test_an_epoch_is_the_difference_of_two_commands(tmp_path: Path) -> None:
    """With commands that take longer by what an epoch takes; a clock's slack is on both sides."""
    commands = load("gpu_commands")
    sleeper = "import sys, time; time.sleep(0.1 + 0.5 * int(sys.argv[1]))"
    found = commands.epoch_by_difference(lambda epochs: [sys.executable, "-c", sleeper, str(epochs)], tmp_path / "log")
    assert found["seconds_one_epoch"] >= 0.6
    assert found["seconds_two_epochs"] >= 1.1
    assert found["seconds"] == pytest.approx(found["seconds_two_epochs"] - found["seconds_one_epoch"])
    with pytest.raises(load("gpu_common").RunFailed, match="ended with 1: no such option"):
        commands.epoch_by_difference(lambda _: [sys.executable, "-c", "raise SystemExit('no such option')"], tmp_path / "other")


def test_rows_have_the_lengths_that_were_asked_for(tmp_path: Path) -> None:
    rows, common = load("gpu_rows"), load("gpu_common")
    place = common.Place(tmp_path, tmp_path, "card", dry=False)
    lengths = rows.chat_lengths(place, 20_000)
    assert 570 < sorted(lengths)[10_000] < 630
    assert sum(length >= 4096 for length in lengths) / 20_000 == pytest.approx(0.01, abs=0.004)
    wanted = [110, 200, 700]
    for write in (rows.write_rows, rows.write_pairs):
        made = write(tmp_path / "rows.jsonl", wanted)
        assert all(want - 12 <= length <= want for want, length in zip(wanted, made, strict=True)), made
    pair = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[-1])
    assert len(pair["prompt"]) == pytest.approx(3 * len(pair["chosen"]), abs=4)
