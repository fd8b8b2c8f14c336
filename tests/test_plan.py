"""The plan of a run: counts and figures of the real model, memory by component, cards, what would fit, and the run's own plan.json."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

from fastoss.config import DataSource, Hygiene, LoraSettings, Recipe, TrainSettings, load_recipe
from fastoss.data.units import Units
from fastoss.errors import FastossError
from fastoss.model.backend import ModelPlan
from fastoss.model.cards import GIB, card_called, card_for, parse_card
from fastoss.model.plan import CPU_HEAD_ROWS, EAGER_ROWS, GPU_HEAD_ROWS, MicroBatch, Setting, cpu_layer_bytes, plan_memory
from fastoss.model.plan_constants import Constants
from fastoss.model.shape import GPT_OSS_20B, GPT_OSS_120B, TINY, shape_from_config
from fastoss.recipe_edit import set_value
from fastoss.run import size_of
from fastoss.training.planning.fit import Change, Fit, find_fit, write_fit

from .commands import ROOT
from .conftest import ROWS, RecipeFolder, fastoss


def test_parameters_of_the_real_config():
    """20.91 B in all, 3.61 B of which a token meets (OpenAI's model card); the tensors of openai/gpt-oss-20b add up to the first."""
    assert GPT_OSS_20B.total == 20_914_757_184
    assert round(GPT_OSS_20B.active / 1e9, 2) == 3.61
    assert round(GPT_OSS_120B.total / 1e9, 1) == 116.8
    assert round(GPT_OSS_120B.active / 1e9, 1) == 5.1


def test_weights_by_precision():
    size = {form: sum(GPT_OSS_20B.weight_bytes(form).values()) / GIB for form in ("mxfp4", "bf16", "4bit", "float32")}
    assert round(size["mxfp4"], 1) == 12.8
    assert round(size["bf16"]) == 39
    assert size["float32"] == pytest.approx(2 * size["bf16"])
    assert 11 < size["4bit"] < size["mxfp4"]
    stock = sum(GPT_OSS_20B.weight_bytes("4bit", "transformers").values()) / GIB
    assert size["bf16"] - 1.0 < stock < size["bf16"], "transformers packs attention alone"


def test_the_tiny_shape_is_the_tiny_model():
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from fastoss.model import attention_kernels, head, tiny

    assert shape_from_config("tiny", tiny.SETTINGS) == TINY
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**tiny.SETTINGS))
    assert TINY.total == sum(parameter.numel() for parameter in model.parameters())
    assert (EAGER_ROWS, CPU_HEAD_ROWS, GPU_HEAD_ROWS) == (attention_kernels.EAGER_ROWS, head.CPU_CHUNK, head.CHUNK)


