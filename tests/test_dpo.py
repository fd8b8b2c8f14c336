"""DPO: the losses are TRL's own, the reference is the one that is named, and layout, ranks and kills change nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from fastoss.config import load_recipe
from fastoss.data.dataset import build_dataset
from fastoss.data.packing import BatchRule, fill_batches
from fastoss.data.units import pair_units
from fastoss.errors import FastossError, RunFailed
from fastoss.inference.evaluate import _before, evaluate
from fastoss.inference.evaluation_table import table_lines
from fastoss.model.backend import attach_lora, load_model, model_source, plan_model
from fastoss.model.tiny import tiny_model_folder
from fastoss.report.curves import panels_of, read_metrics, resumed_after
from fastoss.report.facts import read_facts
from fastoss.report.story import sentences
from fastoss.run import RunDirectory, file_lock
from fastoss.training.dpo import HarmonyDPOTrainer, PairCollator, answer_logps, collate_pairs
from fastoss.training.train import train

from .browser import find_chromium, open_browser
from .conftest import ROOT, fastoss, metrics

sys.path.insert(0, str(ROOT))  # for benchmarks/

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


ASKED = f"[samples]\nmax_new_tokens = 12\nprompts = {json.dumps(QUESTIONS[:6], ensure_ascii=False)}\n"


def write_pairs(folder: Path, some: Sequence[dict] = PAIRS) -> Path:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in some))
    (folder / "r.toml").write_text(RECIPE)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path)


def trained(folder: Path, name: str, *arguments: object, recipe: str = "r.toml", **environment: str) -> Path:
    """A run through the command line, in a process of its own."""
    result = fastoss("train", recipe, "--output", name, *arguments, cwd=folder, **environment)
    assert result.code == 0, result.err
    return folder / name


def trained_here(folder: Path, name: str, *changes: str, recipe: str = "r.toml") -> Path:
    """The same run without the ten seconds in which a process imports its libraries."""
    torch.set_num_threads(1)
    return train(load_recipe(folder / recipe, list(changes)), folder / recipe, RunDirectory(folder / name)).root


def sets(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        for key in WATCHED:
            if key != "rewards/accuracies" or mine["step"] > 1:  # before the first step all rewards are 0, and rounding decides
                assert mine[key] == pytest.approx(theirs[key], rel=tolerance, abs=1e-5), key


@pytest.fixture(scope="module")
def after_sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT and then DPO, through the command line. SFT teaches half of the questions the rejected answer, so that neither side is preferred.

    Made once for all workers of a test run.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "after-sft"
    with file_lock(folder.with_suffix(".lock")):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_pairs(folder, PAIRS[:6])
            taught = [{"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"]} for i, p in enumerate(PAIRS[:6])]
            (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in taught))
            dpo = RECIPE.replace("r = 4\nlora_alpha = 8", "r = 16\nlora_alpha = 32") + ASKED
            (folder / "dpo.toml").write_text(dpo)
            (folder / "sft.toml").write_text(dpo.replace('method = "dpo"\n', "").replace("pairs.jsonl", "sft.jsonl"))
            trained(folder, "sft", *sets("train.max_steps=30", "train.learning_rate=6e-3"), recipe="sft.toml")
            trained(folder, "dpo", *sets("train.max_steps=10", "train.learning_rate=2e-3", "model.adapter=sft"), recipe="dpo.toml")
            (folder / "done").touch()
    return folder


def answers(run: Path) -> list[str]:
    return [json.loads(line)["after"]["content"] for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def preferred(folder: Path, adapter: Path) -> list[bool]:
    """Of each training pair: whether the tuned model holds the chosen answer likelier than the rejected one."""
    recipe = load_recipe(folder / "dpo.toml")
    plan = plan_model(recipe.model, gpu=False)
    model, _, _ = attach_lora(load_model(recipe.model, plan), recipe.lora, plan, adapter=adapter)
    with torch.no_grad():
        logps, _ = answer_logps(model.eval(), collate_pairs(list(pair_units(build_dataset(recipe).train, [1.0] * 12, trees=True)[:]), "packed"))
    chosen, rejected = logps.sum(1).chunk(2)
    return (chosen > rejected).tolist()


def test_after_sft_the_chosen_side_wins(after_sft):
    entries = metrics(after_sft / "dpo")
    assert entries[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert entries[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert entries[-1]["rewards/accuracies"] == 1.0
    assert entries[-1]["rewards/margins"] > 3
    assert all(key in entries[-1] for key in (*WATCHED, "kl_proxy"))
    assert preferred(after_sft, after_sft / "sft" / "adapter") == [bool(i % 2) for i in range(6)]  # what SFT taught: half
    assert all(preferred(after_sft, after_sft / "dpo" / "adapter"))


def test_after_sft_greedy_answers_move_to_the_chosen_side(after_sft):
    def chosen_side(run: Path) -> list[bool]:
        """Whether each reply begins as the chosen answers do; it must begin as one of the two sides."""
        replies = answers(run)
        assert all(reply.startswith(("Nya", "As a")) for reply in replies), replies
        return [reply.startswith("Nya") for reply in replies]

    assert chosen_side(after_sft / "sft") == [bool(i % 2) for i in range(6)]
    assert all(chosen_side(after_sft / "dpo"))


def test_the_margin_is_drawn(after_sft):
    picture = (after_sft / "dpo" / "curves.svg").read_text(encoding="utf-8")
    entries = read_metrics(RunDirectory(after_sft / "dpo"))
    (margin,) = (panel for panel in panels_of(entries) if panel.title.startswith("margin"))
    assert margin.title in picture
    (line,) = margin.series
    assert line.points == [(entry["step"], entry["rewards/margins"]) for entry in entries]
    assert line.points[0][1] == pytest.approx(0, abs=1e-4)
    assert line.points[-1][1] > 3


def test_the_reference_is_the_one_named(after_sft, monkeypatch):
    """Against the adapter that the run starts from all margins begin at 0; against the base they do not."""
    monkeypatch.chdir(after_sft)
    changes = ("train.max_steps=1", "model.adapter=sft", "dpo.reference=adapter_off", "samples.prompts=[]")
    off = trained_here(after_sft, "off", *changes, recipe="dpo.toml")
    start = after_sft / "dpo"
    first, other = metrics(start)[0], metrics(off)[0]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=1e-6)  # the policy is the same, the reference is not
    assert "asking the reference (sft/adapter)" in (start / "log.txt").read_text()
    assert "asking the reference (the base model)" in (off / "log.txt").read_text()
    # From logits: what the base alone, and the adapter it is not, hold of the chosen answers.
    recipe = load_recipe(after_sft / "dpo.toml")
    plan = plan_model(recipe.model, gpu=False)
    model, counts, _ = attach_lora(load_model(recipe.model, plan), recipe.lora, plan, adapter=after_sft / "sft" / "adapter")
    assert "attention" in counts.line()
    assert "experts" in counts.line()
    model.eval()
    tuned = logit_logps(model, build_dataset(recipe).train[::2])
    with model.disable_adapter():
        base = logit_logps(model, build_dataset(recipe).train[::2])
    assert other["rewards/chosen"] == pytest.approx(0.1 * float((tuned - base).mean()), rel=1e-4)
    assert other["rewards/chosen"] > 1


def test_it_is_compared_with_what_it_began_from(after_sft, monkeypatch):
    """Samples before training, and what stands beside it in an evaluation, are the SFT run's; the pairs have intervals."""
    monkeypatch.chdir(after_sft)
    entries = [json.loads(line) for line in (after_sft / "dpo" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["before"]["content"] for entry in entries] == answers(after_sft / "sft")
    assert {entry["start"] for entry in entries} == {"sft"}
    assert "asking the model as it starts (sft)" in (after_sft / "dpo" / "log.txt").read_text(encoding="utf-8")
    how = {"rows": 6, "output": after_sft / "told", "batch_size": 6, "language": None, "max_new_tokens": 1, "say": lambda line: None}
    told = evaluate("dpo", after_sft / "pairs.jsonl", **how)
    alone = evaluate("sft", after_sft / "pairs.jsonl", **how)
    assert (told["before"], alone["before"]) == ("start", "base")
    for name in ("loss_final", "prefers_chosen"):
        assert told["measures"][name]["base"]["mean"] == pytest.approx(alone["measures"][name]["tuned"]["mean"], rel=1e-5)
    moved = told["measures"]["dpo_accuracy"]["tuned"]
    assert (moved["mean"], moved["n"]) == (1.0, 6)  # every margin is above 0, as its last metrics say
    assert 0.5 < moved["low"] < 0.7
    assert told["measures"]["loss_final"]["tuned"]["mean"] != pytest.approx(told["measures"]["loss_final"]["base"]["mean"], rel=1e-3)
    assert table_lines(told)[2].split()[:3] == ["start", "tuned", "change"]
    gone = load_recipe(after_sft / "dpo.toml", ["model.adapter=nowhere"])
    assert _before(None, gone, lambda line: None) == "base"


def logit_logps(model, examples) -> torch.Tensor:
    """Summed log-probabilities of what is scored in each example, from its full logits alone."""
    sums = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logps = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        places = torch.tensor([i for i, label in enumerate(example.labels) if label != -100])
        sums.append(logps[places - 1, ids[0, places]].sum())
    return torch.stack(sums)


def by_trl(folder: Path) -> list[dict]:
    """Stock TRL on the same pairs and the same first weights: one padded batch of them all, its own reference."""
    recipe = load_recipe(folder / "r.toml")
    plan = plan_model(recipe.model, gpu=False)
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
        router_aux_loss_coef=0.0, disable_tqdm=True, gradient_checkpointing=False, bf16=False, remove_unused_columns=False,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_source(plan))
    trainer = Tokenised(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_a_run_is_that_of_stock_trl(tmp_path):
    """From rows to metrics; TRL has the whole tokenizer."""
    write_pairs(tmp_path, PAIRS[1:3])  # TRL's logits are 70 MB an answer
    same_figures(metrics(trained_here(tmp_path, "ours", "train.max_steps=3")), by_trl(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["ipo"], "beta": 0.3},
        {"loss_type": ["hinge", "nca_pair", "bco_pair", "sppo_hard"], "loss_weights": [1.0, 0.7, 0.5, 0.3]},
        {"loss_type": ["apo_zero", "apo_down", "discopop", "sigmoid_norm"], "loss_weights": [1.0, 0.7, 0.5, 0.3]},
        {"loss_type": ["robust", "exo_pair", "sft"], "loss_weights": [1.0, 0.3, 0.5], "label_smoothing": 0.1},
    ],
    ids=lambda settings: "+".join(settings["loss_type"]),
)
def test_losses_rewards_and_gradients_are_those_of_stock_trl(tmp_path, settings, one_thread):
    """Both trainers over the same random pairs, on a model whose vocabulary is small enough for TRL's logits."""
    from benchmarks.dpo_cpu import PAIRS_A_STEP, ours, pairs, trl

    rows = pairs(2 * PAIRS_A_STEP)
    same_figures(ours(rows, tmp_path, **settings)["logs"], trl(rows, tmp_path, **settings)["logs"])


