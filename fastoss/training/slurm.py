"""`fastoss slurm`: a batch script that saves ahead of the time limit and resumes in the next slot; on several nodes; for several settings."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path

from fastoss.errors import EXIT_STOPPED, FastossError

# Seconds between the signal and the limit: a step, an evaluation that has begun, and a checkpoint must fit into it.
_AHEAD_S = 300

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={time}{options}
#SBATCH --signal=B:USR1@{ahead}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}

# fastoss hears USR1 {ahead} s before the time limit, finishes its step, saves and exits with {stopped}; the job is then put back
# into the queue, and the same command resumes the run. The signal goes to this shell ("B:"), which passes it on.
set -u
cd {folder} || exit 1{venv}
{prepare}
{command} &
training=$!
trap 'kill -USR1 "$training" && again=1' USR1
trap 'kill -TERM "$training" && again=1' TERM
again=1
while [ "$again" -eq 1 ]; do
    again=0
    wait "$training" && code=0 || code=$?  # a signal ends `wait`, not the training: then it is waited for again
done

if [ "$code" -eq {stopped} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""

# Each node runs one launcher, which starts its processes; they meet on the first node, at a port that follows from the job's number.
_MEETING = """\
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
meeting="$first:$((20000 + SLURM_JOB_ID % 20000))"
"""


def combinations(recipe: Path, changes: Sequence[str], sweeps: Sequence[str]) -> list[list[str]]:
    """Every combination of a sweep's values as `section.key=value` strings; one empty one without a sweep.

    `sweeps` are `section.key=[value, value]`, TOML. Each combination is read as a recipe, so that a job does not fail at its start.
    Raises `FastossError` for a sweep that is none, and for what a recipe may not say.
    """
    from fastoss.config import load_recipe

    axes: list[list[str]] = []
    for sweep in sweeps:
        key, _, text = sweep.partition("=")
        try:
            values = tomllib.loads(f"values = {text}")["values"]
        except tomllib.TOMLDecodeError:
            values = None
        if not isinstance(values, list) or not values or len({json.dumps(value, default=str) for value in values}) < len(values):
            hint = "write its values as a list, each once: --array 'train.learning_rate=[1e-4, 2e-4]'"
            raise FastossError("not of the form section.key=[value, value]", place=f"--array {sweep}", hint=hint)
        if key.strip() == "name":
            raise FastossError("the runs of a sweep get their names from its values", place=f"--array {sweep}", hint="sweep over another key")
        axes.append([f"{key.strip()}={json.dumps(value, ensure_ascii=False, default=str)}" for value in values])
    found = [list(combination) for combination in itertools.product(*axes)]
    names: set[str] = set()
    for combination in found:
        load_recipe(recipe, [*changes, *combination])
        run = sweep_name("", combination)
        if run in names:  # what may not stand in a folder's name is left out of it
            fact = f"two jobs would train in the same folder, runs/…{run}"
            raise FastossError(
                fact, place=f"--array {sweeps[0]}", hint="sweep over values that differ in letters and digits, or write a script for each"
            )
        names.add(run)
    return found


def sweep_name(name: str, combination: Sequence[str]) -> str:
    """`catgirl-learning_rate-0.0001`: what a run of a sweep is called."""
    parts = [f"{key.rpartition('.')[2]}-{value}" for key, _, value in (change.partition("=") for change in combination)]
    return "-".join([name, *(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-") for part in parts)])


def sbatch_script(
    recipe: Path, name: str, *, gpus: int, time: str, nodes: int = 1, cpus: int | None = None, partition: str | None = None,
    venv: Path | None = None, changes: Sequence[str] = (), sweep: Sequence[Sequence[str]] = (),
) -> str:  # fmt: skip
    """The script as text, for `sbatch`; to be submitted from the folder in which the recipe's paths are right.

    `sweep` holds the changes of each job of an array; none or a single empty one is a plain job.
    """
    options = [f"--partition={partition}"] if partition else []
    options += [f"--cpus-per-task={cpus}"] if cpus else []
    several = len(sweep) > 1 or any(sweep)
    options += [f"--array=0-{len(sweep) - 1}"] if several else []
    arguments = shlex.join(
        [str(recipe), *(part for change in changes for part in ("--set", change)), *(["--gpus", str(gpus)] if gpus > 1 or nodes > 1 else [])]
    )
    arguments += ' "$@"' if several else ""
    command = f'srun fastoss train {arguments} --nodes {nodes} --rendezvous "$meeting"' if nodes > 1 else f"fastoss train {arguments}"
    return _SCRIPT.format(
        name=name,
        nodes=nodes,
        gpus=gpus,
        time=time,
        options="".join(f"\n#SBATCH {option}" for option in options),
        ahead=_AHEAD_S,
        stopped=EXIT_STOPPED,
        output=f"{name}-%A_%a.log" if several else f"{name}-%j.log",
        folder=shlex.quote(str(Path.cwd())),
        venv=f"\n. {shlex.quote(str(venv / 'bin' / 'activate'))}" if venv else "",
        prepare=(_cases(name, sweep) if several else "") + (_MEETING if nodes > 1 else ""),
        command=command,
    )


def _cases(name: str, sweep: Sequence[Sequence[str]]) -> str:
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for number, combination in enumerate(sweep):
        words = [*(part for change in combination for part in ("--set", change)), "--output", f"runs/{sweep_name(name, combination)}"]
        lines.append(f"    {number}) set -- {shlex.join(words)} ;;")
    return "\n".join([*lines, '    *) echo "no settings for job $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;', "esac", ""])
