"""Checkpoints that are torn, missing, damaged, or written while the process dies: the newest whole one is taken, and nothing else."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from fastoss.run import RunDirectory, file_digest, write_json
from fastoss.training.checkpoint import checkpoint_fault, latest_checkpoint, list_checkpoints, remove_older
from fastoss.training.progress import MetricsFile

from ..conftest import metrics
from .conftest import SLOW, STEPS, Place, Prepared, wait_for


def saved(run: RunDirectory, step: int) -> None:
    """A whole checkpoint of no content."""
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    files = {}
    for name in ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json"):
        (folder / name).write_bytes(b"x")
        files[name] = {"bytes": 1, "sha256": file_digest(folder / name)}
    write_json(folder / "checkpoint.json", {"step": step, "files": files})


def test_checkpoints_go_by_their_steps_and_as_many_are_kept_as_asked_for(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (8, 9, 10, 11):
        saved(run, step)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-8", "checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert latest_checkpoint(run).name == "checkpoint-11"
    remove_older(run, 9)
    assert len(list_checkpoints(run)) == 4
    (run.checkpoints / "checkpoint-11" / "optimizer.pt").write_bytes(b"")  # it does not count as one of two
    remove_older(run, 2)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert latest_checkpoint(run).name == "checkpoint-10"
    remove_older(run, 3)
    assert len(list_checkpoints(run)) == 3


def test_metrics_after_a_kill_end_at_the_checkpoint_and_know_the_best(tmp_path):
    path = tmp_path / "metrics.jsonl"
    entries = [{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 1.0}, {"step": 3, "eval_loss": 2.0}, {"step": 4, "eval_loss": 0.5}]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 5, "lo')
    metrics_file = MetricsFile(path, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == entries[:3]
    assert metrics_file.best == {"eval_loss": 1.0, "step": 2}
    metrics_file.write(4, {"eval_loss": 1.5})
    assert metrics_file.best == {"eval_loss": 1.0, "step": 2}
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 4, "eval_loss": 1.5}
    assert MetricsFile(path, 0).best is None
    assert path.read_text() == ""


def same_end(run: Path, whole: Path) -> None:
    """Every step's figures and every weight, to the last bit; and no torn file is left."""
    assert metrics(run) == metrics(whole)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (whole / "adapter" / "adapter_model.safetensors").read_bytes()
    assert all(checkpoint_fault(checkpoint) is None for checkpoint in list_checkpoints(RunDirectory(run)))
    assert not [path for path in run.rglob(".*") if path.name not in (".lock",)], "something half-written was left"


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    ("optimizer.pt", tear, "optimizer.pt has"),
    ("optimizer.pt", flip, "optimizer.pt is not what was written"),
    ("adapter_model.safetensors", tear, "adapter_model.safetensors has"),
    ("adapter_model.safetensors", flip, "adapter_model.safetensors is not what was written"),
    ("adapter_model.safetensors", Path.unlink, "adapter_model.safetensors is missing"),
    ("scheduler.pt", Path.unlink, "scheduler.pt is missing"),
    ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
    ("trainer_state.json", lambda path: path.write_text(""), "trainer_state.json has 0 of"),
    ("checkpoint.json", Path.unlink, "checkpoint.json: file not found"),
    ("checkpoint.json", tear, "checkpoint.json: cannot be read"),
    ("checkpoint.json", lambda path: path.write_text('{"files": 3}'), "checkpoint.json is not understood"),
    ("checkpoint.json", lambda path: path.write_text('{"files": {}}'), "checkpoint.json does not name adapter_model.safetensors"),
]


@pytest.mark.parametrize(("name", "damage", "told"), DAMAGES, ids=[f"{name}-{told.split()[1]}" for name, _, told in DAMAGES])
def test_a_damaged_checkpoint_is_named_and_passed_over(place: Place, name, damage, told):
    damage(place.checkpoint(6) / name)
    lines: list[str] = []
    assert latest_checkpoint(RunDirectory(place.run), lines.append) == place.checkpoint(4)
    assert lines == [f"note: checkpoint-6 is passed over: {lines[0].split(': ', 2)[2]}"]
    assert told in lines[0]
    doctor = place.commands.run("doctor", "run", "--json", cwd=place.root)
    findings = {finding["what"]: finding for finding in json.loads(doctor.out)["findings"]}
    assert (findings["checkpoint-6"]["state"], findings["checkpoint-4"]["state"]) == ("broken", "ok")
    assert told in findings["checkpoint-6"]["told"]
    assert "checkpoint-4" in findings["checkpoint-6"]["hint"]
    assert json.loads(doctor.out)["verdict"].startswith("broken: checkpoint-6")


