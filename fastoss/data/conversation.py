"""What a row means: a conversation of messages. Formats make it, the harmony renderer takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One message. `thinking` is an assistant's reasoning (harmony's analysis channel), None where there is none."""

    role: Role
    content: str
    thinking: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages in order: at most one system message (first), then user and assistant in turn.

    `place` is `file:line`, for error messages. `reasoning_effort` overrides the recipe's for this row.
    """

    messages: tuple[Message, ...]
    place: str = ""
    reasoning_effort: str | None = None
