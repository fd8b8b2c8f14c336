"""GPU checks in short phases, smallest first: `make gpu` runs them all, `make gpu-dry` walks the same way on a CPU.

Written before any of it had been run on a GPU: until `benchmarks/results/` holds a card's files, nothing here is a
claim about one. The dry run proves the script, not the card.

Each phase is a process of its own with a time limit, and needs no network. It writes what it found to
`benchmarks/results/<card>-<phase>.json`. A phase that fails does not stop the next; one that was ok before on this
card is not run again without `--again`. The exit code is 0 when no phase failed (a skipped one gives its reason).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_common import GB, ROOT, Phase, Place, Record, Skip, peak_memory
from gpu_phases import PHASES
from gpu_warm import WarmProcesses, serve

from fastoss.errors import FastossError
from fastoss.model.adapter import library_versions
from fastoss.run import read_json, write_json


def run_inside(phase: Phase, place: Place) -> int:
    """The phase's own process."""
    record = Record(place.file(phase.name))
    try:
        phase.check(place, record)
        record.note(status="ok")
    except Skip as skip:
        record.note(status="skipped", reason=str(skip))
    except BaseException as problem:
        fact = problem.fact if isinstance(problem, FastossError) else f"{type(problem).__name__}: {problem}"
        record.note(status="failed", reason=_public(fact, place))
        raise
    finally:
        record.note(**peak_memory(), processor_seconds=round(time.process_time(), 1))
    return 0


def run_phase(phase: Phase, place: Place, facts: dict[str, Any], limit_s: float, warm: WarmProcesses | None = None) -> dict[str, Any]:
    """Run a phase in a process of its own; returns its record, finished whatever happened to the process.

    With `warm` the process is forked from one that has imported the phase's libraries.
    """
    dry = ["--dry-run"] if place.dry else []
    command = " ".join(["python", "benchmarks/gpu_checks.py", "--only", phase.name, "--again", *dry])
    empty = {"losses": None, "peak_allocated_gb": None, "peak_reserved_gb": None, "reason": None}
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record = {"phase": phase.name, "status": "running", **facts, "command": command, "started": started, "seconds": None, **empty}
    write_json(place.file(phase.name), record)
    arguments = ["--inside", phase.name, "--work", str(place.work), "--card", place.card, *dry]
    log = place.work / f"{phase.name}.log"
    begun = time.monotonic()
    process: Any
    if warm is not None and phase.imports:
        process = warm.start(phase.imports, arguments, log)
    else:
        command_line = [sys.executable, __file__, *arguments]
        with open(log, "wb") as output:
            process = subprocess.Popen(command_line, cwd=place.work, stdout=output, stderr=output, env=_environment(place), process_group=0)
    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group: what it left behind goes too
        process.wait()
    finished = Record(place.file(phase.name))
    if code is None:
        finished.note(status="failed", reason=f"stopped after its limit of {limit_s:.0f} s")
    elif code != 0 and finished.values["reason"] is None:
        finished.note(status="failed", reason=f"the process ended with {code}: {_public(_last_line(log), place)}")
    finished.note(seconds=round(time.monotonic() - begun, 1))
    return finished.values


def _environment(place: Place) -> dict[str, str]:
    """Of the phases' processes: no hub, so that a forgotten download fails at once; no GPU in a dry run."""
    settings = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    if place.dry:
        settings |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | settings


