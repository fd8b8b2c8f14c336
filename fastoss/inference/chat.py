"""The terminal chat: a view over whatever answers. Reasoning goes dimmed to stderr, the answer to stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fastoss.data.conversation import Message
from fastoss.errors import FastossError, RunFailed
from fastoss.inference.endpoint import EndpointEngine
from fastoss.inference.engine import Engine
from fastoss.inference.gguf import GgufEngine
from fastoss.inference.open_model import open_model
from fastoss.inference.reply import Reply
from fastoss.inference.sampling import Effort, Question, ReasoningLanguage, Sampling

HELP = """\
/effort low|medium|high|as trained   how much it reasons
/language NAME|off                   the language to reason in, such as /language German
/system TEXT                         the system text; without TEXT: none
/base, /tuned                        ask the base model, or the tuned one again
/temperature T                       0 always takes the likeliest token
/retry                               answer the last question again
/undo                                forget the last question and its answer
/new                                 forget the whole conversation
/save FILE                           add the conversation to a JSONL file, as a row for training
/help                                this
/quit, or Ctrl-D                     end; Ctrl-C stops a reply
A line that ends with \\ continues on the next one."""


class Talk:
    """One conversation and its settings; `command` and `ask` change it."""

    def __init__(self, engine: Engine | GgufEngine | EndpointEngine, question: Question, sampling: Sampling, *, tuned: bool = True):
        self.engine, self.sampling, self.tuned = engine, sampling, tuned
        self.asked = question  # its messages are the history
        self.last: str | None = None  # the last question, whether or not it was answered

    def ask(self, text: str) -> str:
        """Ask, show the reply as it comes, and keep both where an answer came. Returns the answer."""
        self.last = text
        question = self.asked.followed_by(Message("user", text))
        reply = self.engine.stream(
            question.messages, self.sampling, question.reasoning_effort, language=question.language, tuned=self.tuned
        )  # fmt: skip
        shown = show(reply)
        completion = reply.completion()
        if completion.content and reply.finish_reason != "cancelled":
            # The next prompt holds this answer without its reasoning, as training showed them; /save writes it with it.
            self.asked = question.followed_by(Message("assistant", completion.content, completion.thinking or None))
        else:
            say("note: the question is not kept, since no whole answer came; /retry asks it again")
        for problem in completion.problems:
            say(f"note: the reply was malformed: {problem}")
        if reply.finish_reason == "length":
            say(f"note: cut off after {reply.tokens:,} tokens (--max-new-tokens)")
        return shown

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash. `FastossError` when it is none, or cannot be done."""
        name, _, told = line[1:].partition(" ")
        told = told.strip()
        if name == "help":
            say(HELP)
        elif name == "new":
            self.asked = replace(self.asked, messages=self.asked.messages[:1] if self._system() else ())
            self.last = None
        elif name == "retry":
            if self.last is None:
                raise FastossError("nothing was asked yet", place="/retry")
            last = self.last
            self._undo()
            if self.sampling.temperature == 0:
                say("note: at temperature 0 the same question has the same answer; /temperature 1 varies it")
            self.ask(last)
        elif name == "undo":
            self._undo()
            self.last = None
        elif name == "effort":
            if told not in ("", "as trained", *Effort):
                raise FastossError(f"“{told}” is not a reasoning effort", place="/effort", hint="low, medium, high, or as trained")
            self.asked = replace(self.asked, reasoning_effort=told if told in list(Effort) else None)
        elif name == "language":
            self.asked = replace(self.asked, language=None if told in ("", "off") else ReasoningLanguage.named(told))
        elif name == "system":
            rest = self.asked.messages[1 if self._system() else 0 :]
            self.asked = replace(self.asked, messages=((Message("system", told), *rest) if told else rest))
        elif name in ("base", "tuned"):
            if name == "base" and not self.engine.has_adapter:
                raise FastossError("this model has no adapter: there is nothing to switch off", place="/base")
            self.tuned = name == "tuned"
        elif name == "temperature":
            try:
                self.sampling = replace(self.sampling, temperature=float(told))
            except ValueError:
                raise FastossError(f"“{told}” is not a number", place="/temperature") from None
        elif name == "save":
            self._save(told)
        else:
            raise FastossError(f"/{name} is not a command", hint="/help lists them")

    def _system(self) -> str:
        messages = self.asked.messages
        return messages[0].content if messages and messages[0].role == "system" else ""

    def _undo(self) -> None:
        """Take back the last question, if it was kept."""
        messages = self.asked.messages
        if self.last is not None and len(messages) >= 2 and messages[-2] == Message("user", self.last):
            self.asked = replace(self.asked, messages=messages[:-2])

    def _save(self, name: str) -> None:
        if not name:
            raise FastossError("name a file", place="/save", hint="/save chats.jsonl")
        messages = self.asked.said()
        if not messages or messages[-1].role != "assistant":
            raise FastossError("there is no answer to save yet", place="/save")
        row = {"messages": [{"role": m.role, "content": m.content} | ({"thinking": m.thinking} if m.thinking else {}) for m in messages]}
        effort = {"reasoning_effort": self.asked.reasoning_effort} if self.asked.reasoning_effort else {}
        try:
            with open(Path(name).expanduser(), "a", encoding="utf-8") as file:
                file.write(json.dumps(row | effort, ensure_ascii=False) + "\n")
        except OSError as problem:
            raise FastossError(f"cannot be written: {problem.strerror}", place=name) from None
        say(f"added to {name}")


