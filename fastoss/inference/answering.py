"""What all engines are asked by, whatever answers: a run in memory (engine.py), a GGUF in llama.cpp (gguf.py), a server (endpoint.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from fastoss.data.conversation import Message, Tool
from fastoss.data.harmony import Completion
from fastoss.inference.reply import Answer, Reply
from fastoss.inference.sampling import Question, ReasoningLanguage, Sampling


class Answering(ABC):
    """An engine says how it asks one question and several; the rest is said in terms of these."""

    @abstractmethod
    def ask(self, question: Question, sampling: Sampling, *, tuned: bool = True) -> Reply:
        """Answer one question, piece by piece."""

    @abstractmethod
    def answers(self, questions: Sequence[Question], sampling: Sampling | None = None, *, tuned: bool = True) -> list[Answer]:
        """Answer several questions, in order."""

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        reasoning_effort: str | None = None,
        *,
        language: ReasoningLanguage | None = None,
        tuned: bool = True,
        tools: tuple[Tool, ...] = (),
        current_date: str | None = None,
    ) -> Reply:
        """Answer a chat, piece by piece as it is sampled. `close()` the reply to stop it: sampling ends within a token.

        `tuned=False` asks the base model: the adapter is switched off for this reply. Raises `FastossError` when the chat cannot
        be asked, `Busy` when too many wait; iterating raises `RunFailed` when generation fails.
        """
        return self.ask(Question(tuple(messages), reasoning_effort, language, tools, current_date), sampling or Sampling(), tuned=tuned)

    def complete(
        self, chats: Sequence[Sequence[Message]], sampling: Sampling | None = None, efforts: Sequence[str | None] | None = None, *, tuned: bool = True
    ) -> list[Completion]:
        """Answer several chats at once, in order, each with its own effort."""
        asked = [Question(tuple(chat), effort) for chat, effort in zip(chats, efforts or [None] * len(chats), strict=True)]
        return [answer.completion for answer in self.answers(asked, sampling, tuned=tuned)]
