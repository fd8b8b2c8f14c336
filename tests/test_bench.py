"""`fastoss bench` from start to end on the tiny model, its sums by hand, and small forms of the training benchmarks against their record."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from fastoss.config import Recipe, load_recipe, resolved_dict
from fastoss.data.dataset import build_dataset
from fastoss.errors import FastossError
from fastoss.model.backend import plan_model
from fastoss.training.bench.baseline import plan_padded
from fastoss.training.bench.bench import bench
from fastoss.training.bench.plan import parse_gpus, plan_contestants, write_recipe
from fastoss.training.bench.report import percentile, summarise, table_lines, write_report
from fastoss.training.train import plan_batches

from .conftest import ROOT, ROWS, RecipeFolder, Result, fastoss

sys.path.insert(0, str(ROOT))
RECORD = json.loads((ROOT / "benchmarks" / "results" / "training_cpu.json").read_text())["results"]
RUNS = ["fastoss-1-1", "fastoss-2-1", "transformers-1-1"]


@pytest.fixture
def packing(folder: RecipeFolder) -> RecipeFolder:
    """The tiny recipe with packed batches, two a step."""
    text = folder.recipe.read_text().replace("per_device_train_batch_size = 2", "tokens_per_batch = 300\ngradient_accumulation_steps = 2")
    folder.recipe.write_text(text)
    folder.rows(ROWS * 2)
    return folder


# --- from start to end ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_is_stopped_goes_on_and_reports(packing):
    """Two numbers of processes and the baseline; a signal after the first run; then the rest, and nothing twice."""
    output = packing.root / "made"
    options = ["--gpus", "1,2", "--baseline", "transformers", "--steps", "3", "--repeats", "1", "--output", str(output)]
    stopped = stop_after_first(packing, output, options)
    assert stopped.code == 75, stopped.err
    assert "stopped: 1 of 3 runs are done; run the same command again to resume from there" in stopped.err
    first = output / "results" / "fastoss-1-1.json"
    before = first.read_bytes()
    assert json.loads((output / "bench.json").read_text())["contestants"][0]["runs"] == 1, "what there is has been reported"

    done = fastoss("bench", packing.recipe, *options, cwd=packing.root, timeout=600)
    assert done.code == 0, done.err
    assert "[1/3] fastoss-1, repeat 1: done before" in done.err
    assert re.search(r"\[2/3] fastoss-2, repeat 1 … about \S+ left in all", done.err)
    assert first.read_bytes() == before
    check_results(output)
    check_report(output)
    check_one_is_fastoss_train(packing, output)

    again = fastoss("bench", packing.recipe, *options, cwd=packing.root)
    assert (again.code, again.err.count("done before")) == (0, 3)
    other = fastoss("bench", packing.recipe, *options, "--set", "lora.r=8", cwd=packing.root)
    assert other.code == 2
    assert "the folder holds results with other settings (lora.r)" in other.err


def stop_after_first(packing: RecipeFolder, output: Path, options: list[str]) -> Result:
    command = [sys.executable, "-m", "fastoss", "bench", str(packing.recipe), *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=packing.root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while not (output / "logs" / "fastoss-2-1.log").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(2)  # the second run is loading
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(output).encode() in read_or_nothing(path)]
    assert left == [], "no process goes on"
    return Result(process.returncode, out, err)


def read_or_nothing(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def check_results(output: Path) -> None:
    """One JSON a run, all of them over the same documents, with the same losses."""
    results = [json.loads(path.read_text()) for path in sorted((output / "results").iterdir())]
    assert [f"{result['contestant']}-{result['repeat']}" for result in results] == RUNS
    assert not list((output / "work").iterdir()), "adapters are no result"
    one = results[0]
    assert (one["layout"], results[2]["layout"]) == ("packed", "padded")
    for result in results:
        assert len(result["step_seconds"]) == len(result["losses"]) == len(result["tokens"]) == 3
        assert min(result["step_seconds"]) > 0
        assert 0.3 < result["peak_memory"]["resident_gb"] < 10
        assert result["documents"] == one["documents"]
        assert result["trained_tokens"] == one["trained_tokens"]
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert sum(results[2]["slots"]) > sum(results[2]["tokens"]) >= sum(one["tokens"]) == sum(one["slots"])


def check_report(output: Path) -> None:
    """Table, JSON and picture say what the results say."""
    summary = json.loads((output / "bench.json").read_text())
    results = {row["contestant"]: json.loads((output / "results" / f"{row['contestant']}-1.json").read_text()) for row in summary["contestants"]}
    assert list(results) == ["fastoss-1", "fastoss-2", "transformers-1"]
    table = (output / "bench.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith(("| fastoss", "| transformers"))]
    for row, line in zip(summary["contestants"], lines, strict=True):
        result = results[row["contestant"]]
        speed = sum(result["trained_tokens"][1:]) / sum(result["step_seconds"][1:])
        assert row["trained_tokens_per_second"]["median"] == pytest.approx(speed)
        assert line.split(" | ")[1] == str(row["processes"])
        assert f" {speed:,.0f} " in line
    one, two, theirs = summary["contestants"]
    ratio = two["trained_tokens_per_second"]["median"] / one["trained_tokens_per_second"]["median"]
    assert two["speed_up"]["median"] == pytest.approx(ratio)
    assert two["efficiency"]["median"] == pytest.approx(ratio / 2)
    assert two["communication_share_estimate"] == pytest.approx(max(0, 1 - ratio / 2))
    assert one["communication_share_estimate"] is theirs["speed_up"] is None
    faster = one["trained_tokens_per_second"]["median"] / theirs["trained_tokens_per_second"]["median"]
    assert f"fastoss trains as many tokens {faster:.2f} times as fast as transformers on 1 process" in table
    picture = ElementTree.fromstring((output / "bench.svg").read_text())
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"fastoss-1", "fastoss-2", "transformers-1", "2 processes", f"{one['trained_tokens_per_second']['median']:,.0f}"} <= set(texts)
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}polyline"))) == 3


def check_one_is_fastoss_train(packing: RecipeFolder, output: Path) -> None:
    """The run of the folder's recipe by hand has the same losses: nothing but `fastoss train` was measured."""
    run = packing.root / "by-hand"
    done = fastoss("train", output / "recipes" / "fastoss-1.toml", "--output", run, cwd=packing.root)
    assert done.code == 0, done.err
    result = json.loads((output / "results" / "fastoss-1-1.json").read_text())
    assert [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] == result["losses"]