def _public(text: str, place: Place) -> str:
    """Results are committed: no paths of this machine."""
    for path, name in ((place.work, "WORK"), (ROOT, "."), (Path(sys.prefix), "PYTHON"), (Path.home(), "~")):
        text = text.replace(str(path), name) if len(str(path)) > 1 else text
    return text[:1000]


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def machine(dry: bool) -> dict[str, Any]:
    """Card, driver, versions and commit, the same in every record. Asked in another process, which leaves the GPU free."""
    facts: dict[str, Any] = {"dry_run": dry, "card": "cpu", "gpu_memory_gb": None, "gpu_free_gb": None, "cuda": None, "driver": None}
    if not dry:
        code = "import json, torch; c = torch.cuda; print(json.dumps([c.get_device_name(), *c.mem_get_info(), torch.version.cuda]))"
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if asked.returncode != 0:
            raise FastossError("torch sees no GPU", place="gpu_checks.py", hint="--dry-run walks the same way on a CPU")
        name, free, total, cuda = json.loads(asked.stdout.splitlines()[-1])
        facts |= {"card": name, "gpu_memory_gb": round(total / GB, 1), "gpu_free_gb": round(free / GB, 1), "cuda": cuda, "driver": _driver()}
    return facts | {"versions": library_versions() | {"python": sys.version.split()[0]}, "commit": _commit()}


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _commit() -> str | None:
    """The checkout's commit, read from its files: the machine with the GPU may have no git."""
    with contextlib.suppress(OSError, StopIteration):
        git = ROOT / ".git"
        if git.is_file():  # a worktree: `gitdir: PATH`
            git = (ROOT / git.read_text().split(":", 1)[1].strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
        loose = common / head[5:]
        if loose.is_file():
            return loose.read_text().strip()
        packed = (common / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {head[5:]}"))
    return None


def _line(record: dict[str, Any]) -> str:
    parts = [f"{record['status']:8}{record['phase']:24}{record['seconds']:6.0f} s"]
    if record["losses"]:
        parts.append(f"loss {record['losses'][0]:.4f} → {record['losses'][-1]:.4f}")
    if record["peak_allocated_gb"]:
        parts.append(f"peak {record['peak_allocated_gb']:.1f} GB")
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    return "  ".join([*parts, *([record["reason"]] if record["reason"] else [])])


def _inside(arguments: list[str]) -> int:
    """`--inside NAME …`, as a process started for it, or as one that `gpu_warm.py` has forked."""
    options = _parser().parse_args(arguments)
    results = options.work / "results" if options.dry_run else ROOT / "benchmarks" / "results"
    return run_inside(next(p for p in PHASES if p.name == options.inside), Place(options.work, results, options.card, options.dry_run))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="GPU checks in short phases.", epilog="See the docstring of this file.")
    parser.add_argument("--list", action="store_true", help="print the phases and end")
    parser.add_argument("--only", metavar="NAME", action="append", help="only this phase, or those whose names begin with NAME-")
    parser.add_argument("--again", action="store_true", help="run phases that were ok before as well")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no phase after so many minutes, and let none run longer")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for checkpoints and runs, 60 GB at most (default: a temporary one)")
    parser.add_argument("--dry-run", action="store_true", help="the tiny shape on the CPU; results go to DIR/results")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--card", help=argparse.SUPPRESS)
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if options.warm:
        serve(options.warm, _inside)
        return 0
    if options.inside:
        return _inside(sys.argv[1:])
    if options.list:
        later = {True: "", False: "  (not in a dry run: the same code as another phase)"}
        print("\n".join(f"{phase.name:24}limit {phase.minutes:.0f} min{later[phase.in_dry_run]}" for phase in PHASES))
        return 0
    there = [p for p in PHASES if p.in_dry_run or not options.dry_run]
    chosen = [p for p in there if not options.only or any(p.name == name or p.name.startswith(f"{name}-") for name in options.only)]
    unknown = [name for name in options.only or [] if not any(p.name == name or p.name.startswith(f"{name}-") for p in chosen)]
    if unknown:
        parser.error(f"there is no phase {unknown[0]} (--list)")

    default = Path(tempfile.gettempdir()) / f"fastoss-gpu-checks-{os.getuid()}"
    work = options.work or (Path(tempfile.mkdtemp(prefix="fastoss-gpu-dry-")) if options.dry_run else default)
    work = work.resolve()
    results = work / "results" if options.dry_run else ROOT / "benchmarks" / "results"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`: the phase's process ends as well
    try:
        facts = machine(options.dry_run)
        place = Place(work, results, facts["card"], options.dry_run)
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        results.mkdir(exist_ok=True)
        return _run_all(chosen, place, facts, again=options.again, minutes=options.minutes)
    except FastossError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        if options.dry_run and options.work is None:
            shutil.rmtree(work, ignore_errors=True)


def _run_all(phases: list[Phase], place: Place, facts: dict[str, Any], *, again: bool, minutes: float | None) -> int:
    print(f"{facts['card']}, results in {place.results}, logs in {place.work}", flush=True)
    deadline = time.monotonic() + minutes * 60 if minutes else float("inf")
    ended = []
    warm = WarmProcesses(__file__, _environment(place), place.work) if place.dry else None
    try:
        for phase in phases:
            path = place.file(phase.name)
            if not again and path.is_file() and (before := read_json(path))["status"] == "ok":
                print(f"ok      {phase.name:24}done before, {before['started']} (--again repeats it)", flush=True)
                ended.append("ok")
            elif deadline - time.monotonic() < 10:
                print(f"left    {phase.name:24}no time left; the same command resumes here", flush=True)
                ended.append("left")
            else:
                record = run_phase(phase, place, facts, min(phase.minutes * 60, deadline - time.monotonic()), warm)
                print(_line(record), flush=True)
                ended.append(record["status"])
    finally:
        if warm is not None:
            warm.stop()
    print(", ".join(f"{ended.count(status)} {status}" for status in ("ok", "skipped", "failed", "left") if status in ended))
    if not place.dry:
        print(f"the checkpoint stays in {place.work} for the next call; remove the folder when you are done")
    return 1 if {"failed", "left"} & set(ended) else 0


if __name__ == "__main__":
    sys.exit(main())
