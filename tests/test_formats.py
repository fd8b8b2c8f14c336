"""Formats: which rows are understood and as what, and which are refused, with which words."""

from __future__ import annotations

import contextlib
import datetime
import timeit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastoss.config import Identity
from fastoss.data.conversation import Conversation, Message, Tool, ToolCall
from fastoss.data.formats.conversations import KNOWN_COLUMNS, row_to_conversation, unread_columns
from fastoss.data.formats.preferences import is_preference, row_to_preference, unread_pair_columns
from fastoss.data.reading.rows import BadRow, Row
from fastoss.errors import FastossError

U, A, S = Message("user", "u"), Message("assistant", "a"), Message("system", "s")


def understood(columns: dict, /, *arguments, **named) -> Conversation:
    return row_to_conversation(Row(columns, "here:1"), *arguments, **named)


def said(columns: dict, /, *arguments, **named) -> list[Message]:
    return list(understood(columns, *arguments, **named).messages)


def chat(*messages: tuple) -> dict:
    return {"messages": [{"role": role, "content": content, **dict(*rest)} for role, content, *rest in messages]}


def asked(**answer) -> dict:
    """A question, and an answer with these keys."""
    return {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", **answer}]}


def refusal(columns: dict, /, *arguments, **named) -> BadRow:
    with pytest.raises(BadRow) as caught:
        understood(columns, *arguments, **named)
    assert caught.value.place == "here:1"
    return caught.value


# --- what is understood ----------------------------------------------------------------------------------------------


def answer(content: str = "a", thinking: str | None = None) -> Message:
    return Message("assistant", content, thinking)


TURNS = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "<think>t</think>a"}]


@pytest.mark.parametrize(
    ("columns", "messages"),
    [
        (chat(("user", "u"), ("assistant", "a")), [U, A]),
        (
            chat(("system", "s"), ("user", "u"), ("assistant", "a", {"thinking": "t"}), ("user", "u"), ("assistant", "a")),
            [S, U, answer("a", "t"), U, A],
        ),
        (chat(("developer", "s"), ("user", "u"), ("assistant", "a")), [S, U, A]),
        (chat(("user", "u"), ("assistant", "a")) | {"system": "s"}, [S, U, A]),
        (chat(("user", "u"), ("assistant", "a")) | {"system": ""}, [U, A]),
        (chat(("user", [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]), ("assistant", "a")), [Message("user", "a b"), A]),
        (chat(("user", [{"type": "text", "value": "u"}]), ("assistant", "a")), [U, A]),
        (chat(("user", "\ufeffu"), ("assistant", "\ufeffa")), [U, A]),
        (chat(("user", "u\ufeff\t\r\n"), ("assistant", " a ")), [Message("user", "u\ufeff\t\r\n"), Message("assistant", " a ")]),
        ({"conversations": TURNS}, [U, answer("a", "t")]),
        ({"conversations": TURNS, "system": "s"}, [S, U, answer("a", "t")]),
        ({"conversations": [{"from": "system", "value": "s"}, *TURNS]}, [S, U, answer("a", "t")]),
        ({"conversations": [{"from": "user", "value": "u"}, {"from": "assistant", "value": "a", "thinking": "t"}]}, [U, answer("a", "t")]),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "model", "value": "a"}]}, [U, A]),
        ({"conversations": chat(("user", "u"), ("assistant", "a"))["messages"]}, [U, A]),
        ({"instruction": "u", "output": "a"}, [U, A]),
        ({"instruction": "u", "input": " ", "output": "a", "history": []}, [U, A]),
        ({"instruction": "i", "input": "x", "output": "a", "history": None, "system": None}, [Message("user", "i\nx"), A]),
        (
            {"instruction": "i", "output": "o", "history": [["u", "a"], ["u", "a"]], "system": "s", "thinking": "t"},
            [S, U, A, U, A, Message("user", "i"), answer("o", "t")],
        ),
        ({"instruction": "u", "output": "a", "reasoning_content": "t"}, [U, answer("a", "t")]),
        ({"query": "u", "response": "a", "history": [["u", "a"]]}, [U, A, U, A]),
        ({"prompt": "u", "completion": "<think>t</think>a"}, [U, answer("a", "t")]),
        ({"prompt": "u", "completion": "a", "system": "s", "reasoning": "t"}, [S, U, answer("a", "t")]),
        (
            {"prompt": chat(("system", "s"), ("user", "u"))["messages"], "completion": chat(("assistant", "a"))["messages"]},
            [S, U, A],
        ),
        ({"reasoning_language": "de", "developer": "s", "user": "u", "analysis": "t", "final": "a"}, [S, U, answer("a", "t")]),
        ({"user": "u", "final": "a", "analysis": "", "developer": ""}, [U, answer("a", "")]),
        ({"user": "u", "final": "a", "analysis": None}, [U, A]),
    ],
)
def test_rows_that_are_understood(columns, messages):
    assert said(columns) == messages
    assert unread_columns(Row(columns, "here:1")) == set()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"thinking": "t"}, ("a", "t")),
        ({"reasoning_content": "t"}, ("a", "t")),
        ({"reasoning": "t"}, ("a", "t")),
        ({"reasoning": "t", "reasoning_content": "t", "thinking": None}, ("a", "t")),
        ({"content": "<think>\nt\n</think>\n\na"}, ("a", "t")),
        ({"content": "<think>t</think>a", "thinking": " t "}, ("a", "t")),
        ({"content": [{"type": "text", "text": "<think>t</think>"}, {"type": "text", "text": "a"}]}, ("a", "t")),
        ({"thinking": " t "}, ("a", " t ")),
        ({"content": "<think></think>\n\na"}, ("a", "")),
        ({"content": "<think>\n \n</think>a"}, ("a", "")),
        ({"thinking": ""}, ("a", "")),
        ({"thinking": " \n"}, ("a", "")),
        ({"content": "<think></think>a", "thinking": "\n"}, ("a", "")),
        ({"thinking": None}, ("a", None)),
        ({}, ("a", None)),
    ],
)
def test_reasoning(message, expected):
    (_, message) = said(asked(**message))
    assert (message.content, message.thinking) == expected


