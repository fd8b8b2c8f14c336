"""What is asked of a model, and how its tokens are chosen: chat, batches, evaluation and server hand this to whatever answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from fastoss.data.conversation import Message, Tool
from fastoss.data.tokenizer import PAD, STOP_IDS
from fastoss.errors import FastossError

if TYPE_CHECKING:
    from fastoss.data.harmony import HarmonyRenderer


class Effort(StrEnum):
    """How much the model reasons, as gpt-oss's system message says it."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class ReasoningLanguage(StrEnum):
    """Languages that reasoning can be asked in: ISO 639-1 codes."""

    ARABIC = "ar"
    CHINESE = "zh"
    CZECH = "cs"
    DUTCH = "nl"
    ENGLISH = "en"
    FRENCH = "fr"
    GERMAN = "de"
    GREEK = "el"
    HEBREW = "he"
    HINDI = "hi"
    INDONESIAN = "id"
    ITALIAN = "it"
    JAPANESE = "ja"
    KOREAN = "ko"
    POLISH = "pl"
    PORTUGUESE = "pt"
    RUSSIAN = "ru"
    SPANISH = "es"
    SWEDISH = "sv"
    THAI = "th"
    TURKISH = "tr"
    UKRAINIAN = "uk"
    VIETNAMESE = "vi"

    @property
    def english_name(self) -> str:
        return self.name.capitalize()

    @classmethod
    def named(cls, text: str) -> ReasoningLanguage:
        """The language of an English name or code, in any case. `FastossError` when there is none."""
        wanted = text.strip().lower()
        for language in cls:
            if wanted in (language.value, language.english_name.lower()):
                return language
        names = ", ".join(language.english_name for language in cls)
        raise FastossError(f"“{text}” is not a language that can be asked for", place="reasoning language", hint=f"one of {names}; or their codes")


# As HuggingFaceH4/Multilingual-Thinking writes it at the head of its developer messages: what was trained is what is asked.
LANGUAGE_LINE = "reasoning language: "


def in_language(messages: Sequence[Message], language: ReasoningLanguage | None) -> tuple[Message, ...]:
    """The chat with `reasoning language: German` at the head of its system text, in place of another that stands there; None changes nothing."""
    if language is None:
        return tuple(messages)
    system = messages[0].content if messages and messages[0].role == "system" else ""
    rest = messages[1:] if system else messages
    first, _, others = system.partition("\n")
    if first.lower().startswith(LANGUAGE_LINE):
        system = others.lstrip("\n")
    line = f"{LANGUAGE_LINE}{language.english_name}"
    return (Message("system", f"{line}\n\n{system}" if system else line), *rest)


def asked_language(messages: Sequence[Message]) -> ReasoningLanguage | None:
    """The reasoning language that a chat's system text asks for, None where it names none that is known."""
    if not messages or messages[0].role != "system":
        return None
    first = messages[0].content.partition("\n")[0]
    if not first.lower().startswith(LANGUAGE_LINE):
        return None
    try:
        return ReasoningLanguage.named(first[len(LANGUAGE_LINE) :])
    except FastossError:
        return None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in transformers' words. `temperature` 0 always takes the likeliest, whatever `top_p` and `top_k` say.

    `top_p` 1, `top_k` 0 and `repetition_penalty` 1 change nothing. Raises `FastossError` for values that mean nothing.
    """

    temperature: float = 0.0
    max_new_tokens: int = 1024
    seed: int | None = None
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, right, wanted in (
            ("temperature", 0 <= self.temperature <= 100, "0 to 100"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 10, "above 0, up to 10"),
        ):
            if not right:
                raise FastossError(f"`{name}` is {getattr(self, name)}", place="sampling", hint=wanted)

    def generate_arguments(self) -> dict[str, Any]:
        """Arguments for `generate`. All are named: what is not would come from the checkpoint's own generation settings."""
        chosen: dict[str, Any] = {"do_sample": False}
        if self.temperature:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return chosen | {
            "repetition_penalty": self.repetition_penalty, "max_new_tokens": self.max_new_tokens,
            "eos_token_id": list(STOP_IDS), "pad_token_id": PAD, "use_cache": True,
        }  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A chat that waits for an answer. `reasoning_effort` and `current_date` override what the model was trained with."""

    messages: tuple[Message, ...]
    reasoning_effort: str | None = None
    language: ReasoningLanguage | None = None
    tools: tuple[Tool, ...] = ()
    current_date: str | None = None

    def said(self) -> tuple[Message, ...]:
        """The messages as they are rendered, with the reasoning language."""
        return in_language(self.messages, self.language)

    def checked(self) -> Question:
        """Itself. `FastossError` where it cannot be asked."""
        if not self.messages or self.messages[-1].role not in ("user", "tool"):
            raise FastossError("the chat does not end with a question", place="messages", hint="its last message is the user's, or a tool's result")
        if self.reasoning_effort is not None and self.reasoning_effort not in list(Effort):
            raise FastossError(f"“{self.reasoning_effort}” is not a reasoning effort", place="reasoning effort", hint="low, medium or high")
        return self

    def followed_by(self, *messages: Message) -> Question:
        return replace(self, messages=(*self.messages, *messages))


def prompt_ids(renderer: HarmonyRenderer, question: Question, context_length: int) -> list[int]:
    """The tokens that ask a question of a model that reads `context_length`. `FastossError` when it cannot be asked, or is longer."""
    question.checked()
    ids = renderer.render_prompt(question.said(), question.reasoning_effort, question.tools, question.current_date)
    if len(ids) >= context_length:
        raise FastossError(f"the chat has {len(ids):,} tokens, the model reads {context_length:,}", place="messages", hint="begin a new one")
    return ids
