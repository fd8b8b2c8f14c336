"""`fastoss bench`: a recipe on one, two, … processes and beside a baseline, each run a real `fastoss train` in processes of its own.

Every run leaves one JSON in `results/`; `report.py` makes of them the table, the JSON and the picture.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastoss.config import Recipe, resolved_dict
from fastoss.errors import EXIT_BAD_INPUT, EXIT_STOPPED, FastossError, RunFailed, Stopped
from fastoss.model.adapter import library_versions
from fastoss.run import RunDirectory, file_lock, read_json, read_json_lines, write_json
from fastoss.training.bench.plan import Contestant, plan_contestants, write_recipe
from fastoss.training.bench.report import median, rate, write_report
from fastoss.training.progress import Console, duration

_POLL_S = 0.5
_PATIENCE_S = 60.0  # for a run that is told to stop: it saves first


def bench(
    recipe: Recipe,
    recipe_path: Path,
    output: Path | None = None,
    *,
    sample: bool = False,
    gpus: Sequence[int] = (1,),
    baseline: str | None = None,
    steps: int = 20,
    repeats: int = 3,
    dry_run: bool = False,
) -> Path:
    """Measure a recipe on each number of processes, and the baseline on the smallest; returns the benchmark's folder.

    A run that has its result is not run again. Raises `FastossError` for bad input before anything is started, `RunFailed`
    when a run fails, `Stopped` when a signal ended it.
    """
    output = output or Path("runs") / f"{recipe.name}-bench"
    console = Console()
    contestants = plan_contestants(recipe, sample=sample, gpus=gpus, baseline=baseline, steps=steps, repeats=repeats)
    warm_up = max(1, steps // 5)
    runs = f"{len(contestants)} contestant{'s' * (len(contestants) > 1)} × {repeats} repeats"
    console.say(f"{recipe.name}: {runs}, {steps} steps each, of which the first {warm_up} are not counted")
    for contestant in contestants:
        console.say(contestant.line())
        for note in contestant.notes:
            console.say(f"note: {note}")
    if dry_run:
        return output
    if "RANK" in os.environ:
        raise FastossError("the benchmark starts its processes itself", place="fastoss bench", hint="run it without torchrun")
    facts = {"recipe": str(recipe_path), "steps": steps, "warm_up": warm_up, "repeats": repeats}
    _claim(output)
    with _one_at_a_time(output), _signals():
        try:
            _run_all(contestants, output, facts, sample, console)
        except KeyboardInterrupt:
            done = [_result_file(output, c, repeat).is_file() for c in contestants for repeat in range(1, repeats + 1)]
            raise Stopped(f"{sum(done)} of {len(done)} runs are done; run the same command again to resume from there") from None
    return output


# --- running ----------------------------------------------------------------------------------------------------------


def _run_all(contestants: list[Contestant], output: Path, facts: dict[str, Any], sample: bool, console: Console) -> None:
    """One run after the other, in turned order at every second repeat; the report is written again after each."""
    order = [(c, repeat) for repeat in range(1, facts["repeats"] + 1) for c in (contestants if repeat % 2 else contestants[::-1])]
    inputs = {c.name: _inputs(c, sample) for c in contestants}
    results = [result for c, repeat in order if (result := _known(output, c, repeat, inputs[c.name]))]
    known = {(result["contestant"], result["repeat"]) for result in results}
    for number, (contestant, repeat) in enumerate(order, 1):
        label = f"[{number}/{len(order)}] {contestant.name}, repeat {repeat}"
        if (contestant.name, repeat) in known:
            console.say(f"{label}: done before")
            continue
        left = _seconds_left(results, [c.name for c, r in order[number - 1 :] if (c.name, r) not in known])
        console.say(f"{label} … {f'about {duration(left)} left in all' if left else '(how long it takes is known after the first run)'}")
        result = _run(contestant, repeat, output, sample, console, label) | {"inputs": inputs[contestant.name]}
        write_json(_result_file(output, contestant, repeat), result)
        results.append(result)
        speed = rate(result, "trained_tokens", facts["warm_up"])
        step = median(result["step_seconds"][facts["warm_up"] :])
        console.say(f"{label}: {speed:,.0f} trained tokens a second, {step:.3g} s a step, {duration(result['seconds'])} in all")
        write_report(output, facts, results)
    write_report(output, facts, results)


def _run(contestant: Contestant, repeat: int, output: Path, sample: bool, console: Console, label: str) -> dict[str, Any]:
    """Train once and read off the run directory what there is to measure. Raises `RunFailed` with the run's last words."""
    name = f"{contestant.name}-{repeat}"
    run, log = RunDirectory(output / "work" / name), output / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = _command(contestant, output, run, sample)
    started, begun = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.monotonic()
    with open(log, "wb") as said:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=said, stderr=said, start_new_session=True)
        try:
            code, resident = _wait(process, run, len(contestant.work.tokens), console, label)
        except BaseException:
            _end(process)
            raise
    _check_exit(code, contestant, log)
    steps = [entry for entry in read_json_lines(run.metrics) if "loss" in entry]
    assert len(steps) == len(contestant.work.tokens), f"{len(steps)} of {len(contestant.work.tokens)} steps in {run.metrics}"
    ends = [0.0, *(entry["seconds"] for entry in steps)]
    manifest = read_json(run.manifest)
    result = {
        "contestant": contestant.name,
        "kind": contestant.kind,
        "processes": contestant.processes,
        "repeat": repeat,
        "command": " ".join(["python", "-m", *command]),
        "started": started,
        "seconds": round(time.monotonic() - begun, 2),
        "step_seconds": [round(end - start, 4) for start, end in itertools.pairwise(ends)],
        "losses": [entry["loss"] for entry in steps],
        **asdict(contestant.work),
        # With no word from the trainer: the largest process of the run.
        "peak_memory": manifest.get("peak_memory") or ({"resident_gb": resident} if manifest["gpu"] is None else None),
        **{key: manifest[key] for key in ("gpu", "backend", "precision", "layout", "python")},
    }
    shutil.rmtree(run.root)  # adapter and optimizer are no result
    return result


