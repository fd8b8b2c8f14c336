"""Tools: definitions, calls and results in rows, several calls told one after the other, and what does not fit together."""

from __future__ import annotations

import json

import pytest

from fastoss.data.conversation import Message, Tool, ToolCall
from fastoss.data.formats.conversations import unread_columns
from fastoss.data.reading.rows import Row

from .test_formats import A, U, asked, refusal, said, understood

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}


def call(name: str = "f", arguments: object = "{}", id: str | None = None) -> dict:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict, **keys) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **keys}


def result(content: object = "r", **keys) -> dict:
    return {"role": "tool", "content": content, **keys}


def chat(*messages: dict, **columns) -> dict:
    return {"messages": list(messages), **columns}


def called(name: str = "f", arguments: str = "{}", content: str = "", thinking: str | None = None) -> Message:
    return Message("assistant", content, thinking, ToolCall(name, arguments))


def given(content: str = "r", name: str = "f") -> Message:
    return Message("tool", content, name=name)


def test_a_call_its_result_and_the_answer():
    row = chat(USER, calling(call(arguments='{"city": "Köln"}', id="c1")), result(tool_call_id="c1", name="f"), ANSWER)
    assert said(row) == [U, called(arguments='{"city": "Köln"}'), given(), A]
    assert unread_columns(Row(row, "x")) == set()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (calling(call()), called()),
        (calling(call(), content=""), called()),
        (calling(call(), content="\n"), called()),
        (calling(call(), content="one moment", thinking="t"), called(content="one moment", thinking="t")),
        (calling(call(), content="<think>t</think>"), called(thinking="t")),
        (calling(call(), thinking=" "), called(thinking="")),
        (calling(call(arguments={"x": [1, "é", None]})), called(arguments='{"x":[1,"é",null]}')),
        (calling(call(arguments=' {"x": 1}\n')), called(arguments='{"x": 1}')),
        (calling(call(arguments=None)), called()),
        (calling(call("functions.get-it.v2_x")), called("get-it.v2_x")),
        (calling({"name": "f", "arguments": {}}), called()),
        ({"role": "assistant", "tool_calls": json.dumps([call()])}, called()),
        ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}, called()),
        ({"role": "assistant", "content": "", "tool_calls": [], "function_call": {"name": "f", "arguments": "{}"}}, called()),
    ],
)
def test_calls(message, expected):
    assert said(chat(USER, message)) == [U, expected]


def test_a_calling_message_has_its_weight():
    row = chat(USER, calling(call(), call(), train=False), result(), result(), ANSWER)
    assert [m.weight for m in said(row)] == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("sunny", "sunny"),
        ("", ""),
        ({"t": [1.5, "é"]}, '{"t":[1.5,"é"]}'),
        ([1, 2], "[1,2]"),
        ([], "[]"),
        (21, "21"),
        (False, "false"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "image_url"}], '[{"type":"image_url"}]'),
    ],
)
def test_results(content, text):
    assert said(chat(USER, calling(call()), result(content), ANSWER))[2] == given(text)
    assert said(chat(USER, calling(call()), {"role": "function", "name": "functions.f", "content": content}, ANSWER))[2] == given(text)


def test_several_calls_are_told_one_after_the_other():
    both = calling(call("f", id="1"), call("g", id="2"), content="wait", thinking="t")
    expected = [U, called("f", content="wait", thinking="t"), given("rf", "f"), called("g"), given("rg", "g"), A]
    assert said(chat(USER, both, result("rf", tool_call_id="1"), result("rg", tool_call_id="2"), ANSWER)) == expected
    assert said(chat(USER, both, result("rg", tool_call_id="2"), result("rf", tool_call_id="1"), ANSWER)) == expected
    assert said(chat(USER, both, result("rf"), result("rg"), ANSWER)) == expected
    assert said(chat(USER, both, result("rf", name="f"), result("rg", name="g", tool_call_id="2"), ANSWER)) == expected


def test_chains_of_calls():
    row = chat(USER, calling(call()), result(), calling(call(), call()), result("x"), result("y"), ANSWER, USER, calling(call()))
    assert said(row) == [U, called(), given(), called(), given("x"), called(), given("y"), A, U, called()]