@pytest.mark.parametrize(
    "changes", [{}, {"hidden_size": 32}, {"intermediate_size": 96}, {"num_experts_per_tok": 1}, {"num_attention_heads": 8}, {"head_dim": 24}]
)
@pytest.mark.parametrize("targets", [("attention", "experts"), ("attention",)])
def test_what_a_layer_keeps_is_what_autograd_saves(changes: dict, targets: tuple, one_thread: None):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GptOssConfig, GptOssForCausalLM

    from fastoss.model import tiny
    from fastoss.model.attention import register_packed_attention
    from fastoss.model.lora import peft_targets

    settings = tiny.SETTINGS | {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 2} | changes
    config = GptOssConfig(**settings)
    config._attn_implementation = register_packed_attention()
    lora = LoraSettings(r=4, targets=targets)
    model = get_peft_model(GptOssForCausalLM(config), LoraConfig(r=4, task_type="CAUSAL_LM", **peft_targets(lora, [0, 1])))
    documents = [150, 90, 60]
    positions = torch.cat([torch.arange(length) for length in documents])[None]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    stacks = {3 * settings["num_local_experts"] * settings["hidden_size"] * settings["intermediate_size"] * part * 4 // 3 for part in (1, 2)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_base_model().model(input_ids=torch.randint(3, 299, positions.shape), position_ids=positions, use_cache=False)
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    measured = sum(size for size in sizes if size not in stacks) / 2
    planned = cpu_layer_bytes(shape_from_config("", settings), Setting("transformers", "float32", "cpu", lora, False), documents)
    assert planned == pytest.approx(measured, rel=0.05)


def gpu(precision: str = "4bit", recompute: bool = True, **changes) -> Setting:
    return Setting("unsloth", precision, "gpu", LoraSettings(), recompute, **changes)


def memory(setting: Setting, tokens: int = 8192):
    return plan_memory(GPT_OSS_20B, setting, MicroBatch([tokens]), Constants())


def test_memory_follows_what_it_hangs_on():
    plan = memory(gpu())
    assert plan.peak == sum(plan.components.values())
    trained = 8 * 24 * (20_736 + 32 * 14_400)
    assert plan.components["optimizer states"] == 8 * trained
    assert plan.components["checkpoints of activations"] == 8192 * 24 * 2880 * 2, "138 kB a token"
    assert memory(gpu(), 16384).peak > plan.peak
    assert memory(gpu(recompute=False)).peak > 2 * plan.peak
    assert memory(gpu("bf16")).peak - plan.peak > 25e9
    assert plan.others["evaluation"] <= plan.peak


def test_strategies_shard_what_they_shard():
    held = {strategy: memory(gpu("bf16", strategy=strategy, ranks=4)).components for strategy in ("ddp", "zero2", "zero3", "fsdp")}
    whole = memory(gpu("bf16")).components
    for kind, sharding in (
        ("weights: experts", ("zero3", "fsdp")),
        ("LoRA", ("zero3",)),
        ("gradients", ("zero2", "zero3")),
        ("optimizer states", ("zero2", "zero3")),
    ):
        for strategy, parts in held.items():
            assert parts[kind] == whole[kind] // (4 if strategy in sharding else 1), (kind, strategy)
    assert all(parts["exchange between cards"] > 0 for parts in held.values())


def test_layers_that_wait_on_the_host_free_their_share_of_the_card():
    none, some, all_of_them = (memory(gpu("bf16", strategy="fsdp", ranks=2, host_layers=count)).components for count in (0, 6, 24))
    for kind in ("weights: experts", "weights: attention"):
        assert some[kind] == pytest.approx(0.75 * none[kind])
        assert all_of_them[kind] == 0
    rows = re.findall(r"^\| (\d) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "docs" / "scaling.md").read_text(), re.MULTILINE)
    assert len(rows) == 5
    for cards, waiting, *shown in rows:
        for targets, told in zip((("attention",), ("attention", "experts")), shown, strict=True):
            lora = LoraSettings(r=8, targets=targets)
            setting = Setting("transformers", "bf16", "gpu", lora, True, strategy="fsdp", ranks=int(cards), host_layers=int(waiting))
            assert f"{memory(setting, 2048).card_bytes / GIB:.1f}" == told, (cards, waiting, targets)
    assert some["exchange between cards"] > none["exchange between cards"]
    assert memory(gpu("bf16", host_layers=6, strategy="fsdp")).components["weights: experts"] == memory(gpu("bf16")).components["weights: experts"]


def test_cards_by_their_names():
    assert parse_card("24GB").memory == parse_card("24").memory == 24 * GIB
    assert [parse_card(name).name for name in ("rtx 4090", "4090", "A100-40", "a100 80GB", "NVIDIA H200", "l4")] == [
        "4090", "4090", "A100-40", "A100-80", "H200", "L4",
    ]  # fmt: skip
    for wrong in ("H9000", "0.1GB", "", "-24GB", "409"):
        with pytest.raises(FastossError):
            parse_card(wrong)


def test_a_card_is_found_by_what_its_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-a, NVIDIA A100-SXM4-40GB, 40960'\necho '1, GPU-b, NVIDIA GeForce RTX 4090, 24564'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (card_for(None).memory, card_for(None).flops) == (24564 * 2**20, 165e12), "the smaller one"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    assert (card_for(None).memory, card_for(None).flops) == (40960 * 2**20, 312e12)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert card_for(None).name == "24 GB"


@pytest.mark.parametrize(
    ("name", "mebibytes", "tera_flops"),
    [
        ("NVIDIA RTX 6000 Ada Generation", 49140, 364), ("NVIDIA RTX A6000", 49140, 155), ("NVIDIA H100 NVL", 95830, 835),
        ("NVIDIA H100 80GB HBM3", 81559, 989), ("Tesla V100-SXM2-32GB", 32768, 125),
        ("NVIDIA GeForce RTX 4080", 16376, 0), ("Quadro RTX 6000", 24576, 0),
    ],
)  # fmt: skip
def test_only_a_card_of_that_name_lends_its_speed(name: str, mebibytes: int, tera_flops: int):
    assert card_called(name, mebibytes).flops == tera_flops * 1e12


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("[train]\nlearning_rate = 1e-4 # why\n", "train.learning_rate", 2),
        ('name = "a"\n\n[model]\nname = "tiny"\n', "train.tokens_per_batch", 512),
        ('[model]\nname = "tiny"\n[lora]\nr = 8', "model.precision", "4bit"),
        ('train.recompute = "auto"  # so\n', "train.recompute", "full"),
        ('[lora]\nexpert_layers = "all"   # or [7, 15]\n', "lora.expert_layers", [7, 15, 23]),
    ],
)
def test_a_key_of_a_recipe_is_set_and_comments_stay(text: str, key: str, value: object):
    changed = set_value(text, key, value, place="r.toml")
    section, name = key.split(".")
    assert tomllib.loads(changed) == tomllib.loads(text) | {section: tomllib.loads(text).get(section, {}) | {name: value}}
    assert changed.count("#") == text.count("#")


