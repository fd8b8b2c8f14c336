"""The demo: `python app.py RUN`, then talk to what was trained, in a browser. A view over `fastoss.inference`; the page is in `fastoss/demo/`."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastoss.demo.limits import Limits
from fastoss.demo.login import hash_password
from fastoss.errors import FastossError

_DEFAULTS = Limits()
_PICKER = "Offer the other runs beside this one. [default: on, unless other machines can connect]"
_VOTES = "Where votes go. [default: preferences.jsonl in the run]"


def demo(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A run, an adapter, an export, or http://… of a server.")] = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; other machines need --auth or --no-auth.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535)] = 7860,
    auth: Annotated[Path | None, typer.Option("--auth", metavar="FILE", help="File of users, one line each, made with --hash-password.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let everybody in who can reach it.")] = False,
    hash_password_: Annotated[str | None, typer.Option("--hash-password", metavar="NAME", help="Ask for a password and print a user's line.")] = None,
    name: Annotated[list[str] | None, typer.Option("--name", metavar="HOST", help="A host name to answer to; then no other is answered.")] = None,
    behind_proxy: Annotated[bool, typer.Option("--behind-proxy", help="Trust the client headers of a proxy on this machine.")] = False,
    hide_reasoning: Annotated[bool, typer.Option("--hide-reasoning", help="Keep the reasoning on the server.")] = False,
    picker: Annotated[
        bool | None,
        typer.Option("--run-picker/--no-run-picker", help=_PICKER),
    ] = None,
    preferences: Annotated[Path | None, typer.Option("--preferences", metavar="FILE", help=_VOTES)] = None,
    log_chats: Annotated[
        Path | None, typer.Option("--log-chats", metavar="FILE", help="Log the conversations, as JSONL; by default they are not kept.")
    ] = None,
    waiting: Annotated[int, typer.Option("--waiting", metavar="N", min=0, help="Questions that may wait for the model.")] = _DEFAULTS.waiting,
    max_question: Annotated[
        int, typer.Option("--max-question", metavar="N", min=1, help="The longest question, in characters.")
    ] = _DEFAULTS.question_chars,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=16, help="The longest reply, in tokens.")
    ] = _DEFAULTS.reply_tokens,
    max_seconds: Annotated[
        float, typer.Option("--max-seconds", metavar="S", min=1, help="The longest time for a reply, in seconds.")
    ] = _DEFAULTS.reply_seconds,
) -> None:
    """A chat with a run in the browser, tuned beside base, whose votes become training data.

    It answers only this machine, unless --host says otherwise.
    """
    if hash_password_ is not None:
        password = getpass.getpass("password: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
        typer.echo(hash_password(hash_password_, password))
        return
    if model is None:
        raise FastossError("name a run", place="app.py", hint="python app.py runs/quickstart")
    from fastoss.demo.server import DemoSettings, serve_demo

    limits = Limits(question_chars=max_question, reply_tokens=max_new_tokens, reply_seconds=max_seconds, waiting=waiting)
    settings = DemoSettings(
        model, host, port, auth, no_auth, tuple(name or ()), behind_proxy, reasoning=not hide_reasoning, picker=picker, preferences=preferences,
        log_chats=log_chats, limits=limits,
    )  # fmt: skip
    serve_demo(settings, lambda line: typer.echo(line, err=True))


def main() -> None:
    command = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    command.command()(demo)
    try:
        command()
    except FastossError as problem:
        typer.echo(str(problem), err=True)
        raise SystemExit(problem.exit_code) from None


if __name__ == "__main__":
    main()
