"""A GGUF export, asked as a run is: our renderer's tokens go to llama.cpp, its tokens come back through our parser. Its own template is not used."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastoss.config import FormatSettings
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.tokenizer import SPECIAL, START, encode, token_bytes
from fastoss.errors import FastossError
from fastoss.inference.answering import Answering
from fastoss.inference.llama_cpp import LlamaServer, Stream, check_llama_cpp, running
from fastoss.inference.reply import Answer, Reply
from fastoss.inference.sampling import Question, Sampling, prompt_ids
from fastoss.inference.streaming import Tell, streamed
from fastoss.inference.turns import Turns
from fastoss.model.adapter import STAMP, read_stamp

CHATS = 4  # answered at once: llama.cpp batches them token by token
CONTEXT = 16_384  # tokens that all of them share, 49 kB each for gpt-oss-20b


def is_gguf(name: str) -> bool:
    """Whether a name is a .gguf file's, or that of an export's folder with one."""
    path = Path(name).expanduser()
    if path.is_dir():
        return any(path.glob("*.gguf")) and not (path / "config.json").is_file()
    return path.suffix.lower() == ".gguf"


class GgufEngine(Answering):
    """llama.cpp with one file, behind the same words as `Engine`. It has no adapter that could be switched off."""

    has_adapter = False

    def __init__(self, server: LlamaServer, format: FormatSettings, *, waiting: int | None = None):
        self.server = server
        self.renderer = HarmonyRenderer(format)
        self.turns = Turns(waiting, CHATS)
        self._end: Callable[[], Any] = lambda: None
        self.context_length = int(server.get("/props")["default_generation_settings"]["n_ctx"])

    @classmethod
    def load(cls, name: str) -> GgufEngine:
        """Start llama.cpp with a file. Raises `FastossError` without llama.cpp or file, `RunFailed` where it does not load."""
        file = _file(name)
        check_llama_cpp(name, "answers")
        # An export says how its prompts are to be rendered; a published file does not.
        stamp = read_stamp(file.parent) if (file.parent / STAMP).is_file() else None
        context = max(CONTEXT, stamp.model.max_length if stamp else 0)
        stack = contextlib.ExitStack()
        # Without a GPU, or with a llama.cpp that was built for none, the number of its layers means nothing.
        server = stack.enter_context(running(file, context, _threads(), chats=CHATS, gpu_layers=999))
        try:
            if server.tokenize(SPECIAL[START] + "assistant") != [START, *encode("assistant")]:
                raise FastossError("the file has another tokenizer than gpt-oss", place=str(file))
            engine = cls(server, stamp.format if stamp else FormatSettings())
        except BaseException:
            stack.close()
            raise
        engine._end = weakref.finalize(engine, stack.close)
        return engine

    def close(self) -> None:
        """End llama.cpp; it ends with this process as well."""
        self._end()

    def prompt_ids(self, question: Question) -> list[int]:
        """As `Engine.prompt_ids`."""
        return prompt_ids(self.renderer, question, self.context_length)

    def ask(self, question: Question, sampling: Sampling, *, tuned: bool = True) -> Reply:
        """A few replies are sampled at once."""
        if not tuned:
            raise FastossError("a GGUF file holds tuned weights: there is no adapter to switch off", place="tuned=False", hint="ask the run")
        prompt = self.prompt_ids(question)
        asking = _Asking(self.server, prompt, sampling, self.context_length)
        return Reply(lambda reply: streamed(reply, self.turns, lambda tell: asking.sample(reply, tell), asking.cut), len(prompt))

    def answers(self, questions: Sequence[Question], sampling: Sampling | None = None, *, tuned: bool = True) -> list[Answer]:
        """Several chats at once, in order. Their `seconds` are their own; each has its own seed, by its place."""
        chosen = sampling or Sampling()

        def answer(place: int, question: Question) -> Answer:
            seeded = chosen if chosen.seed is None else replace(chosen, seed=chosen.seed + place * 1_000_003)
            return self.ask(question, seeded, tuned=tuned).answer()

        with ThreadPoolExecutor(CHATS) as pool:
            return list(pool.map(answer, range(len(questions)), questions))


class _Asking:
    """One request, from its first token to its last."""

    def __init__(self, server: LlamaServer, prompt: list[int], sampling: Sampling, context: int):
        self.server = server
        self.body = {"prompt": prompt, "stream": True, "return_tokens": True} | _arguments(sampling, context)
        self.stream: Stream | None = None

    def cut(self) -> None:
        if self.stream is not None:
            self.stream.cut()

    def sample(self, reply: Reply, tell: Tell) -> None:
        self.stream = Stream(self.server, "/completion", self.body)
        counted = 0
        for event in self.stream.events():
            if reply.cancelled.is_set():
                return
            sampled = int(event.get("tokens_predicted") or 0)
            if event.get("stop"):
                reply.reused_tokens = int((event.get("timings") or {}).get("cache_n") or 0)
                if sampled > counted:  # cut off within a character
                    tell([_one_byte(0xF0)], sampled - counted)
                return
            told: list[int] = event["tokens"]
            if sampled - counted > len(told):
                # While a character is incomplete llama.cpp keeps its tokens back, and then says the last of them with the whole text.
                last = told[-1:] if told and told[-1] in SPECIAL else []
                text = event["content"].removesuffix(SPECIAL[last[0]] if last else "")
                told = [*map(_one_byte, text.encode()), *last]
            tell(told, sampled - counted)
            counted = sampled


def _arguments(sampling: Sampling, context: int) -> dict[str, Any]:
    """Our settings in llama.cpp's words, samplers in transformers' order. All are named: it has defaults of its own (top-k 40, min-p 0.05)."""
    chosen: dict[str, Any] = {
        "n_predict": sampling.max_new_tokens, "temperature": sampling.temperature, "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": context, "top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": 0.0, "typical_p": 1.0,
        "samplers": ["penalties", "temperature", "top_k", "top_p"],
    }  # fmt: skip
    if sampling.temperature == 0:
        chosen |= {"top_k": 0, "top_p": 1.0}
    if sampling.seed is not None:
        # Kept keys and values were computed in other batches and differ in the last bit, so that sampling would differ.
        chosen |= {"seed": sampling.seed % (2**32 - 1), "cache_prompt": sampling.temperature == 0}
    return chosen


def _one_byte(byte: int) -> int:
    """The token that is this byte alone; there is one for each."""
    if not _BYTES:
        _BYTES.update({token_bytes(token)[0]: token for token in range(300) if len(token_bytes(token)) == 1})
    return _BYTES[byte]


_BYTES: dict[int, int] = {}


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        parts = [file for file in found if "-00001-of-" in file.name]
        if len(found) > 1 and len(parts) != 1:
            raise FastossError(f"{len(found)} GGUF files", place=name, hint=f"name one: {found[0]}")
        return (parts or found)[0]
    if not path.is_file():
        raise FastossError("file not found", place=name)
    return path


def _threads() -> int:
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else len(os.sched_getaffinity(0))
