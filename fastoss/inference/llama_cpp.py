"""llama.cpp itself with a GGUF file, in a process of its own and spoken to on this machine only: chats are answered by it, exports verified.

It comes from the wheel `xllamacpp` (extra `gguf`), or as a `llama-server` that FASTOSS_LLAMA_SERVER names. A file that
crashes it takes a child process down and not who asks.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastoss.errors import FastossError, RunFailed

_START_S = 600.0  # 13 GB from a slow disk


def check_llama_cpp(place: str, purpose: str) -> None:
    """Raises `FastossError` when there is no llama.cpp, in which a GGUF file is verified, or answers (`purpose`)."""
    if _own_server() is None and importlib.util.find_spec("xllamacpp") is None:
        hint = "pip install 'fastoss[gguf]', or set FASTOSS_LLAMA_SERVER to a llama-server program"
        raise FastossError(f"there is no llama.cpp, in which a GGUF file {purpose}", place=place, hint=hint)


def _own_server() -> str | None:
    return os.environ.get("FASTOSS_LLAMA_SERVER")


class LlamaServer:
    """A running llama.cpp. Raises `RunFailed` when it gives no answer."""

    def __init__(self, address: str, path: Path):
        self.address, self.path = address, path

    def post(self, route: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(self.address + route, json.dumps(content).encode(), {"Content-Type": "application/json"})
        try:
            # A proxy of the environment is for the world outside, not for this machine.
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as answer:
                return json.loads(answer.read())
        except (OSError, ValueError) as problem:
            said = problem.read().decode("utf-8", "replace")[:300] if isinstance(problem, urllib.error.HTTPError) else str(problem)
            raise RunFailed(f"llama.cpp did not answer {route}: {said}", place=str(self.path)) from None

    def get(self, route: str) -> Any:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.address + route, timeout=60) as answer:
                return json.loads(answer.read())
        except (OSError, ValueError) as problem:
            raise RunFailed(f"llama.cpp did not answer {route}: {problem}", place=str(self.path)) from None

    def next_token(self, ids: list[int], count: int) -> dict[int, float]:
        """Log-probabilities of the `count` likeliest tokens after `ids`."""
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "n_probs": count, "cache_prompt": True}
        # It keeps a token's probabilities back while a character is incomplete, so it is made to sample "!"; they are those before sampling.
        asked["logit_bias"] = [[0, 1e4]]
        first = self.post("/completion", asked)["completion_probabilities"][0]
        return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The tokens that it answers, at most `count`."""
        asked = {"prompt": ids, "n_predict": count, "temperature": 0.0, "cache_prompt": False, "return_tokens": True}
        tokens: list[int] = self.post("/completion", asked)["tokens"]
        return tokens

    def render(self, messages: list[dict[str, Any]]) -> str:
        """A chat as the file's own template writes it in llama.cpp."""
        prompt: str = self.post("/apply-template", {"messages": messages})["prompt"]
        return prompt

    def tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self.post("/tokenize", {"content": text, "parse_special": True, "add_special": True})["tokens"]
        return tokens


class Stream:
    """One request whose answer comes in pieces. Raises `RunFailed` when llama.cpp refuses it, or breaks off."""

    def __init__(self, server: LlamaServer, route: str, content: dict[str, Any]):
        self.server = server
        self.connection = http.client.HTTPConnection(urllib.parse.urlparse(server.address).netloc, timeout=600)
        self._cut = False
        try:
            self.connection.request("POST", route, json.dumps(content), {"Content-Type": "application/json"})
            self._socket = self.connection.sock  # the connection lets go of it when an answer is to be the last
        except OSError as problem:
            raise self._broken(problem) from None

    def events(self) -> Iterator[dict[str, Any]]:
        """Its server-sent events; none any more after `cut`."""
        try:
            answer = self.connection.getresponse()
            if answer.status != 200:
                said = answer.read().decode("utf-8", "replace")[:300]
                raise RunFailed(f"llama.cpp answers {answer.status}: {said}", place=str(self.server.path))
            for line in answer:
                if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                    event = json.loads(line[5:])
                    if event.get("error"):
                        raise RunFailed(f"llama.cpp failed: {json.dumps(event['error'], ensure_ascii=False)[:300]}", place=str(self.server.path))
                    yield event
        except (OSError, ValueError, http.client.HTTPException) as problem:
            if not self._cut:
                raise self._broken(problem) from None
        finally:
            self.connection.close()

    def cut(self) -> None:
        """End it from another thread: llama.cpp sees that nobody listens, and stops within a token."""
        self._cut = True
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def _broken(self, problem: Exception) -> RunFailed:
        return RunFailed(f"llama.cpp broke off: {problem}", place=str(self.server.path))


@contextlib.contextmanager
def running(path: Path, context: int, threads: int, *, chats: int = 1, gpu_layers: int = 0) -> Iterator[LlamaServer]:
    """llama.cpp with this file, stopped when the block ends. Raises `RunFailed` when it does not take the file.

    Verification leaves `gpu_layers` at 0: a processor computes alike everywhere. `chats` are answered at once, and share the
    `context` tokens that are kept of them.
    """
    own = _own_server()
    with tempfile.TemporaryFile() as log:
        if own:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            settings = ["--ctx-size", context, "--threads", threads, "--parallel", chats, "--jinja", "--n-gpu-layers", gpu_layers, "--no-warmup"]
            settings += ["--kv-unified", "--swa-full"] if chats > 1 else []
            command = [own, "--model", path, "--host", "127.0.0.1", "--port", port, *settings]
        else:
            command = [sys.executable, "-m", "fastoss.inference.llama_child", path, context, threads, chats, gpu_layers]
        parent = str(Path(__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))}
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}" if own else _first_line(process)
            server = LlamaServer(address, path)
            if not address or not _is_ready(server, process):
                log.seek(max(0, log.tell() - 2000))
                lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
                telling = [line for line in lines if "error" in line.lower()] or lines or ["it ended without a message"]
                raise RunFailed(f"llama.cpp does not load the file: {telling[-1].strip()}", place=str(path))
            yield server
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _first_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def _is_ready(server: LlamaServer, process: subprocess.Popen[bytes]) -> bool:
    until = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(server.address + "/health", timeout=5) as answer:
                if answer.status == 200:
                    return True
        except OSError:
            time.sleep(0.1)
    return False
