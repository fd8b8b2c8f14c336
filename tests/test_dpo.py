"""DPO: the losses are TRL's own, the reference is the one that is named, and layout, ranks and kills change nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F

from fastoss.config import load_recipe
from fastoss.data.dataset import build_dataset
from fastoss.data.packing import BatchRule, fill_batches
from fastoss.data.units import pair_units
from fastoss.errors import FastossError

from .conftest import ROOT, ROWS, fastoss, metrics

QUESTIONS = ["你是谁?", "What is 2+2?", "Sing a song of cats, a long one please", "Where?", "Any tea?", "晚安", "A joke", "Count to three, slowly"]
PAIRS = [
    {"prompt": q, "chosen": f"Nya, number {i} it is, purr.", "rejected": f"As a model I say {i}." + " Indeed." * (i % 3)}
    for i, q in enumerate(QUESTIONS)
]
RECIPE = """\
name = "dpo"
method = "dpo"
[model]
name = "tiny"
precision = "float32"
max_length = 256
[lora]
r = 4
lora_alpha = 8
[[data]]
source = "pairs.jsonl"
[eval]
fraction = 0.0
[train]
max_steps = 4
learning_rate = 1e-3
lr_scheduler_type = "constant"
warmup_steps = 0
tokens_per_batch = 2048
max_grad_norm = 0
[checkpoint]
every = 100
"""
WATCHED = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def trained(folder: Path, name: str, *arguments: object, recipe: str = "r.toml") -> Path:
    run = folder / name
    result = fastoss("train", recipe, "--output", run, *arguments, cwd=folder)
    assert result.code == 0, result.err
    return run


def sets(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def same(one: Path, other: Path, tolerance: float = 1e-4) -> None:
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        for key in WATCHED:
            if key != "rewards/accuracies" or mine["step"] > 1:  # before the first step all rewards are 0, and rounding decides
                assert mine[key] == pytest.approx(theirs[key], rel=tolerance, abs=1e-5), key


def test_the_chosen_side_wins(pairs):
    run = trained(pairs, "run", *sets("train.max_steps=15", "train.learning_rate=3e-3", "lora.r=16", "lora.lora_alpha=32"))
    entries = metrics(run)
    assert entries[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert entries[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert entries[-1]["rewards/accuracies"] == 1.0
    assert entries[-1]["rewards/margins"] > 3
    assert all(key in entries[-1] for key in (*WATCHED, "kl_proxy"))


def by_trl(folder: Path, changes: list[str], config: dict) -> list[dict]:
    """Stock TRL on the same pairs and the same first weights: one padded batch of them all, its own reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from fastoss.config import ModelConfig
    from fastoss.model.backend import attach_lora, load_chat_tokenizer, load_model, plan_model

    recipe = load_recipe(folder / "r.toml", changes)
    plan = plan_model(ModelConfig(name="tiny", precision="float32"), gpu=False)
    model, _, _ = attach_lora(load_model(recipe.model, plan), recipe.lora, plan, seed=recipe.train.seed)
    model.get_base_model().set_attn_implementation("eager")
    examples = list(build_dataset(recipe).train)
    rows = [
        {
            "prompt_ids": chosen.input_ids[: chosen.prompt_length],
            "chosen_ids": chosen.input_ids[chosen.prompt_length :],
            "rejected_ids": rejected.input_ids[rejected.prompt_length :],
            "prompt": "", "chosen": "", "rejected": "",
        }
        for chosen, rejected in zip(examples[::2], examples[1::2], strict=True)
    ]  # fmt: skip

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset

    arguments = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=len(rows), max_steps=3, learning_rate=1e-3, lr_scheduler_type="constant",
        max_grad_norm=0, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", optim="adamw_torch", max_length=None,
        router_aux_loss_coef=0.0, disable_tqdm=True, gradient_checkpointing=False, bf16=False, remove_unused_columns=False, **config,
    )  # fmt: skip
    trainer = Tokenised(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=load_chat_tokenizer(plan))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ((), {}),
        (('dpo.loss_type=["ipo"]', "dpo.beta=0.3"), {"loss_type": ["ipo"], "beta": 0.3}),
        (
            ('dpo.loss_type=["robust", "sft"]', "dpo.loss_weights=[1.0, 0.5]", "dpo.label_smoothing=0.1"),
            {"loss_type": ["robust", "sft"], "loss_weights": [1.0, 0.5], "label_smoothing": 0.1},
        ),
    ],
)
def test_losses_rewards_and_gradients_are_those_of_stock_trl(pairs, changes, config, one_thread):
    ours = metrics(trained(pairs, "ours", *sets("train.max_steps=3", *changes)))
    theirs = by_trl(pairs, list(changes), config)
    for mine, other in zip(ours, theirs, strict=True):
        for key in WATCHED:
            assert mine[key] == pytest.approx(float(other[key]), rel=2e-4, abs=2e-5), (key, mine["step"])


