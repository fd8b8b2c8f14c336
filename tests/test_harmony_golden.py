"""openai-harmony's own golden renderings: our tokens equal them, or differ by exactly what docs/harmony.md says.

The 23 files lie in the source archive on PyPI, which is fetched at test time and held against its sha256. Each test builds the
conversation that openai-harmony's test of the same name builds. Where we differ on purpose, the golden text is edited by that
difference alone, and our tokens must equal the edited text's.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest

from fastoss.config import FormatSettings
from fastoss.data.conversation import Conversation, Message, Tool, ToolCall
from fastoss.data.harmony import HarmonyRenderer, parse_completion
from fastoss.data.other_renderers import encode_control
from fastoss.data.tokenizer import CALL, END, RETURN, decode, encode
from fastoss.data.typescript import tools_section

from .real_data import Archive, NotFetchedError, fetched

ARCHIVE = Archive("openai_harmony-0.0.8.tar.gz", "6e43f98e6c242fa2de6f8ea12eab24af63fa2ed3e89c06341fb9d92632c5cbdf", "Apache-2.0")
DATE = "2025-06-28"  # of the golden files that have one


@pytest.fixture(scope="session")
def golden(cache: Path) -> dict[str, str]:
    """The golden files by name, as openai-harmony's tests read them: without white space at their end."""
    try:
        path = fetched(ARCHIVE)
    except NotFetchedError as problem:
        pytest.skip(str(problem))
    files = {}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            if "/test-data/" in member.name and member.isfile():
                file = archive.extractfile(member)
                assert file is not None
                files[Path(member.name).stem] = file.read().decode().rstrip()
    assert len(files) == 23
    return files


# --- what is said in them --------------------------------------------------------------------------------------------


def user(text: str) -> Message:
    return Message("user", text)


def prompt(*messages: Message, effort: str = "medium", tools: tuple[Tool, ...] = (), date: str = DATE) -> list[int]:
    return HarmonyRenderer(FormatSettings(current_date=date)).render_prompt(messages, effort, tools)


def with_date(text: str, date: str = DATE) -> str:
    """Stated difference: we always say the date, as the guide's examples and the official template do."""
    assert "Current date" not in text
    return text.replace("Knowledge cutoff: 2024-06\n", f"Knowledge cutoff: 2024-06\nCurrent date: {date}\n", 1)


def with_system(text: str) -> str:
    """Stated difference: we always begin with a system message, as the guide asks ("the most basic system message you should use")."""
    assert not text.startswith("<|start|>system")
    return decode(prompt()).removesuffix("<|start|>assistant") + text


def with_empty_line(text: str) -> str:
    """Stated difference: instructions end with an empty line, as in the official template and not in the guide."""
    assert text.count("<|end|><|start|>user") == 1
    return text.replace("<|end|><|start|>user", "\n\n<|end|><|start|>user")


def with_commentary_channel(text: str) -> str:
    """Stated difference: the valid channels are always the three that the guide wants for the best performance."""
    assert "# Valid channels: analysis, final." in text
    return text.replace("# Valid channels: analysis, final.", "# Valid channels: analysis, commentary, final.")


def without_builtin_tools(text: str) -> str:
    """Stated difference: the built-in browser and python are not described, since a fine-tune has no use for them."""
    begin, end = text.index("# Tools\n\n## browser"), text.index("# Valid channels")
    return text[:begin] + text[end:]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_simple_convo(golden):
    assert prompt(user("What is 2 + 2?")) == encode_control(with_date(golden["test_simple_convo"]))


CAPITAL = user("What is the capital of the largest country in the world?")


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_simple_convo_effort(golden, effort):
    text = with_empty_line(with_date(golden[f"test_simple_convo_{effort}_effort"]))
    assert prompt(Message("system", "Answer the user's questions like a robot."), CAPITAL, effort=effort) == encode_control(text)


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_simple_convo_effort_no_instruction(golden, effort):
    text = with_date(golden[f"test_simple_convo_{effort}_effort_no_instruction"])
    assert prompt(CAPITAL, effort=effort) == encode_control(text)


def test_reasoning_system_message(golden):
    text = with_commentary_channel(with_date(golden["test_reasoning_system_message"]))
    assert prompt(user("What is 2 + 2?")) == encode_control(text)


