"""Runs through the command line, each in processes of its own: losses, resuming, signals, and what is said."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastoss.config import load_recipe

from .conftest import ROOT, ROWS, RecipeFolder, Result, fastoss, losses, metrics

EVAL = ("--set", "eval.fraction=0.07", "--set", "eval.every=3")  # one of the eight rows


def train(folder: RecipeFolder, name: str, *arguments: object, **environment: str) -> tuple[Result, Path]:
    run = folder.root / name
    result = fastoss("train", folder.recipe, "--output", run, *arguments, cwd=folder.root, **environment)
    return result, run


def trained(folder: RecipeFolder, name: str, *arguments: object) -> Path:
    result, run = train(folder, name, *arguments)
    assert result.code == 0, result.err
    assert result.out == ""
    return run


def start(folder: RecipeFolder, name: str, *arguments: object) -> tuple[subprocess.Popen, Path]:
    run = folder.root / name
    command = [sys.executable, "-m", "fastoss", "train", str(folder.recipe), "--output", str(run), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder.root, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True), run


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)


def same_adapter(one: Path, other: Path) -> bool:
    name = "adapter/adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


# --- the quickstart ------------------------------------------------------------------------------------------------------


def test_quickstart_learns_its_dialogues_by_heart(tmp_path):
    run = tmp_path / "quickstart"
    begun = time.monotonic()
    result = fastoss("train", ROOT / "recipes" / "quickstart.toml", "--output", run, cwd=tmp_path, timeout=900)
    assert result.code == 0, result.err
    print(f"quickstart took {time.monotonic() - begun:.0f} s")
    entries = metrics(run)
    assert entries[-1]["loss"] < 0.2 * entries[0]["loss"]
    recipe = load_recipe(ROOT / "recipes" / "quickstart.toml")
    assert recipe.data[0].max_rows >= 24

    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 10
    reply = lambda entry: (entry["thinking"], entry["content"])  # noqa: E731
    assert sum(reply(s["after"]) == reply(s["expected"]) for s in samples) >= 8
    assert not any(reply(s["before"]) == reply(s["expected"]) for s in samples)
    chinese = [s for s in samples if any("\u4e00" <= c <= "\u9fff" for c in s["messages"][-1]["content"])]
    assert len(chinese) >= 3
    assert sum(bool(s["expected"]["thinking"]) for s in samples) >= 3
    assert sum(len(s["messages"]) > 1 for s in samples) >= 2
    # The transcript of both is printed, and kept.
    known = next(s for s in samples if reply(s["after"]) == reply(s["expected"]))
    assert known["expected"]["content"].split()[0] in result.err
    assert "   base:  " in result.err
    assert "word for word, in every channel: base 0 of 10, tuned " in result.err
    assert (run / "log.txt").read_text(encoding="utf-8").count("   tuned: ") == 10

    single = next(s for s in samples if len(s["messages"]) == 1 and reply(s["after"]) == reply(s["expected"]))
    answer = fastoss("chat", run, "--prompt", single["messages"][0]["content"])
    assert (answer.code, answer.out) == (0, single["expected"]["content"] + "\n")
    if single["expected"]["thinking"]:
        assert single["expected"]["thinking"] in answer.err


# --- the same loss, whichever way ---------------------------------------------------------------------------------------


def test_two_processes_give_the_losses_of_one(folder):
    """Seven rows of 11 examples a step: the ranks' shares differ in tokens, and the last step is ragged."""
    changes = ("--set", "train.max_steps=0", "--set", "train.num_train_epochs=2", *EVAL)
    one = metrics(trained(folder, "one", *changes, "--set", "train.gradient_accumulation_steps=2"))
    two = metrics(trained(folder, "two", *changes, "--gpus", 2))
    assert len(one) == len(two) >= 6
    for mine, theirs in zip(one, two, strict=True):
        for key in ("loss", "eval_loss", "grad_norm", "learning_rate", "num_tokens", "step"):
            assert (key in mine) == (key in theirs)
            assert mine.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-5)


