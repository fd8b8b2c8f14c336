"""The commands on finished weights: export, verify, push, adapter check. Parse, call, print; nothing heavy is imported early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastoss import terminal
from fastoss.cli_answers import LogJson

RunOrAdapter = Annotated[str, typer.Argument(metavar="RUN", help="A run, or an adapter's folder.")]
BaseFolder = Annotated[
    str | None, typer.Option("--base", metavar="DIR", help="A folder with the original base weights, instead of the run's own base.")
]


def export(
    run: RunOrAdapter,
    format: Annotated[list[str], typer.Option("--format", metavar="NAME", help="adapter, merged, mxfp4 or gguf; may be given several times.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="The folder, instead of RUN/exports; each format gets a folder in it.")
    ] = None,
    quantization: Annotated[str, typer.Option("--quantization", metavar="NAME", help="For GGUF: mxfp4, bf16, f16 or q8_0.")] = "mxfp4",
    base: BaseFolder = None,
    push: Annotated[str | None, typer.Option("--push", metavar="REPO", help="Upload to this repository of the hub (token from HF_TOKEN).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would need; write nothing.")] = False,
    log_json: LogJson = False,
) -> None:
    """Write a run's model for other programs, and verify it.

    A folder appears only if every LoRA change was found in its weights, it answers as the adapter does, and its template writes the training
    tokens.
    """
    from fastoss.export.export import export as write

    for folder in write(run, format, output=output, quantization=quantization, push_to=push, base=base, dry_run=dry_run, progress=terminal.say):
        typer.echo(folder)


def verify(
    path: Annotated[Path, typer.Argument(metavar="EXPORT", help="The folder of an export.")],
    against: Annotated[str, typer.Option("--against", metavar="RUN", help="The run, or the adapter's folder, that it was made from.")],
    base: BaseFolder = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
    log_json: LogJson = False,
) -> None:
    """Verify an export against its run: exit code 1 when it fails."""
    from fastoss.errors import RunFailed
    from fastoss.export.export import verify_export

    result = verify_export(path, against, base=base, progress=terminal.say)
    typer.echo(json.dumps(result.to_plain(), indent=2, ensure_ascii=False) if json_ else "\n".join(result.lines()))
    if not result.passed:
        raise RunFailed("the verification failed", place=str(path))
    typer.echo(f"{path} is verified", err=True)


def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run that has been exported, or one export's folder.")],
    repo: Annotated[str | None, typer.Option("--repo", metavar="REPO", help="The repository, instead of the recipe's hub.repo.")] = None,
    format: Annotated[list[str] | None, typer.Option("--format", metavar="NAME", help="Only these formats.")] = None,
    log_json: LogJson = False,
) -> None:
    """Upload exports to the hub; unchanged files are not sent again."""
    from fastoss.export.export import push_run

    for address in push_run(run, format or (), repo, progress=terminal.say):
        typer.echo(address)


adapter_app = typer.Typer(help="Inspect LoRA adapters.", no_args_is_help=True, rich_markup_mode=None)


@adapter_app.callback()
def adapter_commands() -> None:
    """Inspect LoRA adapters."""


@adapter_app.command("check")
def adapter_check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run, or an adapter's folder.")],
    convert: Annotated[Path | None, typer.Option("--convert", metavar="DIR", help="Convert it to the current layout, into this folder.")] = None,
    layout: Annotated[str | None, typer.Option("--layout", metavar="NAME", help="Its layout, if it cannot be detected: peft or grouped.")] = None,
) -> None:
    """Show the layout of an adapter's expert LoRA, or convert it."""
    from fastoss.export.adapter_layouts import check_adapter

    for line in check_adapter(path, layout, convert):
        typer.echo(line)
