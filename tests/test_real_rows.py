"""Rows that other people published, by the hundreds in every format: what is understood of them, and which are refused and why.

They are fetched when the tests run (tests/real_data.py); without a network these tests are skipped.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastoss.config import FormatSettings, load_recipe
from fastoss.data.conversation import Conversation, Message
from fastoss.data.dataset import Dataset, build_dataset
from fastoss.data.formats.preferences import row_to_preference
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.mojibake import first_mojibake, repaired
from fastoss.data.reading.rows import BadRow, Row
from fastoss.errors import FastossError

from .real_data import NotFetchedError, real_rows
from .test_fuzz import check_example

MOST = 1_500
SHAREGPT = {"system": "system", "human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
RECIPE = """\
name = "real"
[model]
name = "tiny"
precision = "float32"
max_length = 8192
[[data]]
source = "rows.jsonl"
[eval]
fraction = 0.0
"""
LENIENT = ("hygiene.malformed=drop", "hygiene.mojibake=repair")


def rows_of(kind: str) -> list[dict[str, Any]]:
    """At most `MOST` rows of a kind: the first, and of the rest every so manieth, so that each source has its share."""
    try:
        rows = real_rows(kind)
    except NotFetchedError as problem:
        pytest.skip(str(problem))
    assert len(rows) >= 500
    return rows if len(rows) <= MOST else rows[:500] + rows[500 :: -(-len(rows) // (MOST - 500))]


def built(folder: Path, rows: list[dict[str, Any]], *settings: str, method: str = "sft") -> Dataset:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return build_dataset(load_recipe(folder / "recipe.toml", settings).model_copy(update={"method": method}))


def number_of(conversation: Conversation) -> int:
    """Which of the rows a conversation was, from 0."""
    return int(conversation.place.removeprefix("rows.jsonl:")) - 1


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["value"] for part in content)


def expected(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a row says as (role, text), and of a call the value of its JSON: read here in the plainest way."""
    if "output" in row:
        asked = f"{row['instruction']}\n{row['input']}" if row["input"].strip() else row["instruction"]
        return [("user", asked), ("assistant", row["output"])]
    if "messages" in row:
        return [(message["role"], text_of(message["content"])) for message in row["messages"]]
    turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    return [(SHAREGPT[speaker], json.loads(value) if speaker == "function_call" else value) for speaker, value in turns]


def read(message: Message) -> tuple[str, Any]:
    if message.tool_call is None:
        return message.role, message.content
    assert message.content == ""
    return message.role, {"name": message.tool_call.name, "arguments": json.loads(message.tool_call.arguments)}


def check_dataset(dataset: Dataset, rows: list[dict[str, Any]], refused: set[int]) -> None:
    """Every row but the refused ones is understood word by word; each of its answers and calls is an example that can be trained."""
    renderer = HarmonyRenderer(FormatSettings())
    made: Counter[int] = Counter()
    for example in dataset.train:
        number = number_of(example.conversation)
        said = expected(rows[number])[: len(example.conversation.messages)]
        assert [read(message) for message in example.conversation.messages] == said, example.conversation.place
        assert all(message.thinking is None for message in example.conversation.messages)
        tools = json.loads(rows[number].get("tools") or "[]")
        assert [(tool.name, tool.description, tool.parameters) for tool in example.conversation.tools] == [
            (tool["name"], tool["description"], tool.get("parameters")) for tool in tools
        ]
        check_example(example, renderer)
        made[number] += 1
    answers = {number: sum(role == "assistant" for role, _ in expected(row)) for number, row in enumerate(rows) if number not in refused}
    assert made == answers


def unread(dataset: Dataset) -> dict[str, int]:
    return dict(dataset.report.unread)


def dropped(dataset: Dataset) -> dict[str, int]:
    return {reason: tally.count for reason, tally in dataset.report.drops.items()}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_alpaca(tmp_path):
    """English, Chinese and SQL instructions: none is refused."""
    rows = rows_of("alpaca")
    dataset = built(tmp_path, rows)
    assert dataset.report.train_rows == len(rows) > 1_000
    assert dropped(dataset) == {}
    assert unread(dataset) == {"db_id": sum("db_id" in row for row in rows)}
    check_dataset(dataset, rows, set())


def test_sharegpt(tmp_path):
    rows = rows_of("sharegpt")
    dataset = built(tmp_path, rows)
    assert dropped(dataset) == {}
    assert unread(dataset) == {"id": len(rows)}
    assert len(dataset.train) == 2 * len(rows)
    check_dataset(dataset, rows, set())


