"""The command line: parse, call, print. No logic lives here, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import fastoss
from fastoss import cli_answers, cli_exports, terminal
from fastoss.cli_answers import LogJson
from fastoss.errors import EXIT_BAD_INPUT, EXIT_RUN_FAILED, FastossError, Stopped
from fastoss.telemetry import no_telemetry

if TYPE_CHECKING:
    from fastoss.config import Recipe
    from fastoss.run import RunDirectory

app = typer.Typer(name="fastoss", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a TOML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set train.learning_rate=2e-4.")]
UseSample = Annotated[bool, typer.Option("--sample", help="Read the sample that each source names instead of the source.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastoss {fastoss.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Fine-tune gpt-oss-20b on one GPU, and prove what was learned."""
    if debug:
        os.environ["FASTOSS_DEBUG"] = "1"  # seen by the processes that --gpus starts as well


@app.command()
def train(
    recipe: RecipePath,
    set: Overrides = None,
    sample: UseSample = False,
    gpus: Annotated[int | None, typer.Option("--gpus", metavar="N", help="Train in N processes, one per GPU (on the CPU if there is none).")] = None,
    nodes: Annotated[int, typer.Option("--nodes", metavar="M", min=1, help="Machines that train together; each runs this command.")] = 1,
    rendezvous: Annotated[
        str | None, typer.Option("--rendezvous", metavar="HOST:PORT", help="Where the machines meet: the first one's name and a free port.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="DIR", help="The run directory, instead of runs/<name>.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and what would be done; train nothing.")] = False,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start over instead of resuming.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --no-resume: remove the run that is there, and its exports.")] = False,
    override_resume: Annotated[bool, typer.Option("--override-resume", help="Resume although recipe, data or libraries have changed.")] = False,
    log_json: LogJson = False,
    ignore_plan: Annotated[bool, typer.Option("--ignore-plan", help="Train although the plan says that it cannot fit on the card.")] = False,
) -> None:
    """Train a recipe; the same command again resumes where it stopped."""
    from fastoss.config import load_recipe
    from fastoss.run import RunDirectory

    resolved = load_recipe(recipe, set or ())
    run = RunDirectory(output or Path("runs") / resolved.name)
    if overwrite and not no_resume:
        raise FastossError("--overwrite works only with --no-resume", place="fastoss train", hint="add --no-resume to start over")
    if override_resume and no_resume:
        raise FastossError("--override-resume resumes, --no-resume starts over: use one of them", place="fastoss train")
    processes = 1 if gpus is None else gpus
    if processes < 1:
        raise FastossError("nothing is trained in no process", place=f"--gpus {gpus}", hint="ask for 1 or more")
    if dry_run:
        from fastoss.training.planning.dry_run import dry_run_lines

        for line in dry_run_lines(resolved, run, sample=sample, gpus=processes * nodes):
            typer.echo(line)
        return
    if (gpus is not None or nodes > 1 or rendezvous) and "RANK" not in os.environ:
        _train_in_processes(resolved, run, processes, sample, ignore_plan, nodes, rendezvous)
        return
    if gpus is not None and gpus * nodes != int(os.environ.get("WORLD_SIZE", "1")):
        raise FastossError(f"torchrun started {os.environ['WORLD_SIZE']} processes", place=f"--gpus {gpus}", hint="leave --gpus out under torchrun")
    from fastoss.training.train import train as train_recipe

    again = {"resume": not no_resume, "overwrite": overwrite, "override_resume": override_resume, "ignore_plan": ignore_plan}
    train_recipe(resolved, recipe, run, sample=sample, **again, command=shlex.join(["fastoss", *sys.argv[1:]]))


def _train_in_processes(recipe: Recipe, run: RunDirectory, gpus: int, sample: bool, ignore_plan: bool, nodes: int, rendezvous: str | None) -> None:
    from fastoss.training.launch import check_rendezvous, launch
    from fastoss.training.train import check_before_launch

    check_rendezvous(nodes, rendezvous)
    check_before_launch(recipe, run, gpus, nodes=nodes, sample=sample, ignore_plan=ignore_plan)
    raise typer.Exit(launch(sys.argv[1:], gpus, run, nodes=nodes, rendezvous=rendezvous))


