"""Do others write the same tokens? Our rendering against a model's own chat template and against openai-harmony.

`fastoss check --template` hands it the recipe's conversations; chats of its own join them, and what differs comes back by
cause, with one example each and who will ask the model that way. docs/harmony.md says of every cause who is right and why.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, NamedTuple

from fastoss.config import FormatSettings
from fastoss.data.conversation import Conversation, Message, Tool, ToolCall
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.other_renderers import CONTROL_TOKEN, OFFICIAL, Kind, Refusal, Render, harmony_renderer, template_renderer
from fastoss.data.tokenizer import CALL, CONSTRAIN, END, MESSAGE, RETURN, SPECIAL, START, chat_template, decode

# What is known to differ, in words. docs/harmony.md has a line for each.
EMPTY_LINE = "instructions that end with an empty line"
TOOLS = "the description of the tools"
CONSTRAIN_MARK = "`<|constrain|>json` before a tool's arguments"
ARGUMENTS = "a tool's arguments, rewritten as JSON"
RESULT = "a tool's result, encoded as JSON once more"
TARGET_REASONING = "the reasoning to be learned, left out"
CHAIN_REASONING = "the reasoning before a tool call, left out"
OLD_REASONING = "the reasoning of an earlier answer, kept"
PREAMBLE = "what is said before a tool call, written as reasoning"
PREAMBLE_LOST = "what is said before a tool call, left out"
CONTROL = "control tokens in a text, taken for real ones"
REFUSED = "the template refuses"
CUT = "the same text in other tokens"

_RECIPIENT = re.compile(r"to=([^\s<]+)")
_WINDOW = 8  # tokens shown on each side of a difference
_LISTED = 20  # differences of one comparison that `lines` tells


@dataclass
class Difference:
    """One way in which another side's tokens differ from ours, and the first place where it was seen.

    `prompts` and `examples` count the texts in which it occurs; `token` is the index in our ids; `ours` and `theirs` are a few
    tokens around it as text, `theirs` empty where the other side renders nothing.
    """

    cause: str
    place: str
    kind: Kind
    token: int
    ours: str
    theirs: str
    prompts: int = 0
    examples: int = 0


@dataclass
class Comparison:
    """Our rendering against one other. A prompt is what asks for a trained turn, an example is that prompt with its answer."""

    name: str
    asked_by: str  # who asks the model with the other rendering
    prompts: int = 0
    equal_prompts: int = 0
    examples: int = 0
    equal_examples: int = 0
    differences: list[Difference] = field(default_factory=list)
    not_compared: str | None = None  # why there is nothing to compare with

    @property
    def agrees(self) -> bool:
        return not self.differences and self.not_compared is None


@dataclass
class Conformance:
    """What `check_templates` found: one comparison for each other side, on the rows and on the built-in chats."""

    rows: list[Comparison]
    builtin: list[Comparison]

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The findings as text, the recipe's own rows first."""
        out = ["our tokens are those that `fastoss chat` asks with; compared with them, token by token:"]
        for what, comparisons in (("your rows", self.rows), ("built-in chats", self.builtin)):
            for comparison in comparisons:
                out += _lines(comparison, what)
        return out


def check_templates(
    conversations: Iterable[Conversation],
    format: FormatSettings,
    template: str | None = None,
    template_name: str = OFFICIAL,
    *,
    max_rows: int = 1000,
) -> Conformance:
    """Compare our tokens with those of a chat template and of openai-harmony, on conversations and on built-in chats.

    `template` is Jinja (`read_template` takes it out of a model folder), the official one when None. Every trained turn is
    compared twice: the prompt that asks for it, and the example that ends with it. Takes about 2 ms a turn.

    Raises `FastossError` when the template is no Jinja.
    """
    others = _others(chat_template() if template is None else template, template_name, format)
    renderer = HarmonyRenderer(format)
    rows = list(itertools.islice(conversations, max_rows))
    return Conformance(_compare(rows, renderer, others) if rows else [], _compare(builtin_chats(), renderer, others))


# --- comparing -------------------------------------------------------------------------------------------------------


class _Other(NamedTuple):
    name: str
    asked_by: str
    render: Render | None  # None: `not_compared` says why
    not_compared: str | None = None
    control_is_meant: bool = False


def _others(template: str, name: str, format: FormatSettings) -> list[_Other]:
    by_template = _Other(name, "transformers, Unsloth and llama.cpp", template_renderer(template, format, name), None, True)
    by_library = "vLLM and OpenAI's reference code"
    try:
        name = f"openai-harmony {version('openai-harmony')}"
        return [by_template, _Other(name, by_library, harmony_renderer(format))]
    except ImportError:
        why = "it is not installed (pip install openai-harmony==0.0.8)"
    except Exception as problem:  # HarmonyError, which cannot be named where the library may be missing
        why = f"it does not load: {problem}"
    return [by_template, _Other("openai-harmony", by_library, None, why)]