def test_keys_that_mean_nothing_on_other_messages():
    user = {"role": "user", "content": "u", "thinking": " ", "train": False, "weight": 0, "tool_calls": [], "function_call": None, "loss": None}
    assert said({"messages": [user, {"role": "assistant", "content": "a"}]}) == [U, A]


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({}, 1.0),
        ({"train": True}, 1.0),
        ({"weight": 0.25}, 0.25),
        ({"weight": 2, "train": True, "loss": None}, 2.0),
        ({"loss_weight": 0.5, "weight": 0.5}, 0.5),
        ({"train": False}, 0.0),
        ({"loss": False}, 0.0),
        ({"weight": 0, "train": False}, 0.0),
    ],
)
def test_weights(keys, weight):
    row = chat(("user", "u"), ("assistant", "a", keys), ("user", "u"), ("assistant", "a"))
    assert [m.weight for m in said(row)] == [1.0, weight, 1.0, 1.0]
    assert unread_columns(Row(row, "here:1")) == set()


@pytest.mark.parametrize(
    ("columns", "effort", "date"),
    [
        ({}, None, None),
        ({"reasoning_effort": "high", "current_date": "2025-02-28"}, "high", "2025-02-28"),
        ({"reasoning_effort": None, "date": "2025-02-28"}, None, "2025-02-28"),
        ({"current_date": datetime.date(2025, 2, 28)}, None, "2025-02-28"),
        ({"date": datetime.datetime(2025, 2, 28, 12, 30), "current_date": "2025-02-28"}, None, "2025-02-28"),
    ],
)
def test_a_row_sets_effort_and_date(columns, effort, date):
    conversation = understood(asked() | columns)
    assert (conversation.reasoning_effort, conversation.current_date) == (effort, date)


def test_identity_fills_rows():
    identity = Identity(name='Mi"ka', author="us")
    row = {"instruction": "Who are you, {{NAME}}?", "output": "<think>{{AUTHOR}}</think>{{NAME}}, made by {{AUTHOR}}."}
    assert said(row, identity=identity) == [Message("user", 'Who are you, Mi"ka?'), answer('Mi"ka, made by us.', "us")]
    call = {"function": {"name": "f", "arguments": '{"a": "{{NAME}}"}'}}
    assert said(asked(tool_calls=[call]), identity=identity)[1].tool_call == ToolCall("f", '{"a": "Mi\\"ka"}')
    assert said(row)[0].content == "Who are you, {{NAME}}?"


