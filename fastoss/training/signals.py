"""Signals: a run that is asked to stop saves first, at a step that all its processes agree on; a second signal stops it at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from fastoss.errors import EXIT_STOPPED
from fastoss.terminal import line_for
from fastoss.training.progress import rank, world_size

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_REQUEST_S = 2.0  # a scheduler signals launcher and processes alike, and the launcher passes its signal on
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class StopRequest:
    """Set by a signal; every rank learns of it at the end of a step, so that all stop at the same one."""

    signal: int | None = None
    _since: float = 0.0
    _old: dict[int, Any] = field(default_factory=dict)

    def watch(self) -> None:
        for number in STOPPING:
            self._old[number] = signal.signal(number, self._receive)

    def restore(self, *, ended_well: bool) -> None:
        """Back to how it was; or deaf, when the process is on its way out: a launcher's late signal must not hide why."""
        for number, handler in self._old.items():
            signal.signal(number, handler if ended_well and self.signal is None else signal.SIG_IGN)

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = number, now
            self._write(f"{signal.Signals(number).name}: saving after this step (once more to stop at once)")
        elif now - self._since > _SAME_REQUEST_S:
            # At once: nothing on the way out may wait for another process, and a checkpoint is whole at any moment.
            self._write("stopped at once by a second signal; run the same command again to resume from the last checkpoint")
            os._exit(128 + number)

    def _write(self, line: str) -> None:
        if rank() == 0:  # not print: a handler may interrupt one
            os.write(sys.stderr.fileno(), f"{line_for(line)}\n".encode())

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop; all of them must ask this at the same point."""
        if world_size() == 1:
            return self.signal is not None
        flag = torch.tensor([1.0 if self.signal is not None else 0.0], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


def end_with_parent() -> None:
    """Ask the kernel for a SIGTERM when the launcher dies: a process of a run must not outlive it and hold a GPU."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:  # it died before we asked
            sys.exit(EXIT_STOPPED)
