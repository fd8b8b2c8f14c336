"""The engine beside transformers' plain `generate` (`make bench`): when the first token comes, and how fast the others follow.

The same prompt, the same sampled tokens, in one process, in pairs whose order alternates. `wall` is what a clock shows, `cpu` the processor
time of this process until then, on which other work on the machine has less influence. Ratios are ours / theirs: 1.0 is as fast,
below is faster. Results go to benchmarks/results/answers_cpu.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script too

from benchmarks.timing import ROOT, spread
from fastoss.data.conversation import Message
from fastoss.inference.engine import Engine
from fastoss.inference.sampling import Question, Sampling
from fastoss.model.adapter import library_versions
from fastoss.run import write_json

RESULTS = ROOT / "benchmarks" / "results" / "answers_cpu.json"
PAIRS = 16
NEW_TOKENS = 24
Times = dict[str, float]  # seconds until the first token, and a token after it


class _Clock:
    """Two clocks that begin together; the first token is noted as it comes."""

    def __init__(self) -> None:
        self.begun = (time.perf_counter(), time.process_time())
        self.first: tuple[float, float] | None = None

    def tick(self) -> None:
        if self.first is None:
            self.first = (time.perf_counter(), time.process_time())

    def times(self, tokens: int) -> Times:
        ended = (time.perf_counter(), time.process_time())
        assert self.first is not None
        return {
            f"{what}_{clock}": value
            for clock, begun, first, end in zip(("wall", "cpu"), self.begun, self.first, ended, strict=True)
            for what, value in (("first_token", first - begun), ("token", (end - first) / (tokens - 1)))
        }


class _Streamer:
    """transformers hands the prompt first, then each new token: what is bare about `generate`, but for a clock."""

    def __init__(self, clock: _Clock):
        self.clock, self.prompt_seen = clock, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.clock.tick()
        self.prompt_seen = True

    def end(self) -> None:
        pass


def plain(engine: Engine, prompt: list[int], sampling: Sampling) -> tuple[list[int], Times]:
    """What transformers samples by itself, with its own cache."""
    clock = _Clock()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = engine.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), streamer=_Streamer(clock), **sampling.generate_arguments()
        )  # fmt: skip
    sampled = output[0, len(prompt) :].tolist()
    return sampled, clock.times(len(sampled))


def ours(engine: Engine, messages: list[Message], sampling: Sampling, *, anew: bool) -> tuple[list[int], Times]:
    """The engine's tokens: rendered, sampled in a thread, parsed. `anew` forgets what earlier replies computed."""
    if anew and engine._caches is not None:
        engine._caches.clear()
    clock = _Clock()
    reply = engine.stream(messages, sampling)
    count, sampled = reply.count, []

    def counted(tokens: int = 1) -> None:
        clock.tick()
        count(tokens)

    reply.count = counted  # type: ignore[method-assign]  # told of every token, also where no text is complete yet
    for _ in reply:
        pass
    times = clock.times(reply.tokens)
    if engine._caches is not None:  # what was sampled, all but the last token of which has keys
        sampled = engine._caches._kept[-1].ids[reply.prompt_tokens :]
    return sampled, times


def compared(engine: Engine, messages: list[Message], *, anew: bool = True, pairs: int = PAIRS) -> dict[str, Any]:
    """Pairs of both, first one and then the other first; the tokens are held against each other each time."""
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    prompt = engine.prompt_ids(Question(tuple(messages)))
    found: list[dict[str, Times]] = []
    for number in range(pairs + 1):  # the first warms up
        runs: dict[str, Callable[[], tuple[list[int], Times]]] = {
            "ours": lambda: ours(engine, messages, sampling, anew=anew), "plain": lambda: plain(engine, prompt, sampling),
        }  # fmt: skip
        done = {name: runs[name]() for name in (sorted(runs) if number % 2 else sorted(runs, reverse=True))}
        mine, theirs = done["ours"][0], done["plain"][0]
        assert mine == theirs[: len(mine)], "the tokens differ"
        assert len(mine) >= len(theirs) - 1
        if number:
            found.append({name: times for name, (_, times) in done.items()})
    result: dict[str, Any] = {"prompt_tokens": len(prompt), "new_tokens": len(theirs), "pairs": pairs}
    for name in ("first_token_wall", "first_token_cpu", "token_wall", "token_cpu"):
        sides = {side: [pair[side][name] for pair in found] for side in ("ours", "plain")}
        middle = {side: statistics.median(values) for side, values in sides.items()}
        result[name] = {
            "ratio_of_medians": middle["ours"] / middle["plain"], "ratio_of_best": min(sides["ours"]) / min(sides["plain"]),
            "pair_by_pair": spread([mine / theirs for mine, theirs in zip(sides["ours"], sides["plain"], strict=True)]),
            "milliseconds_ours": 1000 * middle["ours"], "milliseconds_plain": 1000 * middle["plain"],
        }  # fmt: skip
    return result


def main() -> None:
    torch.set_num_threads(1)
    engine = Engine.load("tiny")
    question = [Message("user", "Tell me about the harbour and all its boats. " * 20)]
    chat = [*question, Message("assistant", "There are many."), Message("user", "And at night?")]
    results = {"new_question": compared(engine, question), "question_asked_again": compared(engine, chat, anew=False)}
    for name, result in results.items():
        print(f"{name}: {json.dumps(result)}", flush=True)
    facts = {
        "command": "python benchmarks/answers_cpu.py", "machine": platform.machine(), "python": sys.version.split()[0], "threads": 1,
        "load_average": round(os.getloadavg()[0], 1), "cores": os.cpu_count(),
    }  # fmt: skip
    write_json(RESULTS, facts | {"versions": library_versions(), "results": results})


if __name__ == "__main__":
    main()
