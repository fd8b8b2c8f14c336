"""A reply while it comes: an iterator of deltas that knows afterwards how it ended, how long it took and what was malformed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from fastoss.data.harmony import Completion, Delta, completion_from
from fastoss.data.tokenizer import CALL


@dataclass(frozen=True)
class Answer:
    """A whole reply. `tokens` counts what was sampled, the stop token included; `seconds` is the time of its batch, or its own."""

    completion: Completion
    tokens: int
    prompt_tokens: int
    seconds: float
    finish_reason: str


class Reply(Iterator[Delta]):
    """Deltas as they are sampled. `close()` (or the end of a `with` block) ends the sampling within a token, `cancel()` does so from another thread.

    Known at its end: `finish_reason` (stop, length, tool_calls, cancelled), `tokens`, `seconds`; as soon as it is known:
    `problems`, `first_token_seconds` (both times count from the asking, waiting for others included), `waited_seconds`,
    `reused_tokens` (of the prompt, found in the cache of an earlier turn).
    """

    def __init__(self, deltas: Callable[[Reply], Generator[Delta, None, None]], prompt_tokens: int = 0):
        self.problems: list[str] = []
        self.prompt_tokens = prompt_tokens
        self.tokens = self.reused_tokens = 0
        self.stop: int | None = None
        self.finish_reason: str | None = None
        self.first_token_seconds: float | None = None
        self.waited_seconds = 0.0
        self.seconds: float | None = None
        self.deltas: list[Delta] = []
        self.cancelled = threading.Event()
        self._cut = False
        self._begun = time.monotonic()
        self._source = deltas(self)

    def __next__(self) -> Delta:
        try:
            delta = next(self._source)
        except StopIteration:
            self._ended()
            raise
        except BaseException:
            self._ended("failed")
            raise
        self.deltas.append(delta)
        return delta

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self) -> None:
        """End the sampling within a token, from any thread: whoever iterates comes to the end."""
        self._cut = True
        self.cancelled.set()

    def close(self) -> None:
        """End it now, if it has not ended. Returns when the model is free again. For the thread that iterates; others `cancel`."""
        self.cancel()
        self._source.close()
        self._ended()

    def count(self, tokens: int = 1) -> None:
        """Note that tokens were sampled."""
        if self.first_token_seconds is None:
            self.first_token_seconds = self.elapsed()
        self.tokens += tokens

    def elapsed(self) -> float:
        """Seconds since it was asked for."""
        return time.monotonic() - self._begun

    def answer(self) -> Answer:
        """The whole reply, after the rest of it was awaited."""
        for _ in self:
            pass
        assert self.seconds is not None
        return Answer(self.completion(), self.tokens, self.prompt_tokens, self.seconds, self.finish_reason or "length")

    def completion(self) -> Completion:
        """What has come so far, by channel."""
        return completion_from(self.deltas, list(self.problems), self.stop)

    def _ended(self, reason: str | None = None) -> None:
        if self.seconds is None:
            self.seconds = self.elapsed()
            cut = self._cut and self.stop is None
            self.finish_reason = reason or self.finish_reason or ("cancelled" if cut else finish_reason(self.stop))


def finish_reason(stop: int | None) -> str:
    """In OpenAI's words: how a reply ended that this token stopped."""
    return "length" if stop is None else "tool_calls" if stop == CALL else "stop"