class _Part(NamedTuple):
    """One message of a text: where it starts, and what it says. Its content lies in `ids[begin:stop]`."""

    start: int
    ids: list[int]
    speaker: str  # role, recipient and channel: what messages of both sides are matched by
    header: str
    begin: int
    stop: int

    @property
    def content(self) -> str:
        return decode(self.ids[self.begin : self.stop])

    @property
    def end(self) -> list[int]:
        return self.ids[self.stop :]


def _compare(conversations: Sequence[Conversation], renderer: HarmonyRenderer, others: list[_Other]) -> list[Comparison]:
    comparisons = [Comparison(other.name, other.asked_by, not_compared=other.not_compared) for other in others]
    for conversation in conversations:
        for example in renderer.render_examples(conversation):
            whole = example.conversation
            asked = replace(whole, messages=whole.messages[:-1])
            ids = list(example.input_ids)
            for other, comparison in zip(others, comparisons, strict=True):
                if other.render is not None:
                    _compare_one(ids[: example.prompt_length], asked, "prompt", other, comparison)
                    _compare_one(ids, whole, "example", other, comparison)
    return comparisons


def _compare_one(ours: list[int], conversation: Conversation, kind: Kind, other: _Other, comparison: Comparison) -> None:
    assert other.render is not None
    found: list[tuple[str, int, str, str]]  # cause, token, ours, theirs
    try:
        theirs = other.render(conversation, kind)
    except Refusal as refusal:
        found = [(f"{REFUSED}: {' '.join(str(refusal).split())[:150]}", 0, _shown(ours, 0), "")]
    else:
        if theirs == ours:
            found = []
        elif other.control_is_meant and any(CONTROL_TOKEN.search(text) for text in _texts(conversation)):
            at = _first_difference(ours, theirs)
            found = [(CONTROL, at, _shown(ours, at), _shown(theirs, at))]
        else:
            found = [(cause, i, _shown(ours, i), _shown(theirs, j)) for cause, i, j in _causes(ours, theirs, kind)]
    if kind == "prompt":
        comparison.prompts += 1
        comparison.equal_prompts += not found
    else:
        comparison.examples += 1
        comparison.equal_examples += not found
    seen: set[str] = set()
    for cause, token, left, right in found:
        if cause in seen:
            continue
        seen.add(cause)
        difference = next((d for d in comparison.differences if d.cause == cause), None)
        if difference is None:
            difference = Difference(cause, conversation.place, kind, token, left, right)
            comparison.differences.append(difference)
        difference.prompts += kind == "prompt"
        difference.examples += kind == "example"


def _texts(conversation: Conversation) -> Iterator[str]:
    for message in conversation.messages:
        yield message.content
        yield message.thinking or ""
        yield message.tool_call.arguments if message.tool_call else ""
    yield from (json.dumps([tool.description, tool.parameters], ensure_ascii=False) for tool in conversation.tools)


def _causes(ours: list[int], theirs: list[int], kind: Kind) -> Iterator[tuple[str, int, int]]:
    """Why two texts differ, message by message: (cause, index in ours, index in theirs)."""
    left, right = _parts(ours), _parts(theirs)
    matcher = difflib.SequenceMatcher(None, [part.speaker for part in left], [part.speaker for part in right], autojunk=False)
    for what, i1, i2, j1, j2 in matcher.get_opcodes():
        if what == "equal":
            for mine, other in zip(left[i1:i2], right[j1:j2], strict=True):
                if mine.ids != other.ids:
                    yield from _causes_in_message(mine, other)
            continue
        added = list(range(j1, j2))
        here = right[j1].start if j1 < len(right) else len(theirs)
        for number in range(i1, i2):
            mine = left[number]
            if mine.speaker == "assistant  commentary":
                twin = next((j for j in added if right[j].speaker == "assistant  analysis" and right[j].content == mine.content), None)
                if twin is not None:
                    added.remove(twin)
                yield (PREAMBLE_LOST, mine.start, here) if twin is None else (PREAMBLE, mine.start, right[twin].start)
            elif mine.speaker == "assistant  analysis":
                # After its last user's or tool's message an example holds what is to be learned.
                target = kind == "example" and all(part.speaker.startswith("assistant") for part in left[number:])
                yield (TARGET_REASONING if target else CHAIN_REASONING), mine.start, here
            else:
                yield f"{_who(mine)}, missing there", mine.start, here
        for number in added:
            extra = right[number]
            at = left[i1].start if i1 < len(left) else len(ours)
            yield (OLD_REASONING if extra.speaker == "assistant  analysis" else f"{_who(extra)}, added there"), at, extra.start