def test_log_probabilities_are_those_of_the_logits(pairs, one_thread):
    """Against full logits of each answer alone, and the loss as the paper writes it."""
    from fastoss.config import LoraSettings, ModelConfig
    from fastoss.model.backend import attach_lora, load_model, plan_model
    from fastoss.training.dpo import answer_logps, collate_pairs

    plan = plan_model(ModelConfig(name="tiny", precision="float32"), gpu=False)
    model, _, _ = attach_lora(load_model(ModelConfig(name="tiny", precision="float32"), plan), LoraSettings(r=4), plan)
    dataset = build_dataset(load_recipe(pairs / "r.toml"))
    found = {}
    for layout in ("packed", "padded"):
        units = pair_units(dataset.train, dataset.weights, trees=layout == "packed")
        logps, _ = answer_logps(model, collate_pairs(list(units[:]), layout))
        found[layout] = logps.sum(1)
    expected = []
    with torch.no_grad():
        for example in [*dataset.train[::2], *dataset.train[1::2]]:
            ids = torch.tensor([example.input_ids])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
            scored = [i for i, label in enumerate(example.labels) if label != -100]
            expected.append(sum(logits[i - 1, example.input_ids[i]] for i in scored))
    for layout in found:
        torch.testing.assert_close(found[layout], torch.stack(expected), rtol=1e-5, atol=1e-4)
    chosen, rejected = found["packed"].chunk(2)
    assert -F.logsigmoid(0.1 * ((chosen - chosen.detach()) - (rejected - rejected.detach()))).mean().item() == pytest.approx(math.log(2))


def test_packed_padded_accumulated_and_two_processes_agree(pairs):
    packed = trained(pairs, "packed")
    assert "as trees" in (packed / "log.txt").read_text()
    (pairs / "rows.toml").write_text(RECIPE.replace("tokens_per_batch = 2048", "per_device_train_batch_size = 8"))
    same(packed, trained(pairs, "padded", recipe="rows.toml"))
    accumulated = [*sets("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2")]
    same(packed, trained(pairs, "accumulated", *accumulated, recipe="rows.toml"))
    same(packed, trained(pairs, "two", *sets("train.per_device_train_batch_size=4"), "--gpus", 2, recipe="rows.toml"))


def test_unsloth_and_transformers_agree(pairs):
    pytest.importorskip("unsloth", reason="Unsloth is not installed")
    same(trained(pairs, "plain", *sets("train.max_steps=2")), trained(pairs, "unsloth", *sets("train.max_steps=2", "model.backend=unsloth")), 1e-3)


