"""The commands that answer: chat, generate, evaluate, serve. Part of the command line: parse, call, print; nothing heavy is imported early."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from fastoss import terminal
from fastoss.errors import FastossError
from fastoss.inference.sampling import Effort, Question, ReasoningLanguage, Sampling
from fastoss.run import RunDirectory

Temperature = Annotated[float, typer.Option("--temperature", metavar="T", min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", metavar="P", help="Sample among the likeliest tokens whose probabilities add up to P.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", metavar="X", help="Above 1: tokens that occurred before become less likely.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The seed of the sampling: the same one gives the same reply.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Where a reply is cut off, reasoning included.")]
WithEffort = Annotated[Effort | None, typer.Option("--effort", help="Reasoning effort, instead of the one it was trained with.")]
Language = Annotated[str | None, typer.Option("--language", metavar="NAME", help="The language to reason in, such as German.")]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system text.")]
Base = Annotated[bool, typer.Option("--base", help="Ask the base model: the adapter is switched off.")]


def _log_as_json(wanted: bool) -> None:
    if wanted:
        os.environ[terminal.AS_JSON] = "1"


LogJson = Annotated[bool, typer.Option("--log-json", callback=_log_as_json, help="Progress and errors on stderr as JSON, one object per line.")]


def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, an adapter, a model's name or folder, a GGUF export or file, or http://… of a server.")
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Ask once, print the answer, and exit.")] = None,
    system: System = None,
    effort: WithEffort = None,
    language: Language = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    max_new_tokens: NewTokens = 1024,
    base: Base = False,
) -> None:
    """Talk to a run, an adapter or a model.

    Reasoning is printed dimmed on stderr, the answer on stdout. /help lists what can be changed during the chat.
    """
    from fastoss.data.conversation import Message

    sampling = Sampling(temperature, max_new_tokens, seed, top_p, repetition_penalty=repetition_penalty)
    question = Question((Message("system", system),) if system else (), effort, _language(language))
    from fastoss.inference.chat import chat as talk

    talk(model, prompt, question, sampling, tuned=not base)


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, an adapter, a model's name or folder, a GGUF export or file, or http://… of a server.")
    ],
    input: Annotated[Path, typer.Option("--input", metavar="FILE", help="Questions: rows as for training, with or without answers.")],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="Where the answers go, as JSONL in the order of the input.")],
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Answers to each question.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Questions answered at once.")] = 8,
    max_rows: Annotated[int | None, typer.Option("--max-rows", metavar="N", min=1, help="Only the first N questions.")] = None,
    system: System = None,
    effort: WithEffort = None,
    language: Language = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    max_new_tokens: NewTokens = 1024,
    base: Base = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over, whatever is there.")] = False,
    log_json: LogJson = False,
) -> None:
    """Answer a file of questions; the same command again resumes."""
    from fastoss.inference.generate import Batching
    from fastoss.inference.generate import generate as answer

    sampling = Sampling(temperature, max_new_tokens, seed, top_p, repetition_penalty=repetition_penalty)
    how = Batching(sampling, samples, batch_size, effort, _language(language), system, tuned=not base)
    answer(model, input, output, how, overwrite=overwrite, max_rows=max_rows, say=terminal.say)


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, an adapter, or a model's name or folder.")],
    input: Annotated[Path | None, typer.Option("--input", metavar="FILE", help="Rows with answers, instead of the run's held-out rows.")] = None,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=1, help="At most N rows, spread evenly over all.")] = 100,
    output: Annotated[Path | None, typer.Option("--output", metavar="DIR", help="Where the two files go, instead of the run directory.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Questions answered at once.")] = 8,
    language: Language = None,
    max_new_tokens: NewTokens = 512,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    log_json: LogJson = False,
) -> None:
    """Compare the tuned model with its base on held-out rows.

    Prints a table, writes evaluation.json and evaluation.jsonl (every question with both replies), and puts the table into the run's report.
    """
    from fastoss.inference.evaluate import evaluate as compare
    from fastoss.inference.evaluation_table import table_lines
    from fastoss.report.report import write_report

    wanted = _language(language)
    result = compare(run, input, rows=rows, output=output, batch_size=batch_size, language=wanted, max_new_tokens=max_new_tokens, say=terminal.say)
    for line in [json.dumps(result, indent=2, ensure_ascii=False)] if json_ else table_lines(result):
        typer.echo(line)
    directory = RunDirectory(Path(run).expanduser())
    if output is None and directory.exists():
        terminal.say(f"wrote {write_report(directory)}")


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, an adapter, a model's name or folder, or a GGUF export or file.")],
    port: Annotated[int, typer.Option("--port", metavar="N", min=1, max=65535)] = 8000,
) -> None:
    """Serve an OpenAI-compatible endpoint on 127.0.0.1.

    Only this machine can ask. A run answers under its own name, its base model as NAME-base.
    """
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("starlette") is None:
        raise FastossError("the server is not installed", place="fastoss serve", hint="pip install 'fastoss[serve]'")
    from fastoss.inference.serve import serve as answer

    answer(model, port, terminal.say)


def _language(name: str | None) -> ReasoningLanguage | None:
    try:
        return None if name is None else ReasoningLanguage.named(name)
    except FastossError as problem:
        raise FastossError(problem.fact, place=f"--language {name}", hint=problem.hint) from None
