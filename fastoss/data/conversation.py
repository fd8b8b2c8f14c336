"""What a row means: a conversation of messages, or a pair of answers. Formats make them, the harmony renderer takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A call that an assistant makes: the function's plain name (no `functions.`) and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is its JSON Schema, None where it takes nothing."""

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True)
class Message:
    """One message.

    `thinking` is an assistant's reasoning (harmony's analysis channel), None where there is none. An assistant that calls
    a tool has `tool_call`, and its `content` (often empty) is what it says to the user before (harmony's commentary).
    A `tool` message is the result of the call before it; `name` is that function's. `weight` scales the loss of an
    assistant message: 0 makes it context.
    """

    role: Role
    content: str
    thinking: str | None = None
    tool_call: ToolCall | None = None
    name: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """Messages in order: at most one system message (first), then the user, the assistant and its tools; an assistant message ends it.

    `place` is `file:line`, for error messages. `reasoning_effort`, `current_date` (YYYY-MM-DD) override the recipe's for this row.
    """

    messages: tuple[Message, ...]
    place: str = ""
    reasoning_effort: str | None = None
    current_date: str | None = None
    tools: tuple[Tool, ...] = field(default=())


@dataclass(frozen=True)
class Preference:
    """Two ways to end one conversation: `chosen` is better than `rejected`. They share all messages but the last, which is an assistant's."""

    chosen: Conversation
    rejected: Conversation

    @property
    def place(self) -> str:
        return self.chosen.place