def test_a_section_in_one_line_is_said_and_not_guessed():
    with pytest.raises(FastossError, match="cannot be changed"):
        set_value('model = { name = "tiny" }\n', "model.precision", "4bit", place="r.toml")


def check(*arguments: object) -> dict:
    result = fastoss("check", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)["plan"]


def test_what_does_not_fit_comes_with_what_would(tmp_path: Path):
    recipe = ROOT / "recipes" / "catgirl.toml"
    plan = check(recipe, "--card", "24GB", "--set", "model.precision=bf16", "--price", 2)
    assert (plan["fits"], plan["card"], plan["price"]) == (False, "24 GB", 2)
    assert plan["seconds"] is plan["cost"] is None, "of 24 GB nobody knows how fast"
    assert "4bit" in [change["new"] for change in plan["would_fit"]["changes"]] or "mxfp4" in [c["new"] for c in plan["would_fit"]["changes"]]
    assert plan["would_fit"]["peak_bytes"] <= 24 * GIB
    whole = check(recipe, "--card", "H200")
    smaller = check(recipe, "--card", f"{(whole['peak_bytes'] + whole['beside_bytes']) / GIB - 0.5:.2f}GB")
    assert [(change["key"], change["old"], change["new"]) for change in smaller["would_fit"]["changes"]] == [
        ("train.tokens_per_batch", 8192, 4096), ("train.gradient_accumulation_steps", 2, 4),
    ], "the same global batch, and no more than is needed"  # fmt: skip
    fast = check(recipe, "--card", "H200", "--price", 2)
    assert fast["fits"]
    assert fast["cost"] == pytest.approx(fast["seconds"] / 3600 * 2, rel=1e-2)
    assert check(recipe, "--card", "H200", "--gpus", 2)["components"]["exchange between cards"] > 0
    halves = [f"--set={change}" for change in ("distributed.strategy=fsdp", "model.backend=transformers", "model.precision=bf16")]
    on_two = check(recipe, "--card", "24GB", "--gpus", 2, *halves)
    assert not on_two["fits"]
    assert "distributed.host_layers" in [change["key"] for change in on_two["would_fit"]["changes"]]
    assert on_two["would_fit"]["peak_bytes"] <= 24 * GIB


def test_no_more_checkpoints_lie_there_than_are_written(folder: RecipeFolder):
    from fastoss.data.dataset import build_dataset
    from fastoss.training.planning.outlook import judge

    dataset = build_dataset(load_recipe(folder.recipe))
    for changes, count in (
        (["checkpoint.every=\"epoch\"", "train.num_train_epochs=0.5"], "1 checkpoint"),
        (["checkpoint.every=\"epoch\"", "train.num_train_epochs=3"], "2 checkpoints"),
        (["checkpoint.every=1", "train.max_steps=1"], "1 checkpoint"),
    ):  # fmt: skip
        recipe = load_recipe(folder.recipe, ["train.max_steps=0", *changes])
        assert count in judge(recipe, dataset).plan.disk


def test_fit_writes_a_new_recipe_that_fits(folder: RecipeFolder):
    text = folder.recipe.read_text().replace('name = "tiny"', "# a comment").replace('precision = "float32"', 'precision = "bf16"  # whole')
    folder.recipe.write_text(text)
    before = folder.recipe.read_text()
    done = fastoss("check", folder.recipe, "--card", "24GB", "--fit")
    assert done.code == 0, done.err
    written = folder.root / "recipe-fit.toml"
    assert f"wrote {written}, which has" in done.out
    assert "  model.precision: bf16 → mxfp4 (" in done.out
    assert folder.recipe.read_text() == before
    assert written.read_text() == before.replace('"bf16"  # whole', '"mxfp4"  # whole'), "and nothing else, comments included"
    assert check(written, "--card", "24GB")["fits"]
    again = fastoss("check", folder.recipe, "--card", "24GB", "--fit")
    assert (again.code, "--fit overwrites no file" in again.err) == (2, True)
    nothing = fastoss("check", folder.recipe, "--card", "8GB", "--fit")
    assert (nothing.code, "no setting of a recipe makes it fit" in nothing.err) == (2, True)
    unknown = fastoss("check", folder.recipe, "--card", "H9000")
    assert (unknown.code, "not a card that is known here" in unknown.err) == (2, True)