def test_messages(tmp_path):
    """Two answers are mojibake: both are named, and repaired where the recipe wants it; nothing else is touched."""
    rows = rows_of("messages")
    with pytest.raises(FastossError) as caught:
        built(tmp_path, rows)
    assert caught.value.place == "rows.jsonl:246"
    assert caught.value.fact.startswith("looks like UTF-8 that was read as Latin-1: ")
    assert "FranÃ§oise" in caught.value.fact
    assert "“ancy (Françoise Yip), a lingerie model/d”" in caught.value.fact
    (other,) = caught.value.also
    assert other.startswith("rows.jsonl:260: looks like UTF-8")
    assert "Belle Époque Paris, Chéri tells" in other

    dataset = built(tmp_path, rows, *LENIENT)
    assert dropped(dataset) == {}
    assert {what: (tally.count, tally.places) for what, tally in dataset.report.kept.items() if "mojibake" in what} == {
        "mojibake, repaired": (2, ["rows.jsonl:246", "rows.jsonl:260"])
    }
    for number in (245, 259):
        said = Conversation(tuple(Message(message["role"], message["content"]) for message in rows[number]["messages"]))
        mended = repaired(said)
        assert mended is not None
        rows[number] = {"messages": [{"role": message.role, "content": message.content} for message in mended.messages]}
    check_dataset(dataset, rows, set())
    assert unread(dataset) == Counter(name for row in rows for name in row.keys() - {"messages"}) + Counter(label=2)


def test_tools(tmp_path):
    """Calls, results and definitions are those that were written. In two rows a tool answers that was never called."""
    rows = rows_of("tools")
    fact = "message 3 is a tool's result, but no tool was called"
    with pytest.raises(FastossError) as caught:
        built(tmp_path, rows)
    assert (caught.value.place, caught.value.fact) == ("rows.jsonl:498", fact)
    assert caught.value.also == [f"rows.jsonl:594: {fact}"]
    for number in (497, 593):
        assert [turn["from"] for turn in rows[number]["conversations"][:3]] == ["human", "gpt", "observation"]

    dataset = built(tmp_path, rows, *LENIENT)
    assert dropped(dataset) == {fact: 2}
    assert unread(dataset) == {}
    assert dataset.report.trained_by_channel.keys() == {"commentary", "final"}
    check_dataset(dataset, rows, {497, 593})


def test_parts(tmp_path):
    """Lists of text parts are joined, weights are taken; reasoning and calls as parts are not understood, and refused as such."""
    rows = rows_of("parts")
    dataset = built(tmp_path, rows, *LENIENT)
    odd = {number for number, row in enumerate(rows) if any(part["type"] != "text" for message in row["messages"] for part in message["content"])}
    fact = "message 3 (assistant) holds a part of the type 'reasoning'"
    assert dropped(dataset) == {fact: len(odd)} == {fact: 50}
    assert unread(dataset) == {}
    assert {span.weight for example in dataset.train for span in example.spans} == {0.0, 1.0}
    check_dataset(dataset, rows, odd)


def check_pair(row: dict[str, Any], chosen: Conversation, rejected: Conversation) -> None:
    renderer = HarmonyRenderer(FormatSettings())
    for name, conversation in (("chosen", chosen), ("rejected", rejected)):
        said = expected({"conversations": [*row["conversations"], row[name]]})
        assert [read(message) for message in conversation.messages] == said
        check_example(renderer.render_last(conversation), renderer)


def test_pairs(tmp_path):
    """English and Chinese pairs. One holds a form feed and is refused, one is mojibake before its answers."""
    rows = rows_of("dpo")
    refused, damaged = [], []
    for number, row in enumerate(rows):
        try:
            pair = row_to_preference(Row(row, f"pairs:{number}"))
        except BadRow as problem:
            refused.append((problem.place, problem.fact, problem.hint))
            continue
        check_pair(row, pair.chosen, pair.rejected)
        if first_mojibake(pair.chosen) or first_mojibake(pair.rejected):
            damaged.append(number)
    assert refused == [("pairs:286", "the prompt: the text holds the control character U+000C", "remove it")]
    assert damaged == [15]
    assert any("fiancÃ© Cal Hockley" in turn["value"] for turn in rows[15]["conversations"])
    dataset = built(tmp_path, rows, *LENIENT, method="dpo")
    assert dropped(dataset) == {"the prompt: the text holds the control character U+000C": 1}
    assert {what: tally.places for what, tally in dataset.report.kept.items() if "mojibake" in what} == {"mojibake, repaired": ["rows.jsonl:16"]}
    assert Counter(number_of(example.conversation) for example in dataset.train) == dict.fromkeys({*range(len(rows))} - {286}, 2)


def test_pairs_under_other_names():
    """`chosen_messages` and `rejected_messages` are ours once `columns` says so."""
    try:
        rows = real_rows("dpo_parts")
    except NotFetchedError as problem:
        pytest.skip(str(problem))
    for number, row in enumerate(rows):
        pair = row_to_preference(Row(row, f"pairs:{number}"), columns={"chosen": "chosen_messages", "rejected": "rejected_messages"})
        for name, conversation in (("chosen_messages", pair.chosen), ("rejected_messages", pair.rejected)):
            assert [read(message) for message in conversation.messages] == expected({"messages": row[name]})
