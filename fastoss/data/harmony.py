"""Conversation ⇄ tokens: gpt-oss's harmony format. Formats hand it conversations, the dataset and the chat take its tokens.

One example per trained assistant turn. Its history is what the model will see when it is asked (earlier answers without
their reasoning, ended by `<|end|>`; within a chain of tool calls the reasoning stays), its target is what the model must
produce (reasoning, then the answer ended by `<|return|>` or a tool call ended by `<|call|>`), and the labels begin after
the `<|start|>assistant` that the prompt supplies. Content is encoded as ordinary text: it cannot become control tokens.
docs/harmony.md says where this differs from the official template and from openai-harmony, and why.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastoss.config import FormatSettings
from fastoss.data.conversation import Conversation, Message, Tool, ToolCall
from fastoss.data.tokenizer import CALL, CHANNEL, CONSTRAIN, END, END_OF_TEXT, MESSAGE, RETURN, SPECIAL, START, encode, token_bytes
from fastoss.data.typescript import tools_section

IGNORE = -100  # the label of a token without loss, as in torch's cross-entropy


class Span(NamedTuple):
    """Tokens `start` to `end` of an example: one message, or the part of it that `channel` names. `weight` scales its loss, 0: none."""

    role: str
    channel: str | None
    start: int
    end: int
    weight: float

    @property
    def trained(self) -> bool:
        return self.weight > 0


@dataclass(frozen=True)
class Example:
    """One trained assistant turn: its tokens, and the spans that say which of them carry loss."""

    input_ids: Sequence[int]
    spans: tuple[Span, ...]
    conversation: Conversation  # as it was rendered: the history, then the target
    prompt_length: int  # tokens that the prompt supplies, `<|start|>assistant` included

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> list[int]:
        """As long as `input_ids`: the id itself where there is loss, -100 elsewhere."""
        labels = [IGNORE] * len(self.input_ids)
        for span in self.spans:
            if span.trained:
                labels[span.start : span.end] = self.input_ids[span.start : span.end]
        return labels

    @property
    def trained_tokens(self) -> int:
        return sum(span.end - span.start for span in self.spans if span.trained)


@dataclass(frozen=True)
class Delta:
    """A piece of a reply: text of a channel (`analysis`, `commentary`, `final`); `recipient` is the tool that it is addressed to."""

    channel: str
    text: str
    recipient: str | None = None


@dataclass
class Completion:
    """A parsed reply. `problems` says what was malformed and how it was read; `stop` is the token that ended it.

    With a `tool_call`, `content` is what was said to the user before it.
    """

    thinking: str | None
    content: str
    problems: list[str] = field(default_factory=list)
    stop: int | None = None
    tool_call: ToolCall | None = None


class _Encoded(NamedTuple):
    """A message's texts as ids, each encoded once however many examples it stands in."""

    message: Message
    content: list[int]
    thinking: list[int] | None
    call: list[int] | None  # ` to=…`, header and arguments of a tool call, without its end


