"""Conversation ⇄ tokens: gpt-oss's harmony format. Formats hand it conversations, the dataset and the chat take its tokens.

One example per trained assistant turn. Its history is what the model will see when it is asked (earlier turns without
reasoning, ended by `<|end|>`), its target is what the model must produce (reasoning, then the answer, ended by
`<|return|>`), and the labels begin after the `<|start|>assistant` that the prompt supplies. For plain chats the tokens
are those of the official chat template. Content is encoded as ordinary text: it cannot become control tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastoss.config import FormatSettings
from fastoss.data.conversation import Conversation, Message
from fastoss.data.tokenizer import CALL, CHANNEL, CONSTRAIN, END, END_OF_TEXT, MESSAGE, RETURN, START, load_tokenizer, token_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORE = -100  # the label of a token without loss, as in torch's cross-entropy


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` of an example: one message, or the part of it that `channel` names."""

    role: str
    channel: str | None
    start: int
    end: int
    trained: bool


@dataclass(frozen=True)
class Example:
    """One trained assistant turn. `input_ids` and `labels` are equally long; a label is the id itself or -100."""

    input_ids: list[int]
    labels: list[int]
    spans: tuple[Span, ...]
    conversation: Conversation  # as it was rendered: the history, then the target
    prompt_length: int  # tokens that the prompt supplies, `<|start|>assistant` included

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Delta:
    """A piece of a reply: text of a channel (`analysis`, `commentary`, `final`)."""

    channel: str
    text: str


@dataclass
class Completion:
    """A parsed reply. `problems` says what was malformed and how it was read; `stop` is the token that ended it."""

    thinking: str | None
    content: str
    problems: list[str] = field(default_factory=list)
    stop: int | None = None


class HarmonyRenderer:
    """Renders conversations for one recipe's format settings (effort, date, trained channels and turns)."""

    def __init__(self, format: FormatSettings, tokenizer: Tokenizer | None = None):
        self.format = format
        self.tokenizer = tokenizer or load_tokenizer()
        self._system: dict[str, list[int]] = {}
        self._assistant = [START, *self._text("assistant")]
        self._user = [START, *self._text("user"), MESSAGE]
        self._developer = [START, *self._text("developer"), MESSAGE]
        self._channels = {name: [CHANNEL, *self._text(name), MESSAGE] for name in ("analysis", "final")}

    def render_examples(self, conversation: Conversation) -> list[Example]:
        """One example for each trained assistant turn, in order (`format.turns`: all, or the last)."""
        turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
        if self.format.turns == "last":
            turns = turns[-1:]
        return [self._example(conversation, index) for index in turns]

    def render_prompt(self, messages: Sequence[Message], reasoning_effort: str | None = None) -> list[int]:
        """The tokens that ask for the next assistant turn; earlier reasoning is left out."""
        ids, _ = self._history(messages, reasoning_effort)
        return ids + self._assistant

    def _example(self, conversation: Conversation, turn: int) -> Example:
        target = conversation.messages[turn]
        ids, spans = self._history(conversation.messages[:turn], conversation.reasoning_effort)
        start = len(ids)
        ids += self._assistant
        spans.append(Span("assistant", None, start, len(ids), False))
        prompt_length = len(ids)

        def add(part: list[int], channel: str) -> None:
            spans.append(Span("assistant", channel, len(ids), len(ids) + len(part), channel in self.format.train_on))
            ids.extend(part)

        answer = [*self._channels["final"], *self._text(target.content), RETURN]
        if target.thinking:
            add([*self._channels["analysis"], *self._text(target.thinking), END], "analysis")
            # After its reasoning the model opens the answer itself: `<|start|>assistant` is sampled here, so it is trained.
            answer = self._assistant + answer
        add(answer, "final")
        labels = [IGNORE] * len(ids)
        for span in spans:
            if span.trained:
                labels[span.start : span.end] = ids[span.start : span.end]
        shown = Conversation(conversation.messages[: turn + 1], conversation.place, conversation.reasoning_effort)
        return Example(ids, labels, tuple(spans), shown, prompt_length)

    def _history(self, messages: Sequence[Message], effort: str | None) -> tuple[list[int], list[Span]]:
        ids = list(self._system_message(effort or self.format.reasoning_effort))
        spans = [Span("system", None, 0, len(ids), False)]
        for message in messages:
            start = len(ids)
            if message.role == "system":
                # The template ends the instructions with an empty line (openai-harmony does not): inference uses the template.
                ids += [*self._developer, *self._text(f"# Instructions\n\n{message.content}\n\n"), END]
                spans.append(Span("developer", None, start, len(ids), False))
            elif message.role == "user":
                ids += [*self._user, *self._text(message.content), END]
                spans.append(Span("user", None, start, len(ids), False))
            else:
                ids += [*self._assistant, *self._channels["final"], *self._text(message.content), END]
                spans.append(Span("assistant", "final", start, len(ids), False))
        return ids, spans

    def _system_message(self, effort: str) -> list[int]:
        if effort not in self._system:
            text = (
                "You are ChatGPT, a large language model trained by OpenAI.\n"
                "Knowledge cutoff: 2024-06\n"
                f"Current date: {self.format.current_date}\n\n"
                f"Reasoning: {effort}\n\n"
                "# Valid channels: analysis, commentary, final. Channel must be included for every message."
            )
            self._system[effort] = [START, *self._text("system"), MESSAGE, *self._text(text), END]
        return self._system[effort]

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