def chat(name: str, prompt: str | None, question: Question, sampling: Sampling, *, tuned: bool = True) -> None:
    """Answer `prompt` once, or talk until the input ends. `question` holds the system text and how to reason.

    Raises `RunFailed` when one answer was asked and none came.
    """
    if prompt is None:
        say(f"loading {name} …")
    talk = Talk(open_model(name), question, sampling, tuned=tuned)
    if prompt is not None:
        if not talk.ask(prompt):
            raise RunFailed("the model gave no answer", hint="raise --max-new-tokens if its reasoning was cut")
        return
    say("type a message; /help lists commands; Ctrl-D ends the chat")
    for line in _lines():
        try:
            if line.startswith("/"):
                talk.command(line)
            else:
                talk.ask(line)
        except FastossError as problem:
            say(str(problem))


def show(reply: Reply) -> str:
    """Print a reply as it comes; Ctrl-C stops it. Returns what went to stdout."""
    dim, plain = ("\033[2m", "\033[0m") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    answer = ""
    reasoning = False
    try:
        for delta in reply:
            if delta.channel == "final":
                if reasoning:
                    print(plain, file=sys.stderr, flush=True)
                    reasoning = False
                answer += delta.text
                print(delta.text, end="", flush=True)
            else:
                print(("" if reasoning else dim) + delta.text, end="", file=sys.stderr, flush=True)
                reasoning = True
    except KeyboardInterrupt:
        say(f"{plain if reasoning else ''}\n(stopped)")
        reasoning = False
    finally:
        reply.close()
    if reasoning:
        print(plain, file=sys.stderr)
    print(flush=True)
    return answer


def say(line: str) -> None:
    """Tell the user something that is no answer."""
    print(line, file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """Messages from the terminal, with line editing, or from a pipe, without empty ones."""
    terminal = sys.stdin.isatty()
    editing = terminal and sys.stdout.isatty()
    if editing:
        with contextlib.suppress(ImportError):  # not everywhere; then lines are plain
            import readline  # noqa: F401  input() edits lines and remembers them when it is imported
    held = ""
    while True:
        if terminal and not editing:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input("… " if held else "> ") if editing else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not line and not editing:  # the end of what is piped in; an empty line would be "\n"
            return
        line = held + line.rstrip("\n")
        if line.endswith("\\"):
            held = line[:-1] + "\n"
            continue
        held = ""
        if line.strip() in ("/quit", "/exit"):
            return
        if line.strip():
            yield line.strip()