@app.command()
def check(
    recipe: RecipePath,
    set: Overrides = None,
    sample: UseSample = False,
    template: Annotated[
        bool, typer.Option("--template", help="Compare our rendering with the model's chat template and openai-harmony, token by token.")
    ] = False,
    card: Annotated[
        str | None,
        typer.Option("--card", metavar="NAME", help="Plan for this card: 24GB, 4090, A100-80, H200, …; else the one found, or 24 GB."),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="Plan for N processes, one per card.")] = 1,
    price: Annotated[float | None, typer.Option("--price", metavar="P", min=0, help="Show the cost at this price per card and hour.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="If it does not fit: write NAME-fit.toml, a recipe that does.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Check recipe and data and plan the run, without loading a model."""
    from fastoss.config import load_recipe
    from fastoss.data.dataset import build_dataset
    from fastoss.data.overview import compare_templates, overview_lines, overview_plain
    from fastoss.data.reading.sources import NotCached
    from fastoss.training.planning.outlook import judge, write_fitting

    try:
        resolved = load_recipe(recipe, set or ())
        dataset = build_dataset(resolved, sample=sample, progress=terminal.say)
        compared = compare_templates(dataset, resolved) if template else None
        outlook = judge(resolved, dataset, card=card, price=price, ranks=gpus)
        fitted = write_fitting(outlook, recipe, set or []) if fit else []
    except NotCached as missing:
        if json_:
            typer.echo(json.dumps({"recipe": str(recipe), "ok": True, "data": None, "lines": [missing.note()]}, indent=2, ensure_ascii=False))
        else:
            typer.echo(f"{missing.note()}\n{recipe} is fine; its data was not looked at")
        return
    except FastossError as error:
        if json_:
            typer.echo(json.dumps({"recipe": str(recipe), "ok": False, "error": error.to_plain()}, indent=2, ensure_ascii=False))
        raise
    if json_:
        verdict = overview_plain(dataset, resolved, str(recipe)) | ({"template": compared.to_plain()} if compared else {})
        verdict |= {"plan": outlook.to_plain()} | ({"fit": fitted} if fit else {})
        typer.echo(json.dumps(verdict, indent=2, ensure_ascii=False))
        return
    for line in [*overview_lines(dataset, resolved), *outlook.lines(), *fitted, *(compared.lines() if compared else [])]:
        typer.echo(line)
    typer.echo(f"{recipe} is fine" if outlook.plan.fits else f"{recipe} is fine, except for memory")


@app.command()
def show(
    recipe: RecipePath,
    set: Overrides = None,
    sample: UseSample = False,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=1, help="How many training examples to show.")] = 3,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write all examples as one page for the browser.")] = None,
) -> None:
    """Show exactly the tokens and labels that are trained."""
    from fastoss.config import load_recipe
    from fastoss.data.dataset import build_dataset

    resolved = load_recipe(recipe, set or ())
    dataset = build_dataset(resolved, sample=sample, progress=terminal.say)
    if html is not None:
        from fastoss.data.overview import write_page

        write_page(html, dataset, resolved, str(recipe))
        typer.echo(f"wrote {html}: open it in a browser", err=True)
        return
    from fastoss.data.show import example_lines

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    labels = ("chosen", "rejected") if resolved.method == "dpo" else ("",)
    for example, label in zip(dataset.train[: rows * len(labels)], itertools.cycle(labels), strict=False):
        for line in example_lines(example, colour=colour, label=label):
            typer.echo(line)


@app.command()
def init(
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="Your rows: a file, a folder, or a hub dataset (hf:NAME).")] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="M", help="sft (chats), dpo (pairs), or reasoning (the language of the reasoning).")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", metavar="OURS=THEIRS", help="Our name for a column of the file: instruction=question; repeatable.")
    ] = None,
    card: Annotated[str | None, typer.Option("--card", metavar="NAME", help="The card to plan for: 24GB, 4090, A100-80, H200, …")] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="N", help="The recipe's name: its run goes to runs/N.")] = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE", help="The recipe to write, instead of N.toml.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: take what the rows suggest.")] = False,
) -> None:
    """Write a commented recipe for your own rows.

    It looks at the rows first, and asks for what is not given. No file is overwritten.
    """
    from fastoss.init.write import Answers, write_recipe

    typer.echo(write_recipe(Answers(data, method, card, name, output, yes, tuple(column or ()))))


# In the order of the help.
_ELSEWHERE: tuple[Callable[..., None], ...] = (
    cli_answers.chat, cli_answers.generate, cli_answers.evaluate, cli_answers.serve, cli_exports.export, cli_exports.verify, cli_exports.push,
)  # fmt: skip
for _command in _ELSEWHERE:
    app.command()(_command)
app.add_typer(cli_exports.adapter_app, name="adapter")


@app.command()
def bench(
    recipe: RecipePath,
    set: Overrides = None,
    sample: UseSample = False,
    gpus: Annotated[str, typer.Option("--gpus", metavar="N,N,…", help="Numbers of processes to compare, with the same global batch.")] = "1",
    baseline: Annotated[str | None, typer.Option("--baseline", metavar="NAME", help="What to compare with: transformers.")] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=2, help="Steps of each run; the first fifth is not counted.")] = 20,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1)] = 3,
    output: Annotated[Path | None, typer.Option("--output", metavar="DIR", help="The folder, instead of runs/<name>-bench.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run; run nothing.")] = False,
    log_json: LogJson = False,
) -> None:
    """Measure training speed by processes, and against a baseline."""
    from fastoss.config import load_recipe
    from fastoss.training.bench.bench import bench as measure
    from fastoss.training.bench.plan import parse_gpus

    counts = parse_gpus(gpus)
    resolved = load_recipe(recipe, set or ())
    folder = measure(resolved, recipe, output, sample=sample, gpus=counts, baseline=baseline, steps=steps, repeats=repeats, dry_run=dry_run)
    typer.echo(folder)


@app.command()
def slurm(
    recipe: RecipePath,
    set: Overrides = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="GPUs per node, one process each.")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", metavar="M", min=1, help="Nodes that train together; all of them must see the run directory.")] = 1,
    cpus: Annotated[int | None, typer.Option("--cpus", metavar="N", min=1, help="CPU cores per node.")] = None,
    array: Annotated[
        list[str] | None, typer.Option("--array", metavar="KEY=[V, V]", help="One job for each value (for each combination, if given several times).")
    ] = None,
    time: Annotated[str, typer.Option("--time", metavar="T", help="The job's time limit, as sbatch takes it.")] = "08:00:00",
    partition: Annotated[str | None, typer.Option("--partition", metavar="P", help="The partition to queue in.")] = None,
    venv: Annotated[Path | None, typer.Option("--venv", metavar="PATH", help="A virtual environment to activate first.")] = None,
) -> None:
    """Print a SLURM script that saves in time and requeues itself.

    It saves ahead of the time limit; the requeued job resumes the run.
    """
    from fastoss.config import load_recipe
    from fastoss.training.slurm import combinations, sbatch_script

    name = load_recipe(recipe, set or ()).name
    sweep = combinations(recipe, set or (), array or ())
    script = sbatch_script(recipe, name, gpus=gpus, time=time, nodes=nodes, cpus=cpus, partition=partition, venv=venv, changes=set or (), sweep=sweep)
    typer.echo(script, nl=False)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="A run directory; or several, to compare them.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The page, instead of RUN/report.html or comparison.html beside the runs.")
    ] = None,
) -> None:
    """Write a run's report again, or compare several runs.

    The page needs no network and no scripts. For a single run, curves.svg and curves.png are drawn again as well.
    """
    from fastoss.report.curves import write_curves
    from fastoss.report.report import write_comparison, write_report
    from fastoss.run import RunDirectory

    directories = [RunDirectory(run) for run in runs]
    if len(runs) > 1:
        typer.echo(write_comparison(directories, output))
        return
    typer.echo(write_report(directories[0], output))
    write_curves(directories[0], png=True)


@app.command()
def doctor(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", show_default=False, help="A run directory; without it, this machine.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 when something is broken.")] = False,
) -> None:
    """Check what this machine can do, or whether a run is intact."""
    if run is None:
        from fastoss.training.planning.machine import report

        text, broken = report(as_json=json_)
        typer.echo(text)
    else:
        from fastoss.run import RunDirectory
        from fastoss.training.doctor import examine_run, verdict

        findings = examine_run(RunDirectory(run))
        broken = any(finding.state == "broken" for finding in findings)
        if json_:
            found = {"run": str(run), "verdict": verdict(findings), "findings": [finding.to_plain() for finding in findings]}
            typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        else:
            typer.echo("\n".join([*(finding.line() for finding in findings), "", verdict(findings)]))
    if strict and broken:
        raise typer.Exit(EXIT_RUN_FAILED)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the recipe."""
    from fastoss.config import recipe_schema

    typer.echo(recipe_schema())


def main() -> None:
    """Entry point: errors become one clear message and an exit code; a traceback only with --debug."""
    no_telemetry()
    try:
        app(prog_name="fastoss")
    except FastossError as error:
        if os.environ.get("FASTOSS_DEBUG"):
            traceback.print_exc()
        # Every rank finds the same bad input; one of them says so.
        if error.exit_code != EXIT_BAD_INPUT or os.environ.get("RANK", "0") == "0":
            terminal.say(str(error), "stopped" if isinstance(error, Stopped) else "error", **(error.to_plain() if terminal.as_json() else {}))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        terminal.say("interrupted", "error")
        sys.exit(130)
    except Exception as error:
        if os.environ.get("FASTOSS_DEBUG"):
            traceback.print_exc()
        fact = f"{type(error).__name__}: {error}".strip()
        terminal.say(f"error: {fact}\nhint: run `fastoss --debug …` for the traceback", "error")
        sys.exit(EXIT_RUN_FAILED)