def test_torchrun_is_the_same_run_as_gpus(folder):
    run = folder.root / "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastoss", "train"]
    done = subprocess.run(
        [*command, folder.recipe, "--output", run], cwd=folder.root, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    other = trained(folder, "gpus", "--gpus", 2)
    assert metrics(run) == metrics(other)
    assert same_adapter(run, other)


def test_accumulation_does_not_change_the_loss(folder):
    settings = lambda rows, steps: ("--set", f"train.per_device_train_batch_size={rows}", "--set", f"train.gradient_accumulation_steps={steps}")  # noqa: E731
    folder.rows(ROWS)
    last = ("--set", "format.turns=last", "--set", "train.warmup_steps=0")  # eight examples: one step takes them all, either way
    whole, split = (metrics(trained(folder, name, *last, *settings(*sizes))) for name, sizes in (("whole", (8, 1)), ("split", (1, 8))))
    assert len(whole) == len(split) == 4
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.1
    for mine, theirs in zip(whole, split, strict=True):
        assert (mine["loss"], mine["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=1e-4)


def test_packed_batches_give_the_loss_of_padded_ones(folder):
    text = folder.recipe.read_text().replace("per_device_train_batch_size = 2\n", "")
    folder.recipe.write_text(text)
    packed, run = train(folder, "packed")
    assert "documents packed and kept apart" in packed.err
    padded = trained(folder, "padded", "--set", "train.per_device_train_batch_size=11")
    assert losses(run) == pytest.approx(losses(padded), rel=1e-4)


def test_unsloth_gives_the_losses_of_transformers(folder):
    pytest.importorskip("unsloth", reason="Unsloth is not installed")
    plain = trained(folder, "plain", *EVAL, "--set", "model.backend=transformers")
    unsloth = trained(folder, "unsloth", *EVAL, "--set", "model.backend=unsloth")
    pairs = list(zip(metrics(plain), metrics(unsloth), strict=True))
    assert len(pairs) == 6
    for mine, theirs in pairs:
        for key in ("loss", "eval_loss"):
            assert (key in mine) == (key in theirs)
            assert mine.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-4)
    left = {path.name for path in folder.root.iterdir()} - {"data.jsonl", "recipe.toml", "plain", "unsloth"}
    assert left == set(), "Unsloth leaves nothing in the current folder"


# --- stopping and going on --------------------------------------------------------------------------------------------------

LONGER = ("--set", "train.max_steps=9", "--set", "checkpoint.every=2", *EVAL)


@pytest.mark.parametrize("processes", [(), ("--gpus", 2)], ids=["one-process", "two-processes"])
def test_a_killed_and_a_stopped_run_go_on_bit_for_bit(folder, processes):
    """kill -9 after a checkpoint and past it, SIGTERM in between; epochs of 4 steps (2 with two processes) are crossed."""
    whole = trained(folder, "whole", *LONGER, *processes)

    process, killed = start(folder, "killed", *LONGER, *processes)
    wait_for(killed / "checkpoints" / "checkpoint-4", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pid in _left_behind(killed):
        os.kill(pid, signal.SIGKILL)
    assert not (killed / "adapter").exists()

    process, stopped = start(folder, "stopped", *LONGER, *processes)
    wait_for(stopped / "checkpoints" / "checkpoint-2", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "run the same command again to resume from there" in err

    for run in (killed, stopped):
        result, _ = train(folder, run.name, *LONGER, *processes)
        assert result.code == 0, result.err
        assert "resuming from checkpoint-" in result.err
        assert metrics(run) == metrics(whole)
        assert same_adapter(run, whole)
        assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["checkpoint-8", "checkpoint-9"]


# Each a way in which a run can go on wrongly: ragged accumulation, packed batches, epochs, recomputation, dropout.
OTHERWISE = (
    'checkpoint.every="epoch"', "train.gradient_accumulation_steps=3", "train.recompute=full", 'lora.targets=["attention"]', "lora.lora_dropout=0.2",
    "train.max_steps=0", "train.num_train_epochs=5", "eval.fraction=0.25", "checkpoint.keep=9",
)  # fmt: skip


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_resuming_with_accumulation_epochs_packing_and_dropout(folder, layout):
    if layout == "packed":
        text = folder.recipe.read_text().replace("per_device_train_batch_size = 2", "tokens_per_batch = 256")
        folder.recipe.write_text(text)
    changes = [word for change in OTHERWISE for word in ("--set", change)]
    whole = trained(folder, "whole", *changes)
    # A run that was killed right after its first checkpoint, with the line of a later step torn.
    killed = folder.root / "killed"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "adapter")
    first, *later = sorted((killed / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    assert len(later) >= 3
    for path in later:
        shutil.rmtree(path)
    (killed / "checkpoints" / ".writing").mkdir()
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    result, _ = train(folder, "killed", *changes)
    assert result.code == 0, result.err
    assert f"resuming from {first.name}" in result.err
    assert metrics(killed) == metrics(whole)
    assert same_adapter(killed, whole)
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {path.name for path in (whole / "checkpoints").iterdir()}


def test_a_run_killed_before_its_last_words_says_them_later(folder):
    """The adapter is what says that a run is finished: it must not appear before the samples are answered."""
    changes = ("--set", r'samples.prompts=["a line\u2028and another"]', "--set", "samples.max_new_tokens=3")  # U+2028: no line of JSONL ends there
    whole = trained(folder, "whole", *changes)
    killed = folder.root / "killed"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "adapter")
    (killed / "samples.jsonl").write_text((whole / "samples.jsonl").read_text().replace('"after": {', '"after": null, "lost": {'))
    result, _ = train(folder, "killed", *changes)
    assert result.code == 0, result.err
    assert (killed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert same_adapter(killed, whole)


def test_a_run_killed_while_it_opened_its_folder(folder):
    run = folder.root / "run"
    run.mkdir()
    (run / "recipe.toml").write_text("name = ")
    (run / "manifest.json").write_text("{}")
    (run / ".plan.json.1.tmp").write_text("{")
    result, _ = train(folder, "run", "--set", "train.max_steps=1")
    assert result.code == 0, result.err
    assert not list(run.glob(".*.tmp"))


def test_what_a_row_says_is_nothing_to_a_shell():
    """The line to try a run with is copied into one."""
    from fastoss.data.conversation import Message
    from fastoss.training.samples import Question, Samples

    asked = [Question((Message("user", text),)) for text in ('say "hi"', "$(reboot)", "`reboot`", "a\\", "a\nb", "Wow!", "你是谁?")]
    assert Samples.suggestion(SimpleNamespace(questions=asked)) == ' --prompt "你是谁?"'
    assert Samples.suggestion(SimpleNamespace(questions=asked[:-1])) == ""


def test_a_signal_before_anything_is_saved(folder):
    process, run = start(folder, "run", *LONGER, "--gpus", 2)
    wait_for(run / "recipe.resolved.json", process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    saved = any((run / "checkpoints").glob("checkpoint-*")) if (run / "checkpoints").exists() else False
    assert process.returncode == (75 if saved else 128 + signal.SIGUSR1), err
    assert not _left_behind(run)


def _left_behind(run: Path) -> list[int]:
    """Ranks that torchrun starts have sessions of their own; a kill of the launcher does not reach them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_finished_run_says_so_and_another_recipe_is_refused(folder):
    run = trained(folder, "run")
    again, _ = train(folder, "run")
    assert again.code == 0
    assert "is finished already" in again.err
    changed, _ = train(folder, "run", "--set", "train.learning_rate=1e-3", "--set", "lora.r=8")
    assert changed.code == 2
    assert "this is a different run from the one in this folder: lora.r: 4 → 8; train.learning_rate: 0.005 → 0.001" in changed.err
    spoken, _ = train(folder, "run", "--set", "log.every=1")
    assert spoken.code == 0
    folder.rows(ROWS[1:])
    other, _ = train(folder, "run")
    assert (other.code, "the data has changed" in other.err) == (2, True)
    anew, _ = train(folder, "run", "--no-resume")
    assert (anew.code, "add --overwrite" in anew.err) == (2, True)
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    overwritten, _ = train(folder, "run", "--no-resume", "--overwrite")
    assert overwritten.code == 0, overwritten.err


def test_two_runs_in_one_directory(folder):
    process, run = start(folder, "run", *LONGER)
    wait_for(run / "recipe.resolved.json", process)
    second, _ = train(folder, "run", *LONGER)
    assert second.code == 2
    assert "another process is training in this run directory" in second.err
    assert process.wait(120) == 0


# --- what goes wrong, and what is kept ----------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run(folder):
    result, run = train(folder, "run", "--set", "train.learning_rate=1e30", "--set", "train.max_grad_norm=0", "--set", "checkpoint.every=1")
    assert result.code == 1
    assert "error: the " in result.err
    assert "is nan at step" in result.err
    assert "data.jsonl:" in result.err
    assert "start over with a lower train.learning_rate" in result.err
    assert not (run / "adapter").exists()
    assert "failed" in (run / "metrics.jsonl").read_text()


def test_broken_weights_are_not_saved(folder):
    changes = ("--set", "train.learning_rate=1e308", "--set", "train.max_steps=1", "--set", "train.warmup_steps=0")
    result, run = train(folder, "run", *changes)
    assert result.code == 1
    assert "weights became NaN or infinite at step 1" in result.err
    assert not (run / "adapter").exists()
    assert not list((run / "checkpoints").glob("checkpoint-*"))


def test_samples_ask_what_was_trained(folder):
    """A row's own effort stands in its prompt, in training as in the samples."""
    folder.rows([{**ROWS[0], "reasoning_effort": "high"}])
    run = trained(folder, "run", "--set", "samples.from_train=1", "--set", "samples.max_new_tokens=2")
    (sample,) = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert sample["reasoning_effort"] == "high"


def test_training_refuses_labels_that_were_not_rendered(folder, monkeypatch):
    """A label that the collator changes is found before the first step."""
    code = (
        "import fastoss.training.train, fastoss.data.packing as packing\n"
        "from fastoss.cli import main\n"
        "import fastoss.training.scheduled as scheduled\n"
        "real = packing.collate\n"
        "def forged(examples, layout, train=True):\n"
        "    batch = real(examples, layout, train=train)\n"
        "    batch['labels'][0, 3] = batch['input_ids'][0, 3]\n"
        "    return batch\n"
        "scheduled.collate = forged\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "train", str(folder.recipe), "--output", str(folder.root / "run")]
    done = subprocess.run(command, cwd=folder.root, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"data\.jsonl:\d: the first batch trains \d+ tokens of a row, \d+ were rendered", done.stderr)


def test_the_run_directory(folder):
    result, run = train(folder, "run", *EVAL, "--set", 'samples.prompts=["你是谁?"]', "--set", "samples.max_new_tokens=4", "--log-json")
    assert result.code == 0, result.err
    said = [json.loads(line) for line in result.err.splitlines() if line.startswith("{")]  # libraries may write lines of their own
    assert {(1, 4), (4, 4)} <= {(line["step"], line["steps"]) for line in said if line["kind"] == "step"}
    assert [line["step"] for line in said if line["kind"] == "evaluation"] == [3, 4]
    assert said[-1]["text"] == f"report: {run / 'report.html'}"
    names = {path.name for path in run.iterdir()} - {".lock"}
    assert names == {
        "recipe.toml",
        "recipe.resolved.json",
        "manifest.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "samples.jsonl",
        "curves.svg",
        "report.html",
        "profile.json",
        "plan.json",
        "log.txt",
    }
    assert (run / "recipe.toml").read_bytes() == folder.recipe.read_bytes()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["versions"]["trl"] == "1.14.2"
    assert manifest["data"]["rows"] == 8
    assert (manifest["seed"], manifest["world_size"]) == (42, 1)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"checkpoint-4"}
    assert not list(run.rglob("*.bin")), "no pickled arguments"
    steps = [entry["step"] for entry in metrics(run) if "loss" in entry]
    assert steps == [1, 2, 3, 4]
    stamp = json.loads((run / "adapter" / "fastoss.json").read_text())
    assert stamp["format"]["current_date"] == "2026-01-01"
    (sample,) = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert sample["before"]["content"] != ""
    assert sample["after"] is not None


def test_training_starts_from_another_runs_adapter(folder):
    changes = ("--set", "train.per_device_train_batch_size=11", "--set", "train.max_steps=12")
    first = trained(folder, "first", *changes)
    second = trained(folder, "second", *changes, "--set", "model.adapter=first")
    fresh, learned = losses(first)[0], losses(first)[-1]
    assert losses(second)[0] < fresh - 0.5 * (fresh - learned)
    missing, _ = train(folder, "third", "--set", "model.adapter=nowhere")
    assert (missing.code, "nowhere: there is no such run or adapter" in missing.err) == (2, True)


def test_channels_are_weighed_and_watched(folder):
    """Before a weight has moved, each channel's loss is what it is without weights, and the loss is their weighted mean."""
    settings = ("--set", "train.max_steps=1", "--set", "train.per_device_train_batch_size=11", *EVAL)
    weights = ("--set", "format.train_on={analysis = 0.25, final = 2.0}")
    plain, weighed = (metrics(trained(folder, name, *settings, *more)) for name, more in (("plain", ()), ("weighed", weights)))
    counts = json.loads((folder.root / "plain" / "manifest.json").read_text())["data"]["trained_by_channel"]
    for key in ("loss_analysis", "loss_final"):
        assert weighed[0][key] == pytest.approx(plain[0][key], rel=1e-6)
    for entry, scale in ((plain[0], {"analysis": 1.0, "final": 1.0}), (weighed[0], {"analysis": 0.25, "final": 2.0})):
        total = sum(scale[channel] * count for channel, count in counts.items())
        mean = sum(scale[channel] * count * entry[f"loss_{channel}"] for channel, count in counts.items()) / total
        assert entry["loss"] == pytest.approx(mean, rel=1e-5)
    held_out = next(entry for entry in weighed if "eval_loss" in entry)
    assert held_out["eval_loss"] == pytest.approx(held_out["eval_loss_final"], rel=1e-6)  # it has no reasoning


def test_trees_give_the_losses_of_single_examples(folder):
    """Chats of several turns as trees, packed; against every example in a row of its own. One step takes them all, either way."""
    rows = ("--set", "train.per_device_train_batch_size=11")
    folder.recipe.write_text(folder.recipe.read_text().replace("per_device_train_batch_size = 2\n", ""))
    trees = trained(folder, "trees", "--set", "train.tokens_per_batch=4096", "--set", "train.warmup_steps=0")
    single = trained(folder, "single", *rows, "--set", "train.warmup_steps=0")
    assert "as trees, their history computed once" in (trees / "log.txt").read_text()
    assert "as trees" not in (single / "log.txt").read_text()
    for mine, theirs in zip(metrics(trees), metrics(single), strict=True):
        for key in ("loss", "loss_analysis", "loss_final", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)
        assert mine["num_tokens"] < theirs["num_tokens"]


def test_replies_to_held_out_rows_change_nothing_and_survive_a_kill(folder):
    """Losses to the bit with and without them; a resumed run has each step's replies once, as an unbroken one."""
    asked = (
        "--set",
        "eval.replies=3",
        "--set",
        "samples.max_new_tokens=6",
        "--set",
        "checkpoint.every=2",
        "--set",
        "lora.lora_dropout=0.1",
        "--set",
        'lora.targets=["attention"]',
    )
    settings = ("--set", "eval.fraction=0.3", "--set", "eval.every=1", "--set", "train.max_steps=3")
    without = trained(folder, "without", *settings, *asked[4:])
    whole = trained(folder, "whole", *settings, *asked)
    plain = [{key: value for key, value in entry.items() if not key.startswith("eval_") or "loss" in key} for entry in metrics(whole)]
    assert plain == metrics(without)
    assert same_adapter(whole, without)
    evaluated = [entry for entry in metrics(whole) if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [1, 2, 3]
    assert all(0 <= entry[f"eval_{share}"] <= 1 for entry in evaluated for share in ("well_formed", "answered", "finished"))
    assert all(entry["eval_answer_tokens"] + entry["eval_reasoning_tokens"] > 0 for entry in evaluated)
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert len(samples) >= 2
    for sample in samples:
        assert sample["held_out"]
        assert sample["after"] is not None
        assert [reply["step"] for reply in sample["during"]] == [1, 2, 3]
    killed = folder.root / "killed"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "adapter")
    shutil.rmtree(killed / "checkpoints" / "checkpoint-3")
    result, _ = train(folder, "killed", *settings, *asked)
    assert result.code == 0, result.err
    assert "resuming from checkpoint-2" in result.err
    assert metrics(killed) == metrics(whole)
    assert (killed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