def _causes_in_message(mine: _Part, other: _Part) -> Iterator[tuple[str, int, int]]:
    def at_content() -> tuple[int, int]:
        offset = _first_difference(mine.ids[mine.begin :], other.ids[other.begin :])
        return mine.start + mine.begin + offset, other.start + other.begin + offset

    first = _first_difference(mine.ids, other.ids)
    found = False
    if mine.header != other.header:
        found = True
        same = mine.header.replace(SPECIAL[CONSTRAIN], "") == other.header
        yield (CONSTRAIN_MARK if same else f"the header of {_who(mine)}"), mine.start + first, other.start + first
    if mine.content != other.content:
        found = True
        yield _content_cause(mine, other), *at_content()
    if mine.end != other.end:
        found = True
        yield f"the end of {_who(mine)}", mine.start + mine.stop, other.start + other.stop
    if not found:
        yield CUT, mine.start + first, other.start + first


def _content_cause(mine: _Part, other: _Part) -> str:
    if mine.speaker.startswith("developer"):
        (said, _, tools), (theirs, _, their_tools) = mine.content.partition("# Tools\n\n"), other.content.partition("# Tools\n\n")
        if tools != their_tools:
            return TOOLS
        return EMPTY_LINE if said == theirs + "\n\n" or theirs == said + "\n\n" else "the instructions"
    is_call, is_result = mine.speaker.startswith("assistant functions."), mine.speaker.startswith("functions.")
    if is_call or is_result:
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(other.content)
            if read == mine.content:
                return RESULT if is_result else ARGUMENTS
            if is_call and read == json.loads(mine.content):
                return ARGUMENTS
    return f"the text of {_who(mine)}"


def _parts(ids: list[int]) -> list[_Part]:
    starts = [index for index, id in enumerate(ids) if id == START]
    if not starts or starts[0] != 0:
        starts.insert(0, 0)
    parts = []
    for start, after in itertools.pairwise([*starts, len(ids)]):
        piece = ids[start:after]
        header_stop = piece.index(MESSAGE) if MESSAGE in piece else len(piece)
        stop = next((i for i, id in enumerate(piece) if id in (END, RETURN, CALL)), len(piece))
        header = decode(piece[1:header_stop])
        role, _, channel = header.partition("<|channel|>")
        recipient = _RECIPIENT.search(header)
        speaker = f"{(role.split() or [''])[0]} {recipient[1] if recipient else ''} {(channel.split() or [''])[0]}"
        parts.append(_Part(start, piece, speaker, header, header_stop + 1, stop))
    return parts


def _who(part: _Part) -> str:
    role, recipient, channel = part.speaker.split(" ")
    role = "tool" if role.startswith("functions.") else role or "nameless"
    what = "tool call" if recipient.startswith("functions.") else channel
    return f"{'an' if role == 'assistant' else 'a'} {role} message" + (f" ({what})" if what else "")


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _shown(ids: list[int], at: int) -> str:
    """A few tokens around an index as one line of text."""
    begin, end = max(0, at - _WINDOW), min(len(ids), at + _WINDOW)
    text = decode(ids[begin:end]).replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return ("…" if begin else "") + text + ("…" if end < len(ids) else "")


def _lines(comparison: Comparison, what: str) -> list[str]:
    c = comparison
    if c.not_compared is not None:
        return [f"{what}, {c.name}: not compared, {c.not_compared}"]
    counts = f"{c.equal_prompts:,} of {c.prompts:,} prompts and {c.equal_examples:,} of {c.examples:,} examples are equal"
    out = [f"{what}, {c.name} ({c.asked_by} ask with it): {counts}"]
    for d in c.differences[:_LISTED]:
        # Where no prompt differs the model is asked alike: then only who trains with the other side learns something else.
        out.append(f"  {d.cause}: prompts {d.prompts:,}, examples {d.examples:,}" + ("" if d.prompts else " (asking is not affected)"))
        out.append(f"    first in {d.place}, {d.kind}, token {d.token}")
        out.append(f"      ours   {d.ours}")
        out += [f"      theirs {d.theirs}"] if d.theirs else []
    more = len(c.differences) - _LISTED
    return [*out, f"  and {more:,} more"] if more > 0 else out


# --- the built-in chats ----------------------------------------------------------------------------------------------


