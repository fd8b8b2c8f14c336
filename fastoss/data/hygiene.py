"""Is a row the same as another, or nearly, and is its reasoning empty? Formats understand rows, `judge` asks here."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b

from fastoss.data.conversation import Conversation, Message

# The punctuation of sentences; operators stay, so that 1+1 and 1-1 are two things.
_PUNCTUATION = bytes.maketrans(b".,!?;:'\"", b"        ")
_WIDE_PUNCTUATION = "…。，、！？；：“”‘’"


def content_key(said: Iterable[Conversation]) -> int:
    """64 bits of what conversations say (a row's one, or a pair's two); rows that say the same have the same key."""
    said = list(said)
    beside = [part for conversation in said for part in (conversation.current_date or "", *map(repr, conversation.tools))]
    return _hash("\0".join(_texts(said) + beside).encode())


def near_key(said: Iterable[Conversation]) -> int:
    """64 bits of what conversations say, but for case, width, spaces and punctuation (NFKC, case folded), date and tools."""
    text = " \0 ".join(_texts(said)).casefold()
    if not text.isascii():
        for mark in _WIDE_PUNCTUATION:
            text = text.replace(mark, " ")
        if not unicodedata.is_normalized("NFKC", text):
            text = unicodedata.normalize("NFKC", text)
    return _hash(b" ".join(text.encode().translate(_PUNCTUATION).split()))


def _texts(said: Iterable[Conversation]) -> list[str]:
    texts = []
    for conversation in said:
        texts.append(conversation.reasoning_effort or "")
        for message in conversation.messages:
            texts += (message.role, message.content, message.thinking or "")
            if message.tool_call:
                texts += (message.tool_call.name, message.tool_call.arguments)
    return texts


def _hash(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=8).digest())


def has_empty_reasoning(conversation: Conversation) -> bool:
    """Whether a message was given reasoning of nothing but space."""
    return any(message.thinking == "" for message in conversation.messages)


def without_empty_reasoning(conversation: Conversation) -> Conversation:
    """Empty reasoning read as none: it must not be learned as an empty analysis message."""
    messages = tuple(replace(m, thinking=None) if m.thinking == "" else m for m in conversation.messages)
    return replace(conversation, messages=messages)


def excerpt(conversation: Conversation, length: int = 120) -> str:
    """The beginning of the last user's text, for lists of rows."""
    said = [message for message in conversation.messages if message.role == "user"]
    return shortened((said[-1] if said else Message("user", "")).content, length)


def shortened(text: str, length: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
