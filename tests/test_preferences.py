"""Preferences: the shapes in which people keep pairs of answers, and pairs that are none."""

from __future__ import annotations

import pytest

from fastoss.config import Identity
from fastoss.data.conversation import Message, Preference
from fastoss.data.formats.preferences import is_preference, row_to_preference, unread_pair_columns
from fastoss.data.reading.rows import BadRow, Row

from .test_formats import LAST, PLAIN, A, S, U
from .test_formats import USER as HARMONY_USER
from .test_tools import call as tool_call
from .test_tools import calling, given, result

B = Message("assistant", "b")
SYSTEM, USER, CHOSEN, REJECTED = (
    {"role": role, "content": text} for role, text in (("system", "s"), ("user", "u"), ("assistant", "a"), ("assistant", "b"))
)


def pair(columns: dict, /, **named) -> Preference:
    return row_to_preference(Row(columns, "here:1"), **named)


def refusal(columns: dict, /, **named) -> BadRow:
    with pytest.raises(BadRow) as caught:
        pair(columns, **named)
    assert caught.value.place == "here:1"
    return caught.value


HUMAN = {"from": "human", "value": "u"}
GPT_A, GPT_B = {"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"messages": [USER, CHOSEN], "rejected_response": "b"}, [U]),
        ({"messages": [SYSTEM, USER, CHOSEN, USER, CHOSEN], "rejected_response": "b"}, [S, U, A, U]),
        ({"messages": [USER, CHOSEN], "rejected_response": REJECTED}, [U]),
        ({"messages": [USER, CHOSEN], "rejected_messages": [REJECTED]}, [U]),
        ({"messages": [SYSTEM, USER, CHOSEN], "rejected_messages": [SYSTEM, USER, REJECTED]}, [S, U]),
        ({"messages": [SYSTEM, USER, CHOSEN], "rejected_messages": [USER, REJECTED]}, [S, U]),
        ({"instruction": "u", "output": "a", "rejected_response": "b"}, [U]),
        ({"query": "u", "response": "a", "rejected_response": "b", "system": "s"}, [S, U]),
        ({"prompt": "u", "completion": "a", "rejected_response": "b"}, [U]),
        ({"conversations": [HUMAN, GPT_A], "rejected_response": "b"}, [U]),
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, [U]),
        ({"prompt": "u", "chosen": "a", "rejected": "b", "system": "s"}, [S, U]),
        ({"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b"}, [S, U]),
        ({"prompt": [SYSTEM, USER], "chosen": [CHOSEN], "rejected": [REJECTED]}, [S, U]),
        ({"prompt": [SYSTEM, USER], "chosen": CHOSEN, "rejected": "b"}, [S, U]),
        ({"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, CHOSEN], "rejected": [USER, REJECTED]}, [S, U]),
        ({"prompt": "u", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, [U]),
        ({"prompt": "u", "chosen": [SYSTEM, USER, CHOSEN], "rejected": [SYSTEM, USER, REJECTED]}, [S, U]),
        ({"prompt": "u", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED], "messages": [USER, CHOSEN]}, [U]),  # UltraFeedback
        ({"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED], "messages": [USER, CHOSEN]}, [U]),
        ({"chosen": [SYSTEM, USER, CHOSEN, USER, CHOSEN], "rejected": [SYSTEM, USER, CHOSEN, USER, REJECTED]}, [S, U, A, U]),
        ({"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED], "system": ""}, [U]),
        ({"chosen": "\n\nHuman: u\n\nAssistant: a", "rejected": "\n\nHuman: u\n\nAssistant: b"}, [U]),
        (
            {
                "chosen": "\n\nHuman: u\n\nAssistant: a\n\nHuman: u\n\nAssistant: a",
                "rejected": "\n\nHuman: u\n\nAssistant: a\n\nHuman: u\n\nAssistant: b",
            },
            [U, A, U],
        ),
        ({"prompt": "\n\nHuman: u\n\nAssistant:", "chosen": "a", "rejected": "b"}, [U]),
        ({"prompt": "\n\nHuman: u\n\nAssistant: a\n\nHuman: u\n\nAssistant:", "chosen": "a", "rejected": "b"}, [U, A, U]),
        ({"conversations": [HUMAN], "chosen": GPT_A, "rejected": GPT_B}, [U]),
        ({"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT_A, HUMAN], "chosen": GPT_A, "rejected": GPT_B}, [S, U, A, U]),
        ({"conversations": [HUMAN], "chosen": "a", "rejected": "b", "system": "s"}, [S, U]),
        ({"messages": [USER], "chosen": CHOSEN, "rejected": REJECTED}, [U]),
        ({"instruction": "i", "input": "x", "chosen": "a", "rejected": "b"}, [Message("user", "i\nx")]),
        ({"instruction": "u", "input": "", "history": [["u", "a"]], "chosen": "a", "rejected": "b", "system": "s"}, [S, U, A, U]),
        ({"question": "u", "chosen": "a", "rejected": "b", "system": "s"}, [S, U]),
        ({"question": "u", "chosen": "a", "rejected": "b", "system": ""}, [U]),
    ],
)
def test_pairs(columns, prompt):
    preference = pair(columns)
    assert list(preference.chosen.messages) == [*prompt, A]
    assert list(preference.rejected.messages) == [*prompt, B]
    assert preference.place == "here:1"
    assert is_preference(Row(columns, "x"))
    said_twice = {"messages"} if "messages" in columns and "prompt" in columns else set()
    assert unread_pair_columns(Row(columns, "x")) == said_twice | ({"system"} if columns.get("system") == "" and "question" not in columns else set())


def test_reasoning_effort_tools_and_weights():
    thought = pair({"prompt": "u", "chosen": "<think>t</think>a", "rejected": "<think>x</think>b", "reasoning_effort": "low", "date": "2025-02-28"})
    assert [c.messages[-1].thinking for c in (thought.chosen, thought.rejected)] == ["t", "x"]
    assert [(c.reasoning_effort, c.current_date) for c in (thought.chosen, thought.rejected)] == [("low", "2025-02-28")] * 2
    only = pair({"prompt": "u", "chosen": "<think>t</think>a", "rejected": "<think></think>a"})  # the answers are the same, the reasoning is not
    assert (only.chosen.messages[-1].thinking, only.rejected.messages[-1].thinking) == ("t", "")
    tools = [{"name": "f"}, {"name": "g"}]
    called = pair({"prompt": [USER], "chosen": calling(tool_call("f")), "rejected": calling(tool_call("g")), "tools": tools})
    assert [c.messages[-1].tool_call.name for c in (called.chosen, called.rejected)] == ["f", "g"]
    assert called.chosen.tools == called.rejected.tools
    chain = {"messages": [USER, calling(tool_call()), result(), CHOSEN], "rejected_response": "b"}
    assert pair(chain).rejected.messages[-2:] == (given(), B)


def test_the_rejected_conversation_has_the_chosen_ones_prompt():
    spoken = {**CHOSEN, "thinking": "early"}
    preference = pair({"chosen": [USER, spoken, USER, CHOSEN], "rejected": [USER, CHOSEN, USER, REJECTED]})
    assert preference.rejected.messages[:-1] == preference.chosen.messages[:-1]


def test_harmony_text_with_a_rival():
    text = PLAIN + "<|start|>developer<|message|># Instructions\n\ns<|end|>" + HARMONY_USER + LAST
    longer = [SYSTEM, {"role": "user", "content": "v"}, CHOSEN, USER, REJECTED]
    assert pair({"text": text, "rejected_response": "b"}).rejected.messages == (S, U, B)
    assert pair({"text": text, "rejected_response": "b"}).rejected.reasoning_effort == "high"
    assert "chosen and rejected differ in message 1 already" in refusal({"text": HARMONY_USER + LAST, "rejected_messages": longer}).fact
    fact = refusal({"messages": [USER, CHOSEN], "system": "s", "rejected_messages": [{"role": "assistant", "content": None}]}).fact
    assert fact == "the rejected answer: the text of message 3 (assistant) is missing or null"


def test_identity_and_names_of_columns():
    columns = {"q": "Who are you?", "good": "{{NAME}}", "data": {"bad": "ChatGPT"}}
    mapping = {"question": "q", "chosen": "good", "rejected": "data.bad"}
    preference = pair(columns, identity=Identity(name="Mika", author="us"), columns=mapping)
    assert [c.messages[-1].content for c in (preference.chosen, preference.rejected)] == ["Mika", "ChatGPT"]
    assert unread_pair_columns(Row(columns | {"note": 1, "question": "x"}, "x"), mapping) == {"note", "question"}


CONTROL = "the text holds the control token <|end|>"


@pytest.mark.parametrize(
    ("columns", "fact"),
    [
        ({"prompt": "u", "chosen": "", "rejected": "b"}, "the chosen answer: the answer is empty"),
        ({"prompt": "u", "chosen": "a", "rejected": " "}, "the rejected answer: the answer is empty"),
        ({"prompt": "u", "chosen": "<think>a</think>", "rejected": "b"}, "the chosen answer: the answer is empty"),
        ({"messages": [USER, {**CHOSEN, "content": ""}, USER, CHOSEN], "rejected_response": "b"}, "the prompt: the answer is empty"),
        ({"messages": [USER, {**CHOSEN, "content": ""}], "rejected_response": "b"}, "the chosen answer: the answer is empty"),
        ({"prompt": "u<|end|>", "chosen": "a", "rejected": "b"}, f"the prompt: {CONTROL}"),
        ({"prompt": "u", "chosen": "a<|end|>", "rejected": "b"}, f"the chosen answer: {CONTROL}"),
        ({"prompt": "u", "chosen": "a", "rejected": "b<|end|>"}, f"the rejected answer: {CONTROL}"),
        ({"messages": [USER, {**CHOSEN, "content": "<|end|>"}, USER, CHOSEN], "rejected_response": "b"}, f"the prompt: {CONTROL}"),
        ({"chosen": [USER], "rejected": [USER, REJECTED]}, "the chosen answer: the conversation does not end with an answer"),
        ({"chosen": [USER, CHOSEN], "rejected": [USER]}, "the rejected answer: the conversation does not end with an answer"),
        ({"chosen": [CHOSEN], "rejected": [REJECTED]}, "the prompt: message 1 is of the assistant, but it is the user's turn"),
    ],
)
def test_a_fault_names_the_answer_or_the_prompt(columns, fact):
    assert refusal(columns).fact == fact


@pytest.mark.parametrize("kind", ["messages", "response"])
def test_answers_in_columns_of_other_names(kind):
    columns = {f"chosen_{kind}": [USER, CHOSEN], f"rejected_{kind}": [USER, REJECTED]}
    problem = refusal(columns)
    assert problem.fact == f"the answers are in `chosen_{kind}` and `rejected_{kind}`, not in `chosen` and `rejected`"
    assert problem.hint == f'say which they are: columns = {{ chosen = "chosen_{kind}", rejected = "rejected_{kind}" }}'
    understood = pair(columns, columns={"chosen": f"chosen_{kind}", "rejected": f"rejected_{kind}"})  # and the hint is right
    assert [c.messages for c in (understood.chosen, understood.rejected)] == [(U, A), (U, B)]


@pytest.mark.parametrize(
    ("columns", "fact"),
    [
        ({}, "the row is not a pair of answers (no columns)"),
        ({"prompt": "u", "chosen": "a"}, "the row is not a pair of answers (prompt, chosen)"),
        ({"messages": [USER, CHOSEN]}, "the row is not a pair of answers (messages)"),
        ({"prompt": "u", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "u", "chosen": "a", "rejected": "<think> </think>a"}, "chosen and rejected are the same"),
        ({"messages": [USER, CHOSEN], "rejected_messages": [USER, CHOSEN]}, "chosen and rejected are the same"),
        ({"prompt": "u", "chosen": "", "rejected": "b"}, "the answer is empty"),
        ({"prompt": "u", "chosen": "a", "rejected": " "}, "the rejected answer: the answer is empty"),
        ({"prompt": "u", "chosen": "a", "rejected": None}, "`rejected` is not a list of messages"),
        ({"prompt": "u", "chosen": 3, "rejected": "b"}, "`chosen` is not a list of messages"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "the user's text is empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "`prompt` is not a list of messages"),
        ({"prompt": "u", "chosen": "a", "rejected": "b<|end|>"}, "the rejected answer: the text holds the control token <|end|>"),
        ({"prompt": "u", "chosen": "a", "rejected": "<think>b"}, "the rejected answer: a <think> tag is not closed"),
        ({"chosen": "a", "rejected": "b"}, "there is no prompt to `chosen`"),
        ({"chosen": [USER, CHOSEN], "rejected": "b"}, "there is no prompt to `rejected`"),
        ({"chosen": [CHOSEN], "rejected": [REJECTED]}, "message 1 is of the assistant, but it is the user's turn"),
        ({"chosen": [USER, CHOSEN], "rejected": [{"role": "user", "content": "v"}, REJECTED]}, "chosen and rejected differ in message 1 already"),
        ({"chosen": [USER, CHOSEN], "rejected": [SYSTEM, USER, REJECTED]}, "chosen and rejected differ in message 1 already"),
        ({"chosen": [USER, CHOSEN], "rejected": [USER, CHOSEN, USER, REJECTED]}, "chosen has 2 messages, rejected 4"),
        ({"prompt": "v", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, "the messages of `chosen` do not begin with the prompt"),
        ({"prompt": [SYSTEM, USER], "chosen": [USER], "rejected": [USER]}, "the messages of `chosen` do not begin with the prompt"),
        ({"messages": [USER, CHOSEN], "rejected_messages": [SYSTEM, {"role": "user", "content": "v"}, REJECTED]}, "do not begin with the prompt"),
        ({"messages": [USER], "rejected_response": "b"}, "there is no prompt to `rejected_response`"),
        ({"messages": [USER, CHOSEN], "rejected_response": None}, "`rejected_response` is not a list of messages"),
        ({"rejected_response": "b", "note": "x"}, "the columns are not understood (note)"),
        ({"conversations": [HUMAN, GPT_A], "chosen": GPT_A, "rejected": GPT_B}, "message 3 is of the assistant, but it is the user's turn"),
        ({"conversations": [HUMAN], "chosen": HUMAN, "rejected": GPT_B}, "the messages of `chosen` do not begin with the prompt"),
        ({"instruction": None, "chosen": "a", "rejected": "b"}, "`instruction` is missing or null"),
        ({"chosen": "\n\nHuman: u", "rejected": "\n\nHuman: u\n\nAssistant: b"}, "the conversation does not end with an answer"),
        ({"prompt": "u", "chosen": {**CHOSEN, "weight": 0}, "rejected": "b"}, "nothing in the row is trained"),
        ({"prompt": "u", "chosen": "a", "rejected": "b", "reasoning_effort": "x"}, "`reasoning_effort` is 'x'"),
    ],
)
def test_pairs_that_are_refused(columns, fact):
    assert fact in refusal(columns).fact


def test_unread_columns_of_pairs():
    row = {"prompt": "u", "chosen": [{**CHOSEN, "mood": 1}], "rejected": [REJECTED], "score": 3, "completion": "x", "tools": []}
    assert unread_pair_columns(Row(row, "x")) == {"score", "completion", "chosen.mood"}
    row = {"messages": [USER, {**CHOSEN, "mood": 1}], "rejected_response": "b", "score": 3}
    assert unread_pair_columns(Row(row, "x")) == {"score", "messages.mood"}
    assert not is_preference(Row({"messages": [USER, CHOSEN], "chosen": "x"}, "x"))
