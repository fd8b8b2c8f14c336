"""The demo put together: model, page and guard behind one port. `app.py` parses the command line and calls `serve_demo`."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastoss.demo.guard import App, Guard
from fastoss.demo.limits import Limits
from fastoss.demo.login import MAKE_USER, USERS_VARIABLE, Users
from fastoss.demo.models import Models
from fastoss.demo.talk import Turn
from fastoss.demo.votes import VoteFile
from fastoss.errors import FastossError
from fastoss.run import RunDirectory
from fastoss.telemetry import no_telemetry


@dataclass(frozen=True)
class DemoSettings:
    """What `app.py` was told. `auth` is a file of users; without it they come from the environment, and `no_auth` lets everybody in."""

    model: str
    host: str = "127.0.0.1"
    port: int = 7860
    auth: Path | None = None
    no_auth: bool = False
    names: tuple[str, ...] = ()
    behind_proxy: bool = False
    reasoning: bool = True
    picker: bool | None = None
    preferences: Path | None = None
    log_chats: Path | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def users(self) -> Users | None:
        """Who may come in; None: everybody. `FastossError` when other machines could come in and nothing was said about it."""
        if self.auth is not None and self.no_auth:
            raise FastossError("--auth and --no-auth contradict each other")
        if self.auth is not None or (os.environ.get(USERS_VARIABLE) and not self.no_auth):
            return Users.load(self.auth)
        if self.local or self.no_auth:
            return None
        hint = f"--auth FILE ({MAKE_USER}), ${USERS_VARIABLE}, or --no-auth if everybody who can reach it may use it"
        raise FastossError("other machines could ask this model without signing in", place=f"--host {self.host}", hint=hint)

    def hosts(self) -> frozenset[str] | None:
        """Names that are answered: a page elsewhere may resolve its own name to this machine."""
        if self.names:
            return frozenset(self.names)
        return frozenset({"127.0.0.1", "localhost", "[::1]", self.host}) if self.local else None

    def pairs(self) -> Path:
        """Where preferences go: into the run directory, or the current folder for what is no run."""
        if self.preferences is not None:
            return self.preferences
        run = RunDirectory(Path(self.model))
        return run.preferences if run.exists() else Path("preferences.jsonl")


def serve_demo(settings: DemoSettings, say: Callable[[str], None]) -> None:
    """Load the model and answer browsers until the process is stopped. `FastossError` before anything is loaded where the settings are not safe."""
    users = settings.users()
    pairs = settings.pairs()
    if not pairs.parent.is_dir():
        raise FastossError("the folder does not exist", place=str(pairs.parent))
    listening = _listening(settings)
    _gradio()
    say(f"loading {settings.model} …")
    app = demo_app(settings, users)
    import uvicorn

    host, port = listening.getsockname()[:2]
    say(f"the demo is at http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C ends it")
    if not settings.local:
        say("everybody who reaches this machine may sign in" if users else "everybody who reaches this machine may ask")
    # A proxy's word on who asks is taken only when there is one: it would get around the lock for guessers.
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, proxy_headers=settings.behind_proxy, server_header=False, limit_concurrency=2000,
        timeout_graceful_shutdown=3,
    )  # fmt: skip
    with contextlib.closing(listening):
        uvicorn.Server(config).run(sockets=[listening])


def demo_app(settings: DemoSettings, users: Users | None) -> Guard:
    """The whole demo as an ASGI application, its model loaded."""
    gr = _gradio()
    from fastapi import FastAPI

    from fastoss.demo.page import Demo, Shown, build

    log = _log(settings.log_chats)
    models = Models(settings.model, settings.limits)
    models.load()
    pairs = settings.pairs()
    picker = settings.local and users is None if settings.picker is None else settings.picker
    shown = Shown(reasoning=settings.reasoning, picker=picker, sign_out=users is not None)
    liked = pairs.with_name(f"{pairs.stem}-liked.jsonl")
    demo = Demo(models, VoteFile(pairs), VoteFile(liked), shown, log)
    assets = Path(__file__).parent.parent / "assets"
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK SC", "sans-serif"]
    mono = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    app: App = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), build(demo), path="/", footer_links=[], run_history=False,
        enable_monitoring=False, show_error=False, ssr_mode=False, pwa=False, mcp_server=False, max_file_size=0,
        theme=gr.themes.Base(primary_hue="blue", neutral_hue="zinc", radius_size="lg", font=fonts, font_mono=mono),
        css_paths=assets / "demo.css", head='<script src="/demo/demo.js"></script>',
    )  # fmt: skip
    return Guard(app, report=models.report, users=users, hosts=settings.hosts())


def _gradio() -> Any:
    """Gradio; `FastossError` where it is not installed."""
    no_telemetry()
    try:
        import gradio
    except ImportError:
        raise FastossError("the demo's page is not installed", place="app.py", hint="pip install -e '.[demo]'") from None
    return gradio


def _listening(settings: DemoSettings) -> socket.socket:
    """The port, taken before minutes go into loading a model."""
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        return socket.create_server((settings.host, settings.port), family=family, backlog=256)
    except (OSError, OverflowError) as problem:
        hint = "another --port; 0 takes a free one"
        raise FastossError(f"cannot listen there: {problem}", place=f"--host {settings.host} --port {settings.port}", hint=hint) from None


def _log(path: Path | None) -> Callable[[Turn], None]:
    """Keep what was said in a file, where that was asked for; otherwise nothing is kept. `FastossError` where it cannot be written."""
    guard = threading.Lock()
    try:
        if path is not None:
            path.touch()
    except OSError as problem:
        raise FastossError(f"cannot be written: {problem.strerror}", place=str(path)) from None

    def log(turn: Turn) -> None:
        if path is None:
            return
        said = [
            {"label": reply.label, "thinking": reply.thinking, "content": reply.content, "tokens": reply.tokens, "seconds": round(reply.seconds, 2)}
            for reply in turn.replies
        ]
        line = json.dumps({"messages": [{"role": m.role, "content": m.content} for m in turn.asked], "replies": said}, ensure_ascii=False)
        with guard, open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    return log
