"""Two processes under a real torchrun: whatever happens to one, all end within the timeout, none is left over, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastoss.run import RunDirectory
from fastoss.training.checkpoint import checkpoint_fault, list_checkpoints

from ..conftest import ROOT, losses, metrics
from .conftest import CHANGES, SLOW, STEPS, Place

TIMEOUT = 20
SETTINGS = ("--set", "checkpoint.every=1", "--set", f"distributed.ddp_timeout={TIMEOUT}")
COMMAND = ("train", "recipe.toml", "--output", "run", *CHANGES, *SETTINGS, "--gpus", "2")


def start(place: Place) -> subprocess.Popen:
    """Steps that last a little: sitecustomize reaches the processes that torchrun starts."""
    (place.root / "slow").mkdir(exist_ok=True)
    (place.root / "slow" / "sitecustomize.py").write_text(f"import os\nif 'RANK' in os.environ:\n    exec({SLOW!r})\n")
    environment = os.environ | {"PYTHONPATH": f"{place.root / 'slow'}:{ROOT}"}
    log = open(place.root / "log", "w")  # noqa: SIM115
    return subprocess.Popen([sys.executable, "-m", "fastoss", *COMMAND], cwd=place.root, env=environment, stdout=log, stderr=log)


def told(place: Place) -> str:
    return (place.root / "log").read_text(encoding="utf-8", errors="replace")


def wait_for_step(place: Place, step: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not (place.run / "metrics.jsonl").exists() or not [m for m in metrics_so_far(place.run) if m >= step]:
        assert time.monotonic() < until, told(place)
        assert process.poll() is None, told(place)
        time.sleep(0.02)


def metrics_so_far(run: Path) -> list[int]:
    try:
        return [entry["step"] for entry in metrics(run)]
    except ValueError:
        return []  # a line half-written


def ranks(place: Place) -> dict[int, int]:
    """Process ids by rank: torchrun gives each rank an environment of its own."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = dict(part.split(b"=", 1) for part in path.read_bytes().split(b"\0") if b"=" in part)
            here = os.readlink(path.parent / "cwd") == str(place.root)
        except OSError:
            continue
        if here and b"RANK" in environment:
            found[int(environment[b"RANK"])] = int(path.parent.name)
    return found


def check_left(place: Place, within: float = 5) -> None:
    until = time.monotonic() + within
    while ranks(place):
        assert time.monotonic() < until, f"left over: {ranks(place)}"
        time.sleep(0.05)
    found = list_checkpoints(RunDirectory(place.run))
    assert found
    assert [checkpoint_fault(checkpoint) for checkpoint in found] == [None] * len(found)


@pytest.fixture(scope="module")
def expected(commands, prepared, tmp_path_factory) -> list[float]:
    """The unbroken run's losses (one process gives those of two: tests/test_training.py)."""
    folder = tmp_path_factory.mktemp("unbroken")
    changes = ("--set", "train.gradient_accumulation_steps=2")
    result = commands.run("train", prepared.root / "recipe.toml", "--output", folder / "run", *CHANGES, *changes, cwd=folder)
    assert result.code == 0, result.err
    return losses(folder / "run")


def test_signals_kills_and_stalls_of_ranks(fresh: Place, expected):
    """One run, five accidents, and each time the same command again."""
    # 1. SIGTERM to one rank alone: both save the same step.
    process = start(fresh)
    wait_for_step(fresh, 1, process)
    os.kill(ranks(fresh)[1], signal.SIGTERM)
    assert process.wait(60) == 75, told(fresh)
    check_left(fresh)

    # 2. SIGTERM to both, a second apart: still one agreed step.
    process = start(fresh)
    wait_for_step(fresh, 3, process)
    found = ranks(fresh)
    os.kill(found[0], signal.SIGTERM)
    time.sleep(1)
    if process.poll() is None and 1 in ranks(fresh):
        os.kill(found[1], signal.SIGTERM)
    assert process.wait(60) == 75, told(fresh)
    check_left(fresh)

    # 3. kill -9 of a rank: the other one does not wait for ever.
    process = start(fresh)
    wait_for_step(fresh, max(metrics_so_far(fresh.run)) + 1, process)
    os.kill(ranks(fresh)[1], signal.SIGKILL)
    assert process.wait(60) == 1, told(fresh)
    assert "a process was killed by signal 9" in told(fresh) or "lost contact with another one" in told(fresh), told(fresh)
    check_left(fresh, within=40)

    # 4. A rank that stalls: the other one names it and where it was.
    process = start(fresh)
    wait_for_step(fresh, max(metrics_so_far(fresh.run)) + 1, process)
    begun = time.monotonic()
    os.kill(ranks(fresh)[1], signal.SIGSTOP)
    assert process.wait(120) == 1, told(fresh)
    assert "process 1 is frozen or gone: no sign of life for" in told(fresh), told(fresh)
    assert ", last seen in forward and backward of step" in told(fresh) or "last seen" in told(fresh), told(fresh)
    assert time.monotonic() - begun < 30 + 3 * TIMEOUT, "torchrun waits 30 s between its SIGTERM and its SIGKILL"
    check_left(fresh)

    # 5. kill -9 of the launcher: its processes are told by the kernel, save, and go.
    process = start(fresh)
    wait_for_step(fresh, max(metrics_so_far(fresh.run)) + 1, process)
    process.kill()
    process.wait()
    check_left(fresh, within=40)

    # And the run ends as if nothing had happened.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "fastoss", *COMMAND], cwd=fresh.root, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert losses(fresh.run) == pytest.approx(expected, rel=1e-5)


def test_two_machines_train_one_run_and_a_signal_to_one_stops_both(fresh: Place, expected):
    """Two launchers that meet, as on two nodes of a cluster; SIGUSR1 to one of them, as from a scheduler; and the same commands again."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    changes = (*CHANGES, *SETTINGS, "--gpus", "1", "--nodes", "2", "--rendezvous", f"localhost:{port}")
    (fresh.root / "slow").mkdir()
    (fresh.root / "slow" / "sitecustomize.py").write_text(f"import os\nif 'RANK' in os.environ:\n    exec({SLOW!r})\n")

    def start_both(path: str) -> list[subprocess.Popen]:
        command = [sys.executable, "-m", "fastoss", "train", "recipe.toml", "--output", "run", *changes]
        environment = os.environ | {"PYTHONPATH": path}
        logs = [open(fresh.root / name, "a") for name in ("log", "log-2")]  # noqa: SIM115
        return [subprocess.Popen(command, cwd=fresh.root, env=environment, stdout=log, stderr=log) for log in logs]

    both = start_both(f"{fresh.root / 'slow'}:{ROOT}")
    wait_for_step(fresh, 2, both[0])
    both[1].send_signal(signal.SIGUSR1)
    assert [process.wait(90) for process in both] == [75, 75], told(fresh)
    check_left(fresh)
    assert len(losses(fresh.run)) < STEPS
    both = start_both(str(ROOT))
    assert [process.wait(180) for process in both] == [0, 0], told(fresh)
    assert losses(fresh.run) == pytest.approx(expected, rel=1e-5)
    manifest = json.loads((fresh.run / "manifest.json").read_text())
    assert manifest["world_size"] == len(manifest["tokens_by_process"]) == 2
    assert "tokens per process: " in told(fresh)
