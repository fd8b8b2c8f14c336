"""`fastoss slurm`: a batch script that saves ahead of the time limit and goes on in the next slot."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from fastoss.errors import EXIT_STOPPED

# Seconds between the signal and the limit: a step, an evaluation that has begun, and a checkpoint must fit into it.
_AHEAD_S = 300

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={time}{partition}
#SBATCH --signal=B:USR1@{ahead}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}

# fastoss hears USR1 {ahead} s before the time limit, finishes its step, saves and exits with {stopped}; the job is then put back
# into the queue, and the same command goes on. The signal comes to this shell ("B:"), which hands it on.
set -u
cd {folder}{venv}

fastoss train {arguments} &
training=$!
trap 'kill -USR1 "$training"' USR1
trap 'kill -TERM "$training"' TERM
code=0
while kill -0 "$training" 2>/dev/null; do
    wait "$training" && code=0 || code=$?  # a signal ends `wait`, not the training
done

if [ "$code" -eq {stopped} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def sbatch_script(
    recipe: Path, name: str, *, gpus: int, time: str, partition: str | None = None, venv: Path | None = None, changes: Sequence[str] = ()
) -> str:
    """The script as text, for `sbatch`; to be submitted from the folder in which the recipe's paths are right."""
    arguments = [str(recipe), *(part for change in changes for part in ("--set", change)), *(["--gpus", str(gpus)] if gpus > 1 else [])]
    return _SCRIPT.format(
        name=name,
        gpus=gpus,
        time=time,
        partition=f"\n#SBATCH --partition={partition}" if partition else "",
        ahead=_AHEAD_S,
        stopped=EXIT_STOPPED,
        output=f"{name}-%j.log",
        folder=shlex.quote(str(Path.cwd())),
        venv=f"\n. {shlex.quote(str(venv / 'bin' / 'activate'))}" if venv else "",
        arguments=shlex.join(arguments),
    )