def test_held_out_pairs_and_resume(pairs):
    settings = sets("eval.fraction=0.3", "eval.every=2", "checkpoint.every=2")
    whole = trained(pairs, "whole", *settings)
    evaluated = [entry for entry in metrics(whole) if "eval_loss" in entry]
    assert evaluated
    assert {"eval_rewards/margins", "eval_rewards/accuracies"} <= evaluated[0].keys()
    command = [sys.executable, "-m", "fastoss", "train", "r.toml", "--output", "broken", *settings]
    with subprocess.Popen(command, cwd=pairs, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (pairs / "broken" / "checkpoints" / "checkpoint-2").is_dir():
            time.sleep(0.02)
        process.kill()
    broken = trained(pairs, "broken", *settings)
    assert metrics(broken) == metrics(whole)
    assert (broken / "adapter" / "adapter_model.safetensors").read_bytes() == (whole / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_reference_is_the_one_named(pairs):
    """After SFT: against the adapter that the run starts from all margins begin at 0; against the base they do not."""
    (pairs / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sft = RECIPE.replace('method = "dpo"\n', "").replace("pairs.jsonl", "data.jsonl").replace('name = "dpo"', 'name = "sft"')
    (pairs / "sft.toml").write_text(sft.replace("1e-3", "5e-3"))
    trained(pairs, "sft", recipe="sft.toml")
    after = ("--set", "model.adapter=sft")
    start = trained(pairs, "start", *after)
    off = trained(pairs, "off", *after, *sets("dpo.reference=adapter_off"))
    first, other = metrics(start)[0], metrics(off)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert abs(other["rewards/chosen"]) > 1e-2
    assert first["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=1e-6)  # the policy is the same, the reference is not
    assert "asking the reference (sft/adapter)" in (start / "log.txt").read_text()
    assert "asking the reference (the base model)" in (off / "log.txt").read_text()


def test_the_reference_is_asked_once(pairs, tmp_path_factory):
    own = {"FASTOSS_CACHE": str(tmp_path_factory.mktemp("cache"))}

    def said(name: str, *changes: str) -> str:
        result = fastoss("train", "r.toml", "--output", pairs / name, *sets("train.max_steps=1", *changes), cwd=pairs, **own)
        assert result.code == 0, result.err
        return result.err

    assert "asking the reference" in said("first")
    assert "are in the cache (8 pairs)" in said("again", "train.learning_rate=1e-4", "dpo.beta=0.5")
    same_first = [metrics(pairs / name)[0]["logps/chosen"] for name in ("first", "again")]
    assert same_first[0] == same_first[1]
    (pairs / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[:-1]))
    assert "asking the reference" in said("other", "model.max_length=256")


def test_pairs_are_packed_whole(pairs):
    dataset = build_dataset(load_recipe(pairs / "r.toml"))
    units = pair_units(dataset.train, dataset.weights, trees=True)
    assert len(units) == 8
    assert 0.3 < units.saved < 0.6
    batches = fill_batches(range(8), units.lengths, BatchRule("packed", tokens=300))
    assert sorted(i for members in batches for i in members) == list(range(8))
    assert numpy.array_equal(units.bounds, numpy.arange(0, 17, 2))
    for unit in units[:]:
        assert [example.conversation.messages[-1].content[:3] for example in unit] == ["Nya", "As "]


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        ({"prompt": "q", "chosen": "a"}, "pairs.jsonl:9: "),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "pairs.jsonl:9: chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "pairs.jsonl:9: the rejected answer: the answer is empty"),
        ({"prompt": "q<|end|>", "chosen": "a", "rejected": "b"}, "pairs.jsonl:9: the text holds the control token <|end|>"),
        ({"chosen": [{"role": "user", "content": "q"}], "rejected": [{"role": "user", "content": "q"}]}, "pairs.jsonl:9: "),
    ],
)
def test_broken_pairs(pairs, row, fact):
    with open(pairs / "pairs.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    result = fastoss("check", "r.toml", cwd=pairs)
    assert result.code == 2
    assert fact in result.err
    assert "\nhint: " in result.err


def test_show_names_the_answers(pairs):
    out = fastoss("show", "r.toml", "--rows", 1, cwd=pairs).out
    assert [line.split("  ")[1] for line in out.splitlines() if line.startswith("pairs.jsonl")] == ["chosen", "rejected"]


def test_pairs_that_teach_something_else_are_said(pairs):
    odd = [
        {"prompt": "q", "chosen": "Yes, of course", "rejected": "yes of course!"},
        {"prompt": "r", "chosen": "<think>hm</think>Yes", "rejected": "No"},
        {"prompt": "s", "chosen": "No", "rejected": "No, " + "really " * 80},
    ]
    (pairs / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in [*PAIRS, *odd]))
    out = fastoss("check", "r.toml", "--set", "train.learning_rate=4e-4", cwd=pairs).out
    assert "1 of 11 rows: the two answers differ in case, spaces or punctuation alone (pairs.jsonl:9)" in out
    assert "1 of 11 rows: one answer has reasoning and the other has none: that difference is what would be learned (pairs.jsonl:10)" in out
    assert "1 of 11 rows: one answer is more than 5 times as long as the other (pairs.jsonl:11)" in out
    assert "train.learning_rate = 0.0004 is high for DPO" in out
    out = fastoss("check", "r.toml", "--set", "model.max_length=110", cwd=pairs).out
    assert "dropped 1 of 22 examples: longer than max_length 110 (pairs.jsonl:11)" in out
    assert "dropped 1 of 22 examples: the other answer of their pair was dropped (pairs.jsonl:11)" in out


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        (('dpo.loss_type=["sft"]',), '"sft" alone compares no answers'),
        (("dpo.loss_weights=[1, 2]",), "2 weights for 1 losses"),
        (('dpo.loss_type=["exo_pair"]',), '"exo_pair" needs label_smoothing above 0'),
        (('dpo.loss_type=["aot"]',), "`dpo.loss_type.0`"),
    ],
)
def test_settings_that_cannot_be_meant(pairs, changes, fact):
    with pytest.raises(FastossError) as caught:
        load_recipe(pairs / "r.toml", changes)
    assert fact in str(caught.value)
