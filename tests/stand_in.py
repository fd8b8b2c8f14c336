"""Servers on this machine that stand in for others: of a protocol a test writes what is asked, and `self.send` answers it."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StandIn(http.server.BaseHTTPRequestHandler):
    """Says nothing on stderr."""

    def send(self, status: int, content: object = b"", headers: dict[str, str] | None = None) -> None:
        """Bytes as they are, anything else as JSON; to HEAD the headers alone."""
        kind = {} if isinstance(content, bytes) else {"Content-Type": "application/json"}
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **kind, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running(handler: type[StandIn]) -> Iterator[str]:
    """The address of a server that asks `handler`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