def test_the_next_step_does_not_change_what_is_being_written():
    """A checkpoint is written beside the training: the optimizer's state is copied, tensor by tensor."""
    import torch

    from fastoss.training.scheduled import _on_cpu

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(3)
    optimizer.step()
    kept = _on_cpu(optimizer.state_dict())
    first = {name: value.clone() for name, value in kept["state"][0].items()}
    weight.grad = torch.full((3,), -5.0)
    optimizer.step()
    assert not torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], first["exp_avg"])
    for name, value in first.items():
        assert torch.equal(kept["state"][0][name], value), name


def test_the_run_goes_on_from_the_newest_whole_checkpoint(place: Place, prepared: Prepared):
    tear(place.checkpoint(6) / "optimizer.pt")
    flip(place.checkpoint(4) / "adapter_model.safetensors")
    result = place.again()
    assert result.code == 0, result.err
    assert "checkpoint-6 is passed over: optimizer.pt has" in result.err
    assert "checkpoint-4 is passed over: adapter_model.safetensors is not what was written" in result.err
    assert "resuming from checkpoint-2" in result.err
    same_end(place.run, prepared.whole)


def test_no_whole_checkpoint_is_an_error_and_nothing_is_removed(place: Place):
    for step in (2, 4, 6):
        tear(place.checkpoint(step) / "optimizer.pt")
    before = sorted(place.run.rglob("*"))
    assert "would be refused, none of its checkpoints is whole" in place.again("--dry-run").out
    result = place.again()
    assert (result.code, "none of this run's checkpoints is whole" in result.err) == (1, True), result.err
    assert [path for path in sorted(place.run.rglob("*")) if path not in before] == []
    assert [path for path in before if not path.exists()] == []
    strict = place.commands.run("doctor", "run", "--strict", cwd=place.root)
    assert strict.code == 1


def test_keeping_few_never_removes_the_last_whole_one(place: Place):
    run = RunDirectory(place.run)
    tear(place.checkpoint(4) / "optimizer.pt")
    tear(place.checkpoint(6) / "optimizer.pt")
    remove_older(run, keep=2)
    assert len(list_checkpoints(run)) == 3, "one whole, two wanted: none may go"
    remove_older(run, keep=1)
    assert list_checkpoints(run) == [place.checkpoint(2), place.checkpoint(4), place.checkpoint(6)], "newer ones stay, the whole one stays"


def test_what_a_kill_left_half_written_is_swept_away(place: Place, prepared: Prepared):
    checkpoints = place.run / "checkpoints"
    shutil.copytree(place.checkpoint(4), checkpoints / ".writing" / "checkpoint-8")
    (checkpoints / ".checkpoint-2.leaving").mkdir()
    (place.run / ".metrics.jsonl.1.tmp").write_text("{")
    (place.run / ".adapter.1.tmp").mkdir()
    with open(place.run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    result = place.again()
    assert result.code == 0, result.err
    same_end(place.run, prepared.whole)


def test_killed_within_the_writing_of_a_checkpoint(fresh: Place, prepared: Prepared):
    """The thread that writes is held up in the middle; the process dies there."""
    held = """
import time, torch
save = torch.save
def slow_save(state, file, *a, **k):
    save(state, file, *a, **k)
    time.sleep(60 if "optimizer" in str(file) else 0)
torch.save = slow_save
"""
    running = fresh.start(prelude=held)
    wait_for(fresh.run / "checkpoints" / ".writing" / "checkpoint-2" / "optimizer.pt", running)
    running.kill()
    assert running.wait().code == -signal.SIGKILL
    assert list_checkpoints(RunDirectory(fresh.run)) == []
    result = fresh.again()
    assert result.code == 0, result.err
    same_end(fresh.run, prepared.whole)


def kill_at(place: Place, seconds: float) -> None:
    running = place.start(prelude=SLOW)
    time.sleep(seconds)
    running.kill()
    running.wait()


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(fresh: Place, prepared: Prepared, seed):
    """Two kills each, at moments of a fixed seed, the second in the resumed run (`make soak` does forty)."""
    moments = random.Random(seed)
    for _ in range(2):
        kill_at(fresh, moments.uniform(0.5, 7))
    result = fresh.again()
    assert result.code == 0, result.err
    same_end(fresh.run, prepared.whole)
    assert len(metrics(fresh.run)) == STEPS
