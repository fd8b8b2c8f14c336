"""What one visitor of the demo may ask for. Everything here is checked before a token is counted or sampled."""

from __future__ import annotations

from dataclasses import dataclass

from fastoss.data.formats.text import check_text
from fastoss.data.reading.rows import BadRow
from fastoss.errors import FastossError


@dataclass(frozen=True)
class Limits:
    """`waiting`: questions that may wait for the model; `sessions`: conversations kept in memory, the oldest idle ones go first."""

    question_chars: int = 8_000
    system_chars: int = 4_000
    turns: int = 50
    chat_tokens: int = 16_384
    reply_tokens: int = 2_048
    reply_seconds: float = 300.0
    waiting: int = 32
    sessions: int = 500

    def check_texts(self, question: str, system: str) -> None:
        """Raises `FastossError` for texts that are empty or longer than they may be, without tokenising them."""
        for name, text, most in (("question", question, self.question_chars), ("system text", system, self.system_chars)):
            if len(text) > most:
                raise FastossError(f"the {name} has {len(text):,} characters, {most:,} are allowed", hint="shorten it")
            try:
                check_text(text, f"the {name}")
            except BadRow as problem:
                raise FastossError(f"the {name} cannot be asked: {problem.fact}") from None
        if not question.strip():
            raise FastossError("the question is empty")

    def check_length(self, turns: int) -> None:
        if turns >= self.turns:
            raise FastossError(f"this chat has {turns} turns, which is the limit", hint="begin a new one")

    def check_prompt(self, tokens: int) -> None:
        if tokens > self.chat_tokens:
            raise FastossError(f"the chat has {tokens:,} tokens, {self.chat_tokens:,} are allowed", hint="begin a new one")