def test_reasoning_system_message_no_instruction(golden):
    text = with_commentary_channel(with_date(golden["test_reasoning_system_message_no_instruction"]))
    assert prompt(user("What is the best place to eat candy in the world?"), effort="high") == encode_control(text)


def test_reasoning_system_message_with_dates(golden):
    """Stated difference: the knowledge cutoff is a fact of the model, 2024-06, and cannot be set."""
    text = with_commentary_channel(golden["test_reasoning_system_message_with_dates"])
    assert text.count("Knowledge cutoff: 2021-01\n") == 1
    text = text.replace("Knowledge cutoff: 2021-01\n", "Knowledge cutoff: 2024-06\n")
    assert prompt(user("What is 42 * pi?"), date="2021-01-01") == encode_control(text)


def test_no_tools(golden):
    """A system message alone: equal as it is."""
    assert prompt() == encode_control(golden["test_no_tools"])


@pytest.mark.parametrize("name", ["test_browser_tool_only", "test_browser_and_python_tool"])
def test_builtin_tools(golden, name):
    assert prompt() == encode_control(without_builtin_tools(golden[name]))


def test_browser_and_function_tool(golden):
    tool = Tool(
        "lookup_weather",
        "Use this tool to lookup the weather in a given location. Call it with the parameter 'location', "
        "can be any textual description of a location.",
        {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
    )
    assert prompt(tools=(tool,)) == encode_control(without_builtin_tools(golden["test_browser_and_function_tool"]))


def test_render_functions_with_parameters(golden):
    """Equal as it is: before the tools openai-harmony leaves the empty line too."""
    weather = {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
        },
        "required": ["location"],
    }
    weathers = {
        "type": "object",
        "properties": {
            "locations": {
                "type": "array",
                "items": {"type": "string"},
                "description": 'List of city and state, e.g. ["San Francisco, CA", "New York, NY"]',
            },
            "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
        },
        "required": ["locations"],
    }
    sink = {
        "description": "params object",
        "type": "object",
        "properties": {
            "string": {"type": "string", "title": "STRING", "description": "A string", "examples": ["hello", "world"]},
            "string_nullable": {"type": "string", "nullable": True, "description": "A nullable string", "default": "the default"},
            "string_enum": {"type": "string", "enum": ["a", "b", "c"]},
            "oneof_string_or_number": {
                "oneOf": [
                    {"type": "string", "default": "default_string_in_oneof"},
                    {"type": "number", "description": "numbers can happen too"},
                ],
                "description": "a oneof",
                "default": 20,
            },
        },
    }
    tools = (
        Tool("get_location", "Gets the location of the user."),
        Tool("get_current_weather", "Gets the current weather in the provided location.", weather),
        Tool("get_multiple_weathers", "Gets the current weather in the provided list of locations.", weathers),
        Tool("kitchensink", "A function with various complex schemas.", sink),
    )
    text = golden["test_render_functions_with_parameters"]
    assert tools_section(tools) in text
    asked = (Message("system", "Always respond in riddles"), user("What is the weather like in SF?"))
    assert prompt(*asked, effort="high", tools=tools) == encode_control(text)


# --- reasoning in the history ----------------------------------------------------------------------------------------

FOUR = Message("assistant", "2 + 2 equals 4.", "User asks: “What is 2 + 2?” Simple arithmetic. Provide answer.")
NEXT = user("What about 9 / 2?")


def test_dropping_cot_by_default(golden):
    assert prompt(user("What is 2 + 2?"), FOUR, NEXT) == encode_control(with_system(golden["test_dropping_cot_by_default"]))


def test_preserve_cot(golden):
    """Stated difference: reasoning before an answer is never kept (an option of openai-harmony, against the guide)."""
    kept = 'User asks a simple question: "What is 2 + 2?" The answer: 4.'
    text = golden["test_preserve_cot"]
    message = f"<|start|>assistant<|channel|>analysis<|message|>{kept}<|end|>"
    assert text.count(message) == 1
    said = Message("assistant", "2 + 2 equals 4.", kept)
    assert prompt(user("What is 2 + 2?"), said, NEXT) == encode_control(with_system(text.replace(message, "")))


