"""Everything that reaches the demo passes here first: known routes and signed-in browsers only, small requests, strict headers.

Gradio offers far more routes than a chat needs (files, proxies, uploads, its API, monitoring). What is not named here does not exist.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import anyio.to_thread

from fastoss.demo.login import Browsers, Lockout, Users
from fastoss.demo.wire import App, Receive, Request, Scope, Send, again, answer, login_page, redirect, say, with_headers

LARGEST = 4 << 20  # bytes of a request: enough to be told that a text is too long, in words
_GET = {"/", "/theme.css", "/gradio_api/theme.css", "/gradio_api/startup-events", "/gradio_api/queue/data"}
_GET_BELOW = ("/assets/", "/static/", "/gradio_api/heartbeat/")
_POST = {"/gradio_api/queue/join", "/gradio_api/cancel"}
_PAGES_OWN = ("/gradio_api/queue/data", "/gradio_api/heartbeat/")  # what a page's session may read
_ANOTHERS = "this is another browser's conversation"
_POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; "
    "connect-src 'self'; frame-src 'self'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
_ICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'><rect width='32' height='32' rx='8' fill='#2f62b5'/>"
    "<path d='M9 23V9h14M9 16h10' stroke='#fff' stroke-width='3.4' fill='none' stroke-linecap='round' stroke-linejoin='round'/></svg>"
)


@dataclass
class Guard:
    """ASGI middleware before Gradio. `users` None: nobody signs in. `hosts` None: any name of this machine is answered."""

    app: App
    report: Callable[[], str | None]
    users: Users | None = None
    hosts: frozenset[str] | None = frozenset({"127.0.0.1", "localhost", "[::1]"})
    browsers: Browsers = field(default_factory=Browsers)
    by_address: Lockout = field(default_factory=lambda: Lockout(free=5))
    by_name: Lockout = field(default_factory=lambda: Lockout(free=20))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":  # nothing here speaks over web sockets
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._request(Request(scope), receive, send)

    async def _request(self, request: Request, receive: Receive, send: Send) -> None:
        method, path = request.method, request.path
        if self.hosts is not None and request.host_name not in self.hosts:
            await say(send, 421, "this host name is not served here")
        elif any(sign in path for sign in ("..", "\\", "\0", "%")):
            await say(send, 404, "not found")
        elif method == "POST" and request.origin not in (None, request.host):
            await say(send, 403, "requests from other sites are refused")
        elif path == "/health":
            await say(send, 200, "ok")
        elif path == "/favicon.ico":
            await answer(send, 200, _ICON.encode(), "image/svg+xml")
        elif self.users is not None and path == "/login":
            await self._login(request, receive, send)
        else:
            token = request.cookie if self.browsers.known(request.cookie) else None
            if self.users is not None and token is None:
                await (redirect(send, "/login") if method == "GET" and path == "/" else say(send, 401, "sign in first"))
            else:
                await self._let_in(request, receive, send, token)

    async def _let_in(self, request: Request, receive: Receive, send: Send, token: str | None) -> None:
        method, path = request.method, request.path
        if method in ("GET", "HEAD") and path == "/":
            await self._page(request, receive, send, token)
        elif method == "GET" and path == "/logout" and self.users is not None:
            self.browsers.close(token)
            await redirect(send, "/login", request.set_cookie("", 0))
        elif method == "GET" and path.startswith("/demo/"):
            await self._own(path, send)
        elif method == "POST" and path in _POST:
            await self._post(request, receive, send, token)
        elif method not in ("GET", "HEAD") or not (path in _GET or path.startswith(_GET_BELOW)):
            await say(send, 404, "not found")
        elif path.startswith(_PAGES_OWN) and not self._is_owner(token, request.query("session_hash") or path.rpartition("/")[2]):
            await say(send, 403, _ANOTHERS)
        else:
            await self.app(request.scope, receive, with_headers(send))

    def _is_owner(self, token: str | None, page: str) -> bool:
        return token is not None and 1 <= len(page) <= 64 and self.browsers.owns(token, page)

    async def _page(self, request: Request, receive: Receive, send: Send, token: str | None) -> None:
        """Gradio's page, its scripts marked with this answer's number: no other script runs. Query parameters do not reach Gradio."""
        request.scope["query_string"] = b""
        nonce = secrets.token_urlsafe(16)
        head: MutableMapping[str, Any] = {}
        body = bytearray()

        async def collect(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                head.update(message)
            else:
                body.extend(message.get("body", b""))

        await self.app({**request.scope, "method": "GET"}, receive, collect)
        marked = re.sub(rb"<script(?=[\s>])", b'<script nonce="' + nonce.encode() + b'"', bytes(body))
        headers = {"Content-Security-Policy": _POLICY.format(nonce=nonce), "Cache-Control": "no-store"}
        if token is None:
            headers["Set-Cookie"] = request.set_cookie(self.browsers.open(None))
        await answer(send, head["status"], marked, "text/html; charset=utf-8", headers)

    async def _own(self, path: str, send: Send) -> None:
        if path == "/demo/demo.js":
            script = resources.files("fastoss.assets").joinpath("demo.js").read_bytes()
            await answer(send, 200, script, "text/javascript; charset=utf-8")
            return
        page = await anyio.to_thread.run_sync(self.report) if path == "/demo/report" else None
        if page is None:
            await say(send, 404, "not found")
        else:
            await answer(send, 200, page.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": REPORT_POLICY})

    async def _post(self, request: Request, receive: Receive, send: Send, token: str | None) -> None:
        body = await request.body(receive, LARGEST)
        try:
            told = json.loads(body or b"null")
            page = str(told["session_hash"])
            json.dumps(told, ensure_ascii=False).encode()  # halves of characters would break the answer that repeats them
        except (ValueError, KeyError, TypeError, RecursionError):
            page = ""
        if body is None:
            await say(send, 413, f"a request has up to {LARGEST >> 20} MiB")
        elif not page:
            await say(send, 400, "not understood")
        elif not self._is_owner(token, page):
            await say(send, 403, _ANOTHERS)
        elif "gradio.FileData" in json.dumps(told):  # Gradio would fetch it, or look it up: no input of this page is a file
            await say(send, 400, "uploads are not accepted here")
        else:
            await self.app(request.scope, again(body), with_headers(send))

    async def _login(self, request: Request, receive: Receive, send: Send) -> None:
        assert self.users is not None
        if request.method != "POST":
            await login_page(send, 200, "")
            return
        name, password = await request.form(receive)
        keys = ((self.by_address, request.address), (self.by_name, name))
        locked = max(lock.seconds_left(key) for lock, key in keys)
        if locked:
            await login_page(send, 429, f"Too many wrong tries. Try again in {_in_words(locked)}.", locked)
            return
        for lock, key in keys:
            lock.wrong(key)  # counted before it is known: a thousand tries at once are a thousand tries
        if not await anyio.to_thread.run_sync(self.users.verify, name, password):
            await login_page(send, 401, "Wrong name or password.")
            return
        for lock, key in keys:
            lock.right(key)
        self.browsers.close(request.cookie)
        await redirect(send, "/", request.set_cookie(self.browsers.open(name)))


def _in_words(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