class CompletionParser:
    """Reads a reply token by token, as it is sampled after `<|start|>assistant`, and gives its text by channel.

    Malformed replies are read as people would read them, and `problems` says so: text without a header, an unknown
    channel, a message that begins before the last one has ended.
    """

    def __init__(self, tokenizer: Tokenizer | None = None):
        self.tokenizer = tokenizer or load_tokenizer()
        self.problems: list[str] = []
        self.stop: int | None = None
        self._header: list[int] | None = []  # the ids of a header that is not complete yet; None within a message
        self._channel = "final"
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
                self.problems.append("a message began before the last one had ended")
            rest = self._flush()
            self._header = []
            return rest
        if token_id in (MESSAGE, CHANNEL, CONSTRAIN):
            self.problems.append("a control token within a message")
            return None
        return self._delta(self._decoder.decode(token_bytes(self.tokenizer, token_id)))

    def close(self) -> Delta | None:
        """End of the reply: whatever text is left."""
        if self._header is not None:
            text = self._decode([i for i in self._header if i not in (START, CHANNEL)])
            self._header = None
            plain = text.removeprefix("assistant")
            if plain.strip():
                self.problems.append("text without a header, read as the answer")
                self._channel = "final"
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
        header = self._header
        self._header = None
        where = [index for index, i in enumerate(header) if i == CHANNEL]
        name = self._decode(header[where[-1] + 1 :]).split() if where else []
        if not name or name[0] not in ("analysis", "commentary", "final"):
            self.problems.append(f"a message with no known channel ({' '.join(name)})" if name else "a message without a channel")
            name = ["final"]
        self._channel = name[0]
        return None

    def _decode(self, ids: Iterable[int]) -> str:
        return b"".join(token_bytes(self.tokenizer, i) for i in ids).decode("utf-8", "replace")

    def _delta(self, text: str) -> Delta | None:
        return Delta(self._channel, text) if text else None

    def _flush(self) -> Delta | None:
        delta = self._delta(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        return delta


def parse_completion(ids: Iterable[int], tokenizer: Tokenizer | None = None) -> Completion:
    """Parse the tokens sampled after `<|start|>assistant` into reasoning and answer. Never raises."""
    parser = CompletionParser(tokenizer)
    texts: dict[str, str] = {}
    deltas = [parser.feed(i) for i in ids]
    if parser.stop is None:
        deltas.append(parser.close())
    for delta in deltas:
        if delta is not None:
            texts[delta.channel] = texts.get(delta.channel, "") + delta.text
    if "final" not in texts:
        parser.problems.append("no answer")
    return Completion(texts.get("analysis"), texts.get("final", ""), parser.problems, parser.stop)
