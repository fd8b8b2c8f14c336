"""Harmony text, as other tools have rendered it → entries of messages. Formats hand it the `text` column of a row.

Only what our renderer would write again is understood, so that nothing is trained otherwise than it stood there: the
standard system message, instructions, and the channels analysis, commentary (tool calls, and what is said before them) and final.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fastoss.data.conversation import Tool
from fastoss.data.formats.text import shown
from fastoss.data.reading.rows import BadRow
from fastoss.data.typescript import tools_section

_MESSAGE = re.compile(r"<\|start\|>(.*?)<\|message\|>(.*?)<\|(end|call|return)\|>", re.DOTALL)
_HEADER = re.compile(
    r"(?P<role>[^\s<]+)(?: to=(?P<to>[^\s<]+))?"
    r"(?:<\|channel\|>(?P<channel>[^\s<]+)(?: to=(?P<then>[^\s<]+))?(?P<json> ?(?:<\|constrain\|>)?json)? ?)?"
)
_SYSTEM = re.compile(
    r"You are ChatGPT, a large language model trained by OpenAI\.\n"
    r"Knowledge cutoff: 2024-06\n"
    r"Current date: (?P<date>\d{4}-\d\d-\d\d)\n\n"
    r"Reasoning: (?P<effort>low|medium|high)\n\n"
    r"# Valid channels: analysis, commentary, final\. Channel must be included for every message\."
    r"(?P<tools>\nCalls to these tools must go to the commentary channel: 'functions'\.)?"
)
_TOOLS = re.compile(r"^# Tools$", re.MULTILINE)
_INSTRUCTIONS = "# Instructions\n\n"


@dataclass
class ParsedHarmony:
    """Entries as the reader of messages takes them, the number of each within the text, and what the system message says."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    reasoning_effort: str | None = None
    current_date: str | None = None


def parse_harmony(text: str, tools: Sequence[Tool], place: str) -> ParsedHarmony:
    """Parse rendered harmony text; `tools` are those that the row gives besides it. `BadRow` says what is not understood."""
    parser = _Parser(tools, place)
    position = 0
    while text[position:].strip():
        found = _MESSAGE.match(text, position)
        parser.number += 1
        if found is None:
            parser.refuse(_flaw(text[position:]))
        if "<|start|>" in found[2]:
            parser.refuse("is not closed before the next one begins")
        parser.take(found[1], found[2], found[3])
        position = found.end()
    return parser.ended()


def _flaw(rest: str) -> str:
    if not rest.startswith("<|start|>"):
        return "does not begin with <|start|>"
    return "is not closed" if "<|message|>" in rest else "has no <|message|>"


class _Parser:
    """What has been read, and the reasoning and the words that wait for their answer or call."""

    def __init__(self, tools: Sequence[Tool], place: str):
        self.tools, self.place = tools, place
        self.parsed = ParsedHarmony()
        self.number = 0
        self.thinking: str | None = None
        self.said: str | None = None  # commentary before a call

    def refuse(self, why: str, hint: str | None = None) -> NoReturn:
        raise BadRow(f"message {self.number} of the harmony text {why}", place=self.place, hint=hint)

    def take(self, header: str, content: str, end: str) -> None:
        parts = _HEADER.fullmatch(header)
        if parts is None:
            self.refuse(f"has a header that is not understood: {shown(header)}")
        role, channel, recipient = parts["role"], parts["channel"], parts["to"] or parts["then"]
        if (parts["to"] and parts["then"]) or (parts["json"] and not (role == "assistant" and recipient)):
            self.refuse(f"has a header that is not understood: {shown(header)}")
        if role == "assistant":
            self._assistant(channel or ("commentary" if recipient else "final"), recipient, content, end)
            return
        if self.thinking is not None or self.said is not None:
            self._waiting()
        if end != "end":
            self.refuse(f"is of the {role}, but ends with <|{end}|>")
        if role.startswith("functions."):
            if recipient != "assistant" or channel not in (None, "commentary"):
                self.refuse("is a tool's result, but is not addressed to=assistant in the commentary channel")
            self._add({"role": "tool", "name": role, "content": content})
        elif channel or recipient or role not in ("system", "developer", "user"):
            self.refuse(f"has a header that is not understood: {shown(header)}")
        elif role == "system":
            self._system(content)
        elif role == "developer":
            self._developer(content)
        else:
            self._add({"role": "user", "content": content})

    def _assistant(self, channel: str, recipient: str | None, content: str, end: str) -> None:
        if recipient:
            if not recipient.startswith("functions."):
                self.refuse(f"calls {shown(recipient)}", "only calls of functions.… are understood")
            if channel != "commentary" or end != "call":
                self.refuse("calls a tool, but not in the commentary channel and ended by <|call|>")
            call = {"function": {"name": recipient, "arguments": content}}
            self._add({"role": "assistant", "content": self.said or "", "thinking": self.thinking, "tool_calls": [call]})
        elif channel == "final":
            if self.said is not None:
                self._waiting()
            if end == "call":
                self.refuse("is an answer, but ends with <|call|>")
            self._add({"role": "assistant", "content": content, "thinking": self.thinking})
        elif channel not in ("analysis", "commentary"):
            self.refuse(f"has the unknown channel {shown(channel)}", "analysis, commentary or final")
        elif end != "end":
            self.refuse(f"is in the channel {channel}, but ends with <|{end}|>")
        elif self.said is not None or (channel == "analysis" and self.thinking is not None):
            self._waiting()
        elif channel == "analysis":
            self.thinking = content
        else:
            self.said = content

    def _waiting(self) -> NoReturn:
        what = "commentary that is followed by no call" if self.said is not None else "analysis that is followed by no answer"
        self.number -= 1
        self.refuse(f"is {what}")

    def _add(self, entry: dict[str, Any]) -> None:
        self.parsed.entries.append(entry)
        self.parsed.numbers.append(self.number)
        self.thinking = self.said = None

    def _system(self, content: str) -> None:
        found = _SYSTEM.fullmatch(content)
        if self.number > 1 or found is None:
            self.refuse("is another system text than gpt-oss's own", "give your instructions in the developer message")
        if found["tools"] and not self.tools:
            self.refuse("announces tools", "give the tools as JSON in `tools`")
        self.parsed.current_date, self.parsed.reasoning_effort = found["date"], found["effort"]

    def _developer(self, content: str) -> None:
        section = tools_section(self.tools) if self.tools else ""
        text = content.removesuffix(section)
        if _TOOLS.search(text):
            why = "has another # Tools section than `tools` gives" if section else "has a # Tools section"
            self.refuse(why, "give the tools as JSON in `tools`")
        if text == content or text:
            if not text.startswith(_INSTRUCTIONS):
                self.refuse("is of the developer, but does not begin with # Instructions")
            self._add({"role": "system", "content": text.removeprefix(_INSTRUCTIONS).removesuffix("\n\n")})

    def ended(self) -> ParsedHarmony:
        if self.thinking is not None or self.said is not None:
            self.number += 1
            self._waiting()
        return self.parsed
