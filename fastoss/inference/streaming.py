"""Tokens → deltas: whoever samples runs in a thread of its own, whoever reads gets what the parser makes of the tokens.

Both the engine and llama.cpp answer through this, so that turns, cancelling and parsing are the same.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Sequence
from queue import Empty, SimpleQueue

from fastoss.data.harmony import CompletionParser, Delta
from fastoss.errors import FastossError, RunFailed
from fastoss.inference.reply import Reply
from fastoss.inference.turns import Turns

Tell = Callable[[Sequence[int], int], None]  # ids for the parser, and how many tokens were sampled
_LOOK_S = 0.1  # how soon a cancelled reply is seen that waits for a token


def streamed(reply: Reply, turns: Turns, sample: Callable[[Tell], None], interrupt: Callable[[], None] | None = None) -> Generator[Delta, None, None]:
    """The deltas of a reply whose tokens `sample` tells. It should end soon after `reply.cancelled` is set; `interrupt` ends it from outside."""
    parser = CompletionParser()
    reply.problems = parser.problems
    with contextlib.closing(_tokens(reply, turns, sample, interrupt)) as told:
        for ids, count in told:
            reply.count(count)
            for token in ids:
                delta = parser.feed(token)
                reply.stop = parser.stop
                if delta is not None:
                    yield delta
    if parser.stop is None:
        delta = parser.close()
        if delta is not None:
            yield delta


def _tokens(
    reply: Reply, turns: Turns, sample: Callable[[Tell], None], interrupt: Callable[[], None] | None
) -> Generator[tuple[Sequence[int], int], None, None]:
    """What `sample` tells, in a thread of its own; the generator's end ends the thread.

    The thread has the model's turn, not whoever reads: a slow reader does not keep others waiting.
    """
    said: SimpleQueue[tuple[Sequence[int], int] | BaseException | None] = SimpleQueue()

    def tell(ids: Sequence[int], count: int) -> None:
        said.put((ids, count))
        time.sleep(0)  # gives the reader its turn now: else it waits for the interpreter's 5 ms, well into the next token

    def run() -> None:
        try:
            with turns.turn(reply.cancelled) as ours:
                reply.waited_seconds = reply.elapsed()
                if ours and not reply.cancelled.is_set():
                    sample(tell)
            said.put(None)
        except BaseException as problem:  # handed to the reader's thread, which raises it
            said.put(problem)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = said.get(timeout=_LOOK_S if interrupt else None)
            except Empty:
                if reply.cancelled.is_set():
                    return
                continue
            if item is None:
                return
            if isinstance(item, FastossError):
                raise item
            if isinstance(item, BaseException):
                raise RunFailed(f"generation failed: {item}") from item
            yield item
            if interrupt and reply.cancelled.is_set():
                return
    finally:
        reply.cancelled.set()
        if interrupt:
            interrupt()
        thread.join()