def test_a_failed_run_says_why_and_where_its_log_is(packing, monkeypatch):
    monkeypatch.setenv("FASTOSS_ATTENTION", "nonsense")  # found only when the model is loaded
    output = packing.root / "made"
    with pytest.raises(FastossError) as error:
        bench(load_recipe(packing.recipe), packing.recipe, output, steps=3, repeats=1)
    assert '"nonsense" is not an attention kernel' in error.value.fact
    assert "logs/fastoss-1-1.log" in error.value.hint
    assert (output / "logs" / "fastoss-1-1.log").is_file()
    assert not list((output / "results").iterdir())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "place", "fact"),
    [
        ({"gpus": (1, 3)}, "train.gradient_accumulation_steps", "2 micro-batches a step cannot be shared by 3 processes"),
        ({"gpus": (0,)}, "--gpus 0", "each number of processes once"),
        ({"gpus": (2, 2)}, "--gpus 2,2", "each number of processes once"),
        ({"baseline": "axolotl"}, "--baseline", '"axolotl" is not a baseline'),
        ({"steps": 2}, "--steps 2 --repeats 3", "at least 3 steps"),
        ({"repeats": 0}, "--steps 20 --repeats 0", "at least 3 steps"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(packing, arguments, place, fact):
    with pytest.raises(FastossError) as error:
        bench(load_recipe(packing.recipe), packing.recipe, packing.root / "made", **arguments)
    assert error.value.place == place
    assert fact in error.value.fact
    assert not (packing.root / "made").exists()


def test_the_hint_of_an_uneven_batch_works(packing):
    with pytest.raises(FastossError) as error:
        plan(load_recipe(packing.recipe), gpus=(1, 2, 4))
    change = re.search(r"--set (\S+),", error.value.hint)[1]
    assert change == "train.gradient_accumulation_steps=4"
    made = plan(load_recipe(packing.recipe, [change]), gpus=(1, 2, 4))
    assert [contestant.recipe.train.gradient_accumulation_steps for contestant in made] == [4, 2, 1]
    assert len({tuple(contestant.work.trained_tokens) for contestant in made}) == 1


def test_rows_that_are_padded_already_have_no_baseline(folder):
    with pytest.raises(FastossError, match="trains padded rows itself"):
        plan(load_recipe(folder.recipe), baseline="transformers")


def test_a_folder_of_something_else_is_left_alone(packing):
    with pytest.raises(FastossError, match="the folder is not a benchmark, and not empty"):
        bench(load_recipe(packing.recipe), packing.recipe, packing.root)


@pytest.mark.parametrize("text", ["", "1,", "a", "1;2", "-1"])
def test_gpus_are_a_list_of_numbers(text):
    with pytest.raises(FastossError):
        parse_gpus(text)


def test_a_dry_run_says_the_plan_and_writes_nothing(packing, capsys):
    bench(load_recipe(packing.recipe), packing.recipe, packing.root / "made", gpus=(1, 2), baseline="transformers", dry_run=True)
    said = capsys.readouterr().err
    assert "3 contestants × 3 repeats, 20 steps each, of which the first 4 are not counted" in said
    assert "fastoss-2: a step is 2 × 1 micro-batches of up to 300 tokens, packed" in said
    assert not (packing.root / "made").exists()


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan(recipe: Recipe, **arguments):
    return plan_contestants(recipe, **{"sample": False, "gpus": (1,), "baseline": None, "steps": 5, "repeats": 1} | arguments)


def test_the_baseline_trains_the_documents_of_each_of_our_steps(packing):
    ours, theirs = plan(load_recipe(packing.recipe), baseline="transformers")
    dataset = build_dataset(ours.recipe)
    model = plan_model(ours.recipe.model, gpu=False)
    _, units, schedule = plan_batches(ours.recipe, model, dataset, 1)
    layout, singles, padded = plan_padded(theirs.recipe, ours.recipe, dataset, 1)
    assert (layout, padded.fillers) == ("padded", 0)
    per_step = theirs.recipe.train.gradient_accumulation_steps
    assert all(padded.batches), "no batch is empty"
    for step in range(5):
        mine = [e.input_ids for members in schedule.batches[2 * step : 2 * step + 2] for unit in members for e in units[unit]]
        other = [e.input_ids for members in padded.batches[per_step * step : per_step * (step + 1)] for unit in members for e in singles[unit]]
        assert sorted(map(list, mine)) == sorted(map(list, other))
    assert ours.work.trained_tokens == theirs.work.trained_tokens
    longest = max(dataset.train.lengths)
    assert all(len(members) * longest <= 300 or len(members) <= max(1, 300 // longest) + 1 for members in padded.batches), "memory is alike"


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.toml")))
def test_a_resolved_recipe_written_out_is_the_same_recipe(recipe, tmp_path):
    resolved = load_recipe(
        ROOT / "recipes" / recipe, ["format.identity={ name = '喵 \"x\"', author = 'a\\b' }", "samples.prompts=['a\\tb', '你是谁?']"]
    )
    write_recipe(tmp_path / "made" / "recipe.toml", resolved)
    assert resolved_dict(load_recipe(tmp_path / "made" / "recipe.toml")) == resolved_dict(resolved)


# --- the report -------------------------------------------------------------------------------------------------------


def made_result(kind: str, processes: int, repeat: int, step: float) -> dict:
    """Five steps of 100 trained and 250 other tokens; the first step is slow."""
    work = {"documents": [4] * 5, "tokens": [250] * 5, "trained_tokens": [100] * 5, "slots": [500 if kind == "transformers" else 250] * 5}
    facts = {
        "gpu": None,
        "backend": "b",
        "precision": "p",
        "layout": "l",
        "python": "3",
        "inputs": {"versions": dict.fromkeys(("fastoss", "torch", "transformers"), "1")},
    }
    name = {"contestant": f"{kind}-{processes}", "kind": kind, "processes": processes, "repeat": repeat}
    return {**name, **work, **facts, "step_seconds": [9.0, *[step] * 4], "losses": [5.0, 4, 3, 2, 1], "peak_memory": {"resident_gb": 1.0 * repeat}}


def test_sums_by_hand():
    facts = {"recipe": "r.toml", "steps": 5, "warm_up": 1, "repeats": 2}
    results = [made_result("transformers", 1, 1, 4.0), made_result("fastoss", 2, 1, 1.25), made_result("fastoss", 1, 1, 2.0)]
    results += [made_result("fastoss", 1, 2, 1.0), made_result("fastoss", 2, 2, 0.5), made_result("transformers", 1, 2, 3.0)]
    summary = summarise(facts, results)
    one, two, theirs = summary["contestants"]
    assert one["trained_tokens_per_second"] == {"median": 75, "min": 50, "max": 100}
    assert one["tokens_per_second"]["max"] == 250
    assert two["speed_up"] == pytest.approx({"median": 1.8, "min": 1.6, "max": 2.0}), "within each repeat"
    assert two["efficiency"] == pytest.approx({"median": 0.9, "min": 0.8, "max": 1.0})
    assert two["communication_share_estimate"] == pytest.approx(0.1)
    assert theirs["fastoss_is_times_faster"] == pytest.approx({"median": 2.5, "min": 2.0, "max": 3.0})
    assert theirs["fill"] == 0.5
    assert summary["trained_tokens_counted"] == 400
    assert theirs["seconds_for_the_same_trained_tokens"] == {"median": 14, "min": 12, "max": 16}
    assert one["peak_memory"] == {"resident_gb": 2.0}
    table = "\n".join(table_lines(summary))
    assert "| fastoss | 2 | 3.5 s (2 s to 5 s) | 1.80× (1.60× to 2.00×) | 0.90 (0.80 to 1.00) | 10 % |" in table
    assert "- fastoss trains as many tokens 2.50 (2.00 to 3.00) times as fast as transformers on 1 process." in table


def test_percentiles_are_measured_values():
    values = [float(n) for n in range(1, 21)]
    assert [percentile(values, share) for share in (0.5, 0.95, 1.0)] == [10, 19, 20]
    assert percentile([3.0], 0.95) == 3


@pytest.mark.parametrize("count", range(1, 5))
def test_a_report_can_be_made_after_any_run(tmp_path, count):
    """Also while ours on the fewest processes is the one that has not run yet, and with losses all alike."""
    results = [
        made_result(*run)
        for run in itertools.islice([("fastoss", 2, 1, 1.0), ("transformers", 1, 1, 1.0), ("fastoss", 1, 2, 1.0), ("fastoss", 1, 1, 1.0)], count)
    ]
    for result in results:
        result["losses"] = [1.0] * 5
    write_report(tmp_path, {"recipe": "a < b & c", "steps": 5, "warm_up": 1, "repeats": 2}, results)
    ElementTree.fromstring((tmp_path / "bench.svg").read_text())
    assert "1 of 2 repeats" in (tmp_path / "bench.md").read_text()


# --- small forms of benchmarks/training_cpu.py, and its record ------------------------------------------------------------------------


def test_packed_is_as_much_faster_as_it_was_at_the_same_loss(one_thread):
    from benchmarks.training_packed import packed

    result = packed(batches=1, repeats=3)
    assert result["document_loss_difference"] <= 1e-5
    assert result["gradient_difference"] <= 1e-5
    was = RECORD["packed"]["times_faster"]["cpu"]["median"] * RECORD["packed"]["fill"]  # of what the padding would allow
    assert result["times_faster"]["cpu"]["max"] * result["fill"] > was / 2


@pytest.mark.slow
def test_the_trainer_costs_no_more_than_it_did():
    """In a process of its own: where a test before has loaded Unsloth, what it patches moves a loss by a last bit."""
    code = "import json; from benchmarks.training_overhead import overhead; print(json.dumps(overhead(rows=2, steps=10)))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loss_difference"] == 0, "the bare step is the same step"
    # The best step: what else the machine does comes on top of the others.
    assert result["overhead"]["accounted"]["min"] < 2 * RECORD["overhead_one_row"]["overhead"]["accounted"]["median"]


def test_the_record_meets_the_targets_that_a_cpu_can_show():
    """Of the committed measurement alone; nothing is run."""
    packed = RECORD["packed"]
    assert packed["target"] == pytest.approx(0.8 / packed["fill"])
    for clock in ("wall", "cpu"):
        assert packed["times_faster"][clock]["median"] >= packed["target"], clock
    assert packed["document_loss_difference"] <= 1e-5
    assert packed["gradient_difference"] <= 1e-5
    overhead = RECORD["overhead"]
    assert overhead["target"] == 0.03
    assert overhead["overhead"]["accounted"]["median"] <= overhead["target"]
    assert overhead["loss_difference"] == 0
    assert RECORD["ddp"]["loss_difference"] <= 1e-5
    waits = RECORD["startup"]["seconds"]
    assert waits["help"]["median"] <= 0.3
    assert waits["check_cold"]["median"] <= 10