def builtin_chats() -> list[Conversation]:
    """Small chats that reach every corner of the format. Those without tools agree with the official template in every token."""
    weather = Tool(
        "get_weather",
        "Gets the weather of a place.",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The city, as people call it"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            },
            "required": ["city"],
        },
    )
    clock = Tool("get_time", "Gets the time of day.")
    wide = Tool(
        "search",
        "Searches a library.\nGives at most ten entries.",
        {
            "type": "object",
            "properties": {
                "query": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}], "description": "words"},
                "years": {"type": "object", "properties": {"from": {"type": "integer"}, "to": {"type": "integer", "default": 2025}}},
                "limit": {"type": ["integer", "null"], "default": 10},
            },
        },
    )

    def user(text: str) -> Message:
        return Message("user", text)

    def answer(text: str, thinking: str | None = None) -> Message:
        return Message("assistant", text, thinking)

    def call(name: str, arguments: str, thinking: str | None = None, content: str = "") -> Message:
        return Message("assistant", content, thinking, ToolCall(name, arguments))

    def result(name: str, text: str) -> Message:
        return Message("tool", text, name=name)

    def system(text: str) -> Message:
        return Message("system", text)

    asked = [user("How is the weather in Oslo?"), call("get_weather", '{"city": "Oslo"}', "I need the weather.")]
    loop = [*asked, result("get_weather", '{"temperature": -3, "sky": "clear"}')]
    chats: dict[str, Conversation] = {
        "plain": Conversation((user("What is 2 + 2?"), answer("Four."))),
        "system": Conversation((system("You are a pirate."), user("Hi!"), answer("Ahoy!"))),
        "system of several lines": Conversation((system("Answer in Chinese.\n\nBe brief.\n"), user("Hi!"), answer("你好！"))),
        "two turns": Conversation((user("a"), answer("b"), user("c"), answer("d"))),
        "reasoning": Conversation((user("What is 17 * 3?"), answer("51", "17 * 3 = 51."))),
        "reasoning in every turn": Conversation(
            (system("Be exact."), user("1?"), answer("1", "Easy."), user("Doubled?"), answer("2", "Twice."), user("Halved?"), answer("1", "Half."))
        ),
        "Chinese": Conversation((user("你是谁？"), answer("我是一只猫。", "用户想知道我的名字。"))),
        "emoji and joined letters": Conversation((user("👩‍👩‍👧 e\u0301 ﬁ İ"), answer("🇪🇺 ok 😀"))),
        "code": Conversation((user("def f(x):\n\treturn x  # `f`\n"), answer("```python\nprint('<b>&amp;</b>')\n```\n"))),
        "spaces around": Conversation((user("  \n hi \t"), answer("\n\n ok  "))),
        "empty answer": Conversation((user("Say nothing."), answer(""))),
        "empty system text": Conversation((system(""), user("Hi!"), answer("Hello."))),
        "low effort": Conversation((user("Hi!"), answer("Hello.")), reasoning_effort="low"),
        "high effort": Conversation((user("Hi!"), answer("Hello.", "A greeting.")), reasoning_effort="high"),
        "its own date": Conversation((user("Hi!"), answer("Hello.")), current_date="2025-06-28"),
        "almost a control token": Conversation((user("<|end |> and <|begin|>"), answer("<end>"))),
        "tools that are not called": Conversation((user("Hi!"), answer("Hello.")), tools=(clock,)),
        "a tool call": Conversation(tuple(asked), tools=(weather, clock)),
        "tool loop": Conversation((system("Be kind."), *loop, answer("Clear, at −3 °C.", "Now I know.")), tools=(weather, clock)),
        "after a tool loop": Conversation((*loop, answer("Cold."), user("Thanks!"), answer("Welcome.", "Polite.")), tools=(weather,)),
        "two calls in a row": Conversation(
            (*loop, call("get_time", "{}", "And the time?"), result("get_time", "noon"), answer("Noon.")), tools=(clock,)
        ),
        "words before a call": Conversation(
            (
                user("Oslo?"),
                call("get_weather", '{"city":"Oslo"}', content="Let me look."),
                result("get_weather", "-3"),
                answer("Cold."),
                user("Thanks!"),
                answer("Welcome."),
            ),
            tools=(weather,),
        ),
        "words and reasoning before a call": Conversation(
            (user("Oslo?"), call("get_weather", '{"city": "Oslo"}', "I should look.", "Let me look.")), tools=(weather,)
        ),
        "a wide tool": Conversation((user("Books?"), call("search", '{"query": ["a", "b"]}')), tools=(wide,)),
    }
    return [replace(chat, place=f"the built-in chat «{name}»") for name, chat in chats.items()]
