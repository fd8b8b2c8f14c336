"""An engine → an OpenAI-compatible endpoint on this machine: requests become questions, deltas become server-sent events.

transformers has a server of its own (`transformers serve`), but it renders with the chat template and loads no run. This is a thin layer
over the engine, on Starlette and uvicorn, so that what is served is what was trained: renderer, parser, effort, base and tuned.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fastoss.data.formats.prompts import row_to_asked
from fastoss.data.harmony import Delta
from fastoss.data.reading.rows import Row
from fastoss.errors import FastossError
from fastoss.inference.engine import Engine
from fastoss.inference.gguf import GgufEngine
from fastoss.inference.open_model import open_engine
from fastoss.inference.reply import Reply
from fastoss.inference.sampling import Sampling
from fastoss.inference.turns import Busy

LARGEST = 1 << 20  # bytes of a request
LONGEST = 4096  # tokens of a reply, where the request does not say
_READ = {
    "model", "messages", "tools", "stream", "stream_options", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens",
    "max_completion_tokens", "seed", "reasoning_effort", "stop",
}  # fmt: skip
_OF_NO_MATTER = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"}
_ONLY = {
    "n": 1, "tool_choice": "auto", "parallel_tool_calls": False, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0,
    "response_format": {"type": "text"},
}  # fmt: skip


class _Refused(Exception):
    """A request that cannot be answered, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def build_app(engine: Engine | GgufEngine, name: str) -> Starlette:
    """The endpoint. `name` is the model's, `name-base` that of its base where it has an adapter."""
    models = {name: True} | ({f"{name}-base": False} if engine.has_adapter else {})
    server = _Server(engine, models)
    routes = [
        Route("/health", server.health), Route("/v1/models", server.models), Route("/v1/chat/completions", server.chat, methods=["POST"]),
    ]  # fmt: skip
    # Another site's page may resolve its own name to 127.0.0.1: only ours are answered.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    return Starlette(routes=routes, middleware=[hosts])


def serve(name: str, port: int, say: Any) -> None:
    """Load a run and answer until the process is stopped. Only this machine can ask."""
    import uvicorn

    say(f"loading {name} …")
    engine = open_engine(name)
    engine.turns.limit = 50
    model = name.rstrip("/").rpartition("/")[2]
    say(f"answering at http://127.0.0.1:{port}/v1 as {model}; Ctrl-C ends it")
    uvicorn.run(build_app(engine, model), host="127.0.0.1", port=port, log_level="warning", access_log=False)


