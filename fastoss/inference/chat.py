"""The terminal chat: a view over `Engine`. Reasoning goes dimmed to stderr, the answer to stdout."""

from __future__ import annotations

import os
import sys

from fastoss.data.conversation import Message
from fastoss.errors import RunFailed
from fastoss.inference.engine import Engine, Sampling


def chat(name: str, prompt: str | None, temperature: float, max_new_tokens: int) -> None:
    """Answer `prompt` once, or talk until the input ends. Raises `RunFailed` when one answer was asked and none came."""
    if prompt is None:
        print(f"loading {name} …", file=sys.stderr, flush=True)
    engine = Engine.load(name)
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
    if prompt is not None:
        answer = _answer(engine, [Message("user", prompt)], sampling)
        if not answer:
            raise RunFailed("the model gave no answer", hint="raise --max-new-tokens if its reasoning was cut")
        return
    print("type a message; /new forgets what was said; an empty line or Ctrl-D ends the chat", file=sys.stderr)
    history: list[Message] = []
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        if line == "/new":
            history.clear()
            continue
        history.append(Message("user", line))
        answer = _answer(engine, history, sampling)
        # The next prompt holds earlier answers without their reasoning, as training showed them.
        history.append(Message("assistant", answer or "…"))


def _answer(engine: Engine, messages: list[Message], sampling: Sampling) -> str:
    dim, plain = ("\033[2m", "\033[0m") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    answer = ""
    reasoning = False
    for delta in engine.stream(messages, sampling):
        if delta.channel == "final":
            if reasoning:
                print(plain, file=sys.stderr, flush=True)
                reasoning = False
            answer += delta.text
            print(delta.text, end="", flush=True)
        else:
            print(("" if reasoning else dim) + delta.text, end="", file=sys.stderr, flush=True)
            reasoning = True
    if reasoning:
        print(plain, file=sys.stderr)
    print(flush=True)
    for problem in engine.problems:
        print(f"note: the reply was malformed: {problem}", file=sys.stderr)
    return answer
