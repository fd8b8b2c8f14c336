"""What the tests of the demo share: the whole demo on a port of its own, and a visitor without a browser."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from fastoss.demo.guard import Guard
from fastoss.demo.login import Users
from fastoss.demo.server import DemoSettings, demo_app


@contextmanager
def running(app: Any) -> Iterator[str]:
    """An ASGI application behind a real server; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", proxy_headers=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@contextmanager
def demo(settings: DemoSettings, users: Users | None = None) -> Iterator[tuple[str, Guard]]:
    guard = demo_app(settings, users)
    with running(guard) as url:
        yield url, guard


@dataclass
class Visitor:
    """A page without a browser: Gradio's own protocol, as its script speaks it."""

    url: str
    name: str
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=300))

    def __post_init__(self) -> None:
        page = self.client.get(self.url).text
        found = re.search(r"window\.gradio_config = (\{.*?\});", page)
        assert found
        self.config = json.loads(found[1])
        self.ids = {c["props"]["elem_id"]: c["id"] for c in self.config["components"] if c["props"].get("elem_id")}

    def function(self, element: str, event: str = "click") -> dict[str, Any]:
        wanted = [self.ids[element], event]
        return next(made for made in self.config["dependencies"] if wanted in [list(target) for target in made["targets"]])

    def join(self, element: str, values: list[Any], event: str = "click") -> httpx.Response:
        body = {"data": values, "fn_index": self.function(element, event)["id"], "session_hash": self.name, "trigger_id": None, "event_data": None}
        return self.client.post(f"{self.url}/gradio_api/queue/join", content=json.dumps(body), headers={"Content-Type": "application/json"})

    def call(self, element: str, values: list[Any], event: str = "click") -> str:
        """Do what a click does, and everything that the page was sent for it, as one text."""
        joined = self.join(element, values, event)
        assert joined.status_code == 200, joined.text
        said = ""
        with self.client.stream("GET", f"{self.url}/gradio_api/queue/data", params={"session_hash": self.name}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    said += line + "\n"
                    if json.loads(line[5:]).get("msg") in ("process_completed", "close_stream"):
                        break
        return json.dumps([json.loads(line[5:]) for line in said.splitlines()], ensure_ascii=False)

    def ask(self, text: str, mode: str = "tuned", language: str = "as trained", tokens: int = 48) -> str:
        return self.call("send", [text, mode, language, "as trained", 0, tokens, ""])