class _Server:
    def __init__(self, engine: Engine | GgufEngine, models: dict[str, bool]):
        self.engine, self.names = engine, models

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": self.engine.turns.waiting})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "fastoss"} for name in self.names]})

    async def chat(self, request: Request) -> Response:
        try:
            body = await _body(request)
            stops = _stops(body)
            # Rendering a long chat takes a moment: not in the loop that serves the others.
            reply = await anyio.to_thread.run_sync(self._asked, body)
        except _Refused as refused:
            return _error(refused.status, str(refused))
        except FastossError as problem:
            return _error(400, f"{problem.place or 'request'}: {problem.fact}" + (f" ({problem.hint})" if problem.hint else ""))
        told = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body["model"]}
        written = _Written(reply, stops)
        if body.get("stream"):
            with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(_events(written, told, with_usage), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        try:
            async for _ in written.deltas():
                pass
        except Busy as busy:
            return _error(429, busy.fact)
        except FastossError as problem:
            return _error(500, problem.fact)
        message = written.message()
        choice = {"index": 0, "message": message, "finish_reason": written.finish_reason}
        answer = {**told, "object": "chat.completion", "choices": [choice], "usage": written.usage(), "fastoss": {"problems": written.problems}}
        return JSONResponse(answer)

    def _asked(self, body: dict[str, Any]) -> Reply:
        if body.get("model") not in self.names:
            raise _Refused(404, f"there is no model {body.get('model')!r}; there is {', '.join(self.names)}")
        for name, value in body.items():
            if value is not None and name not in _READ | _OF_NO_MATTER and (name not in _ONLY or value != _ONLY[name]):
                raise _Refused(400, f"`{name}` = {json.dumps(value)[:80]} is not supported")
        columns = {"messages": body.get("messages")} | ({"tools": body["tools"]} if body.get("tools") else {})
        asked = row_to_asked(Row(columns, "messages"))
        if asked.reference is not None:
            raise _Refused(400, "messages: the chat does not end with a question")
        sampling = _sampling(body)
        effort, tools = body.get("reasoning_effort"), asked.conversation.tools
        return self.engine.stream(asked.messages, sampling, effort, tuned=self.names[body["model"]], tools=tools)


async def _body(request: Request) -> dict[str, Any]:
    """The request as JSON. A page of another site cannot send this type without being asked first, and then is refused."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise _Refused(415, "the request is not application/json")
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > LARGEST:
            raise _Refused(413, f"the request is larger than {LARGEST:,} bytes")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise _Refused(400, "the request is not valid JSON") from None
    if not isinstance(body, dict):
        raise _Refused(400, "the request is not a JSON object")
    return body


def _sampling(body: dict[str, Any]) -> Sampling:
    """OpenAI's defaults: temperature 1."""
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or LONGEST
    values = {"temperature": 1.0} | {
        name: body[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed") if body.get(name) is not None
    }  # fmt: skip
    for name, value in {**values, "max_tokens": limit}.items():
        whole = name in ("top_k", "seed", "max_tokens")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise _Refused(400, f"`{name}` is not a {'whole ' if whole else ''}number")
    return Sampling(max_new_tokens=limit, **values)


def _stops(body: dict[str, Any]) -> list[str]:
    given = body.get("stop") or []
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
        raise _Refused(400, "`stop` is a text, or a list of up to four")
    return stops


class _Written:
    """A reply as it is sent: the answer ends before a stop text; what might be the beginning of one is held back."""

    def __init__(self, reply: Reply, stops: list[str]):
        self.reply, self.stops = reply, stops
        self._held = ""
        self._sent: list[Delta] = []
        self._stopped = False

    async def deltas(self) -> AsyncIterator[Delta]:
        """Whoever stops listening stops the sampling, within a token."""
        try:
            # The thread is left behind when the client is gone: cancelling ends it.
            while (delta := await anyio.to_thread.run_sync(lambda: next(self.reply, None), abandon_on_cancel=True)) is not None:
                for piece in self._cut(delta):
                    self._sent.append(piece)
                    yield piece
                if self._stopped:
                    return
            if self._held:
                self._sent.append(Delta("final", self._held))
                yield self._sent[-1]
        finally:
            self.reply.cancel()

    def _cut(self, delta: Delta) -> list[Delta]:
        if delta.channel != "final" or not self.stops:
            return [delta]
        text = self._held + delta.text
        places = [text.find(stop) for stop in self.stops if stop in text]
        if places:
            self._stopped, self._held = True, ""
            text = text[: min(places)]
        else:
            kept = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        return [Delta("final", text)] if text else []

    @property
    def finish_reason(self) -> str:
        return "stop" if self._stopped else self.reply.finish_reason or "length"

    @property
    def problems(self) -> list[str]:
        return [] if self._stopped else self.reply.completion().problems

    def usage(self) -> dict[str, int]:
        prompt, tokens = self.reply.prompt_tokens, self.reply.tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def message(self) -> dict[str, Any]:
        said: dict[str, str] = {}
        calls: list[dict[str, Any]] = []
        for delta in self._sent:
            for key, value in _plain(delta, known=bool(calls)).items():
                if key == "tool_calls":
                    if not calls:
                        calls = [{**value[0], "function": {**value[0]["function"], "arguments": ""}}]
                    calls[0]["function"]["arguments"] += value[0]["function"]["arguments"]
                else:
                    said[key] = said.get(key, "") + value
        message: dict[str, Any] = {"role": "assistant", "content": said.get("content"), "reasoning_content": said.get("reasoning_content")}
        return message | ({"tool_calls": [{k: v for k, v in call.items() if k != "index"} for call in calls]} if calls else {})


def _plain(delta: Delta, *, known: bool) -> dict[str, Any]:
    """A delta in OpenAI's words; a call's id and name are said once."""
    if delta.recipient is not None:
        function = {"arguments": delta.text} | ({} if known else {"name": delta.recipient.removeprefix("functions.")})
        return {"tool_calls": [{"index": 0, "function": function} | ({} if known else {"id": f"call-{uuid.uuid4().hex[:12]}", "type": "function"})]}
    return {"reasoning_content" if delta.channel == "analysis" else "content": delta.text}


async def _events(written: _Written, told: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    told = {**told, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        return _event({**told, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more})

    yield chunk({"role": "assistant", "content": ""})
    called = False
    try:
        async for delta in written.deltas():
            yield chunk(_plain(delta, known=called))
            called = called or delta.recipient is not None
    except FastossError as problem:
        yield _event({"error": {"message": problem.fact, "type": "server_error", "code": 429 if isinstance(problem, Busy) else 500}})
        return
    yield chunk({}, written.finish_reason, fastoss={"problems": written.problems})
    if with_usage:
        yield _event({**told, "choices": [], "usage": written.usage()})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)
