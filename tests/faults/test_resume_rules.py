"""What may change between two starts of a run: the rule of docs/reliability.md, change by change."""

from __future__ import annotations

import json
import shutil

import pytest

from fastoss.config import recipe_from_resolved
from fastoss.errors import FastossError
from fastoss.run import RunDirectory, read_json, write_json
from fastoss.training.resume import changes_since

from ..conftest import ROWS, metrics
from .conftest import Place, Prepared
from .test_checkpoints import same_end

FREE = ["log.every=2", "checkpoint.keep=5", "eval.every=7", "train.on_oom=split", 'samples.prompts=["hi"]', "distributed.ddp_timeout=60"]
INSIST = {
    "train.learning_rate=1e-4": "train.learning_rate: 0.005 → 0.0001",
    "train.seed=1": "train.seed: 42 → 1",
    "train.per_device_train_batch_size=3": "train.per_device_train_batch_size: 2 → 3",
    "format.reasoning_effort=high": "format.reasoning_effort: 'medium' → 'high'",
    "train.max_steps=9": "train.max_steps: 8 → 9",
}
ANOTHER = {
    "lora.r=8": "lora.r: 4 → 8",
    'lora.targets=["attention"]': "lora.targets: ",
}


def test_free_changes_are_taken_and_the_numbers_stay(place: Place, prepared: Prepared):
    result = place.again(*(part for change in FREE for part in ("--set", change)))
    assert result.code == 0, result.err
    same_end(place.run, prepared.whole)


@pytest.mark.parametrize("change", INSIST)
def test_other_changes_are_refused_with_what_differs(place: Place, change):
    result = place.again("--set", change)
    assert (result.code, f"the run was started with other settings: {INSIST[change]}" in result.err) == (2, True), result.err
    assert "--override-resume resumes all the same" in result.err
    assert len(metrics(place.run)) >= 6


@pytest.mark.parametrize("change", ANOTHER)
def test_another_run_cannot_be_insisted_on(place: Place, change):
    result = place.again("--set", change, "--override-resume")
    assert (result.code, ANOTHER[change] in result.err) == (2, True), result.err
    assert "this is a different run from the one in this folder" in result.err


def test_insisting_goes_on_and_is_written_down(place: Place):
    rows = [*ROWS, {"instruction": "New?", "input": "", "output": "Yes, new.", "history": []}]
    (place.root / "data.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    refused = place.again()
    assert (refused.code, "the data has changed" in refused.err) == (2, True), refused.err
    result = place.again("--set", "train.learning_rate=1e-4", "--set", "train.max_steps=10", "--override-resume")
    assert result.code == 0, result.err
    assert "note: changed since the run was started: train.learning_rate: 0.005 → 0.0001" in result.err
    assert "note: changed since the run was started: the data has changed" in result.err
    assert [entry["step"] for entry in metrics(place.run)] == list(range(1, 11))
    changed = json.loads((place.run / "manifest.json").read_text())["changed"]
    assert {"at_step": 6, "what": "train.max_steps: 8 → 10"} in changed
    assert len(changed) == 3


def test_versions_mend_freely_and_change_only_by_insisting(place: Place, prepared: Prepared):
    path = place.run / "manifest.json"
    manifest = json.loads(path.read_text())
    torch = manifest["versions"]["torch"]
    family, last = torch.split("+")[0].rsplit(".", 1)
    path.write_text(json.dumps(manifest | {"versions": manifest["versions"] | {"torch": f"{family}.{int(last) + 7}"}}))
    result = place.again()
    assert (result.code, f"the version of torch: '{family}.{int(last) + 7}' → '{torch}'" in result.err) == (0, True), result.err
    same_end(place.run, prepared.whole)


def test_another_version_is_refused(place: Place):
    path = place.run / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"versions": manifest["versions"] | {"peft": "0.18.0"}}))
    result = place.again()
    assert (result.code, "the version of peft: '0.18.0' → " in result.err) == (2, True), result.err
    assert place.again("--override-resume").code == 0


def test_both_ways_at_once_are_refused(place: Place):
    result = place.again("--override-resume", "--no-resume")
    assert (result.code, "use one of them" in result.err) == (2, True)


@pytest.mark.parametrize("backend", ["transformers", "unsloth"])
def test_a_library_that_the_run_does_not_use_may_come_and_go(prepared: Prepared, backend):
    run = RunDirectory(prepared.whole)
    facts = read_json(run.manifest) | {"backend": backend}
    versions = dict(facts["versions"])
    if versions.pop("unsloth", None) is None:
        versions["unsloth"] = "2026.10.9"
    changes = changes_since(run, recipe_from_resolved(read_json(run.resolved_recipe), "here"), facts | {"versions": versions})
    assert any("the version of unsloth" in change.line() for change in changes) == (backend == "unsloth")


@pytest.mark.parametrize("key", ["versions", "data", "layout", "world_size"])
def test_papers_of_another_version_are_named(prepared: Prepared, tmp_path, key):
    run = RunDirectory(tmp_path)
    shutil.copyfile(prepared.whole / run.resolved_recipe.name, run.resolved_recipe)
    facts = read_json(RunDirectory(prepared.whole).manifest)
    write_json(run.manifest, {name: value for name, value in facts.items() if name != key})
    with pytest.raises(FastossError, match=f"`{key}` is missing"):
        changes_since(run, recipe_from_resolved(read_json(run.resolved_recipe), "here"), facts)