# --- columns with other names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "mapping", "messages"),
    [
        ({"question": "u", "reply": "a"}, {"instruction": "question", "output": "reply"}, [U, A]),
        ({"data": {"q": {"text": "u"}, "a": "a"}}, {"instruction": "data.q.text", "output": "data.a"}, [U, A]),
        ({"data.q": "u", "data": {"q": "x"}, "a": "a"}, {"instruction": "data.q", "output": "a"}, [U, A]),
        ({"input": "u", "output": "a"}, {"instruction": "input"}, [U, A]),
        ({"instruction": "a", "output": "u"}, {"instruction": "output", "output": "instruction"}, [U, A]),
        ({"chat": chat(("user", "u"), ("assistant", "a"))["messages"]}, {"messages": "chat"}, [U, A]),
        ({"chat": TURNS, "sys": "s"}, {"conversations": "chat", "system": "sys"}, [S, U, answer("a", "t")]),
        ({"instruction": "u", "output": "a"}, {"thinking": "cot"}, [U, A]),
        ({"instruction": "u", "output": "a", "input": "own"}, {"input": "context"}, [U, A]),
    ],
)
def test_columns_with_other_names(columns, mapping, messages):
    assert said(columns, columns=mapping) == messages


def test_columns_that_are_not_there():
    problem = refusal({"q": "u", "a": "x"}, columns={"instruction": "question", "output": "a"})
    assert problem.fact == "the column `question` is not there"
    assert problem.hint == "`columns` says that it is `instruction`; the row has `q`, `a`"
    assert refusal({"data": 3}, columns={"text": "data.x"}).fact == "the column `data.x` is not there"


def test_columns_that_no_format_knows():
    row = Row({"q": "u"}, "here:1")
    with pytest.raises(FastossError, match="`columns` names `instructions`, a column that no format knows") as caught:
        row_to_conversation(row, columns={"instructions": "q"})
    assert not isinstance(caught.value, BadRow)  # hygiene.malformed must not drop it
    assert (caught.value.place, caught.value.hint) == ("here:1", "did you mean `instruction`?")
    with pytest.raises(FastossError, match="no format knows"):
        row_to_preference(row, columns={"xyzzy": "q"})


def test_unread_columns():
    assert unread_columns(Row({"instruction": "u", "output": "a", "histroy": [], "id": 3}, "x")) == {"histroy", "id"}
    assert unread_columns(Row(asked(mood="x", thinking="t") | {"images": []}, "x")) == {"images", "messages.mood"}
    assert unread_columns(Row(asked(mood=None), "x")) == set()  # Parquet gives every message every key
    assert unread_columns(Row({"messages": [{"role": "user", "content": "u", "name": "Eve"}]}, "x")) == {"messages.name"}
    assert unread_columns(Row({"conversations": [{"from": "human", "value": "u", "markdown": True}]}, "x")) == {"conversations.markdown"}
    prompt = [{"role": "user", "content": "u", "mood": 1}]
    assert unread_columns(Row({"prompt": prompt, "completion": prompt}, "x")) == {"prompt.mood", "completion.mood"}
    assert unread_columns(Row(asked() | {"rejected_response": "x", "tools": [], "date": "x"}, "x")) == {"rejected_response"}
    assert unread_columns(Row(asked() | {"user": "u", "final": "a", "analysis": "t"}, "x")) == set()  # Multilingual-Thinking says it twice
    mapped = {"instruction": "data.q", "output": "a"}
    assert unread_columns(Row({"data": {"q": "u"}, "a": "x", "output": "other", "note": 1}, "x"), "alpaca", mapped) == {"output", "note"}
    assert {"messages", "conversations", "thinking", "tools", "text"} <= set(KNOWN_COLUMNS)


# --- harmony text ----------------------------------------------------------------------------------------------------

SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-06-28\n\nReasoning: high\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.{tools}<|end|>"
)
PLAIN = SYSTEM.format(tools="")
WITH_TOOLS = SYSTEM.format(tools="\nCalls to these tools must go to the commentary channel: 'functions'.")
DEVELOPER = "<|start|>developer<|message|># Instructions\n\ns\n\n{tools}<|end|>"
USER = "<|start|>user<|message|>u<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>a<|end|>"
LAST = "<|start|>assistant<|channel|>final<|message|>a<|return|>"
ANALYSIS = "<|start|>assistant<|channel|>analysis<|message|>t<|end|>"
SAYING = "<|start|>assistant<|channel|>commentary<|message|>one moment<|end|>"
CALL = '<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"x": 1}<|call|>'
RESULT = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>sunny<|end|>"
CALLED = Message("assistant", "", tool_call=ToolCall("f", '{"x": 1}'))
GIVEN = Message("tool", "sunny", name="f")
SECTION = "# Tools\n\n## functions\n\nnamespace functions {\n\n// does\ntype f = () => any;\n\n} // namespace functions"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (PLAIN + USER + LAST, [U, A]),
        (USER + FINAL, [U, A]),
        (USER + LAST + "\n", [U, A]),
        ("\ufeff" + USER + LAST, [U, A]),
        (USER + "<|start|>assistant<|message|>a<|end|>", [U, A]),
        (PLAIN + DEVELOPER.format(tools="") + USER + FINAL + USER + ANALYSIS + LAST, [S, U, A, U, answer("a", "t")]),
        ("<|start|>developer<|message|># Instructions\n\ns<|end|>" + USER + LAST, [S, U, A]),
        (USER + ANALYSIS + SAYING + CALL, [U, Message("assistant", "one moment", "t", ToolCall("f", '{"x": 1}'))]),
        (USER + CALL + RESULT + ANALYSIS + LAST, [U, CALLED, GIVEN, answer("a", "t")]),
        (USER + CALL.replace("<|constrain|>", "") + RESULT + LAST, [U, CALLED, GIVEN, A]),
        (USER + CALL.replace(" <|constrain|>json", "") + RESULT + LAST, [U, CALLED, GIVEN, A]),
        (USER + CALL.replace(" to=functions.f", "").replace("commentary", "commentary to=functions.f") + RESULT + LAST, [U, CALLED, GIVEN, A]),
        (USER + "<|start|>assistant<|channel|>final<|message|>1 < 2 | 3 > 2<|return|>", [U, answer("1 < 2 | 3 > 2")]),
    ],
)
def test_harmony_text(text, messages):
    conversation = understood({"text": text})
    assert list(conversation.messages) == messages
    assert conversation.reasoning_effort == ("high" if text.startswith(PLAIN) else None)
    assert conversation.current_date == ("2025-06-28" if text.startswith(PLAIN) else None)
    assert unread_columns(Row({"text": text}, "x")) == set()


def test_harmony_text_with_its_tools_as_json():
    tools = [{"name": "f", "description": "does"}]
    for text in (WITH_TOOLS + DEVELOPER.format(tools=SECTION) + USER + CALL, PLAIN + DEVELOPER.format(tools="") + USER + CALL):
        conversation = understood({"text": text, "tools": tools})
        assert list(conversation.messages) == [S, U, CALLED]
        assert conversation.tools == (Tool("f", "does"),)
    only = WITH_TOOLS + f"<|start|>developer<|message|>{SECTION}<|end|>" + USER + CALL
    assert list(understood({"text": only, "tools": tools}).messages) == [U, CALLED]