def test_sharegpt_calls():
    one, two = {"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}
    turns = [
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": json.dumps(one)},
        {"from": "observation", "value": '{"r": 1}'},
        {"from": "gpt", "value": "a"},
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": "<think>t</think>\n" + json.dumps([one, two])},
        {"from": "tool", "value": "x"},
        {"from": "observation", "value": {"y": 2}},
        {"from": "gpt", "value": "a"},
    ]
    row = {"conversations": turns, "tools": json.dumps([{"name": "f"}, {"name": "g"}])}
    expected = [U, called("f", '{"x":1}'), given('{"r": 1}'), A]
    assert said(row) == [*expected, U, called("f", '{"x":1}', thinking="t"), given("x"), called("g"), given('{"y":2}', "g"), A]
    assert unread_columns(Row(row, "x")) == set()


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        (None, ()),
        ([], ()),
        ("[]", ()),
        ("", ()),
        (
            [{"type": "function", "function": {"name": "f", "description": "does", "parameters": SCHEMA, "strict": True}}],
            (Tool("f", "does", SCHEMA),),
        ),
        ([{"name": "functions.f"}, {"type": "function", "name": "g", "description": None, "parameters": None}], (Tool("f"), Tool("g"))),
        (json.dumps([{"name": "f", "parameters": {}}]), (Tool("f", "", {}),)),
    ],
)
def test_definitions(tools, expected):
    assert understood(asked() | {"tools": tools}).tools == expected
    assert understood(asked() | {"functions": tools}).tools == expected


@pytest.mark.parametrize(
    ("tools", "fact"),
    [
        ({"name": "f"}, "`tools` is not a list of functions"),
        ("x", "`tools` is not valid JSON"),
        ('"x"', "`tools` is not a list of functions"),
        (["x"], "tool 1 is not an object"),
        ([{"name": "f"}, {"description": "x"}], "the name of tool 2 is missing or null"),
        ([{"name": "get weather"}], "tool 1 has the name 'get weather'"),
        ([{"name": ""}], "tool 1 has the name ''"),
        ([{"name": "f", "description": 3}], "the description of tool 1 is not a text"),
        ([{"name": "f", "parameters": "x"}], "`parameters` of tool 1 is not an object"),
        ([{"name": "f", "parameters": {"x": float("inf")}}], "`parameters` of tool 1 cannot be written as JSON"),
        ([{"name": "f", "parameters": {"x": "<|end|>"}}], "the text holds the control token <|end|>"),
        ([{"name": "f", "description": "\ud800"}], "half a character"),
        ([{"type": "web_search"}], "tool 1 is of the type 'web_search'"),
        ([{"name": "f"}, {"name": "functions.f"}], "the tool `f` is defined twice"),
        ([{"name": "g"}], "the tool `f` is called, but not defined in `tools`"),
    ],
)
def test_refused_definitions(tools, fact):
    assert fact in refusal(chat(USER, calling(call()), tools=tools)).fact


def test_tools_under_two_names():
    assert refusal(asked() | {"tools": [{"name": "f"}], "functions": [{"name": "f"}]}).fact == "the row has both `tools` and `functions`"


