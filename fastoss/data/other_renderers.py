"""A conversation as others write it: a model's own Jinja chat template, and openai-harmony. Conformance compares ours with these."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib
import json
import lzma
import os
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from fastoss.config import FormatSettings
from fastoss.data.conversation import Conversation, Message, Tool
from fastoss.data.tokenizer import RANKS_SHA256, SPECIAL, encode
from fastoss.errors import FastossError
from fastoss.run import cache_folder, file_lock, write_whole

OFFICIAL = "the official chat template"
CONTROL_TOKENS = {SPECIAL.get(id, f"<|reserved_{id}|>"): id for id in range(199998, 200019)}
CONTROL_TOKEN = re.compile("(" + "|".join(map(re.escape, CONTROL_TOKENS)) + ")")

# A prompt is what asks for an assistant's turn, an example is a conversation that ends with one.
Kind = Literal["prompt", "example"]
Render = Callable[[Conversation, Kind], list[int]]


class Refusal(Exception):
    """The other side will not render this conversation."""


def read_template(folder: Path) -> str | None:
    """The chat template of a model folder as transformers 5 finds it, None where there is none.

    `chat_template.jinja` wins over the key `chat_template` of tokenizer_config.json, which may list several: then `default`.
    """
    try:
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        path = folder / "tokenizer_config.json"
        kept = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
    except (OSError, ValueError) as problem:
        raise FastossError(f"the chat template cannot be read: {problem}", place=str(folder)) from None
    if isinstance(kept, list):
        kept = {entry.get("name"): entry.get("template") for entry in kept if isinstance(entry, dict)}.get("default")
    return kept if isinstance(kept, str) else None


def template_renderer(template: str, format: FormatSettings, name: str = OFFICIAL) -> Render:
    """Ids as `apply_chat_template` of transformers 5 gives them, with the format's date in place of today's."""
    import jinja2

    try:
        compiled = template_environment().from_string(template)
    except jinja2.TemplateError as problem:
        raise FastossError(f"it is not a Jinja template: {problem}", place=name) from None

    def render(conversation: Conversation, kind: Kind) -> list[int]:
        day = datetime.date.fromisoformat(conversation.current_date or format.current_date)
        try:
            text = compiled.render(
                messages=[as_chat_message(message, parsed=True) for message in conversation.messages],
                tools=[as_chat_tool(tool) for tool in conversation.tools] or None,
                documents=None,
                add_generation_prompt=kind == "prompt",
                reasoning_effort=conversation.reasoning_effort or format.reasoning_effort,
                strftime_now=day.strftime,
                bos_token="<|startoftext|>",
                eos_token="<|return|>",
                pad_token="<|endoftext|>",
            )
        except Exception as problem:  # a template can raise whatever its own expressions raise, TypeError and the like
            raise Refusal(str(problem) or type(problem).__name__) from None
        return encode_control(text)

    return render


def harmony_renderer(format: FormatSettings) -> Render:
    """Ids as openai-harmony gives them by default. Raises ImportError where it is not installed."""
    library = importlib.import_module("openai_harmony")
    encoding = load_openai_harmony()

    def render(conversation: Conversation, kind: Kind) -> list[int]:
        try:
            chat = library.Conversation.from_messages(list(_as_harmony(library, conversation, format)))
            if kind == "prompt":
                ids: list[int] = encoding.render_conversation_for_completion(chat, library.Role.ASSISTANT)
            else:
                ids = encoding.render_conversation_for_training(chat)
        except (library.HarmonyError, ValueError) as problem:
            raise Refusal(str(problem)) from None
        return ids

    return render


@functools.cache
def load_openai_harmony() -> Any:
    """openai-harmony's encoding for gpt-oss, loaded without network from the ranks that travel in the package."""
    library = importlib.import_module("openai_harmony")
    with set_tiktoken_encodings_base(unpacked_ranks()):
        return library.load_harmony_encoding(library.HarmonyEncodingName.HARMONY_GPT_OSS)


