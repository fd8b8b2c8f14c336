"""What the guard reads of a request and how it answers, in ASGI's words."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",  # the report's tab shows a page of ours
    "Referrer-Policy": "same-origin",  # "no-referrer" would make a form's own Origin null
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}


class Request:
    """What the guard looks at."""

    def __init__(self, scope: Scope):
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.host = self.headers.get("host", "")
        self.host_name = re.sub(r":\d+$", "", self.host)
        origin = self.headers.get("origin")
        self.origin = None if origin is None else urlsplit(origin).netloc
        client = scope.get("client")
        self.address: str = client[0] if client else ""

    @property
    def cookie_name(self) -> str:
        """Cookies do not know ports: two demos on one machine have one each."""
        port = re.search(r":(\d+)$", self.host)
        return f"fastoss_demo_{port[1] if port else 'web'}"

    @property
    def cookie(self) -> str | None:
        try:
            morsel = SimpleCookie(self.headers.get("cookie", "")).get(self.cookie_name)
        except CookieError:
            return None
        return morsel.value if morsel else None

    def set_cookie(self, value: str, seconds: int = 12 * 3600) -> str:
        secure = "; Secure" if self.scope.get("scheme") == "https" else ""
        return f"{self.cookie_name}={value}; Path=/; HttpOnly; SameSite=Lax; Max-Age={seconds}{secure}"

    def query(self, name: str) -> str:
        return parse_qs(self.scope.get("query_string", b"").decode("latin-1")).get(name, [""])[0]

    async def body(self, receive: Receive, most: int) -> bytes | None:
        """The whole body, or None where it is larger than `most` bytes."""
        if int(self.headers.get("content-length") or 0) > most:
            return None
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body.extend(message.get("body", b""))
            more = bool(message.get("more_body"))
            if len(body) > most:
                return None
        return bytes(body)

    async def form(self, receive: Receive) -> tuple[str, str]:
        """Name and password of the login page's form; empty where it is none."""
        body = await self.body(receive, 16_384)
        try:
            form = parse_qs((body or b"").decode("utf-8", "replace"), max_num_fields=4)
        except ValueError:
            form = {}
        return form.get("name", [""])[0][:256], form.get("password", [""])[0]


def again(body: bytes) -> Receive:
    """A request's body, for whoever reads it next."""
    sent = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def with_headers(send: Send) -> Send:
    """`send` that puts our `HEADERS` in place of the application's own."""
    ours = {name.lower() for name in HEADERS}

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            told = [(name, value) for name, value in message["headers"] if name.decode("latin-1").lower() not in ours]
            message = {**message, "headers": [*told, *_encoded(HEADERS)]}
        await send(message)

    return sending


async def answer(send: Send, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
    told = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store", **HEADERS, **(headers or {})}
    told.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    await send({"type": "http.response.start", "status": status, "headers": _encoded(told)})
    await send({"type": "http.response.body", "body": body})


async def say(send: Send, status: int, words: str) -> None:
    await answer(send, status, f"{words}\n".encode(), "text/plain; charset=utf-8")


async def redirect(send: Send, path: str, cookie: str | None = None) -> None:
    await answer(send, 303, b"", "text/plain", {"Location": path} | ({"Set-Cookie": cookie} if cookie else {}))


async def login_page(send: Send, status: int, problem: str, seconds: float | None = None) -> None:
    page = resources.files("fastoss.assets").joinpath("login.html").read_text(encoding="utf-8").replace("@@PROBLEM@@", problem)
    policy = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy} | ({"Retry-After": str(int(seconds) + 1)} if seconds else {})
    await answer(send, status, page.encode(), "text/html; charset=utf-8", headers)


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
