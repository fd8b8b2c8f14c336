"""Several processes: `fastoss train RECIPE --gpus N` is `torchrun --standalone --nproc-per-node N -m fastoss train RECIPE`.

On several machines each runs the same command with `--nodes M --rendezvous HOST:PORT`; the run directory lies where all of them see it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastoss.errors import EXIT_RUN_FAILED, EXIT_STOPPED, FastossError
from fastoss.run import RunDirectory, read_json
from fastoss.training.checkpoint import latest_checkpoint
from fastoss.training.progress import Console

_LAST_WORDS_S = 60  # process 0 writes the run's report and how it ended


def check_gpus(gpus: int, *, available: int) -> None:
    """`FastossError` when more processes are asked for than there are GPUs (with none, processes share the CPU)."""
    if available and gpus > available:
        raise FastossError(f"this machine has {available} GPUs", place=f"--gpus {gpus}", hint=f"ask for 1 to {available}")


def check_rendezvous(nodes: int, rendezvous: str | None) -> str:
    """Where the machines meet, as torchrun takes it. `FastossError` when there are several and no place, or a place and one machine."""
    if nodes > 1 and rendezvous is None:
        hint = "--rendezvous HOST:PORT, the same on all: the first machine's name and a free port"
        raise FastossError("several machines must know where to meet", place=f"--nodes {nodes}", hint=hint)
    if rendezvous is not None and nodes == 1:
        raise FastossError("one machine meets no other", place=f"--rendezvous {rendezvous}", hint="add --nodes M, or leave it out")
    if rendezvous is not None and not rendezvous.rpartition(":")[2].isdigit():
        raise FastossError("not of the form HOST:PORT", place=f"--rendezvous {rendezvous}", hint="for example --rendezvous node1:29400")
    return rendezvous or "localhost:0"


def launch(arguments: Sequence[str], gpus: int, run: RunDirectory, *, nodes: int = 1, rendezvous: str | None = None) -> int:
    """Run `fastoss ARGUMENTS` in `gpus` processes of each of `nodes` machines through torchrun's own launcher; returns the run's exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, said here so that it does not warn
    meeting = check_rendezvous(nodes, rendezvous)
    # Known alike on all machines, and another one when a scheduler starts the job again.
    identity = f"fastoss-{os.getpid()}" if nodes == 1 else f"fastoss-{meeting}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    config = LaunchConfig(
        min_nodes=nodes, max_nodes=nodes, nproc_per_node=gpus, run_id=identity, rdzv_backend="c10d",
        rdzv_endpoint=meeting, max_restarts=0, monitor_interval=0.1, signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT",
    )  # fmt: skip
    _quiet_launcher()
    before, ends = latest_checkpoint(run, contents=False), _ends(run)
    try:
        with _usr1_handed_on() as handed_on:
            elastic_launch(config, sys.executable)("-m", "fastoss", *arguments)
    except RendezvousError:
        # The machine that holds the meeting was done first; how the run ended, process 0 has written down.
        how = _wait_for_end(run, ends) if nodes > 1 else None
        return {"finished": 0, "stopped": EXIT_STOPPED}.get(how or "", EXIT_RUN_FAILED)
    except ChildFailedError as failed:
        if nodes > 1:
            _wait_for_end(run, ends)  # the meeting lives in one of the launchers: none leaves while process 0 still writes
        codes = [failure.exitcode for failure in failed.failures.values()]
        if -signal.SIGUSR1 in codes and signal.SIGUSR1 in handed_on:  # it came before the processes knew what to do with it
            return _stopped_unsaved(signal.SIGUSR1)
        known = [code for code in codes if code > 1]
        first = min(
            failed.failures.values(), key=lambda failure: (failure.timestamp, failure.exitcode == -signal.SIGTERM)
        )  # SIGTERM: the launcher ends the others
        if not known and first.exitcode < 0:
            Console().say(
                f"error: a process was killed by signal {-first.exitcode}\nhint: run the same command again to resume from the last checkpoint"
            )
        return known[0] if known else EXIT_RUN_FAILED
    except SignalException as stopped:
        # The launcher passed the signal on; whether the processes came to save shows in the run.
        if latest_checkpoint(run, contents=False) != before:
            return EXIT_STOPPED
        return _stopped_unsaved(int(stopped.sigval))
    return 0


def _stopped_unsaved(number: int) -> int:
    Console().say("stopped before anything new was saved; the same command begins at the last checkpoint")
    return 128 + number


def _ends(run: RunDirectory) -> list[dict[str, Any]]:
    """How each start of the run ended, as its manifest tells."""
    try:
        ends: list[dict[str, Any]] = read_json(run.manifest).get("ends", [])
    except FastossError:
        return []
    return ends


def _wait_for_end(run: RunDirectory, before: Sequence[Any]) -> str | None:
    """How this start ended: finished, stopped, failed; None when nothing says so within a minute (process 0 was killed)."""
    until = time.monotonic() + _LAST_WORDS_S
    while time.monotonic() < until:
        ends = _ends(run)
        if len(ends) > len(before):
            return str(ends[-1]["how"])
        time.sleep(0.2)
    return None


@contextlib.contextmanager
def _usr1_handed_on() -> Iterator[set[int]]:
    """SIGUSR1 is passed on to the processes, and the launcher waits for them: torchrun's own way kills them 30 seconds later. Yields what came."""
    came: set[int] = set()

    def hand_on(number: int, frame: Any) -> None:
        came.add(number)
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):
                for pid in (task / "children").read_text().split():
                    os.kill(int(pid), number)

    old = signal.signal(signal.SIGUSR1, hand_on)
    try:
        yield came
    finally:
        signal.signal(signal.SIGUSR1, old)


def _quiet_launcher() -> None:
    import logging

    for name in ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