def unpacked_ranks() -> Path:
    """A folder in the cache that holds OpenAI's `o200k_base.tiktoken`; safe when two processes ask at once."""
    path = cache_folder() / f"ranks-{RANKS_SHA256[:12]}" / "o200k_base.tiktoken"
    with file_lock(path.parent.with_suffix(".lock")):
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != RANKS_SHA256:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, lzma.decompress(resources.files("fastoss.assets").joinpath("o200k_base.tiktoken.xz").read_bytes()))
    return path.parent


@contextlib.contextmanager
def set_tiktoken_encodings_base(folder: Path) -> Iterator[None]:
    """TIKTOKEN_ENCODINGS_BASE is the only way to tell openai-harmony 0.0.8 where its ranks lie; set while the block runs."""
    before = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TIKTOKEN_ENCODINGS_BASE"]
        else:
            os.environ["TIKTOKEN_ENCODINGS_BASE"] = before


def encode_control(text: str) -> list[int]:
    """Ids of a text in which control tokens are meant, as tokenizers read a rendered chat."""
    ids: list[int] = []
    for piece in CONTROL_TOKEN.split(text):
        if piece in CONTROL_TOKENS:
            ids.append(CONTROL_TOKENS[piece])
        elif piece:
            ids += encode(piece)
    return ids


@functools.cache
def template_environment() -> Any:
    """Jinja as transformers 5.17 sets it up (`utils/chat_template_utils.py`): the sandbox, its filter and its tags."""
    import jinja2
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what is trained in TRL's templates; here its text alone matters."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja wants it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("text"), [], [], body).set_lineno(line)

        def text(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def as_chat_message(message: Message, *, parsed: bool) -> dict[str, Any]:
    """A message as programs hand it to a chat template. A call's arguments are `parsed`, as `transformers serve` has them, or the model's text."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        plain["thinking"] = message.thinking
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call is not None:
        arguments = message.tool_call.arguments
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments) if parsed else arguments
        plain["tool_calls"] = [{"type": "function", "function": {"name": message.tool_call.name, "arguments": arguments}}]
    return plain


def as_chat_tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    return {"type": "function", "function": function}


def _as_harmony(library: Any, conversation: Conversation, format: FormatSettings) -> Iterator[Any]:
    role, of = library.Role, library.Message.from_role_and_content
    effort = library.ReasoningEffort((conversation.reasoning_effort or format.reasoning_effort).capitalize())
    date = conversation.current_date or format.current_date
    yield of(role.SYSTEM, library.SystemContent.new().with_reasoning_effort(effort).with_conversation_start_date(date))
    first = conversation.messages[0] if conversation.messages else None
    instructions = first.content if first is not None and first.role == "system" else None
    if instructions or conversation.tools:
        developer = library.DeveloperContent.new()
        if instructions:
            developer = developer.with_instructions(instructions)
        if conversation.tools:
            described = [library.ToolDescription.new(tool.name, tool.description, tool.parameters) for tool in conversation.tools]
            developer = developer.with_function_tools(described)
        yield of(role.DEVELOPER, developer)
    for message in conversation.messages:
        if message.role == "user":
            yield of(role.USER, message.content)
        elif message.role == "tool":
            author = library.Author.new(role.TOOL, f"functions.{message.name}")
            said = library.Message.from_author_and_content(author, message.content)
            yield said.with_channel("commentary").with_recipient("assistant")
        elif message.role == "assistant":
            if message.thinking:
                yield of(role.ASSISTANT, message.thinking).with_channel("analysis")
            if message.tool_call is None:
                yield of(role.ASSISTANT, message.content).with_channel("final")
                continue
            if message.content:
                yield of(role.ASSISTANT, message.content).with_channel("commentary")
            call = of(role.ASSISTANT, message.tool_call.arguments).with_channel("commentary")
            yield call.with_recipient(f"functions.{message.tool_call.name}").with_content_type("<|constrain|>json")