class HarmonyRenderer:
    """Renders conversations for one recipe's format settings (effort, date, trained channels and turns)."""

    def __init__(self, format: FormatSettings):
        self.format = format
        self._kept: dict[tuple[str, ...], list[int]] = {}  # system and developer messages, which rows tend to share
        self._assistant = [START, *encode("assistant")]
        self._user = [START, *encode("user"), MESSAGE]
        self._channels = {name: [CHANNEL, *encode(name), MESSAGE] for name in ("analysis", "commentary", "final")}
        self._json_call = [CHANNEL, *encode("commentary"), *encode(" "), CONSTRAIN, *encode("json"), MESSAGE]
        self._from_tool = [*encode(" to=assistant"), CHANNEL, *encode("commentary"), MESSAGE]

    def render_examples(self, conversation: Conversation) -> list[Example]:
        """One example for each trained assistant turn, in order (`format.turns`: all, or the last)."""
        encoded = [self._encode(message) for message in conversation.messages]
        turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
        if self.format.turns == "last":
            turns = turns[-1:]
        return [self._example(conversation, encoded, turn) for turn in turns if conversation.messages[turn].weight > 0]

    def render_last(self, conversation: Conversation) -> Example:
        """The example of the last assistant turn."""
        encoded = [self._encode(message) for message in conversation.messages]
        return self._example(conversation, encoded, len(encoded) - 1)

    def render_prompt(
        self, messages: Sequence[Message], reasoning_effort: str | None = None, tools: tuple[Tool, ...] = (), current_date: str | None = None
    ) -> list[int]:
        """The tokens that ask for the next assistant turn; reasoning before the last answer is left out."""
        asked = Conversation(tuple(messages), reasoning_effort=reasoning_effort, tools=tools, current_date=current_date)
        ids, _ = self._history(asked, [self._encode(message) for message in messages])
        return ids + self._assistant

    def _encode(self, message: Message) -> _Encoded:
        call = None
        if message.tool_call is not None:
            call = [*encode(f" to=functions.{message.tool_call.name}"), *self._json_call, *encode(message.tool_call.arguments)]
        content = [] if message.role == "system" else encode(message.content)
        return _Encoded(message, content, encode(message.thinking) if message.thinking else None, call)

    def _example(self, conversation: Conversation, encoded: list[_Encoded], turn: int) -> Example:
        target = encoded[turn]
        ids, spans = self._history(conversation, encoded[:turn])
        start = len(ids)
        ids += self._assistant
        prompt_length = len(ids)
        spans.append(Span("assistant", None, start, prompt_length, 0.0))
        first = True
        for channel, part in self._parts(target, last=True):
            begin = len(ids)
            if not first:
                # After its reasoning the model opens the next message itself: `<|start|>assistant` is sampled here, so it is trained.
                ids += self._assistant
            ids += part
            spans.append(Span("assistant", channel, begin, len(ids), self.format.train_on.get(channel, 0.0) * target.message.weight))
            first = False
        messages = conversation.messages
        shown = conversation if turn == len(messages) - 1 else _up_to(conversation, turn + 1)
        return Example(ids, tuple(spans), shown, prompt_length)

    def _parts(self, encoded: _Encoded, *, last: bool) -> list[tuple[str, list[int]]]:
        """An assistant turn as (channel, ids) of its messages, each without its `<|start|>assistant`; `last`: the turn to be learned."""
        parts = []
        if encoded.thinking is not None:
            parts.append(("analysis", [*self._channels["analysis"], *encoded.thinking, END]))
        if encoded.call is None:
            parts.append(("final", [*self._channels["final"], *encoded.content, RETURN if last else END]))
            return parts
        if encoded.content:
            parts.append(("commentary", [*self._channels["commentary"], *encoded.content, END]))
        parts.append(("commentary", [*encoded.call, CALL]))
        return parts

    def _history(self, conversation: Conversation, encoded: list[_Encoded]) -> tuple[list[int], list[Span]]:
        ids = list(self._system_message(conversation))
        spans = [Span("system", None, 0, len(ids), 0.0)]
        answered = max((i for i, e in enumerate(encoded) if e.message.role == "assistant" and e.call is None), default=-1)
        instructions = encoded[0].message.content if encoded and encoded[0].message.role == "system" else ""
        if instructions or conversation.tools:
            start = len(ids)
            ids += self._developer_message(instructions, conversation.tools)
            spans.append(Span("developer", None, start, len(ids), 0.0))
        for index, entry in enumerate(encoded):
            role, start = entry.message.role, len(ids)
            if role == "user":
                ids += self._user
                ids += entry.content
                ids.append(END)
                spans.append(Span("user", None, start, len(ids), 0.0))
            elif role == "tool":
                ids += [START, *encode(f"functions.{entry.message.name}"), *self._from_tool, *entry.content, END]
                spans.append(Span("tool", None, start, len(ids), 0.0))
            elif role == "assistant":
                # Reasoning is seen again only in a chain of tool calls that no answer has ended yet.
                seen = entry if index > answered and entry.call is not None else entry._replace(thinking=None)
                for channel, part in self._parts(seen, last=False):
                    start = len(ids)
                    ids += self._assistant
                    ids += part
                    spans.append(Span("assistant", channel, start, len(ids), 0.0))
        return ids, spans

    def _system_message(self, conversation: Conversation) -> list[int]:
        effort = conversation.reasoning_effort or self.format.reasoning_effort
        date = conversation.current_date or self.format.current_date
        key = ("system", effort, date, "tools" if conversation.tools else "")
        if key not in self._kept:
            text = (
                "You are ChatGPT, a large language model trained by OpenAI.\n"
                "Knowledge cutoff: 2024-06\n"
                f"Current date: {date}\n\n"
                f"Reasoning: {effort}\n\n"
                "# Valid channels: analysis, commentary, final. Channel must be included for every message."
            )
            if conversation.tools:
                text += "\nCalls to these tools must go to the commentary channel: 'functions'."
            self._keep(key, [START, *encode("system"), MESSAGE, *encode(text), END])
        return self._kept[key]

    def _developer_message(self, instructions: str, tools: tuple[Tool, ...]) -> list[int]:
        described = tools_section(tools) if tools else ""
        key = ("developer", described, f"# Instructions\n\n{instructions}\n\n" if instructions else "")
        if key not in self._kept:
            # The template ends the instructions with an empty line (openai-harmony does not): inference uses the template.
            self._keep(key, [START, *encode("developer"), MESSAGE, *encode(key[2] + described), END])
        return self._kept[key]

    def _keep(self, key: tuple[str, ...], ids: list[int]) -> None:
        if len(self._kept) > 1000:
            self._kept.clear()
        self._kept[key] = ids


def _up_to(conversation: Conversation, count: int) -> Conversation:
    c = conversation
    return Conversation(c.messages[:count], c.place, c.reasoning_effort, c.current_date, c.tools)


_RECIPIENT = re.compile(r"to=(\S+)")


