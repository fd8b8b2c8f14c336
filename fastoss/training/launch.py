"""Several processes: `fastoss train RECIPE --gpus N` is `torchrun --standalone --nproc-per-node N -m fastoss train RECIPE`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from fastoss.errors import EXIT_RUN_FAILED, EXIT_STOPPED, FastossError
from fastoss.run import RunDirectory
from fastoss.training.checkpoint import latest_checkpoint
from fastoss.training.progress import Console


def check_gpus(gpus: int, *, available: int) -> None:
    """`FastossError` when more processes are asked for than there are GPUs (with none, processes share the CPU)."""
    if gpus < 1 or (available and gpus > available):
        raise FastossError(f"this machine has {available} GPUs", place=f"--gpus {gpus}", hint=f"ask for 1 to {max(1, available)}")


def launch(arguments: Sequence[str], gpus: int, run: RunDirectory) -> int:
    """Run `fastoss ARGUMENTS` in `gpus` processes through torchrun's own launcher; returns the exit code of the run."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, said here so that it does not warn
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=gpus, run_id=f"fastoss-{os.getpid()}", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )  # fmt: skip
    _quiet_launcher()
    before = latest_checkpoint(run, contents=False)
    try:
        elastic_launch(config, sys.executable)("-m", "fastoss", *arguments)
    except ChildFailedError as failed:
        codes = [failure.exitcode for failure in failed.failures.values()]
        known = [code for code in codes if code > 1]
        first = min(
            failed.failures.values(), key=lambda failure: (failure.timestamp, failure.exitcode == -signal.SIGTERM)
        )  # SIGTERM: the launcher ends the others
        if not known and first.exitcode < 0:
            Console().say(f"error: a process was killed by signal {-first.exitcode}\nhint: the same command goes on from the last checkpoint")
        return known[0] if known else EXIT_RUN_FAILED
    except SignalException as stopped:
        # The launcher passed the signal on; whether the processes came to save shows in the run.
        if latest_checkpoint(run, contents=False) != before:
            return EXIT_STOPPED
        Console().say("stopped before anything new was saved; the same command begins at the last checkpoint")
        return 128 + int(stopped.sigval)
    return 0


def _quiet_launcher() -> None:
    import logging

    for name in ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