def same_figures(ours: list[dict], theirs: list[dict]) -> None:
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for key in WATCHED:
            if key != "rewards/accuracies" or number:  # at the first step all rewards are 0, and rounding decides
                # AdamW's first step turns the last digit of a gradient into one of the weights: the next norm shows it.
                tolerance = 5e-5 if key == "grad_norm" and number else 1e-5
                assert mine[key] == pytest.approx(float(other[key]), rel=tolerance, abs=1e-5), (key, number)


LOSSES = {  # as their papers write them, of the two log-ratios to the reference (for ipo: of their means over tokens), with beta 0.1
    "sigmoid": lambda chosen, rejected: -F.logsigmoid(0.1 * (chosen - rejected)),  # Rafailov et al. 2023, eq. 7
    "ipo": lambda chosen, rejected: (chosen - rejected - 1 / (2 * 0.1)) ** 2,  # Azar et al. 2023, eq. 17
    "hinge": lambda chosen, rejected: torch.relu(1 - 0.1 * (chosen - rejected)),  # Zhao et al. 2023, eq. 3
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_rewards_and_gradients_are_those_of_a_plain_implementation(tmp_path, kind, monkeypatch):
    """Full logits of each answer alone, and the loss as its paper writes it, held against the trainer's second step."""
    seen = []

    def watch(trainer, model, *arguments, **others):
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        seen.append({name: (p.detach().clone(), p.grad.clone()) for name, p in parameters.items()})
        return grad_norm(trainer, model, *arguments, **others)

    grad_norm = HarmonyDPOTrainer._get_grad_norm
    monkeypatch.setattr(HarmonyDPOTrainer, "_get_grad_norm", watch)
    write_pairs(tmp_path, PAIRS[:3])
    entry = metrics(trained_here(tmp_path, "run", "train.max_steps=2", f'dpo.loss_type=["{kind}"]', 'lora.targets=["attention", "experts"]'))[1]
    recipe = load_recipe(tmp_path / "r.toml")
    plan = plan_model(recipe.model, gpu=False)
    model, _, _ = attach_lora(load_model(recipe.model, plan), recipe.lora, plan)
    examples = build_dataset(recipe).train
    with torch.no_grad(), model.disable_adapter():
        reference = logit_logps(model, examples)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, (value, _) in seen[1].items():
            parameters[name].copy_(value)
    policy = logit_logps(model, examples)
    ratios = policy - reference
    if kind == "ipo":
        ratios = ratios / torch.tensor([example.trained_tokens for example in examples])
    loss = LOSSES[kind](ratios[::2], ratios[1::2]).mean()
    loss.backward()
    rewards = 0.1 * (policy - reference).detach()
    expected = {
        "loss": loss, "rewards/chosen": rewards[::2].mean(), "rewards/rejected": rewards[1::2].mean(),
        "rewards/margins": (rewards[::2] - rewards[1::2]).mean(), "logps/chosen": policy[::2].mean(), "logps/rejected": policy[1::2].mean(),
    }  # fmt: skip
    for key, value in expected.items():
        assert entry[key] == pytest.approx(float(value.detach()), rel=1e-5, abs=1e-5), key
    scale = max(float(p.grad.abs().max()) for p in parameters.values())
    for name, (_, gradient) in seen[1].items():
        torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-4, atol=1e-5 * scale)