def _command(contestant: Contestant, output: Path, run: RunDirectory, sample: bool) -> list[str]:
    """What comes after `python -m`."""
    theirs, processes = str(_recipe_file(output, contestant.name)), str(contestant.processes)
    extra = ["--sample"] if sample else []
    if contestant.kind == "fastoss":
        gpus = ["--gpus", processes] if contestant.processes > 1 else []
        return ["fastoss", "train", theirs, "--output", str(run.root), "--no-resume", "--overwrite", *gpus, *extra]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m"] if contestant.processes > 1 else []
    ours = str(_recipe_file(output, f"fastoss-{processes}"))
    return [*launcher, "fastoss.training.bench.baseline", theirs, ours, str(run.root), *extra]


def _wait(process: subprocess.Popen[bytes], run: RunDirectory, steps: int, console: Console, label: str) -> tuple[int, float]:
    """Wait for a run and say at which step it is; returns its exit code and the GB of its largest process."""
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_maxrss * 1024 / 1e9
        done = run.metrics.read_bytes().count(b"\n") if run.metrics.is_file() else 0
        console.live(f"{label}: " + (f"step {done}/{steps}" if done else "loading …"), keep=False)
        time.sleep(_POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a run and its ranks, which the launcher tells; what does not hear is killed."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _check_exit(code: int, contestant: Contestant, log: Path) -> None:
    if code == 0:
        return
    if code == EXIT_STOPPED:
        raise KeyboardInterrupt
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "it said nothing")
    hint = f"its log is {log}; run the same command again to repeat this run"
    failure = FastossError if code == EXIT_BAD_INPUT else RunFailed
    raise failure(f"the run ended with {code}: {said.removeprefix('error: ')}", place=contestant.name, hint=hint)


# --- the folder -------------------------------------------------------------------------------------------------------


def _claim(output: Path) -> None:
    """Make the folder, or take one that is a benchmark's."""
    try:
        if output.is_dir() and any(output.iterdir()) and not (output / "results").is_dir():
            raise FastossError("the folder is not a benchmark, and not empty", place=str(output), hint="choose another place with --output")
        (output / "results").mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise FastossError(f"cannot write: {problem.strerror}", place=str(output), hint="choose another place with --output") from None


@contextmanager
def _one_at_a_time(output: Path) -> Iterator[None]:
    try:
        with file_lock(output / ".lock", wait=False):
            yield
    except BlockingIOError:
        raise FastossError("another benchmark runs in this folder", place=str(output), hint="wait for it, or choose another --output") from None


def _inputs(contestant: Contestant, sample: bool) -> dict[str, Any]:
    """Everything that a result depends on: a run is not run again only where all of it is the same."""
    work, recipe = asdict(contestant.work), resolved_dict(contestant.recipe)
    return {"recipe": recipe, "processes": contestant.processes, "sample": sample, "work": work, "versions": library_versions()}


def _known(output: Path, contestant: Contestant, repeat: int, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier call. `FastossError` where it is one of other settings. Writes the contestant's recipe."""
    write_recipe(_recipe_file(output, contestant.name), contestant.recipe)
    file = _result_file(output, contestant, repeat)
    if not file.is_file():
        return None
    result: dict[str, Any] = read_json(file)
    before = result["inputs"]
    changed = [key for key in inputs if before.get(key) != inputs[key]]
    if "recipe" in changed:
        keys = [f"{section}.{key}" for section, old in before["recipe"].items() if isinstance(old, dict) for key in old
                if old[key] != (inputs["recipe"].get(section) or {}).get(key)]  # fmt: skip
        changed = [*(key for key in changed if key not in ("recipe", "work")), *(keys or ["recipe"])]
    if changed:
        hint = "remove the folder to start over, or choose another place with --output"
        raise FastossError(f"the folder holds results with other settings ({', '.join(changed)})", place=str(output), hint=hint)
    return result


def _result_file(output: Path, contestant: Contestant, repeat: int) -> Path:
    return output / "results" / f"{contestant.name}-{repeat}.json"


def _recipe_file(output: Path, name: str) -> Path:
    return output / "recipes" / f"{name}.toml"


def _seconds_left(results: list[dict[str, Any]], names: list[str]) -> float:
    """From the runs so far, 0 while there are none; a contestant that has not run yet is taken for an average one."""
    if not results:
        return 0.0
    mean = sum(result["seconds"] for result in results) / len(results)
    own = {name: [result["seconds"] for result in results if result["contestant"] == name] for name in set(names)}
    return sum(sum(own[name]) / len(own[name]) if own[name] else mean for name in names)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 stop the benchmark as Ctrl-C does: the running process is told, and the finished ones are kept."""

    def receive(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
