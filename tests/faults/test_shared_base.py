"""`distributed.strategy = "fsdp"`: two processes with half a base each train what one process with the whole base trains, and die like others."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastoss.run import RunDirectory
from fastoss.training.checkpoint import checkpoint_fault, latest_checkpoint, list_checkpoints

from ..commands import Running
from ..conftest import ROWS, TINY_RECIPE, metrics
from .conftest import CHANGES, Place, wait_for

ASKED = (
    *CHANGES, "--set", "train.max_steps=5", "--set", "train.recompute=full", "--set", "eval.fraction=0.3", "--set", "eval.every=4",
    "--set", "eval.replies=1", "--set", "samples.prompts=['Who are you?']", "--set", "samples.max_new_tokens=2",
)  # fmt: skip
SHARED = (
    "--set", "distributed.strategy=fsdp", "--set", "model.backend=transformers", "--set", "checkpoint.every=1",
    "--set", "distributed.ddp_timeout=60",  # no launcher here: where gloo does not hear of a death, the watchdog does
)  # fmt: skip
ALIKE = ("loss", "grad_norm", "learning_rate", "num_tokens", "logps", "rewards", "eval")  # what a process measures of its own batches is not

# After each backward pass of a process: the bytes of all tensors that live in it, those of the base among them.
WEIGH = """
import gc, os, time, torch
from transformers import Trainer
step = Trainer.training_step
def weighed(self, *a, **k):
    loss = step(self, *a, **k)
    held = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):
            storage = getattr(found, "_local_tensor", found).untyped_storage()
            if storage.device.type == "cpu":
                held[storage.data_ptr()] = storage.nbytes()
    with open(f"held-{os.environ['RANK']}", "a") as file:
        file.write(f"{sum(held.values())}\\n")
    time.sleep(0.25)
    return loss
Trainer.training_step = weighed
"""


@pytest.fixture
def place(commands, tmp_path: Path) -> Place:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(TINY_RECIPE, encoding="utf-8")
    return Place(tmp_path, commands)


def both(place: Place, *changes: str, prelude: str = "") -> list[Running]:
    """The processes that torchrun would start."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = ("train", "recipe.toml", "--output", "run", *changes, *SHARED)
    return [place.commands.start(*arguments, cwd=place.root, prelude=prelude, RANK=r, LOCAL_RANK=r, **meeting) for r in ("0", "1")]


def same(one: Path, other: Path) -> None:
    mine, theirs = metrics(one), metrics(other)
    assert [entry["step"] for entry in mine] == [entry["step"] for entry in theirs]
    for ours, expected in zip(mine, theirs, strict=True):
        assert ours.keys() == expected.keys()
        for key in ours:
            if key.startswith(ALIKE):
                assert ours[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), (ours["step"], key)


def test_halves_train_what_the_whole_trains(place: Place):
    """One run, stopped by a signal to one process, ended by a kill of one, and finished by the same command."""
    processes = both(place, *ASKED, prelude=WEIGH)
    wait_for(place.checkpoint(1), processes[0])
    processes[1].kill(signal.SIGTERM)
    assert [process.wait().code for process in processes] == [75, 75], processes[0].err

    processes = both(place, *ASKED, prelude=WEIGH)
    wait_for(place.checkpoint(3), processes[0])
    processes[1].kill()
    assert processes[0].wait(240).code == 1
    assert "lost contact with another one" in processes[0].err or "process 1 is frozen or gone" in processes[0].err, processes[0].err
    assert processes[1].wait().code == -signal.SIGKILL
    found = list_checkpoints(RunDirectory(place.run))
    assert [checkpoint_fault(checkpoint) for checkpoint in found] == [None] * len(found)
    stopped_at = latest_checkpoint(RunDirectory(place.run))
    assert stopped_at is not None

    processes = both(place, *ASKED, "--set", "distributed.host_layers=2")  # moves weights, and no number
    assert [process.wait().code for process in processes] == [0, 0], processes[0].err
    assert f"resuming from {stopped_at.name}" in processes[0].err

    # One process with the same global batch.
    alone = place.root / "alone"
    changes = ("--set", "train.gradient_accumulation_steps=2")
    result = place.commands.run("train", "recipe.toml", "--output", "alone", *ASKED, *changes, cwd=place.root)
    assert result.code == 0, result.err
    assert len(metrics(alone)) == 5 + 2
    same(place.run, alone)
    assert (place.run / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()

    # The adapter is a plain one, and the same.
    adapter, expected = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (place.run, alone))
    assert adapter.keys() == expected.keys()
    assert all(torch.allclose(adapter[name], expected[name], rtol=1e-5, atol=1e-5) for name in expected)
    configs = [json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in (place.run, alone)]
    base_of = {config["base_model_name_or_path"] for config in configs}
    assert len(base_of) == 1

    # Each process held half of the base: as it was loaded, and between the passes of the training.
    manifest = json.loads((place.run / "manifest.json").read_text())
    base, shares = manifest["base_bytes"], manifest["base_bytes_by_process"]
    assert base == sum(weight.nbytes for weight in load_file(Path(base_of.pop()) / "model.safetensors").values())
    assert len(shares) == 2
    assert max(shares) < 0.501 * base
    for rank in (0, 1):
        held = [int(line) for line in (place.root / f"held-{rank}").read_text().split()]
        assert 0.5 * base < min(held) <= max(held) < 0.6 * base, (rank, held, base)


def test_preferences_too(place: Place):
    """DPO over packed pairs, its reference asked by both; three held-out pairs, of which one process has one more."""
    pairs = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": f"No. {i}"} for i, row in enumerate(ROWS)]
    (place.root / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    text = TINY_RECIPE.replace('name = "test"', 'name = "test"\nmethod = "dpo"')
    (place.root / "recipe.toml").write_text(text.replace("per_device_train_batch_size = 2", "tokens_per_batch = 256"), encoding="utf-8")
    changes = ("--set", "train.max_steps=2", "--set", "eval.fraction=0.3", "--set", "eval.every=2", "--set", "train.learning_rate=1e-4")
    processes = both(place, *changes)
    assert [process.wait().code for process in processes] == [0, 0], processes[0].err
    assert "asking the reference (the base model)" in processes[0].err
    more = ("--set", "train.gradient_accumulation_steps=2")
    result = place.commands.run("train", "recipe.toml", "--output", "alone", *changes, *more, cwd=place.root)
    assert result.code == 0, result.err
    same(place.run, place.root / "alone")