def test_harmony_text_is_what_the_renderer_writes():
    from fastoss.config import FormatSettings
    from fastoss.data.harmony import HarmonyRenderer
    from fastoss.data.tokenizer import decode

    row = chat(
        ("system", "s\n\n你"),
        ("user", "u"),
        ("assistant", "one moment", {"thinking": "t", "tool_calls": [{"name": "f", "arguments": {"x": [1, "é"]}}]}),
    )
    row["messages"] += [{"role": "tool", "content": '"sunny"'}, {"role": "assistant", "content": "😀\n", "thinking": "more"}]
    row |= {"tools": [{"name": "f", "description": "does", "parameters": {"type": "object", "properties": {}}}], "reasoning_effort": "low"}
    conversation = understood(row | {"current_date": "2025-01-02"})
    text = decode(HarmonyRenderer(FormatSettings()).render_examples(conversation)[-1].input_ids)
    assert understood({"text": text, "tools": row["tools"]}) == conversation


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("<|start|>" + USER + LAST, "message 1 of the harmony text has a header that is not understood"),
        (PLAIN.replace("ChatGPT", "Mika") + USER + LAST, "message 1 of the harmony text is another system text than gpt-oss's own"),
        (PLAIN.replace("high", "max") + USER + LAST, "is another system text"),
        (USER + PLAIN + LAST, "message 2 of the harmony text is another system text"),
        (WITH_TOOLS + USER + LAST, "message 1 of the harmony text announces tools"),
        (DEVELOPER.format(tools=SECTION) + USER + LAST, "message 1 of the harmony text has a # Tools section"),
        ("<|start|>developer<|message|>be kind<|end|>" + USER + LAST, "does not begin with # Instructions"),
        ("<|start|>user u<|end|>" + LAST, "message 1 of the harmony text has a header that is not understood"),
        (USER + "<|start|>assistant<|channel|>final", "message 2 of the harmony text has no <|message|>"),
        (USER + "<|start|>assistant", "message 2 of the harmony text has no <|message|>"),
        (USER + "<|start|>assistant<|channel|>final<|message|>a", "message 2 of the harmony text is not closed"),
        ("<|start|>user<|message|>u" + LAST, "message 1 of the harmony text is not closed before the next one begins"),
        (USER + "\n" + LAST, "message 2 of the harmony text does not begin with <|start|>"),
        (USER + LAST + "more", "message 3 of the harmony text does not begin with <|start|>"),
        (USER + FINAL.replace("final", "thoughts"), "message 2 of the harmony text has the unknown channel 'thoughts'"),
        (USER + FINAL.replace("final", "final json"), "has a header that is not understood"),
        (USER + FINAL.replace("<|end|>", "<|call|>"), "message 2 of the harmony text is an answer, but ends with <|call|>"),
        (USER + ANALYSIS.replace("<|end|>", "<|return|>"), "message 2 of the harmony text is in the channel analysis, but ends with <|return|>"),
        (USER.replace("<|end|>", "<|return|>") + LAST, "message 1 of the harmony text is of the user, but ends with <|return|>"),
        (USER + ANALYSIS + ANALYSIS + LAST, "message 2 of the harmony text is analysis that is followed by no answer"),
        (USER + ANALYSIS + USER + LAST, "message 2 of the harmony text is analysis that is followed by no answer"),
        (USER + ANALYSIS, "message 2 of the harmony text is analysis that is followed by no answer"),
        (USER + SAYING + LAST, "message 2 of the harmony text is commentary that is followed by no call"),
        (USER + SAYING + ANALYSIS + CALL, "message 2 of the harmony text is commentary that is followed by no call"),
        (USER + CALL.replace("functions.f", "python"), "message 2 of the harmony text calls 'python'"),
        (USER + CALL.replace("<|call|>", "<|end|>"), "message 2 of the harmony text calls a tool, but not in the commentary channel"),
        (USER + CALL.replace("commentary", "analysis"), "message 2 of the harmony text calls a tool, but not in the commentary channel"),
        (USER + CALL.replace("commentary", "commentary to=functions.f"), "has a header that is not understood"),
        (USER + CALL.replace('{"x": 1}', "{x}"), "`arguments` of the call of message 2 is not valid JSON"),
        (USER + CALL + RESULT.replace(" to=assistant", "") + LAST, "message 3 of the harmony text is a tool's result, but is not addressed"),
        (USER + CALL + RESULT.replace("functions.f", "functions.g") + LAST, "message 3 is a result of 'functions.g', but `f` was called"),
        (USER + RESULT + LAST, "message 2 is a tool's result, but no tool was called"),
        (USER + FINAL + FINAL, "message 3 is of the assistant, but it is the user's turn"),
        (PLAIN + FINAL, "message 2 is of the assistant, but it is the user's turn"),
        (PLAIN + USER, "the conversation does not end with an answer"),
        ("<|start|>user<|message|>u<|channel|>x<|end|>" + LAST, "the text holds the control token <|channel|>"),
        ("<|start|>moderator<|message|>u<|end|>" + LAST, "has a header that is not understood: 'moderator'"),
        ("<|start|>user<|message|> <|end|>" + LAST, "the user's text is empty"),
    ],
)
def test_harmony_text_that_is_refused(text, fact):
    assert fact in refusal({"text": text}).fact