@pytest.mark.parametrize(
    ("method", "batch", "examples", "units", "changes"),
    [
        (
            "dpo",
            {"per_device_train_batch_size": 8},
            [3000, 1500] * 20,
            [6000] * 20,
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        ),
        (
            "dpo",
            {"per_device_train_batch_size": 5},
            [3000, 1500] * 20,
            [6000] * 20,
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5},
        ),
        ("dpo", {"tokens_per_batch": 16384}, [3500, 3000] * 20, [6000] * 20, {"tokens_per_batch": 8192, "gradient_accumulation_steps": 2}),
        ("sft", {"tokens_per_batch": 16384}, [3000] * 40, [12_000] * 10, {"tokens_per_batch": 8192, "gradient_accumulation_steps": 2}),
    ],
)
def test_what_would_fit_counts_pairs_and_trees_by_their_longest_example(method: str, batch: dict, examples: list, units: list, changes: dict):
    """Both are longer than max_length, and are trained all the same: a smaller batch is what helps."""
    recipe = Recipe(name="x", method=method, data=(DataSource(source="x"),), train=TrainSettings(**batch), dpo=None)
    laid_out = Units(SimpleNamespace(lengths=examples), numpy.arange(len(units) + 1), units, [1.0] * len(units))
    fit = find_fit(recipe, ModelPlan("unsloth", None, "4bit", "gpu"), parse_card("24GB"), laid_out, 1)
    assert {change.key: change.new for change in fit.changes} == {f"train.{key}": value for key, value in changes.items()}
    assert 12 * GIB < fit.bytes <= 24 * GIB


def test_rows_are_shortened_for_a_card_only_where_the_recipe_lets_rows_go():
    model, laid_out = (
        ModelPlan("unsloth", None, "4bit", "gpu"),
        Units(SimpleNamespace(lengths=[4000] * 9 + [900]), numpy.arange(11), [1] * 10, [1.0] * 10),
    )
    small, data = parse_card("15.5GB"), (DataSource(source="x"),)
    for policy, fits in (("drop", True), ("error", False)):
        recipe = Recipe(name="x", data=data, train=TrainSettings(tokens_per_batch=4096), hygiene=Hygiene(over_length=policy))
        fit = find_fit(recipe, model, small, laid_out, 1)
        assert any(change.key == "model.max_length" for change in fit.changes) is fits if fit else not fits


def test_a_recipe_with_a_byte_order_mark_can_be_made_to_fit(tmp_path: Path):
    (tmp_path / "r.toml").write_text('\ufeffname = "x"\n[train]\ntokens_per_batch = 16384 # so\n', encoding="utf-8")
    written = write_fit(tmp_path / "r-fit.toml", Fit([Change("train.tokens_per_batch", 16384, 8192, "")], 1), tmp_path / "r.toml")
    assert written.read_text() == 'name = "x"\n[train]\ntokens_per_batch = 8192 # so\n'


def test_what_cannot_fit_is_refused_before_the_model_is_loaded():
    from fastoss.data.dataset import build_dataset
    from fastoss.training.planning.fit import check_fits
    from fastoss.training.planning.outlook import judge

    recipe = load_recipe(ROOT / "recipes" / "catgirl.toml", ["model.precision=bf16"])
    dataset = build_dataset(recipe)
    plan = judge(recipe, dataset, card="24GB").plan
    with pytest.raises(FastossError, match="cannot fit on this card") as refused:
        check_fits(plan, recipe, ignore=False)
    assert refused.value.exit_code == 2
    assert "--ignore-plan" in str(refused.value)
    check_fits(plan, recipe, ignore=True)
    doubtful = judge(load_recipe(ROOT / "recipes" / "catgirl.toml", ["train.tokens_per_batch=16384"]), dataset, card="24GB").plan
    assert not doubtful.fits, "an estimate alone refuses nothing"
    check_fits(doubtful, recipe, ignore=False)


