"""One visitor's conversation: questions go to the engine, replies come in pieces, each turn remembers what it was asked with.

The page calls it and draws it (view.py); nothing here knows of Gradio.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fastoss.data.conversation import Message
from fastoss.demo.limits import Limits
from fastoss.errors import FastossError
from fastoss.inference.languages import language_of
from fastoss.inference.reply import Reply
from fastoss.inference.sampling import Question, ReasoningLanguage, Sampling, asked_language
from fastoss.inference.turns import Busy

PICTURES_A_SECOND = 10
AS_USER = "as the user"


class Mode(StrEnum):
    """Whom a question goes to. Two answers are what a preference can be said of."""

    TUNED = "tuned"
    BASE = "base"
    BOTH = "base | tuned"
    TWICE = "tuned | tuned"

    @property
    def sides(self) -> tuple[tuple[str, bool], ...]:
        """Label, and whether the adapter is on."""
        one, _, other = self.value.partition(" | ")
        return tuple((name, name == "tuned") for name in (one, other) if name)


@dataclass(frozen=True)
class Asking:
    """How a question is asked. `language`: a name, "as the user" (the language the question is in), or empty: as it was trained."""

    mode: Mode = Mode.TUNED
    effort: str | None = None
    language: str = ""
    temperature: float = 0.0
    system: str = ""
    max_new_tokens: int = 1024

    def reasoning_language(self, text: str) -> ReasoningLanguage | None:
        if self.language == AS_USER:
            code = language_of(text)
            return ReasoningLanguage(code) if code else None
        return ReasoningLanguage.named(self.language) if self.language else None


@dataclass
class Spoken:
    """One reply as far as it has come. `state`: waiting, thinking, answering, done, stopped, failed."""

    label: str
    tuned: bool
    state: str = "waiting"
    thinking: str = ""
    content: str = ""
    call: str = ""
    problems: list[str] = field(default_factory=list)
    fault: str | None = None  # why there is no answer, in words for the visitor
    tokens: int = 0
    first_token_seconds: float | None = None  # from its own turn on, waiting for others left out
    thinking_seconds: float | None = None
    seconds: float = 0.0
    waiting: int = 0
    reasoned_in: str | None = None
    vote: str | None = None  # "up" or "down"

    @property
    def ended(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    @property
    def tokens_a_second(self) -> float | None:
        after = self.seconds - (self.first_token_seconds or 0.0)
        return (self.tokens - 1) / after if self.tokens > 4 and after > 0 else None

    def follow(self, reply: Reply) -> None:
        """Take over what has come so far."""
        so_far = reply.completion()
        self.thinking, self.content, self.problems = so_far.thinking or "", so_far.content, so_far.problems
        self.call = f"{so_far.tool_call.name}({so_far.tool_call.arguments})" if so_far.tool_call else ""
        self.tokens = reply.tokens
        if reply.first_token_seconds is not None:
            self.first_token_seconds = reply.first_token_seconds - reply.waited_seconds
        self.seconds = (reply.seconds if reply.seconds is not None else reply.elapsed()) - reply.waited_seconds
        if self.content:
            if self.thinking and self.thinking_seconds is None:
                self.thinking_seconds = self.seconds
            self.state = "answering"
        elif reply.tokens:
            self.state = "thinking"

    def end(self, reply: Reply) -> None:
        self.follow(reply)
        if self.thinking and self.thinking_seconds is None:
            self.thinking_seconds = self.seconds
        self.state = {"cancelled": "stopped", "failed": "failed"}.get(reply.finish_reason or "", "done")
        if reply.finish_reason == "length":
            self.fault = f"cut off after {reply.tokens:,} tokens"
        self.reasoned_in = language_of(self.thinking)


@dataclass
class Turn:
    """A question and its replies: side by side, and those of earlier tries in `before`. `asked` is the prompt, as it was rendered."""

    text: str
    asking: Asking
    asked: tuple[Message, ...]
    language: ReasoningLanguage | None
    replies: list[Spoken]
    before: list[Spoken] = field(default_factory=list)
    preferred: int | None = None

    @property
    def kept(self) -> Spoken:
        """The reply from which the conversation continues: the preferred one, else the tuned one."""
        if self.preferred is not None:
            return self.replies[self.preferred]
        return next((reply for reply in self.replies if reply.tuned), self.replies[0])

    def all_replies(self) -> list[Spoken]:
        return [*self.before, *self.replies]


class Talk:
    """A conversation. One question at a time is under way; `stop` may be called from another thread."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.used = time.monotonic()
        self._asking = threading.Lock()
        self._reply: Reply | None = None
        self._stopped = False

    @property
    def busy(self) -> bool:
        return self._asking.locked()

    def messages(self, system: str) -> tuple[Message, ...]:
        """The history as the next prompt shows it; turns without an answer are left out."""
        said = [Message("system", system)] if system.strip() else []
        for turn in self.turns:
            if turn.kept.content:
                said += [Message("user", turn.text), Message("assistant", turn.kept.content, turn.kept.thinking or None)]
        return tuple(said)

    def ask(self, engine: Any, text: str, asking: Asking, limits: Limits, before: list[Spoken] | None = None) -> Iterator[None]:
        """Ask, and yield whenever there is something new to draw. Raises `FastossError` when it cannot be asked.

        `before` are earlier replies to the same question.
        """
        limits.check_texts(text, asking.system)
        limits.check_length(len(self.turns))
        if not self._asking.acquire(blocking=False):
            raise FastossError("an answer is under way already", hint="wait for it, or stop it")
        try:
            self.used, self._stopped = time.monotonic(), False
            language = asking.reasoning_language(text)
            question = Question((*self.messages(asking.system), Message("user", text)), asking.effort, language)
            limits.check_prompt(len(engine.prompt_ids(question)))
            sampling = Sampling(asking.temperature, min(asking.max_new_tokens, limits.reply_tokens))
            names = asking.mode.sides if engine.has_adapter else (("model", True),)
            turn = Turn(text, asking, question.said(), language or asked_language(question.messages), [Spoken(*name) for name in names], before or [])
            self.turns.append(turn)
            for spoken in turn.replies:
                if self._stopped:
                    spoken.state = "stopped"
                    continue
                yield from self._follow(engine, question, sampling, spoken, limits)
            yield
        finally:
            self._reply = None
            self._asking.release()
            self.used = time.monotonic()

    def stop(self) -> None:
        """End the reply under way within a token."""
        self._stopped = True
        reply = self._reply
        if reply is not None:
            reply.cancel()

    @contextlib.contextmanager
    def free(self, seconds: float) -> Iterator[None]:
        """Within it nothing is under way. `FastossError` when a reply does not come to its end in time."""
        if not self._asking.acquire(timeout=seconds):
            raise FastossError("the answer under way does not end")
        try:
            yield
        finally:
            self._asking.release()

    def take_back(self) -> Turn | None:
        """Remove the last turn and return it."""
        return self.turns.pop() if self.turns and not self.busy else None

    def _follow(self, engine: Any, question: Question, sampling: Sampling, spoken: Spoken, limits: Limits) -> Iterator[None]:
        reply = engine.stream(question.messages, sampling, question.reasoning_effort, language=question.language, tuned=spoken.tuned)
        self._reply = reply
        if self._stopped:  # between the two lines before
            reply.cancel()
        news, over = threading.Event(), threading.Event()
        faults: list[FastossError] = []

        def read() -> None:
            """In a thread of its own: a reader cannot be interrupted while it waits for text, and the clock must go on."""
            try:
                for _ in reply:
                    news.set()
            except FastossError as problem:
                faults.append(problem)
            except Exception as problem:
                faults.append(FastossError(f"the answer failed: {type(problem).__name__}"))
            finally:
                over.set()
                news.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        late = False
        try:
            while not over.is_set():
                news.wait(0.5)
                news.clear()
                spoken.waiting = engine.turns.waiting if hasattr(engine, "turns") else 0
                spoken.follow(reply)
                yield
                began = reply.waited_seconds or (reply.tokens > 0)
                if began and reply.elapsed() - reply.waited_seconds > limits.reply_seconds and not late:
                    late = True
                    reply.cancel()
                over.wait(1 / PICTURES_A_SECOND)
        finally:
            reply.cancel()
            reader.join()
        spoken.end(reply)
        if late:
            spoken.fault = f"stopped after {limits.reply_seconds:.0f} seconds"
        if faults:
            spoken.state = "failed"
            busy = isinstance(faults[0], Busy)
            spoken.fault = "Many people are asking just now. Please try again in a moment." if busy else faults[0].fact
