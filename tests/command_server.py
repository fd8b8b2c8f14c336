"""A process that has the libraries imported already and forks one for each command: real processes, without ten seconds of imports each.

One JSON request a line on stdin, one answer a line on stdout. `run` starts `fastoss ARGUMENTS` in a child, a session of its own,
with its output in files; `prelude` is Python that the child runs first, to break something. `wait` tells how it ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback


def child(request: dict) -> None:
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        descriptor = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["fastoss", *request["arguments"]]
    code = 0
    try:
        exec(request["prelude"], {})
        from fastoss.cli import main

        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        import threading

        for thread in threading.enumerate():  # as Python does at its end
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ended(pid: int, timeout: float) -> int | None:
    until = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.01)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    from fastoss.telemetry import no_telemetry

    no_telemetry()  # as the command line does, before the imports
    import torch

    torch.set_num_threads(1)
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    import fastoss.inference.engine
    import fastoss.training.dpo
    import fastoss.training.sft
    import fastoss.training.train  # noqa: F401

    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answers.write(json.dumps({"code": ended(request["wait"], request["timeout"])}) + "\n")
            continue
        pid = os.fork()
        if pid == 0:
            child(request)
        answers.write(json.dumps({"pid": pid}) + "\n")


if __name__ == "__main__":
    main()
