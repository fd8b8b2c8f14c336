"""A dry run spends most of its time on importing: here a process imports once, and forks another one for each phase. Not used on a GPU."""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMPORTS = {
    "trl": "import torch, transformers, peft; from trl import DPOTrainer, SFTTrainer",
    "unsloth": "import unsloth, torch, transformers, peft; from trl import SFTTrainer",
}


class WarmProcesses:
    """One process of each kind of imports, started when it is first asked for."""

    def __init__(self, script: str, environment: dict[str, str], work: Path):
        self.script, self.environment, self.work = script, environment, work
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def start(self, imports: str, arguments: list[str], log: Path) -> WarmPhase:
        process = self.processes.get(imports)
        if process is None or process.poll() is not None:
            command = [sys.executable, self.script, "--warm", imports]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with open(self.work / f"warm-{imports}.log", "w") as errors:
                process = subprocess.Popen(command, cwd=self.work, env=self.environment, stderr=errors, **pipes)
            self.processes[imports] = process
        assert process.stdin is not None
        process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
        process.stdin.flush()
        return WarmPhase(process)

    def stop(self) -> None:
        for process in self.processes.values():
            process.communicate()


class WarmPhase:
    """A forked phase, with what `run_phase` needs of a `Popen`."""

    def __init__(self, process: subprocess.Popen[str]):
        assert process.stdout is not None
        self.answers = process.stdout
        line = self.answers.readline()  # comes when the imports are done
        if not line:
            raise OSError(f"the process that forks phases ended with {process.wait()}")
        self.pid = int(line)
        self.code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.code is None:
            if not select.select([self.answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a phase", timeout or 0.0)
            self.code = int(self.answers.readline())
        return self.code


def serve(imports: str, inside: Callable[[list[str]], int]) -> None:
    """Fork `inside(arguments)` for every line on stdin; on stdout its process id, and its exit code when it has ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print at import
    exec(IMPORTS[imports])
    _load_tokenizers()
    gc.freeze()  # else every collection of a phase walks over all that was imported, and copies its pages
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _be(asked["log"], lambda arguments=asked["arguments"]: inside(arguments))
        print(child, file=answers, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _load_tokenizers() -> None:
    """Ours, and transformers' of the published tokenizer.json, which every folder of a dry run holds: two thirds of a phase's time."""
    from transformers import PreTrainedTokenizerFast

    from fastoss.data.tokenizer import encode
    from fastoss.model.tiny import write_tokenizer

    encode("once")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        ready = PreTrainedTokenizerFast.from_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained = staticmethod(lambda *_, **__: ready)


def _be(log: str, phase: Callable[[], int]) -> None:
    """Become the phase: a process group of its own, its output in its log."""
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        code = phase()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
