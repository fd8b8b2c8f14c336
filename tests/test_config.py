"""The recipe: defaults, precedence, and every mistake told with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastoss.config import load_recipe, recipe_from_resolved, recipe_schema, resolved_dict
from fastoss.errors import FastossError

from .conftest import ROOT

BASE = 'name = "x"\n[model]\nname = "tiny"\n[[data]]\nsource = "a.jsonl"\n'


def load(tmp_path: Path, text: str = BASE, *overrides: str):
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(FastossError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(tmp_path) + "/", "")


FSDP = ("distributed.strategy=fsdp", "model.backend=transformers", "model.precision=bf16")


def test_defaults_and_paths(tmp_path):
    recipe = load(tmp_path)
    assert recipe.train.tokens_per_batch == 16384
    assert recipe.train.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert recipe.data[0].source == str(tmp_path / "a.jsonl")
    assert recipe.format.train_on == {"analysis": 1.0, "commentary": 1.0, "final": 1.0}
    assert load(tmp_path, BASE + "[format]\ntrain_on = { final = 2 }\ncurrent_date = 2026-02-03\n").format.train_on == {"final": 2.0}


def test_precedence(tmp_path):
    text = BASE + "[train]\nlearning_rate = 3e-4\nseed = 7\n"
    recipe = load(tmp_path, text, "train.learning_rate=2e-4", "data.0.max_rows=3", "checkpoint.every=epoch", "name=other")
    assert (recipe.train.learning_rate, recipe.train.seed) == (2e-4, 7)
    assert (recipe.data[0].max_rows, recipe.checkpoint.every, recipe.name) == (3, "epoch", "other")


def test_recipe_is_frozen(tmp_path):
    with pytest.raises(Exception, match="frozen"):
        load(tmp_path).train.seed = 1


def test_resolved_recipe_comes_back(tmp_path):
    recipe = load(tmp_path, BASE + "[lora]\nexpert_layers = [1, 3]\n")
    values = json.loads(json.dumps(resolved_dict(recipe)))
    assert recipe_from_resolved(values, "place") == recipe


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (BASE + "[train]\nlearning_rte = 1e-4\n", (), "error: r.toml:7: unknown key `train.learning_rte`\nhint: did you mean `learning_rate`?"),
        (BASE + "[trian]\nseed = 1\n", (), "error: r.toml:6: unknown key `trian`\nhint: did you mean `train`?"),
        (BASE + "color_space = 1\n", (), "error: r.toml:6: unknown key `data.0.color_space`\nhint: known here: source, split, subset, revision"),
        (BASE + '[train]\nlearning_rate = "1e-4"\n', (), 'error: r.toml:7: `train.learning_rate`: should be a valid number, not "1e-4"'),
        (
            BASE,
            ("lora.targets=attention",),
            'error: --set lora.targets=attention: `lora.targets`: should be a list, such as ["attention"], not "attention"',
        ),
        (BASE, ("data=4",), "error: --set data=4: `data`: should be a list, not 4"),
        (BASE, ("train=3",), "error: --set train=3: `train`: should be a table, with keys of its own, not 3"),
        (BASE + "[train]\nseed = true\n", (), "error: r.toml:7: `train.seed`: should be a whole number, not true"),
        (BASE + "[train]\nnum_train_epochs = 0\n", (), "error: r.toml:7: `train.num_train_epochs`: should be greater than 0, not 0"),
        (BASE + '[lora]\nexpert_layers = "some"\n', (), 'error: r.toml:7: `lora.expert_layers`: should be "all" or a list of layer numbers'),
        (BASE + '[lora]\ntargets = ["attn"]\n', (), "error: r.toml:7: `lora.targets.0`: should be 'attention' or 'experts', not \"attn\""),
        (BASE + '[format]\nidentity = { nam = "a", author = "b" }\n', (), "error: r.toml:7: unknown key `format.identity.nam`"),
        (
            BASE + '[format]\ncurrent_date = "1 May"\n',
            (),
            'error: r.toml:7: `format.current_date`: should be a date such as "2026-01-01", not "1 May"',
        ),
        (BASE, ("train.foo",), "error: --set train.foo: not of the form section.key=value"),
        (BASE, ("train.learning_rte=1",), "error: --set train.learning_rte=1: unknown key `train.learning_rte`"),
        (BASE, ("data.max_rows=1",), "error: --set data.max_rows=1: `data` is a list\nhint: name the entry by its number: --set data.0.max_rows=…"),
        (BASE, ("name.x=1",), "error: --set name.x=1: `name` is a value, not a section"),
        ('name = "x"\n', (), "error: r.toml: `data` is missing\nhint: a recipe needs at least one [[data]]"),
        ('name = "x"\nname = "y"\n', (), "error: r.toml:2:"),
        ("name = \n", (), "error: r.toml:1:8: not valid TOML: Invalid value"),
        ('name = "../x"\n[[data]]\nsource = "a"\n', (), "error: r.toml:1: `name`: string should match pattern"),
        (BASE + "[dpo]\nbeta = 0.2\n", (), 'error: r.toml:6: `[dpo]` belongs to method = "dpo", and this recipe says method = "sft"'),
        (BASE + '[distributed]\nstrategy = "zero2"\n', (), 'error: r.toml:7: `distributed.strategy = "zero2"` is not available in this version'),
        (
            BASE + '[distributed]\nstrategy = "zero3"\n',
            (),
            'error: r.toml:7: `distributed.strategy = "zero3"` is not available in this version\nhint: use strategy = "fsdp"',
        ),
        (BASE + '[distributed]\nstrategy = "fsdp"\n', (), 'error: r.toml:7: distributed.strategy = "fsdp" needs plain transformers\nhint: '),
        (BASE, (*FSDP, "model.backend=unsloth"), 'backend=unsloth: distributed.strategy = "fsdp" needs plain transformers'),
        (BASE, (*FSDP, "model.precision=4bit"), 'precision=4bit: distributed.strategy = "fsdp" shares out a base in bf16 or float32, not in 4bit'),
        (BASE, (*FSDP, "model.precision=mxfp4"), "shares out a base in bf16 or float32, not in mxfp4"),
        (BASE, ("distributed.host_layers=2",), 'host_layers=2: under strategy = "ddp" every card holds the whole base'),
        (BASE.replace("tiny", "openai/gpt-oss-20b"), (*FSDP, "distributed.host_layers=25"), "25 layers are to wait on the host"),
        (BASE, (*FSDP, "train.on_oom=split"), 'on_oom=split: distributed.strategy = "fsdp" cannot cut a micro-batch in one process alone'),
        (BASE, ("hub.push=true", "hub.repo=a/b/c"), "error: --set hub.repo=a/b/c: `a/b/c` is not a repository name"),
        (BASE, ('log.trackers=["wandbb"]',), "names the unknown tracker 'wandbb'"),
        (BASE, ("log.trackers=always",), 'should be "auto" or a list of trackers'),
        (
            BASE + "[train]\ntokens_per_batch = 8192\nper_device_train_batch_size = 2\n",
            (),
            "error: r.toml:8: `tokens_per_batch` and `per_device_train_batch_size` contradict each other",
        ),
        (BASE + "[train]\ntokens_per_batch = 1000\n", (), "error: r.toml:7: a batch of 1,000 tokens cannot hold a row of max_length 4,096"),
        (BASE + "[lora]\nlora_dropout = 0.1\n", (), "error: r.toml:7: LoRA on fused experts supports no dropout"),
        (BASE + '[lora]\ntargets = ["attention"]\nexpert_layers = [1]\n', (), "error: r.toml:8: `expert_layers` is given, but"),
        (
            BASE.replace("tiny", "openai/gpt-oss-20b") + "[lora]\nexpert_layers = [7, 24]\n",
            (),
            "error: r.toml:7: `expert_layers` names layer 24, openai/gpt-oss-20b has 24",
        ),
        (BASE + "[train]\nwarmup_steps = 2.5\n", (), "error: r.toml:7: 2.5 is neither a whole number of steps nor a share below 1"),
        (
            BASE + '[train]\nlr_scheduler_type = "linear"\nlr_scheduler_kwargs = { min_lr_rate = 0.1 }\n',
            (),
            "error: r.toml:8: `min_lr_rate` is not a setting of the linear schedule",
        ),
        (BASE + "[train]\nlr_scheduler_kwargs = { num_cycles = 1 }\n", (), "error: r.toml:7: cosine_with_min_lr needs min_lr or min_lr_rate"),
        (BASE, ("model.name=meta-llama/Llama-3", "model.backend=unsloth"), "is not of the gpt-oss family"),
        (BASE, ("model.name=./nowhere",), "error: --set model.name=./nowhere: there is no folder ./nowhere"),
        (BASE, ("model.name=gpt-oss",), "is neither a hub id (owner/name), nor a folder, nor tiny"),
        (BASE, ("train.learning_rate=inf",), "error: --set train.learning_rate=inf: `train.learning_rate`: should be a finite number, not inf"),
        (BASE, ("train.num_train_epochs=1e9",), "`train.num_train_epochs`: should be less than or equal to 10000"),
        (BASE + 'split = "test"\n', (), "error: r.toml:6: a local file has no splits"),
        (BASE, ("data.0.source=~nobody-here/x",), "not a path"),
        (
            BASE,
            ("model.name=openai/gpt-oss-20b", "model.backend=transformers", "model.precision=mxfp4"),
            "transformers cannot train on packed MXFP4 weights",
        ),
        (BASE.replace("a.jsonl", "hf:"), (), "error: r.toml:5: `hf:` names no dataset"),
        (BASE + 'revision = "main"\n', (), "error: r.toml:6: a local file has no revisions"),
        (BASE + "weight = 0\n", (), "error: r.toml:6: `data.0.weight`: should be greater than 0, not 0"),
        (BASE + '[[eval.data]]\nsource = "b.jsonl"\nweight = 2\n', (), "error: r.toml:8: `weight` is for training: each held-out row counts once"),
        (BASE + '[format]\ntrain_on = ["thinking"]\n', (), "error: r.toml:7: `format.train_on`: names the unknown channel 'thinking'"),
        (BASE + '[format]\ntrain_on = ["final", "final"]\n', (), "error: r.toml:7: `format.train_on`: names a channel twice"),
        (BASE + "[format]\ntrain_on = { final = -1 }\n", (), "error: r.toml:7: `format.train_on`: gives a weight that is not a number from 0 up"),
        (BASE + "[format]\ntrain_on = { final = 0 }\n", (), "error: r.toml:7: `format.train_on`: trains no channel"),
    ],
)
def test_mistakes(tmp_path, text, overrides, expected):
    assert expected in refused(tmp_path, text, *overrides)


def test_folder_of_another_family_is_refused(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    assert "holds a `llama` model" in refused(tmp_path, BASE, f"model.name={tmp_path / 'm'}")


def test_missing_recipe_suggests_another():
    with pytest.raises(FastossError, match=r"did you mean .*quickstart\.toml"):
        load_recipe(ROOT / "recipes" / "quickstar.toml")


def test_recipe_that_is_not_text(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"name = \xff\xfe")
    with pytest.raises(FastossError, match="not UTF-8"):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_of_the_tree_parses(path):
    assert load_recipe(path).name == path.stem


def test_schema_names_every_section():
    schema = json.loads(recipe_schema())
    assert {"model", "lora", "data", "format", "hygiene", "eval", "train", "samples", "log"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