class CompletionParser:
    """Reads a reply token by token, as it is sampled after `<|start|>assistant`, and gives its text by channel.

    Malformed replies are read as people would read them, and `problems` says so: text without a header, an unknown
    channel, a message that begins before the last one has ended, a user's or tool's message that the model makes up.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.stop: int | None = None
        self._header: list[int] | None = []  # the ids of a header that is not complete yet; None within a message
        self._channel = "final"  # empty: the message is left out
        self._recipient: str | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> Delta | None:
        """Take one token; return the text it completes, if any (a character may need several tokens)."""
        if token_id in (RETURN, END_OF_TEXT, CALL):
            self.stop = token_id
            return self.close()
        if self._header is not None:
            return self._feed_header(token_id)
        if token_id in (END, START):
            if token_id == START:
                self.problems.append("a message began before the last one had ended" if self.stop is None else "the reply continued after its end")
            rest = self._flush()
            self._header = []
            return rest
        if token_id in (MESSAGE, CHANNEL, CONSTRAIN):
            self.problems.append("a control token within a message")
            return None
        return self._delta(self._decoder.decode(token_bytes(token_id)))

    def close(self) -> Delta | None:
        """End of the reply: whatever text is left."""
        if self._header is not None:
            text = self._decode([i for i in self._header if i not in (START, CHANNEL)])
            begun = CHANNEL in self._header
            self._header = None
            plain = text.removeprefix("assistant")
            if begun and plain.strip() in ("analysis", "commentary", "final"):
                self.problems.append("it ends within a header")
            elif plain.strip():
                self.problems.append("text without a header, read as the answer")
                self._channel, self._recipient = "final", None
                return self._delta(plain)
            return None
        return self._flush()

    def _feed_header(self, token_id: int) -> Delta | None:
        assert self._header is not None
        if token_id == END:  # a header that ends with no message: drop it, the next one follows
            self.problems.append("a header without a message")
            self._header = []
            return None
        if token_id != MESSAGE:
            self._header.append(token_id)
            return None
        header = [i for i in self._header if i != START]
        self._header = None
        where = [index for index, i in enumerate(header) if i == CHANNEL]
        # `to=functions.x<|constrain|>json` comes without a space too: the mark ends the name.
        before = self._decode(header[: where[-1]] if where else header).replace(SPECIAL[CONSTRAIN], " ")
        after = self._decode(header[where[-1] + 1 :]).replace(SPECIAL[CONSTRAIN], " ") if where else ""
        speaker = (before.split() or [""])[0]
        if speaker in ("system", "developer", "user") or speaker.startswith(("functions.", "browser.")):
            self.problems.append(f"the reply continued with a message of {speaker}, left out")
            self._channel, self._recipient = "", None
            return None
        # The model writes the recipient before the channel or after it: both are read.
        recipient = _RECIPIENT.search(before) or _RECIPIENT.search(after)
        self._recipient = recipient[1] if recipient else None
        if self._recipient == "assistant":  # `<|channel|>commentary to=assistant<|channel|>final` is sampled now and then; it calls no tool
            self.problems.append("a message to the assistant itself, read as one to the user")
            self._recipient = None
        name = after.split()
        if not name or name[0] not in ("analysis", "commentary", "final"):
            self.problems.append(f"a message with no known channel ({' '.join(name)})" if name else "a message without a channel")
            name = ["commentary" if self._recipient else "final"]
        self._channel = name[0]
        return None

    def _decode(self, ids: Iterable[int]) -> str:
        return b"".join(token_bytes(i) for i in ids).decode("utf-8", "replace")

    def _delta(self, text: str) -> Delta | None:
        return Delta(self._channel, text, self._recipient) if text and self._channel else None

    def _flush(self) -> Delta | None:
        return self._delta(self._decoder.decode(b"", final=True))


def parse_completion(ids: Iterable[int]) -> Completion:
    """Parse the tokens sampled after `<|start|>assistant` into reasoning, answer or tool call. Never raises."""
    parser = CompletionParser()
    deltas = [parser.feed(i) for i in ids]
    if parser.stop is None:
        deltas.append(parser.close())
    return completion_from([delta for delta in deltas if delta is not None], parser.problems, parser.stop)


def completion_from(deltas: Iterable[Delta], problems: list[str], stop: int | None) -> Completion:
    """Put a reply's pieces together; what is missing or too much is added to `problems`."""
    texts: dict[tuple[str, str | None], str] = {}
    for delta in deltas:
        key = (delta.channel, delta.recipient)
        texts[key] = texts.get(key, "") + delta.text
    calls = [ToolCall(recipient.removeprefix("functions."), text) for (_, recipient), text in texts.items() if recipient is not None]
    answer = texts.get(("final", None))
    if answer is None and not calls:
        problems.append("no answer")
    if len(calls) > 1:
        problems.append("more than one tool call, the first is read")
    content = answer if answer is not None else texts.get(("commentary", None), "")
    return Completion(texts.get(("analysis", None)), content, problems, stop, calls[0] if calls else None)