def test_harmony_text_against_the_rows_columns():
    assert refusal({"text": PLAIN + USER + LAST, "reasoning_effort": "low"}).fact == "`reasoning_effort` is 'low', but the row says 'high' as well"
    assert "`current_date` is '2025-01-01', but the row says '2025-06-28'" in refusal({"text": PLAIN + USER + LAST, "date": "2025-01-01"}).fact
    assert understood({"text": PLAIN + USER + LAST, "reasoning_effort": "high", "tools": []}).current_date == "2025-06-28"
    other = {"text": DEVELOPER.format(tools=SECTION) + USER + LAST, "tools": [{"name": "g"}]}
    assert "has another # Tools section than `tools` gives" in refusal(other).fact


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["messages", "sharegpt", "alpaca", "prompt_completion", "flat", "harmony"])
def test_a_named_format_is_insisted_on(format):
    fact = refusal({"note": "x"}, format).fact
    assert "is missing or null" in fact or "is not a list of messages" in fact
    assert refusal({"prompt": "u", "chosen": "a", "rejected": "b"}, format).hint == 'train pairs with method = "dpo"'


@pytest.mark.parametrize(
    ("columns", "fact"),
    [
        ({"text": "x"}, "the columns are not understood (text)"),
        ({}, "the columns are not understood (none)"),
        ({"messages": []}, "`messages` is not a list of messages"),
        ({"messages": "hi"}, "`messages` is not a list of messages"),
        ({"messages": ["hi"]}, "message 1 is not an object"),
        (chat(("human", "u"), ("assistant", "a")), "message 1 has the unknown role 'human'"),
        (chat((["user"], "u"), ("assistant", "a")), "message 1 has the unknown role of the type list"),
        (chat(("x" * 100, "u"), ("assistant", "a")), f"message 1 has the unknown role '{'x' * 58}…"),
        (chat(("user", None), ("assistant", "a")), "message 1 (user) is missing or null"),
        (chat(("user", "u"), ("assistant", None)), "message 2 (assistant) is missing or null"),
        (chat(("user", ["u"]), ("assistant", "a")), "message 1 (user) is not a text"),
        (chat(("user", {"text": "u"}), ("assistant", "a")), "message 1 (user) is not a text"),
        (chat(("user", [{"type": "image_url"}]), ("assistant", "a")), "message 1 (user) holds a part of the type 'image_url'"),
        (chat(("user", [{"type": "text"}]), ("assistant", "a")), "a part of message 1 (user) is missing or null"),
        (chat(("user", []), ("assistant", "a")), "the user's text is empty"),
        (chat(("user", "u"), ("assistant", " \n")), "the answer is empty"),
        (chat(("user", ""), ("assistant", "a")), "the user's text is empty"),
        (chat(("user", "\ufeff"), ("assistant", "a")), "the user's text is empty"),
        (chat(("system", ""), ("user", "u"), ("assistant", "a")), "the system text is empty"),
        (chat(("user", "u")), "the conversation does not end with an answer"),
        (chat(("system", "s")), "the conversation does not end with an answer"),
        (chat(("assistant", "a"), ("user", "u"), ("assistant", "a")), "message 1 is of the assistant, but it is the user's turn"),
        (chat(("user", "u"), ("user", "u"), ("assistant", "a")), "message 2 is of the user, but it is the assistant's turn"),
        (chat(("user", "u"), ("system", "s"), ("assistant", "a")), "a system message that is not the first"),
        (chat(("system", "s"), ("system", "s"), ("user", "u"), ("assistant", "a")), "a system message that is not the first"),
        (chat(("system", "s"), ("user", "u"), ("assistant", "a")) | {"system": "s"}, "a system message that is not the first"),
        (chat(("user", "u"), ("user", "u")) | {"system": "s"}, "message 2 is of the user, but it is the assistant's turn"),
        (asked(content="<think>x"), "a <think> tag is not closed"),
        (asked(content="a</think>b"), "a <think> tag is not closed"),
        (asked(content="<think>x<think>y</think>b"), "a <think> tag is not closed"),
        (asked(content="a <think>x</think> b"), "a <think> tag is not closed, or not at the beginning"),
        (asked(content="<think>x</think>"), "the answer is empty"),
        (asked(content="<think>x</think>a", thinking="y"), "the answer has a <think> part and other reasoning as well"),
        (asked(thinking="x", reasoning_content="y"), "`thinking` and `reasoning_content` of message 2 differ"),
        (asked(thinking=3), "`thinking` of message 2 is not a text"),
        (chat(("user", "u", {"thinking": "x"}), ("assistant", "a")), "message 1 has reasoning, but its role is user"),
        (chat(("user", "u<|end|>"), ("assistant", "a")), "the text holds the control token <|end|>"),
        (asked(content="<|channel|>final<|message|>a"), "the text holds the control token <|channel|>"),
        (asked(content="<|target|>a"), "the text holds the control token <|target|>"),
        (asked(thinking="<|return|>"), "the text holds the control token <|return|>"),
        (asked(content="\ud83d"), "the text holds half a character (a lone surrogate)"),
        (asked(content="a\0"), "the text holds a NUL character (U+0000)"),
        (asked(thinking="a\x1b[1m"), "the text holds the control character U+001B"),
        (chat(("user", "你\x08"), ("assistant", "a")), "the text holds the control character U+0008"),
        (asked() | {"reasoning_effort": "max"}, "`reasoning_effort` is 'max'"),
        (asked() | {"reasoning_effort": ["low"]}, "`reasoning_effort` is of the type list"),
        (asked() | {"current_date": "2025-02-30"}, "`current_date` is '2025-02-30'"),
        (asked() | {"current_date": "20250228"}, "`current_date` is '20250228'"),
        (asked() | {"date": "May 2020"}, "`date` is 'May 2020'"),
        (asked() | {"date": 2020}, "`date` is 2020"),
        (asked() | {"date": "2025-02-28", "current_date": "2025-03-01"}, "`current_date` is '2025-03-01', but the row says '2025-02-28' as well"),
        (asked(train=1), "`train` of message 2 is 1"),
        (asked(loss="no"), "`loss` of message 2 is 'no'"),
        (asked(weight=-1), "`weight` of message 2 is -1"),
        (asked(weight=True), "`weight` of message 2 is True"),
        (asked(weight=float("nan")), "`weight` of message 2 is nan"),
        (asked(weight=10**400), "`weight` of message 2 is 1000000"),
        (asked(train=True, weight=0), "`train` and `weight` of message 2 contradict each other"),
        (asked(train=True, loss=False), "`train` and `loss` of message 2 contradict each other"),
        (asked(weight=0.5, loss_weight=1), "`weight` and `loss_weight` of message 2 contradict each other"),
        (asked(train=False), "nothing in the row is trained"),
        (chat(("user", "u", {"train": True}), ("assistant", "a")), "message 1 is to be trained, but its role is user"),
        (chat(("user", "u", {"weight": 1}), ("assistant", "a")), "message 1 is to be trained, but its role is user"),
        (chat(("user", "u", {"weight": "x"}), ("assistant", "a")), "`weight` of message 1 is 'x'"),
        ({"instruction": "i"}, "`output` is missing or null"),
        ({"output": "o"}, "`instruction` is missing or null"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "message 1 has the unknown role 'narrator'"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]}, "message 1 (user) is missing or null"),
        ({"conversations": [{"from": "human", "value": "u"}, "x"]}, "message 2 is not an object"),
        ({"conversations": [*TURNS, *TURNS[1:]], "system": "s"}, "message 3 is of the assistant, but it is the user's turn"),
        ({"conversations": "x"}, "`conversations` is not a list of messages"),
        ({"prompt": ["x"], "completion": "c"}, "`prompt` is not a text"),
        ({"prompt": "p", "completion": None}, "`completion` is missing or null"),
        ({"prompt": chat(("user", "u"))["messages"], "completion": []}, "`completion` is not a list of messages"),
        ({"user": "u", "final": ""}, "the answer is empty"),
        ({"user": "u", "final": "a", "analysis": 3}, "`analysis` is not a text"),
        ({"instruction": "i", "output": 3}, "`output` is not a text"),
        ({"instruction": "i", "output": "o", "history": "x"}, "`history` is not a list of [user, assistant] pairs"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, "pair 1 of `history` is not [user, assistant]"),
        ({"instruction": "i", "output": "o", "history": [["a", None]]}, "the answer in pair 1 of `history` is missing or null"),
        ({"instruction": "i", "output": "o", "input": 3}, "`input` is not a text"),
        ({"instruction": "i", "output": "o", "system": 0}, "`system` is not a text"),
        ({"instruction": "i", "output": "o", "thinking": 0}, "`thinking` is not a text"),
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, "the row is a preference pair (`chosen` and `rejected`)"),
        ({"chosen": [], "rejected": []}, "the row is a preference pair"),
        ({"conversations": TURNS[:1], "chosen": {}, "rejected": {}}, "the row is a preference pair"),
    ],
)
def test_refused_rows(columns, fact):
    assert fact in refusal(columns).fact