def test_check_needs_no_torch():
    """`check` with its plan answers at once, on any laptop."""
    code = (
        "import sys; from fastoss.config import load_recipe; from fastoss.data.dataset import build_dataset\n"
        "from fastoss.training.planning.outlook import judge\n"
        f"r = load_recipe({str(ROOT / 'recipes' / 'quickstart.toml')!r}); judge(r, build_dataset(r), card='24GB'); "
        "print([name for name in ('torch', 'transformers', 'trl', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_keeps_its_plan_and_what_was_measured(folder: RecipeFolder):
    """In a process from scratch: memory is counted from its imports on. The 15 % are the promise; benchmarks/plan_cpu.py has larger models.

    Batches of 1,024 tokens, as there: what libraries take varies by 25 MiB from process to process.
    """
    from fastoss.model.tiny import tiny_model_folder

    tiny_model_folder()  # else it is built in the process that is measured
    folder.rows(ROWS * 8)
    folder.recipe.write_text(folder.recipe.read_text().replace("per_device_train_batch_size = 2", "tokens_per_batch = 1024"))
    result = fastoss("train", folder.recipe, "--set", "train.max_steps=2", cwd=folder.root, PYTHONHASHSEED="0")
    assert result.code == 0, result.err
    plan = json.loads((folder.root / "runs" / "test" / "plan.json").read_text())
    assert plan["card"] is plan["seconds"] is None
    assert plan["peak_bytes"] == sum(plan["components"].values())
    assert (plan["steps"], plan["tokens"] > 0) == (2, True)
    measured = plan["measured"]
    assert plan["peak_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.15)
    assert measured["disk_bytes"] >= plan["disk_bytes"] * 0.9
    assert measured["seconds"] > 0
    assert any(line.startswith("memory ") and " planned, " in line for line in result.err.splitlines()[-5:])


def test_a_file_that_another_process_takes_away_counts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The processes of a run write signs of life into its folder while its size is taken."""
    (tmp_path / "stays").write_bytes(b"x" * 100)
    (tmp_path / "goes").touch()
    is_file = Path.is_file

    def taken(path: Path) -> bool:
        there = is_file(path)
        (tmp_path / "goes").unlink(missing_ok=True)
        return there or path.name == "goes"

    monkeypatch.setattr(Path, "is_file", taken)
    assert size_of(tmp_path) == 100


def test_the_doctor_of_a_machine():
    result = fastoss("doctor", "--json", HF_HUB_OFFLINE="1", PYTHONHASHSEED="0")
    assert result.code == 0, result.err
    lines = {line["what"]: line for line in json.loads(result.out)["findings"]}
    assert lines["torch"]["state"] == "ok"
    assert lines["attention with sinks"]["state"] in ("ok", "slow")
    assert lines["hub"]["told"].startswith("HF_HUB_OFFLINE is set")
    assert {"Python", "GPU", "trl", "peft", "bitsandbytes", "Unsloth", "disk here", "gloo between two processes"} <= set(lines)
    assert all(line["fix"] for line in lines.values() if line["state"] == "broken")
    assert re.match("not ready: mend |ready to train gpt-oss-20b|ready for the tiny model", json.loads(result.out)["verdict"])


def test_the_doctors_verdict():
    from fastoss.training.planning.machine import Line, verdict

    python, card, none = Line("Python", "ok", "3.12"), Line("GPU", "ok", "0: RTX 4090"), Line("GPU", "absent", "none")
    disk, torch = Line("disk here", "slow", "28 GB free"), Line("torch", "broken", "does not import")
    assert verdict([python, card]) == "ready to train gpt-oss-20b"
    assert verdict([python, none, disk]) == "ready for the tiny model; gpt-oss-20b needs a GPU (slow or scarce: disk here)"
    assert verdict([python, card, torch, disk]) == "not ready: mend torch (slow or scarce: disk here)"


def test_the_doctor_reaches_the_hub_as_its_client_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a proxy is set, that is what must answer; its password is not shown."""
    from fastoss.training.planning.machine import _disk, _hub

    for name in ("HF_HUB_OFFLINE", "NO_PROXY", "no_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@127.0.0.1:{proxy.getsockname()[1]}")
        line = next(_hub())
    assert (line.state, line.told.startswith("https://hub.invalid through the proxy that is set answers")) == ("ok", True)
    assert "secret" not in line.line()
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTOSS_CACHE", str(tmp_path / "file" / "cache"))
    assert next(line.state for line in _disk()) == "broken", "one line, and the others after it"


def test_a_library_that_breaks_breaks_a_line_and_not_the_doctor(tmp_path: Path):
    from fastoss.training.planning.machine import _probe

    broken = tmp_path / "peft"
    broken.mkdir()
    (broken / "__init__.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    sys.path.insert(0, str(tmp_path))
    try:
        lines = _probe(["torch", "libraries", "torch"], [])
    finally:
        sys.path.remove(str(tmp_path))
    states = [(line.what, line.state) for line in lines]
    assert states[0] == ("torch", "ok")
    assert ("libraries", "broken") in states
    assert states[-2:] == [("torch", "ok"), ("CUDA", "absent")], "the parts behind it are still asked"