def test_both_layouts_give_the_log_probabilities_of_the_logits(pairs, one_thread):
    recipe = load_recipe(pairs / "r.toml")
    plan = plan_model(recipe.model, gpu=False)
    model, _, _ = attach_lora(load_model(recipe.model, plan), recipe.lora, plan)
    dataset = build_dataset(recipe)
    with torch.no_grad():
        expected = logit_logps(model, [*dataset.train[::2], *dataset.train[1::2]])
        for layout in ("packed", "padded"):
            units = pair_units(dataset.train, dataset.weights, trees=layout == "packed")
            logps, _ = answer_logps(model, collate_pairs(list(units[:]), layout))
            torch.testing.assert_close(logps.sum(1), expected, rtol=1e-5, atol=1e-4)


def test_packed_padded_accumulated_and_two_processes_agree(pairs):
    """Two steps each: in the second one the weights differ if the first one's gradients did."""
    (pairs / "r.toml").write_text(RECIPE.replace("max_steps = 4", "max_steps = 2"))
    (pairs / "rows.toml").write_text(
        RECIPE.replace("max_steps = 4", "max_steps = 2").replace("tokens_per_batch = 2048", "per_device_train_batch_size = 8")
    )
    packed = trained_here(pairs, "packed")
    assert "as trees" in (packed / "log.txt").read_text()
    same(packed, trained_here(pairs, "padded", recipe="rows.toml"))
    accumulated = ("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2")
    same(packed, trained_here(pairs, "accumulated", *accumulated, recipe="rows.toml"))
    same(packed, trained(pairs, "two", *sets("train.per_device_train_batch_size=4"), "--gpus", 2, recipe="rows.toml"))


