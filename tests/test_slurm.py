"""The batch scripts: sound shell, the right options, and under stand-ins for SLURM's commands the right calls."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastoss.errors import FastossError
from fastoss.training.launch import check_rendezvous
from fastoss.training.slurm import combinations, sbatch_script, sweep_name

SWEEP = ("train.learning_rate=[1e-4, 2e-4]", "lora.r=[8, 16]")
VARIANTS = {
    "plain": {"gpus": 1},
    "cards": {
        "gpus": 4, "partition": "gpu", "cpus": 16, "venv": Path("/opt/an environment"),
        "changes": ["train.seed=1", 'samples.prompts=["who\'s $you?"]'],
    },
    "nodes": {"gpus": 8, "nodes": 2, "partition": "gpu"},
    "sweep": {"gpus": 2, "sweep": [["lora.r=8"], ["lora.r=16"]]},
    "sweep on nodes": {"gpus": 2, "nodes": 3, "sweep": [["lora.r=8"], ["lora.r=16"]]},
}  # fmt: skip


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_script_is_sound_shell(variant):
    script = sbatch_script(Path("my recipe.toml"), "catgirl", time="02:00:00", **VARIANTS[variant])
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.is_file():
        pytest.skip("shellcheck is not installed")
    # SC1091: the environment to activate is not here. SC2016: a dollar in a recipe's value is meant as one.
    done = subprocess.run([shellcheck, "-s", "bash", "-e", "SC1091,SC2016", "-"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
    assert {"--time=02:00:00", "--requeue", "--signal=B:USR1@300", "--open-mode=append"} <= set(options(script))


def run_script(script: str, tmp_path: Path, **environment: str) -> list[str]:
    """What the script calls, a line a command, each word in brackets."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    calls = tmp_path / "calls"
    calls.unlink(missing_ok=True)
    bodies = {"fastoss": "exit 75", "srun": '"$@"', "scontrol": 'if [ "$2" = hostnames ]; then printf "node7\\nnode8\\n"; fi'}
    for name, body in bodies.items():
        (tools / name).write_text(f'#!/bin/bash\n{{ printf "{name}"; printf " [%s]" "$@"; echo; }} >> "{calls}"\n{body}\n')
        (tools / name).chmod(stat.S_IRWXU)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "20017", "SLURM_JOB_NODELIST": "node[7-8]"} | environment
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == 75, done.stderr
    return calls.read_text().splitlines()


def test_several_nodes_meet_on_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = sbatch_script(Path("r.toml"), "r", gpus=4, nodes=2, time="1:00:00")
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--output=r-%j.log"} <= set(options(script))
    command = "[train] [r.toml] [--gpus] [4] [--nodes] [2] [--rendezvous] [node7:20017]"
    assert run_script(script, tmp_path) == [
        "scontrol [show] [hostnames] [node[7-8]]", f"srun [fastoss] {command}", f"fastoss {command}", "scontrol [requeue] [20017]",
    ]  # fmt: skip


def test_a_sweep_gives_each_job_its_settings_and_its_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = combinations(folder.recipe, (), SWEEP)
    assert found == [
        ["train.learning_rate=0.0001", "lora.r=8"], ["train.learning_rate=0.0001", "lora.r=16"],
        ["train.learning_rate=0.0002", "lora.r=8"], ["train.learning_rate=0.0002", "lora.r=16"],
    ]  # fmt: skip
    script = sbatch_script(folder.recipe, "test", gpus=1, time="1:00:00", sweep=found)
    assert {"--array=0-3", "--output=test-%A_%a.log"} <= set(options(script))
    settings = "[--set] [train.learning_rate=0.0001] [--set] [lora.r=16] [--output] [runs/test-learning_rate-0.0001-r-16]"
    assert run_script(script, tmp_path, SLURM_ARRAY_TASK_ID="1") == [f"fastoss [train] [{folder.recipe}] {settings}", "scontrol [requeue] [20017]"]
    assert len({sweep_name("test", combination) for combination in found}) == 4


@pytest.mark.parametrize(
    ("sweep", "fact"),
    [
        ("lora.r", "not of the form section.key=[value, value]"),
        ("lora.r=8,16", "not of the form section.key=[value, value]"),
        ("lora.r=[8, 8]", "not of the form section.key=[value, value]"),
        ('name=["a", "b"]', "the runs of a sweep get their names from its values"),
        ("lora.rank=[8, 16]", "unknown key `lora.rank`"),
        ("train.learning_rate=[1e-4, -1.0]", "train.learning_rate"),
        ('log.project=["你好", "再见"]', "two jobs would train in the same folder, runs/…-project"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_before_it_is_queued(folder, sweep, fact):
    with pytest.raises(FastossError) as raised:
        combinations(folder.recipe, (), [sweep])
    assert fact in str(raised.value)


def test_machines_must_know_where_to_meet():
    assert check_rendezvous(1, None) == "localhost:0"
    assert check_rendezvous(2, "node1:29400") == "node1:29400"
    for nodes, place, fact in ((2, None, "must know where to meet"), (1, "node1:29400", "meets no other"), (2, "node1", "HOST:PORT")):
        with pytest.raises(FastossError, match=fact):
            check_rendezvous(nodes, place)