def test_keep_analysis_between_finals(golden):
    """As an example to learn: the same tokens, but the end. `<|return|>` is what the model must sample, says the guide."""
    chat = Conversation(
        (user("What is 2 + 2?"), Message("assistant", "4", "thinking 2+2"), user("What is 3 + 5?"), Message("assistant", "8", "thinking 3+5"))
    )
    ours = HarmonyRenderer(FormatSettings(current_date=DATE)).render_examples(chat)[-1].input_ids
    expected = encode_control(with_system(golden["test_keep_analysis_between_finals"]))
    assert (ours[-1], expected[-1]) == (RETURN, END)
    assert ours[:-1] == expected[:-1]


def test_does_not_drop_if_ongoing_analysis(golden):
    """Stated difference: a tool's result names its receiver and channel, as the guide has it and this golden has not."""
    text = golden["test_does_not_drop_if_ongoing_analysis"]
    assert text.count("<|start|>functions.lookup_weather<|message|>") == 1
    text = text.replace(
        "<|start|>functions.lookup_weather<|message|>", "<|start|>functions.lookup_weather to=assistant<|channel|>commentary<|message|>"
    )
    call = Message(
        "assistant",
        "",
        "User asks: “What is the weather in SF?” We need to use lookup_weather tool.",
        ToolCall("lookup_weather", '{"location": "San Francisco"}'),
    )
    result = Message("tool", '{"temperature": 20, "description": "sunny"}', name="lookup_weather")
    assert prompt(user("What is the weather in SF?"), call, result) == encode_control(with_system(text))


def test_tool_response_parsing(golden):
    """The rendering of a tool's message. Stated difference: the tools of a row are functions, so `browser.` becomes `functions.`."""
    text = golden["test_tool_response_parsing"]
    assert text.startswith("<|start|>browser.search to=assistant<|channel|>commentary")
    expected = encode_control(text.replace("browser.search", "functions.search", 1))
    asked = (user("?"), Message("assistant", "", tool_call=ToolCall("search", "{}")))
    result = Message("tool", '{"result": "https://openai.com/"}', name="search")
    ours = prompt(*asked, result)[len(prompt(*asked)) - len(encode_control("<|start|>assistant")) :]
    assert ours == [*expected, *encode_control("<|end|><|start|>assistant")]


# --- parsing ---------------------------------------------------------------------------------------------------------


def test_simple_reasoning_response(golden):
    """Its reasoning ends with `<|return|>`, where the guide's own copy of these tokens (format.md) has `<|end|>`.

    With the guide's tokens we read the same, without a problem; the golden's we read as well, and say what is odd.
    """
    ids = [int(word) for word in golden["test_simple_reasoning_response"].split()]
    assert ids.count(RETURN) == 1
    read = parse_completion(ids)
    assert read.thinking == 'User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.'
    assert read.content == "2 + 2 = 4."
    assert read.problems == ["the reply continued after its end"]
    ids[ids.index(RETURN)] = END
    again = parse_completion([*ids, RETURN])
    assert (again.thinking, again.content, again.problems, again.stop) == (read.thinking, read.content, [], RETURN)


def test_simple_tool_call(golden):
    """A call to a tool that is no function, on the analysis channel, of type `code`; here too `<|return|>` stands for `<|end|>`."""
    ids = [int(word) for word in golden["test_simple_tool_call"].split()]
    assert ids.count(RETURN) == 1
    read = parse_completion(ids)
    assert read.thinking == 'User asks: "What is the weather in Tokyo?" We need to use lookup_weather tool.'
    assert read.tool_call == ToolCall("lookup_weather", '{"location": "Tokyo"}')
    assert read.problems == ["the reply continued after its end"]


def test_streamable_parser(golden):
    """Reasoning, a call to the browser, and its result. Stated difference: we read one reply, which ends with the call."""
    ids = encode_control(golden["test_streamable_parser"])
    read = parse_completion(ids[: ids.index(CALL) + 1])
    assert read.thinking is not None
    assert read.thinking.startswith('User asks "Who is the current US president?"')
    assert read.thinking.endswith("Let's browse to confirm.")
    assert read.tool_call == ToolCall("browser.search", '{"query": "current US president July 2025", "topn": 10, "source": "news"}')
    assert (read.content, read.problems, read.stop) == ("", [], CALL)
    whole = parse_completion(ids)
    assert whole.tool_call == read.tool_call
    assert "the reply continued after its end" in whole.problems