def test_unsloth_and_transformers_agree(pairs):
    pytest.importorskip("unsloth", reason="Unsloth is not installed")
    same(trained_here(pairs, "plain", "train.max_steps=2"), trained(pairs, "unsloth", *sets("train.max_steps=2", "model.backend=unsloth")), 1e-3)


def test_held_out_pairs_and_resume(pairs):
    changes = ("eval.fraction=0.3", "eval.every=2", "checkpoint.every=2", 'samples.prompts=["<script>你是谁?</script>"]', "samples.max_new_tokens=4")
    settings = sets(*changes)
    whole = trained(pairs, "whole", *settings)  # in a process of its own as well: where arrays lie in memory decides about last bits
    evaluated = [entry for entry in metrics(whole) if "eval_loss" in entry]
    assert evaluated
    assert {"eval_rewards/margins", "eval_rewards/accuracies"} <= evaluated[0].keys()
    command = [sys.executable, "-m", "fastoss", "train", "r.toml", "--output", "broken", *settings]
    with subprocess.Popen(command, cwd=pairs, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (pairs / "broken" / "checkpoints" / "checkpoint-2").is_dir():
            time.sleep(0.02)
        process.kill()
    broken = trained(pairs, "broken", *settings)
    picture = (broken / "curves.svg").read_text(encoding="utf-8")
    assert "started 2 times" in picture
    (went_on,) = json.loads((broken / "manifest.json").read_text())["resumed_after_step"]
    assert resumed_after(RunDirectory(broken), read_metrics(RunDirectory(broken))) == ([went_on] if went_on < 4 else [])
    assert metrics(broken) == metrics(whole)
    assert (broken / "adapter" / "adapter_model.safetensors").read_bytes() == (whole / "adapter" / "adapter_model.safetensors").read_bytes()
    told = sentences(read_facts(RunDirectory(broken)))
    assert told[1] == f"On the way it was interrupted once: killed (and resumed after step {went_on:,}). It ran to its end."
    assert told[3].startswith("It now prefers the chosen answer in ")
    if find_chromium() is not None:
        opens_well(broken / "report.html", told)


def opens_well(report: Path, told: list[str]) -> None:
    """A real run's report in a real browser, scripts blocked: what happened, the question as text, the curves as pictures."""
    with open_browser() as browser:
        page = browser.new_context(viewport={"width": 390, "height": 800}, java_script_enabled=False, offline=True).new_page()
        page.goto(report.as_uri())
        said = page.inner_text("body")
        assert all(sentence in said for sentence in told)
        assert "<script>你是谁?</script>" in said
        headings = page.locator("figcaption").all_inner_texts()
        assert {"loss", "memory (GiB)", "tokens a second"} <= {heading.split("\n")[0] for heading in headings}
        assert page.locator("svg.curves .dot").count() >= 2  # evaluations
        assert page.locator("#masks .span.trained").count() >= 2  # both answers of a pair


def test_the_reference_is_asked_once(tmp_path, monkeypatch):
    """A hit, a miss and a stale key; what was asked before gives the very run that asking anew does."""
    shared, cache = tiny_model_folder().parent, tmp_path / "cache"
    cache.mkdir()
    for made in (*shared.glob("tiny-*"), *shared.glob("tokenizer-*.json")):  # model and tokenizer need not be built again
        (cache / made.name).symlink_to(made)
    monkeypatch.setenv("FASTOSS_CACHE", str(cache))
    write_pairs(tmp_path, PAIRS[:4])

    def run(name: str, *changes: str) -> tuple[bool, Path]:
        root = trained_here(tmp_path, name, "train.max_steps=2", *changes)
        log = (root / "log.txt").read_text()
        asked = "asking the reference" in log
        assert asked != ("are in the cache (4 pairs)" in log)
        return asked, root

    def kept() -> list[Path]:
        return sorted(cache.rglob("reference-*.npy"))

    asked, first = run("first")
    assert asked
    (file,) = kept()
    again, cached = run("again")
    assert not again
    assert metrics(first) == metrics(cached)
    assert not run("other-settings", "train.learning_rate=1e-4", "dpo.beta=0.5", "lora.r=8")[0]  # none of these is in the reference
    numpy.save(file, numpy.load(file) + 1)
    assert metrics(run("read")[1])[0]["rewards/chosen"] == pytest.approx(-0.1, abs=1e-4)  # it is the file that is read
    file.unlink()
    assert run("gone")[0]
    rows = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(rows.replace("number 0", "number 9"))
    assert run("other-tokens")[0]
    assert len(kept()) == 2


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_first_pairs_are_held_against_a_fresh_rendering(tmp_path, layout, monkeypatch):
    """Each way in which a batch can differ from what was rendered stops the run before its first step."""
    write_pairs(tmp_path, PAIRS[:3])
    if layout == "padded":
        (tmp_path / "r.toml").write_text(RECIPE.replace("tokens_per_batch = 2048", "per_device_train_batch_size = 3"))
    untouched = PairCollator.__call__
    batches = []

    def spoilt(change):
        def collate(self, items):
            batch = untouched(self, items)
            batches.append(batch)
            change(batch)
            return batch

        return collate

    def other_prompt(batch):
        batch["row_input_ids"][0, 5] += 1

    def other_answer(batch):
        batch["row_input_ids"].view(-1)[batch["scored"][-1]] += 1

    def sides_swapped(batch):
        for name in ("input_ids", "completion_mask"):
            batch[name] = batch[name].roll(len(batch[name]) // 2, 0)

    def one_token_less(batch):
        batch["scored"] = batch["scored"][:-1]

    for change in (other_prompt, other_answer, sides_swapped, one_token_less):
        monkeypatch.setattr(PairCollator, "__call__", spoilt(change))
        with pytest.raises(RunFailed, match="first batch") as caught:
            trained_here(tmp_path, change.__name__, "train.max_steps=1")
        assert caught.value.place.startswith("pairs.jsonl:") or str(tmp_path) in caught.value.place
        assert not (tmp_path / change.__name__ / "adapter").exists()
    assert len(batches) == 4  # the check's own, and none was trained


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
        ({"prompt": "q<|end|>", "chosen": "a", "rejected": "b"}, "pairs.jsonl:9: the prompt: the text holds the control token <|end|>"),
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
