"""An OpenAI-compatible endpoint in place of a loaded model: the same questions go to a server, its stream comes back as deltas.

The server renders the prompt, so the promise that prompts are those of training is its own. What of harmony's markup a server lets
through is flagged, not repaired: it cannot be told from an answer about such things.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import httpx

from fastoss.data.conversation import Message
from fastoss.data.harmony import Delta
from fastoss.data.tokenizer import CALL, RETURN, encode
from fastoss.errors import FastossError, RunFailed
from fastoss.inference.answering import Answering
from fastoss.inference.reply import Answer, Reply
from fastoss.inference.sampling import Question, Sampling

_TIMES = httpx.Timeout(connect=5, read=300, write=60, pool=60)
_LEFT_MARKUP = re.compile(r"<\|(start|channel|message|end|return|call)\|>|\banalysis.*assistantfinal", re.DOTALL)
_START = "start one there, or give a run"


def is_endpoint(name: str) -> bool:
    return name.startswith(("http://", "https://"))


class EndpointEngine(Answering):
    """Asks a server. `url` is what comes before `/chat/completions`, or the server alone (`/v1` is added); `#NAME` chooses one of its models.

    The key is OPENAI_API_KEY's, where the server wants one. Raises `FastossError` when no such server answers.
    """

    has_adapter = False

    def __init__(self, url: str):
        address, _, model = url.partition("#")
        try:
            parsed = httpx.URL(address)
        except httpx.InvalidURL as problem:
            raise FastossError(f"not an address: {problem}", place=url) from None
        self.url = address.rstrip("/") + ("/v1" if parsed.path in ("", "/") else "")
        headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"} if os.environ.get("OPENAI_API_KEY") else {}
        self.client = httpx.Client(timeout=_TIMES, headers=headers)
        self.model = model or self._first_model()

    def ask(self, question: Question, sampling: Sampling, *, tuned: bool = True) -> Reply:
        """Deltas hold what the server sends at once; a date cannot be asked for."""
        if not tuned:
            raise FastossError("a server has one model: its adapter cannot be switched off", place=self.url)
        if question.current_date is not None:
            raise FastossError("a server chooses the date itself", place=self.url, hint="leave `current_date` out of the row")
        body = self._body(question.checked(), sampling)
        return Reply(lambda reply: self._deltas(reply, body))

    def answers(self, questions: Sequence[Question], sampling: Sampling | None = None, *, tuned: bool = True) -> list[Answer]:
        """One after the other; the server may know better how to hurry."""
        return [self.ask(question, sampling or Sampling(), tuned=tuned).answer() for question in questions]

    def prompt_ids(self, question: Question) -> list[int]:
        """The tokens of its texts, by our tokenizer: for lengths alone. `FastossError` when it cannot be asked."""
        return [id for message in question.checked().said() for id in encode(message.content)]

    def _first_model(self) -> str:
        try:
            answer = self.client.get(f"{self.url}/models")
            answer.raise_for_status()
            return str(answer.json()["data"][0]["id"])
        except httpx.HTTPStatusError as problem:
            raise FastossError(f"the server answers {problem.response.status_code} to /models", place=self.url, hint=_hint(problem)) from None
        except httpx.TransportError as problem:
            raise FastossError(f"no server answers ({problem})", place=self.url, hint=_START) from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise FastossError("the server lists no model", place=self.url, hint=f"name one: {self.url}#NAME") from None

    def _body(self, question: Question, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model, "messages": [_plain(message, place) for place, message in enumerate(question.said())], "stream": True,
            "stream_options": {"include_usage": True}, "temperature": sampling.temperature, "max_tokens": sampling.max_new_tokens,
        }  # fmt: skip
        defaults = Sampling()
        for name in ("seed", "top_p", "top_k", "repetition_penalty"):  # the last two are no words of OpenAI's: only said where they are meant
            if getattr(sampling, name) != getattr(defaults, name):
                body[name] = getattr(sampling, name)
        if question.reasoning_effort:
            body["reasoning_effort"] = str(question.reasoning_effort)
        if question.tools:
            body["tools"] = [
                {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters or {}}}
                for tool in question.tools
            ]
        return body

    def _deltas(self, reply: Reply, body: dict[str, Any]) -> Generator[Delta, None, None]:
        text = ""
        names: dict[int, str] = {}  # of tool calls: the name comes once, the arguments in pieces
        for event in self._events(body):
            if reply.cancelled.is_set():
                return
            usage = event.get("usage")
            if usage:
                reply.prompt_tokens, reply.tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or reply.tokens
            for choice in event.get("choices") or ():
                for delta in _read(choice.get("delta") or {}, names):
                    reply.count()
                    text += delta.text if delta.channel == "final" else ""
                    yield delta
                reason = choice.get("finish_reason")
                if reason:
                    reply.finish_reason = str(reason)
                    reply.stop = {"stop": RETURN, "tool_calls": CALL}.get(reply.finish_reason)
        if reply.finish_reason is None:
            reply.problems.append("the server ended the stream without saying why")
        if _LEFT_MARKUP.search(text):
            reply.problems.append("the server left harmony's markup in the answer")

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The server-sent events of one request. `RunFailed` when it refuses, or breaks off."""
        try:
            with self.client.stream("POST", f"{self.url}/chat/completions", json=body) as answer:
                if answer.is_error:
                    answer.read()
                    raise RunFailed(f"the server answers {answer.status_code}: {answer.text[:300].strip()}", place=self.url)
                for line in answer.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        continue
                    event = json.loads(data)
                    if event.get("error"):
                        raise RunFailed(f"the server failed: {json.dumps(event['error'], ensure_ascii=False)[:300]}", place=self.url)
                    yield event
        except httpx.TransportError as problem:
            raise RunFailed(f"the connection broke: {problem}", place=self.url) from None
        except ValueError:
            raise RunFailed("the server sent something other than JSON", place=self.url) from None


def _read(delta: dict[str, Any], names: dict[int, str]) -> Iterator[Delta]:
    """A choice's delta: servers call the reasoning by two names."""
    reasoning = delta.get("reasoning_content") or delta.get("reasoning")
    if reasoning:
        yield Delta("analysis", str(reasoning))
    if delta.get("content"):
        yield Delta("final", str(delta["content"]))
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        name = names.setdefault(call.get("index") or 0, str(function.get("name") or ""))
        yield Delta("commentary", str(function.get("arguments") or ""), f"functions.{name}")


def _plain(message: Message, place: int) -> dict[str, Any]:
    if message.role == "tool":
        return {"role": "tool", "content": message.content, "name": message.name, "tool_call_id": f"call-{place - 1}"}
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_call:
        function = {"name": message.tool_call.name, "arguments": message.tool_call.arguments}
        plain["tool_calls"] = [{"id": f"call-{place}", "type": "function", "function": function}]
    return plain


def _hint(problem: httpx.HTTPStatusError) -> str:
    return "set OPENAI_API_KEY" if problem.response.status_code in (401, 403) else _START