def test_a_pair_with_an_answer_to_train_trains_it():
    row = asked() | {"chosen": "a", "rejected": "b"}
    assert said(row) == [U, A]
    assert unread_columns(Row(row, "x")) == {"chosen", "rejected"}


# --- whatever comes --------------------------------------------------------------------------------------------------

WORDS = [
    "user", "assistant", "tool", "system", "function", "human", "gpt", "function_call", "observation", "<|end|>", "<think>", "</think>a", "text",
    '{"name": "f", "arguments": {}}', "[]", "\0", "\ud800", "low", "2025-02-28", "\n\nHuman: u\n\nAssistant: a", USER, LAST, ANALYSIS, CALL, RESULT,
    USER + CALL + RESULT + LAST, PLAIN, "f", "functions.f",
]  # fmt: skip
KEYS = [
    "role", "content", "thinking", "reasoning", "from", "value", "tool_calls", "function_call", "name", "tool_call_id", "id", "function", "arguments",
    "type", "text", "train", "loss", "weight", "parameters", "description",
]  # fmt: skip
names = st.sampled_from([*KNOWN_COLUMNS, "chosen", "rejected", "rejected_response", "rejected_messages", "question"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=14,
)
calls = st.fixed_dictionaries(
    {}, optional={"id": json_values, "type": json_values, "function": st.fixed_dictionaries({"name": st.just("f"), "arguments": json_values})}
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "assistant", "tool"]), "content": st.just("x") | json_values},
        optional={
            "thinking": json_values,
            "tool_calls": st.lists(calls, max_size=2),
            "train": json_values,
            "weight": json_values,
            "name": json_values,
        },
    )
    | json_values,
    max_size=5,
)
rows = st.dictionaries(names, json_values | messages, max_size=6)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(rows, st.sampled_from(["auto", "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "flat", "harmony"]))
def test_any_row_is_understood_or_refused(columns, format):
    row = Row(columns, "x:1")
    with contextlib.suppress(BadRow):
        assert row_to_conversation(row, format, Identity(name="n", author="a")).messages[-1].role == "assistant"
    with contextlib.suppress(BadRow):
        pair = row_to_preference(row)
        assert pair.chosen.messages[:-1] == pair.rejected.messages[:-1]
        assert is_preference(row)
    assert unread_columns(row, format) is not None
    assert unread_pair_columns(row) is not None


@settings(max_examples=200, deadline=None)
@given(rows, st.dictionaries(names, st.sampled_from(["messages", "a.b", "role", "instruction", "prompt", ".", ""]), max_size=3))
def test_any_row_under_other_names(columns, mapping):
    row = Row(columns, "x:1")
    with contextlib.suppress(BadRow):
        row_to_conversation(row, columns=mapping)
    with contextlib.suppress(BadRow):
        row_to_preference(row, columns=mapping)
    assert unread_columns(row, "auto", mapping) is not None
    assert unread_pair_columns(row, mapping) is not None


@given(st.lists(st.sampled_from([USER, LAST, FINAL, ANALYSIS, SAYING, CALL, RESULT, PLAIN, "<|start|>", "<|message|>", "x", "<|end|>"]), max_size=6))
def test_any_harmony_text_is_understood_or_refused(parts):
    with contextlib.suppress(BadRow):
        row_to_conversation(Row({"text": "<|start|>" * (not parts) + "".join(parts)}, "x:1"), "harmony")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_is_refused(opening):
    value: object = "x"
    for _ in range(100_000):
        value = [value]
    for columns in (
        asked(tool_calls=opening * 100_000),
        asked() | {"tools": opening * 100_000},
        asked() | {"tools": [{"name": "f", "parameters": {"a": value}}]},
        asked(tool_calls=[{"name": "f", "arguments": {"a": value}}]),
        asked(thinking=value),
    ):
        refusal(columns)


def test_speed():
    """A million rows are streamed: a row of two messages takes some 10 µs. Ten times as much would be a mistake of ours."""
    row = Row(asked(thinking="t"), "x:1")
    assert min(timeit.repeat(lambda: row_to_conversation(row), number=200, repeat=5)) / 200 < 100e-6
