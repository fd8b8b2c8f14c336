"""Rows: what is understood, what is refused and where, and that nothing disappears uncounted."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastoss.config import DataSource, Identity, load_recipe
from fastoss.data.conversation import Message
from fastoss.data.dataset import build_dataset
from fastoss.data.formats import row_to_conversation, unread_columns
from fastoss.data.show import example_lines
from fastoss.data.sources import BadRow, Row, read_rows
from fastoss.errors import FastossError

from .conftest import ROWS, fastoss


def understood(columns: dict, **arguments) -> list[tuple]:
    conversation = row_to_conversation(Row(columns, "here:1"), **arguments)
    return [(m.role, m.content, m.thinking) for m in conversation.messages]


def chat(*messages: tuple) -> dict:
    return {"messages": [{"role": role, "content": content, **dict(*rest)} for role, content, *rest in messages]}


def test_messages():
    row = chat(("system", "s"), ("user", "u"), ("assistant", "a", {"thinking": "t"}), ("user", "v"), ("assistant", "b"))
    assert understood(row) == [("system", "s", None), ("user", "u", None), ("assistant", "a", "t"), ("user", "v", None), ("assistant", "b", None)]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "a", "reasoning_content": "t"}, ("a", "t")),
        ({"content": "<think>\nt\n</think>\n\na"}, ("a", "t")),
        ({"content": "<think></think>\n\na"}, ("a", None)),
        ({"content": "<think>\n \n</think>a"}, ("a", None)),
        ({"content": "a", "thinking": "  "}, ("a", None)),
        ({"content": "a", "thinking": None}, ("a", None)),
        ({"content": "a", "thinking": " t "}, ("a", " t ")),
    ],
)
def test_reasoning_in_messages(message, expected):
    row = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", **message}]}
    assert understood(row)[1][1:] == expected


def test_developer_is_the_system_text():
    assert understood(chat(("developer", "d"), ("user", "u"), ("assistant", "a")))[0] == ("system", "d", None)


def test_alpaca_with_history_input_system_and_thinking():
    row = {"instruction": "Fix", "input": "teh", "output": "the", "history": [["a", "b"], ["c", "d"]], "system": "s", "thinking": "t"}
    said = understood(row)
    assert said[0] == ("system", "s", None)
    assert said[1:5] == [("user", "a", None), ("assistant", "b", None), ("user", "c", None), ("assistant", "d", None)]
    assert said[5:] == [("user", "Fix\nteh", None), ("assistant", "the", "t")]


def test_sharegpt():
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "<think>t</think>a"}]
    assert understood({"conversations": turns, "system": "s"}) == [("system", "s", None), ("user", "u", None), ("assistant", "a", "t")]
    assert understood({"conversations": [{"from": "system", "value": "s"}, *turns]})[0] == ("system", "s", None)
    assert understood({"conversations": chat(("user", "u"), ("assistant", "a"))["messages"]}) == [("user", "u", None), ("assistant", "a", None)]


def test_prompt_and_completion():
    assert understood({"prompt": "p", "completion": "<think>t</think>c"}) == [("user", "p", None), ("assistant", "c", "t")]
    prompt, completion = chat(("system", "s"), ("user", "u"))["messages"], chat(("assistant", "a"))["messages"]
    assert understood({"prompt": prompt, "completion": completion}) == [("system", "s", None), ("user", "u", None), ("assistant", "a", None)]


def test_flat_columns():
    row = {"reasoning_language": "German", "developer": "d", "user": "u", "analysis": "denken", "final": "f"}
    assert understood(row) == [("system", "d", None), ("user", "u", None), ("assistant", "f", "denken")]
    assert understood({"user": "u", "final": "f", "analysis": ""})[-1] == ("assistant", "f", None)


@pytest.mark.parametrize("format", ["messages", "sharegpt", "alpaca", "prompt_completion", "flat"])
def test_a_named_format_is_insisted_on(format):
    with pytest.raises(BadRow, match=r"is missing or null|is not a list of messages"):
        understood({"text": "x"}, format=format)


def test_identity_fills_rows():
    row = {"instruction": "Who are you, {{NAME}}?", "output": "{{NAME}}, made by {{AUTHOR}}."}
    said = understood(row, identity=Identity(name="Mika", author="us"))
    assert [m[1] for m in said] == ["Who are you, Mika?", "Mika, made by us."]


@pytest.mark.parametrize(
    ("columns", "fact"),
    [
        ({"text": "x"}, "the columns are not understood (text)"),
        ({}, "the columns are not understood (none)"),
        ({"messages": []}, "`messages` is not a list of messages"),
        ({"messages": "hi"}, "`messages` is not a list of messages"),
        ({"messages": ["hi"]}, "message 1 is not an object"),
        (chat(("human", "u"), ("assistant", "a")), "message 1 has the unknown role 'human'"),
        (chat(("tool", "u"), ("assistant", "a")), "message 1 has the unknown role 'tool'"),
        (chat(("user", None), ("assistant", "a")), "message 1 (user) is missing or null"),
        (chat(("user", "u"), ("assistant", None)), "message 2 (assistant) is missing or null"),
        (chat(("user", ["u"]), ("assistant", "a")), "message 1 (user) is not a text"),
        (chat(("user", "u"), ("assistant", " \n")), "the answer is empty"),
        (chat(("user", ""), ("assistant", "a")), "the user's text is empty"),
        (chat(("user", "u")), "the conversation does not end with an answer"),
        (chat(("system", "s")), "the conversation does not end with an answer"),
        (chat(("assistant", "a"), ("user", "u"), ("assistant", "a")), "message 1 is of the assistant, but it is the user's turn"),
        (chat(("user", "u"), ("user", "u"), ("assistant", "a")), "message 2 is of the user, but it is the assistant's turn"),
        (chat(("user", "u"), ("system", "s"), ("assistant", "a")), "a system message that is not the first"),
        (chat(("system", "s"), ("system", "s"), ("user", "u"), ("assistant", "a")), "a system message that is not the first"),
        (chat(("user", "u"), ("assistant", "<think>x")), "a <think> tag is not closed"),
        (chat(("user", "u"), ("assistant", "a</think>b")), "a <think> tag is not closed"),
        (chat(("user", "u"), ("assistant", "a <think>x</think> b")), "a <think> tag is not closed, or not at the beginning"),
        (chat(("user", "u"), ("assistant", "<think>x</think>")), "the answer is empty"),
        (chat(("user", "u"), ("assistant", "<think>x</think>a", {"thinking": "y"})), "has a <think> part and a `thinking` column"),
        (chat(("user", "u"), ("assistant", "a", {"thinking": "x", "reasoning_content": "y"})), "has both `thinking` and `reasoning_content`"),
        (chat(("user", "u", {"thinking": "x"}), ("assistant", "a")), "message 1 has reasoning, but its role is user"),
        (chat(("user", "u"), ("assistant", "a", {"tool_calls": [{}]})), "message 2 calls a tool"),
        (chat(("user", "u<|end|>"), ("assistant", "a")), "the text holds the control token <|end|>"),
        (chat(("user", "u"), ("assistant", "<|channel|>final<|message|>a")), "the text holds the control token <|channel|>"),
        (chat(("user", "u"), ("assistant", "<|target|>a")), "the text holds the control token <|target|>"),
        (chat(("user", "u"), ("assistant", "a", {"thinking": "<|return|>"})), "the text holds the control token <|return|>"),
        (chat(("user", "u"), ("assistant", "\ud83d")), "half a character"),
        (chat(("user", "u"), ("assistant", "a")) | {"reasoning_effort": "max"}, "`reasoning_effort` is 'max'"),
        ({"instruction": "i"}, "`output` is missing or null"),
        ({"output": "o"}, "`instruction` is missing or null"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "message 1 has the unknown role 'function_call'"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]}, "message 1 (user) is missing or null"),
        ({"conversations": "x"}, "`conversations` is not a list of messages"),
        ({"prompt": ["x"], "completion": "c"}, "`prompt` is not a text"),
        ({"prompt": "p", "completion": None}, "`completion` is missing or null"),
        ({"user": "u", "final": ""}, "the answer is empty"),
        ({"instruction": "i", "output": 3}, "`output` is not a text"),
        ({"instruction": "i", "output": "o", "history": "x"}, "`history` is not a list of [user, assistant] pairs"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, "pair 1 of `history` is not [user, assistant]"),
        ({"instruction": "i", "output": "o", "history": [["a", None]]}, "the answer in pair 1 of `history` is missing or null"),
        ({"instruction": "i", "output": "o", "input": 3}, "`input` is not a text"),
        ({"instruction": "i", "output": "o", "system": 0}, "`system` is not a text"),
        (chat(("user", "u"), ("assistant", "a")) | {"tools": [{}]}, "the row has `tools`"),
    ],
)
def test_refused_rows(columns, fact):
    with pytest.raises(BadRow) as caught:
        understood(columns)
    assert fact in caught.value.fact
    assert caught.value.place == "here:1"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["user", "assistant", "<|end|>", "<think>"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["role", "content", "thinking", "from", "tool_calls"]), inner, max_size=4)
    ),
    max_leaves=12,
)
names = st.sampled_from(
    [
        "conversations",
        "prompt",
        "completion",
        "user",
        "final",
        "analysis",
        "developer",
        "messages",
        "instruction",
        "input",
        "output",
        "history",
        "thinking",
        "system",
        "reasoning_effort",
    ]
)


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(names, json_values, max_size=6))
def test_any_row_is_understood_or_refused(columns):
    with contextlib.suppress(BadRow):
        row_to_conversation(Row(columns, "x:1"))
    assert unread_columns(Row(columns, "x:1")) is not None


# --- files -----------------------------------------------------------------------------------------------------------


def read(path, **arguments) -> list:
    return list(read_rows(DataSource(source=str(path), **arguments)))


def test_jsonl_with_bom_and_empty_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    rows = read(path)
    assert [(row.columns["a"], row.place.rpartition(":")[2]) for row in rows] == [(1, "1"), (2, "4")]


def test_json_array_and_max_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2}, 3]')
    first, second, third = read(path)
    assert (first.columns, second.place[-3:]) == ({"a": 1}, "[1]")
    assert isinstance(third, BadRow)
    assert len(read(path, max_rows=1)) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1}\n{"a": \n', ":2:7: not valid JSON"),
        (b'{"a": 1}}\n', ":1:9: not valid JSON: Extra data"),
        (b"[1]\n", ":1: a row is a JSON object, not a list"),
        (b"null\n", ":1: a row is a JSON object, not null"),
        (b'{"a": NaN}\n', ":1: not valid JSON: NaN is not JSON"),
        (b'{"a": "\xff"}\n', ":1: not UTF-8 text (byte 8)"),
        (b"[" * 100_000 + b"\n", ":1: not valid JSON"),
    ],
)
def test_unreadable_lines(tmp_path, content, expected):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    (bad,) = [row for row in read(path) if isinstance(row, BadRow)]
    assert expected in str(bad)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'{"a": 1}', "a .json file holds a list of rows, not an object"),
        ("a.json", b'{"a": 1}\n{"a": 2}', ":2:1: not valid JSON: Extra data"),
        ("a.json", b'[{"a": 1},\n oops]', ":2:2: not valid JSON"),
        ("a.json", b"\xff", "not UTF-8 text"),
        ("a.jsonl", b"", "the file has no rows"),
        ("a.txt", b"x", "a `.txt` file cannot be read as data"),
        ("a", b"x", "a file without an ending cannot be read as data"),
    ],
)
def test_unreadable_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FastossError, match=re.escape(expected)):
        read(tmp_path / name)


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(FastossError, match="data file not found"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(FastossError, match="the folder holds no data file"):
        read(tmp_path)
    with pytest.raises(FastossError, match="no file matches"):
        read(tmp_path / "*.jsonl")


LINES = b'{"a": "1"}\n{"a": "2"}\n'


def packed(name: str) -> bytes:
    return gzip.compress(LINES) if name.endswith(".gz") else pyarrow.compress(LINES, codec="zstd", asbytes=True)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "A.JSONL.GZ"])
def test_packed_files(tmp_path, name):
    (tmp_path / name).write_bytes(packed(name.lower()))
    rows = read(tmp_path / name)
    assert [(row.columns, row.place[-2:]) for row in rows] == [({"a": "1"}, ":1"), ({"a": "2"}, ":2")]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_torn_and_false_archives(tmp_path, name):
    (tmp_path / name).write_bytes(packed(name)[:-6])
    with pytest.raises(FastossError, match=rf"{name}: (cannot be read|the file has no rows)"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(LINES)
    with pytest.raises(FastossError, match=f"{name}: cannot be read"):
        read(tmp_path / name)


def test_folders_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.json", "sub/c.jsonl.gz", ".hidden.jsonl", "notes.txt"):
        content = b'[{"a": "j"}]' if name.endswith(".json") else gzip.compress(LINES) if name.endswith(".gz") else LINES
        (tmp_path / name).write_bytes(content)
    names = [Path(row.place.rpartition(":")[0] or row.place).name for row in read(tmp_path)]
    assert names == ["a.json[0]", "b.jsonl", "b.jsonl", "c.jsonl.gz", "c.jsonl.gz"]
    assert len(read(tmp_path / "*.jsonl")) == 2
    assert len(read(tmp_path / "**" / "*.jsonl*")) == 4
    assert len(read(tmp_path, max_rows=3)) == 3


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    text = 'instruction,input,output,history\r\n"Hi, you",,"two\nlines",\r\nq,x,a,"[[""b"", ""c""]]"\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second = read(path)
    assert first.columns == {"instruction": "Hi, you", "output": "two\nlines"}
    assert second.columns == {"instruction": "q", "input": "x", "output": "a", "history": [["b", "c"]]}
    assert [row.place.rpartition(":")[2] for row in (first, second)] == ["2", "4"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a,b\n1,2\n1,2,3\n", ":3: the row has more cells than the header"),
        (b"a,b\n1\n", ":2: the row has fewer cells than the header"),
        (b'a,history\n1,"[x"\n', ":2: the cell of `history` is not a JSON list"),
        (b'a,b\n1,"x" y\n', ":2: not valid CSV"),
    ],
)
def test_bad_csv_rows(tmp_path, content, expected):
    (tmp_path / "a.csv").write_bytes(content)
    (bad,) = [row for row in read(tmp_path / "a.csv") if isinstance(row, BadRow)]
    assert expected in str(bad)


def test_parquet(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "u", "thinking": None}, {"role": "assistant", "content": "a", "thinking": "t"}], "extra": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (row,) = read(tmp_path / "a.parquet")
    assert "extra" not in row.columns
    assert understood(row.columns) == [("user", "u", None), ("assistant", "a", "t")]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(FastossError, match="not valid Parquet"):
        read(tmp_path / "b.parquet")


# --- the data set ----------------------------------------------------------------------------------------------------


def built(folder, *overrides):
    return build_dataset(load_recipe(folder.recipe, overrides))


def test_counts(folder):
    dataset = built(folder)
    report = dataset.report
    assert (report.rows, report.train_examples, report.eval_examples) == (8, 11, 0)  # two pairs of history, one pair
    assert report.train_tokens == sum(len(e) for e in dataset.train)
    assert report.trained_tokens == sum(e.trained_tokens for e in dataset.train) == sum(report.trained_by_channel.values())


def test_malformed_is_an_error_or_is_dropped_and_listed(folder):
    folder.rows([*ROWS, {"instruction": "x"}, {"instruction": "y"}])
    with pytest.raises(FastossError, match=r"data\.jsonl:9: `output` is missing or null"):
        built(folder)
    report = built(folder, "hygiene.malformed=drop").report
    (line,) = [line for line in report.lines() if line.startswith("dropped")]
    assert line.startswith("dropped 2 of 10 rows: `output` is missing or null (")
    assert "data.jsonl:9" in line
    assert "data.jsonl:10" in line


def test_over_length(folder):
    long = {"instruction": "more " * 300, "output": "no", "history": []}
    folder.rows([*ROWS, long])
    report = built(folder).report
    assert any(line.startswith("dropped 1 of 12 examples: longer than max_length 256") and "data.jsonl:9" in line for line in report.lines())
    with pytest.raises(FastossError, match=r"data\.jsonl:9: an example of 3\d\d tokens is longer than model.max_length 256"):
        built(folder, "hygiene.over_length=error")


def test_truncation_removes_whole_early_turns(folder):
    history = [[f"question {i} " * 10, f"answer {i} " * 10] for i in range(6)]
    folder.rows([{"instruction": "last", "output": "final answer", "history": history, "system": "stay"}])
    dataset = built(folder, "hygiene.over_length=truncate_left_turns", "format.turns=last")
    (example,) = dataset.train
    kept = example.conversation.messages
    assert len(example) <= 256
    assert kept[0] == Message("system", "stay")
    assert kept[-2:] == (Message("user", "last"), Message("assistant", "final answer"))
    assert 4 <= len(kept) < 14
    assert kept[1].content == history[6 - (len(kept) - 3) // 2][0]
    assert any("left out early turns of 1 of 1 examples" in line for line in dataset.report.lines())


def test_duplicates(folder):
    folder.rows([*ROWS, ROWS[0]])
    assert any("1 rows are the same as an earlier one, and kept" in line for line in built(folder).report.lines())
    assert built(folder, "hygiene.duplicates=drop").report.train_examples == 11
    with pytest.raises(FastossError, match=r"data\.jsonl:9: the row is the same as .*data\.jsonl:1"):
        built(folder, "hygiene.duplicates=error")


def rows_of(count: int) -> list[dict]:
    return [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(count)]


def asked(examples) -> set[str]:
    return {e.conversation.messages[0].content for e in examples}


def test_split_by_content(folder):
    folder.rows(rows_of(100))
    dataset = built(folder, "eval.fraction=0.1")
    assert (len(dataset.eval), len(dataset.train)) == (10, 90)
    folder.rows(rows_of(100)[::-1])
    assert asked(built(folder, "eval.fraction=0.1").eval) == asked(dataset.eval)
    assert not asked(dataset.eval) & asked(dataset.train)


def test_copies_of_a_row_are_never_split(folder):
    folder.rows(rows_of(20) * 3)
    dataset = built(folder, "eval.fraction=0.1")
    assert not asked(dataset.eval) & asked(dataset.train)
    assert len(dataset.eval) == 6


def test_no_eval_on_few_rows_is_said(folder):
    report = built(folder, "eval.fraction=0.02").report
    assert any(line == "no evaluation: 0.02 of 8 rows makes none" for line in report.lines())


def test_examples_with_nothing_to_train_are_dropped_and_counted(folder):
    report = built(folder, 'format.train_on=["analysis"]').report
    assert report.train_examples == 3
    assert any(line.startswith("dropped 8 of 11 examples: nothing in them is trained (format.train_on)") for line in report.lines())
    folder.rows(rows_of(3))
    with pytest.raises(FastossError, match=r"no training example is left \(3 × nothing in them is trained"):
        built(folder, 'format.train_on=["analysis"]')


def test_everything_held_out(folder):
    with pytest.raises(FastossError, match=r"no training example is left \(8 held out by eval.fraction\)"):
        built(folder, "eval.fraction=0.99")


def test_held_out_rows_that_are_too_long(folder):
    report = built(folder, "eval.fraction=0.15", "model.max_length=95").report
    assert report.eval_rows == 1
    said = any(line == "no evaluation: the rows held out were dropped" for line in report.lines())
    assert said == (report.eval_examples == 0)


def test_columns_that_nobody_reads_are_said(folder):
    folder.rows(
        [
            {"instruction": "a", "output": "b", "histroy": [], "id": 3},
            {"messages": chat(("user", "u"), ("assistant", "a", {"weight": 1}))["messages"]},
        ]
    )
    lines = built(folder).report.lines()
    assert "the column `histroy` of 1 row is not read: did you mean `history`?" in lines
    assert "the column `id` of 1 row is not read" in lines
    assert "the column `messages.weight` of 1 row is not read" in lines


def test_sample_stands_in_and_its_absence_is_said(folder):
    (folder.root / "small.jsonl").write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    assert build_dataset(load_recipe(folder.recipe, ["data.0.sample=small.jsonl"]), sample=True).report.rows == 1
    assert any("no sample is named for" in line for line in build_dataset(load_recipe(folder.recipe), sample=True).report.lines())


def test_untrained_reasoning_is_said(folder):
    assert any("train_on leaves it out" in line for line in built(folder, 'format.train_on=["final"]').report.lines())


def test_nothing_left(folder):
    with pytest.raises(FastossError, match="no training example is left"):
        built(folder, "model.max_length=16")


def test_show_prints_the_trainers_tokens(folder):
    result = fastoss("show", folder.recipe, "--rows", 1)
    assert result.code == 0
    lines = result.out.splitlines()
    example = built(folder).train[0]
    assert lines == [*example_lines(example, colour=False)]
    assert [line for line in lines if line.startswith("+ analysis")] == [
        f"+ analysis {sum(s.end - s.start for s in example.spans if s.channel == 'analysis'):>6}  <|channel|>analysis<|message|>先报名字。<|end|>"
    ]


def test_check(folder):
    result = fastoss("check", folder.recipe)
    assert (result.code, result.err) == (0, "")
    assert "8 rows → 11 training examples" in result.out
    folder.data.write_text(json.dumps({"instruction": "x"}) + "\n")
    result = fastoss("check", folder.recipe)
    assert (result.code, result.out) == (2, "")
    assert "data.jsonl:1: `output` is missing or null\nhint: " in result.err