# openai-harmony's further tests of its parser, whose texts stand in its test file.

ARGUMENTS = '{"location": "Tokyo"}'


@pytest.mark.parametrize(
    "header",
    [
        " to=functions.get_weather<|channel|>commentary <|constrain|>json",
        " to=functions.get_weather<|channel|>commentary<|constrain|>json",
        "<|channel|>commentary to=functions.get_weather<|constrain|>json",
        "<|channel|>commentary to=functions.get_weather json",
    ],
)
def test_tool_call_with_constrain_adjacent(header):
    read = parse_completion(encode_control(f"{header}<|message|>{ARGUMENTS}<|call|>"))
    assert (read.tool_call, read.content, read.problems, read.stop) == (ToolCall("get_weather", ARGUMENTS), "", [], CALL)


@pytest.mark.parametrize("refusal", ["I must refuse<|end|>", "<|channel|>analysis I must refuse<|end|>"])
def test_streamable_parser_missing_message_token(refusal):
    """openai-harmony raises when it is strict, else it takes the words for a message. We leave a header without a message out, and say so."""
    rest = "<|start|>assistant<|channel|>analysis<|message|>We must refuse<|end|><|start|>assistant<|channel|>final<|message|>I'm sorry.<|return|>"
    read = parse_completion(encode_control(refusal + rest))
    assert (read.thinking, read.content, read.problems) == ("We must refuse", "I'm sorry.", ["a header without a message"])


def test_streamable_parser_missing_message_token_tool_call():
    call = f"<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>"
    read = parse_completion(encode_control(f"... Let's use the tool.<|end|>{call}"))
    assert (read.tool_call, read.problems) == (ToolCall("get_weather", ARGUMENTS), ["a header without a message"])


@pytest.mark.parametrize(
    ("ids", "text"),
    [([9552, 9552], " \ufffd \ufffdworked"), ([9552, 55, 56], " \ufffdXYworked"), ([9552, *encode(" interesting")], " \ufffd interestingworked")],
)
def test_streamable_parser_invalid_utf8_decoding(ids, text):
    """Token 9552 is a space and half an emoji."""
    read = parse_completion([*encode_control("<|channel|>final<|message|>"), *ids, *encode_control("worked<|return|>")])
    assert read.content == text


# What gpt-oss really samples now and then (llama.cpp #27720 and the comments of its parser), and a reply that does not end.


@pytest.mark.parametrize(
    ("reply", "thinking", "content", "problem"),
    [
        ("<|channel|>commentary to=assistant<|channel|>final<|message|>Hi<|return|>", None, "Hi", "a message to the assistant itself"),
        ("<|channel|>commentary<|channel|>analysis<|message|>h<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>", "h", "Hi", None),
        ("<|channel|>commentary 2?<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>", None, "Hi", "a header without a message"),
        ("<|channel|>??<|message|>Hi<|return|>", None, "Hi", "a message with no known channel (??)"),
        ("<|channel|>final<|message|>Hi<|end|><|start|>user<|message|>And?<|end|>", None, "Hi",
         "the reply continued with a message of user, left out"),
        (
            "<|channel|>final<|message|>Hi<|end|><|start|>functions.f to=assistant<|channel|>commentary<|message|>{}<|end|>",
            None, "Hi", "the reply continued with a message of functions.f, left out",
        ),
    ],
)  # fmt: skip
def test_malformed_replies(reply, thinking, content, problem):
    read = parse_completion(encode_control(reply))
    assert (read.thinking, read.content, read.tool_call) == (thinking, content, None)
    assert [found.startswith(problem) for found in read.problems] == [True] if problem else read.problems == []


def test_every_golden_file_has_its_test(golden):
    tested = Path(__file__).read_text(encoding="utf-8")
    named = set(re.findall(r'golden\[f?"([\w{}]+)"\]', tested)) | set(re.findall(r'"(test_browser\w+)"', tested))
    assert {name.replace("{effort}", effort) for name in named for effort in ("low", "medium", "high")} == set(golden)