@pytest.mark.parametrize(
    ("messages", "fact"),
    [
        ([calling({"function": {"name": "f"}})], "the call of message 2 has no `arguments`"),
        ([calling(call(arguments=""))], "`arguments` of the call of message 2 is not valid JSON"),
        ([calling(call(arguments="{x}"))], "`arguments` of the call of message 2 is not valid JSON"),
        ([calling(call(arguments='{"x": NaN}'))], "`arguments` of the call of message 2 is not valid JSON"),
        ([calling(call(arguments="[1]"))], "`arguments` of the call of message 2 is not a JSON object"),
        ([calling(call(arguments=[1]))], "`arguments` of the call of message 2 is not a JSON object"),
        ([calling(call(arguments={"x": float("nan")}))], "`arguments` of the call of message 2 cannot be written as JSON"),
        ([calling(call(arguments={"x": "<|call|>"}))], "the text holds the control token <|call|>"),
        ([calling(call("a b"))], "the call of message 2 has the name 'a b'"),
        ([calling(call(), {"function": {"arguments": {}}})], "the name of call 2 of message 2 is missing or null"),
        ([calling(call(id=["x"]))], "the id of the call of message 2 is not a text"),
        ([calling({"type": "custom", "custom": {}})], "the call of message 2 is of the type 'custom'"),
        ([calling("x")], "the call of message 2 is not an object"),
        ([calling(call(), tool_calls="x")], "`tool_calls` of message 2 is not valid JSON"),
        ([calling(call(), tool_calls={"x": 1})], "`tool_calls` of message 2 is not a list"),
        ([calling(call(), function_call={"name": "f"})], "message 2 has both `tool_calls` and `function_call`"),
        ([calling(call(), train=False)], "nothing in the row is trained"),
        ([result(), ANSWER], "message 2 is a tool's result, but no tool was called"),
        ([ANSWER, result()], "message 3 is a tool's result, but no tool was called"),
        ([calling(call()), ANSWER], "message 3 is of the assistant, but the result of `f` must follow its call"),
        ([calling(call()), USER], "message 3 is of the user, but the result of `f` must follow its call"),
        ([calling(call()), result()], "the conversation does not end with an answer"),
        ([calling(call()), result(), USER], "message 4 is of the user, but it is the assistant's turn"),
        ([calling(call()), result(), result(), ANSWER], "message 4 is one tool result too many: message 2 makes 1 call"),
        ([calling(call(), call())], "message 2 makes 2 calls, but 0 results follow"),
        ([calling(call(), call()), result()], "message 2 makes 2 calls, but 1 result follows"),
        ([calling(call(), call(), call()), result(), result(), ANSWER], "message 2 makes 3 calls, but 2 results follow"),
        ([calling(call(id="1")), result(tool_call_id="2"), ANSWER], "message 3 answers the call '2', which was not made"),
        (
            [calling(call(id="1"), call(id="2")), result(tool_call_id="1"), result(tool_call_id="1"), ANSWER],
            "the id '1' stands for more than one call or result",
        ),
        (
            [calling(call(id="1"), call(id="1")), result(tool_call_id="1"), result(tool_call_id="1"), ANSWER],
            "the id '1' stands for more than one call or result",
        ),
        ([calling(call()), result(tool_call_id={"x": 1}), ANSWER], "the id of message 3 (tool) is not a text"),
        ([calling(call()), result(name="g"), ANSWER], "message 3 is a result of 'g', but `f` was called"),
        ([calling(call()), result(name=3), ANSWER], "the name of message 3 (tool) is not a text"),
        ([calling(call()), result(None), ANSWER], "message 3 (tool) is missing or null"),
        ([calling(call()), result("\0"), ANSWER], "the text holds a NUL character"),
        ([calling(call()), result({"x": float("inf")}), ANSWER], "message 3 (tool) cannot be written as JSON"),
        ([calling(call()), result(train=True), ANSWER], "message 3 is to be trained, but its role is tool"),
        ([{"role": "user", "content": "u", "tool_calls": [call()]}], "message 2 calls a tool, but its role is user"),
    ],
)
def test_calls_and_results_that_do_not_fit(messages, fact):
    first = [] if messages[0]["role"] == "user" else [USER]
    expected = fact.replace("message 2", "message 1") if not first else fact
    assert expected in refusal(chat(*first, *messages)).fact


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        ("f(1)", "the call of message 2 is not valid JSON"),
        ('"f"', "the call of message 2 is not an object"),
        ('{"name": "f"}', "the call of message 2 has no `arguments`"),
        ("[]", "message 2 (assistant) is missing or null"),
        (None, "the call of message 2 is not an object"),
        ('<think>x<think>y</think>{"name": "f", "arguments": {}}', "a <think> tag is not closed"),
    ],
)
def test_refused_sharegpt_calls(value, fact):
    turns = [{"from": "human", "value": "u"}, {"from": "function_call", "value": value}]
    assert fact in refusal({"conversations": turns}).fact
