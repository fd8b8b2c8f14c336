"""Signals: saved at the step's end and gone with 75; a second one ends the run at once; a scheduler's limit is only a pause."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest

from fastoss.run import RunDirectory
from fastoss.training.checkpoint import checkpoint_fault, list_checkpoints

from ..conftest import ROOT, metrics
from .conftest import CHANGES, SLOW, STEPS, Place, Prepared, wait_for
from .test_checkpoints import same_end

HANGING = """
import os, time
from pathlib import Path
from transformers import Trainer
step = Trainer.training_step
def hanging(self, *a, **k):
    if self.state.global_step == 3:
        Path("hanging").touch()
        time.sleep(60)
    return step(self, *a, **k)
Trainer.training_step = hanging
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_the_same_command_goes_on(fresh: Place, prepared: Prepared, name):
    running = fresh.start("--set", "checkpoint.every=100", prelude=SLOW)
    wait_for(fresh.run / "metrics.jsonl", running)
    while not (fresh.run / "metrics.jsonl").read_text():
        time.sleep(0.01)
    running.kill(getattr(signal, name))
    stopped = running.wait()
    assert stopped.code == 75, stopped.err
    assert f"{name}: saving after this step" in stopped.err
    (checkpoint,) = list_checkpoints(RunDirectory(fresh.run))
    assert checkpoint_fault(checkpoint) is None
    assert f"stopped: saved at step {len(metrics(fresh.run))} of {STEPS}" in stopped.err
    result = fresh.again()
    assert result.code == 0, result.err
    same_end(fresh.run, prepared.whole)


def test_a_second_signal_stops_at_once(fresh: Place, prepared: Prepared):
    running = fresh.start(prelude=HANGING)
    wait_for(fresh.root / "hanging", running)
    running.kill(signal.SIGTERM)
    time.sleep(0.5)
    running.kill(signal.SIGTERM)  # a scheduler and a launcher say the same thing twice: still one request
    time.sleep(2.2)
    assert running.commands.ask({"wait": running.pid, "timeout": 0.1})["code"] is None, "the first asks for a checkpoint after this step"
    running.kill(signal.SIGTERM)
    begun = time.monotonic()
    stopped = running.wait(10)
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    assert time.monotonic() - begun < 5
    assert "stopped at once by a second signal" in stopped.err
    assert [checkpoint_fault(checkpoint) for checkpoint in list_checkpoints(RunDirectory(fresh.run))] == [None]
    result = fresh.again()
    assert (result.code, "resuming from checkpoint-2" in result.err) == (0, True), result.err
    same_end(fresh.run, prepared.whole)


def test_a_signal_while_the_model_loads_loses_nothing(place: Place, prepared: Prepared):
    slow = "import time\nimport fastoss.training.train as t\nt.load_model = lambda *a: time.sleep(60)"
    running = place.start(prelude=slow)
    running.wait_for_line("loading")
    running.kill(signal.SIGTERM)
    assert running.wait(10).code in (128 + signal.SIGTERM, -signal.SIGTERM)
    result = place.again()
    assert (result.code, "resuming from checkpoint-6" in result.err) == (0, True), result.err
    same_end(place.run, prepared.whole)


def test_a_time_limit_of_slurm_is_only_a_pause(fresh: Place, prepared: Prepared, tmp_path):
    """The printed script under a stand-in scheduler: USR1 to the batch shell ahead of the limit, and `scontrol requeue` starts it again."""
    script = tmp_path / "job.sh"
    printed = fresh.commands.run("slurm", "recipe.toml", "--set", f"train.max_steps={STEPS}", "--time", "00:10:00", cwd=fresh.root)
    assert printed.code == 0, printed.err
    assert subprocess.run(["bash", "-n"], input=printed.out, text=True).returncode == 0
    script.write_text(printed.out)
    tools = tmp_path / "bin"
    tools.mkdir()
    # fastoss, with slow steps, into the place of the other tests; scontrol, which writes down that it was called.
    prelude = tmp_path / "slow.py"
    prelude.write_text(f"{SLOW}\nfrom fastoss.cli import main\nmain()\n")
    options = " ".join(["--output", "run", *map(str, CHANGES)])
    for name, body in (("fastoss", f'exec "{sys.executable}" "{prelude}" "$@" {options}'), ("scontrol", f'echo "$@" >> "{tmp_path}/requeued"')):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(stat.S_IRWXU)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(["bash", str(script)], cwd=fresh.root, env=environment, stdout=log, stderr=log)
        until = time.monotonic() + 90
        while not (fresh.run / "metrics.jsonl").exists() or not (fresh.run / "metrics.jsonl").read_text():
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 75, (tmp_path / "log").read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    shutil.copytree(fresh.run, tmp_path / "copy")
    result = fresh.again()  # the next slot runs the very same command
    assert result.code == 0, result.err
    assert "resuming from checkpoint-" in result.err
    same_end(fresh.run, prepared.whole)
