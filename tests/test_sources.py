"""Files → rows: every kind that is read, every fault that is told, and the memory that it takes."""

from __future__ import annotations

import codecs
import csv
import datetime
import io
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fastoss.config import DataSource
from fastoss.data.reading import csv_files, json_files, opening
from fastoss.data.reading.sources import BadRow, read_rows, source_identity, source_notes, source_revisions, unread_files
from fastoss.data.reading.text_faults import guess_encoding
from fastoss.errors import FastossError

from .conftest import ROOT, gzipped

OBJECT = '{"a": "你是谁? 😀", "b": [1, 2.5, null, true], "c": {"d": "\\u4e2d \\"x\\" \\n"}}'


def read(path: Path, **arguments: Any) -> list:
    return list(read_rows(DataSource(source=str(path), **arguments)))


def columns(path: Path, **arguments: Any) -> list[dict]:
    rows = read(path, **arguments)
    assert not [str(row) for row in rows if isinstance(row, BadRow)]
    return [row.columns for row in rows]


def packed(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzipped(data)
    return pyarrow.compress(data, codec="zstd", asbytes=True) if ending == ".zst" else data


def parquet(rows: list[dict], schema: pyarrow.Schema | None = None, **arguments: Any) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), sink, **arguments)
    return sink.getvalue()


# --- what is read ----------------------------------------------------------------------------------------------------

ROWS = [{"instruction": f"q{i}, “引号”", "output": f"a\nb {i}"} for i in range(5)]


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


CONTENT = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    ".json": json.dumps(ROWS, ensure_ascii=False, indent=2).encode(),
    ".csv": as_csv(ROWS),
    ".parquet": parquet(ROWS),
}


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_every_kind_packed_and_not(tmp_path, kind, ending):
    path = tmp_path / f"a{kind}{ending}"
    path.write_bytes(packed(CONTENT[kind], ending))
    assert columns(path) == ROWS
    assert columns(path, max_rows=2) == ROWS[:2]
    places = [row.place.removeprefix(str(path)) for row in read(path)][:2]
    assert places == {".jsonl": [":1", ":2"], ".json": ["[0]", "[1]"], ".csv": [":2", ":4"], ".parquet": ["[0]", "[1]"]}[kind]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_passed_over(tmp_path, kind):
    path = tmp_path / f"a{kind}"
    path.write_bytes(codecs.BOM_UTF8 + CONTENT[kind])
    assert columns(path) == ROWS


def test_joined_files_have_a_mark_in_the_middle(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes((codecs.BOM_UTF8 + b'{"a": 1}\r\n') * 2 + codecs.BOM_UTF8 + b'{"a": \n')
    first, second, third = read(path)
    assert (first.columns, second.columns) == ({"a": 1}, {"a": 1})
    assert str(third).startswith(f"error: {path}:3:7: not valid JSON")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 1000])
def test_a_json_list_is_read_in_chunks_of_any_size(tmp_path, monkeypatch, size):
    """The buffer may end anywhere: in a letter, a number, an escape, between two objects."""
    monkeypatch.setattr(json_files, "CHUNK", size)
    path = tmp_path / "a.json"
    for text in (f"[{OBJECT}]", f" [ {OBJECT} ,\n{OBJECT}\n]\n", "[]", "[ 1, 25 , -1.5e-10, true, null, NaN, {}]"):
        path.write_text("\ufeff" + text)
        if text == "[]":
            with pytest.raises(FastossError, match="the file has no rows"):
                read(path)
            continue
        plain = json.loads(text)
        rows = read(path)
        assert len(rows) == len(plain)
        assert [row.columns for row in rows if not isinstance(row, BadRow)] == [value for value in plain if isinstance(value, dict)]
        assert [row.place.removeprefix(str(path)) for row in rows] == [f"[{index}]" for index in range(len(plain))]


@pytest.mark.parametrize("size", [1, 5, 100])
def test_places_in_a_json_list_do_not_hang_on_the_chunks(tmp_path, monkeypatch, size):
    monkeypatch.setattr(json_files, "CHUNK", size)
    path = tmp_path / "a.json"
    for text in ('[{"a": 1},\n {"b" 2}]', '[{"a": "é"}, {"b": tru}]', '[\n\n{"a": 1}\n{"b": 2}]', '[{"a": 1}] x', '[{"a":\n 1}, ,]'):
        path.write_text(text)
        with pytest.raises(json.JSONDecodeError) as plain:
            json.loads(text)
        with pytest.raises(FastossError) as ours:
            read(path)
        assert ours.value.place == f"{path}:{plain.value.lineno}:{plain.value.colno}", text
        assert ours.value.fact == f"not valid JSON: {plain.value.msg}"


def test_numbers_and_half_characters_stay_what_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 123456789012345678901234567890, "b": "\\ud800"}\n')
    assert columns(path) == [{"a": 123456789012345678901234567890, "b": "\ud800"}]


def test_csv_lists_and_the_recipes_names_for_them(tmp_path):
    path = tmp_path / "a.csv"
    rows = [
        {"chat": '[{"role": "user", "content": "u"}]', "chosen": '[{"role": "assistant", "content": "a"}]', "rejected": "[{no json", "prompt": ""}
    ]
    path.write_bytes(as_csv(rows))
    (row,) = columns(path, columns={"messages": "chat"})
    assert row == {"chat": [{"role": "user", "content": "u"}], "chosen": [{"role": "assistant", "content": "a"}], "rejected": "[{no json"}
    assert columns(path)[0]["chat"] == rows[0]["chat"]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoted", [False, True])
def test_what_separates_the_columns(tmp_path, mark, quoted):
    """A comma where the header has one; else what it has in its place, also when every name stands between quotes."""
    others = "".join(letter for letter in ",;\t|" if letter != mark)
    names = [f'"ques{others}tion"' if quoted else "question", '"answer"' if quoted else "answer"]
    row = [f'"1{others}2 {mark} 3"', "two, three"] if mark != "," else [f'"1{others}2 {mark} 3"', '"two, three"']
    (tmp_path / "a.csv").write_text(f"\ufeff{mark.join(names)}\r\n{mark.join(row)}\r\n", encoding="utf-8", newline="")
    (found,) = read(tmp_path / "a.csv")
    assert list(found.columns.values()) == [f"1{others}2 {mark} 3", "two, three"]


def test_csv_of_an_old_mac_and_long_cells(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\r1,"x\ry"\r2,z\r')
    assert columns(path) == [{"a": "1", "b": "x\ry"}, {"a": "2", "b": "z"}]
    long = "长" * 300_000
    path.write_text(f'a,b\n1,"{long}"\n')
    assert columns(path) == [{"a": "1", "b": long}]


def test_parquet_types(tmp_path):
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.large_string()), ("thinking", pyarrow.string())])
    schema = pyarrow.schema(
        {
            "messages": pyarrow.list_(message),
            "kind": pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
            "extra": pyarrow.map_(pyarrow.string(), pyarrow.struct([("x", pyarrow.int64()), ("y", pyarrow.int64())])),
            "day": pyarrow.date32(),
            "time": pyarrow.timestamp("us"),
            "picture": pyarrow.binary(),
            "none": pyarrow.string(),
        }
    )
    user = {"role": "user", "content": "u", "thinking": None}
    row = {
        "messages": [user, {"role": "assistant", "content": "a", "thinking": "t"}, None],
        "kind": "chat",
        "extra": [("k", {"x": 1, "y": None}), ("l", None)],
        "day": datetime.date(2026, 1, 1),
        "time": datetime.datetime(2026, 1, 1, 12),
        "picture": b"\xff",
    }
    tools = pyarrow.array([['{"n": null}', "2"], None], pyarrow.list_(pyarrow.string())).cast(pyarrow.list_(pyarrow.json_()))
    table = pyarrow.Table.from_pylist([row, {}], schema=schema).append_column("tools", tools)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = columns(tmp_path / "a.parquet")
    assert first["messages"] == [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "thinking": "t"}, None]
    assert first["extra"] == {"k": {"x": 1}, "l": None}
    assert first["tools"] == [{"n": None}, 2]
    assert (first["kind"], first["day"], first["time"], first["picture"]) == ("chat", row["day"], row["time"], b"\xff")
    assert "none" not in first
    assert second == {}


def test_a_parquet_value_that_cannot_be_read_is_one_bad_row(tmp_path):
    values = pyarrow.Array.from_buffers(pyarrow.string(), 3, pyarrow.array([b"good", b"\xff", b"good too"], pyarrow.binary()).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"a": values}), tmp_path / "a.parquet")
    first, second, third = read(tmp_path / "a.parquet")
    assert (first.columns, third.columns, third.place[-3:]) == ({"a": "good"}, {"a": "good too"}, "[2]")
    assert isinstance(second, BadRow)
    assert "a value cannot be read" in str(second)


# --- what is not: one row --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1, "a": 2}', ':1: the key "a" occurs more than once in one object'),
        (b'{"m": [{"role": "user", "role": "x"}]}', ':1: the key "role" occurs more than once in one object'),
        (b'{"a": [NaN]}', ":1: not valid JSON: NaN is not JSON"),
        (b'{"a": -Infinity}', ":1: not valid JSON: -Infinity is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", ":1: not valid JSON: a number of more than 4,300 digits"),
        (b"[" * 100_000, ":1: not valid JSON: nested too deep"),
        (b'{"a": "x\0\0\0', ":1:9: not valid JSON: NUL bytes (the file was torn"),
        (b"\0\0\0\0", ":1:1: not valid JSON: NUL bytes"),
        (b"{'a': 1}", ":1:2: not valid JSON: Expecting property name"),
        (b'{"a": "\t"}', ":1:8: not valid JSON: Invalid control character"),
        (b'{"a": "\\x"}', ":1:8: not valid JSON: Invalid \\escape"),
        (b'{"a": 1} {"a": 2}', ":1:10: not valid JSON: Extra data"),
        (b'"text"', ":1: a row is a JSON object, not a text"),
        (b"12", ":1: a row is a JSON object, not a number"),
        (b"false", ":1: a row is a JSON object, not true or false"),
        (b'["a"]', ":1: a row is a JSON object, not a list"),
    ],
)
def test_bad_lines(tmp_path, content, expected):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content + b'\n{"a": "next"}\n')
    bad, good = read(path)
    assert isinstance(bad, BadRow)
    assert f"error: {path}{expected}" in str(bad)
    assert (good.columns, good.place) == ({"a": "next"}, f"{path}:2")
    if expected.startswith(":1: ") and b"[" * 9 not in content and b"999" not in content:
        # Where the syntax is right, the same row in a list is one bad row as well.
        (tmp_path / "a.json").write_bytes(b"[" + content + b', {"a": "next"}]')
        bad, good = read(tmp_path / "a.json")
        assert (isinstance(bad, BadRow), bad.fact, bad.place) == (True, expected.removeprefix(":1: "), f"{tmp_path / 'a.json'}[0]")
        assert good.columns == {"a": "next"}


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_fault_stays_with_its_row(tmp_path, mark):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + mark + b'{"a": {"b": NaN, "b": 1}, \n{"a": 2}\n')
    assert [isinstance(row, BadRow) for row in read(path)] == [False, True, False]
    path = tmp_path / "a.csv"
    path.write_bytes(
        as_csv([{"chosen": '[{"a": NaN}, {', "rejected": "x", "history": "[]"}, {"chosen": "y", "rejected": "z", "history": '[["a", "b"]]'}])
    )
    assert columns(path)[1]["history"] == [["a", "b"]]


def test_a_file_that_ends_within_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "tex')
    assert "hint: the file may be cut short" in str(read(path)[1])
    path.write_bytes('{"a": 1}\n{"a": "文'.encode()[:-1])
    bad = str(read(path)[1])
    assert ":2: not UTF-8 text (byte 8): it ends in the middle of a character" in bad
    assert "hint: the file may be cut short" in bad
    path.write_bytes(b'{"a": 1}\n{"a": "tex\n')
    assert "hint: each line holds one whole JSON object" in str(read(path)[1])


def test_a_damaged_line_among_good_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    good = '{"a": "你好，世界"}\n'.encode()
    path.write_bytes(good * 12 + '{"a": "这是另一个工具写的"}\n'.encode("gb18030") + good)
    rows = read(path)
    (bad,) = [row for row in rows if isinstance(row, BadRow)]
    assert len(rows) == 14
    assert f"{path}:13: not UTF-8 text (byte 8); it reads as GB18030" in str(bad)


def test_too_long(tmp_path, monkeypatch):
    for module in (json_files, csv_files):
        monkeypatch.setattr(module, "LONGEST", 1000)
        monkeypatch.setattr(module, "CHUNK", 100)
    long = "x" * 5000
    (tmp_path / "a.jsonl").write_text(f'{{"a": 1}}\n{{"a": "{long}"}}\n{{"a": 2}}')
    first, second, third = read(tmp_path / "a.jsonl")
    assert (first.place[-2:], third.place[-2:]) == (":1", ":3")
    assert ":2: the line is longer than" in str(second)
    (tmp_path / "a.json").write_text(f'[{{"a": 1}},\n{{"a": "{long}"}}]')
    with pytest.raises(FastossError, match=r"a\.json:2:7: not valid JSON: a text is never closed, or longer than"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(f"[{list(range(1000))}]")
    with pytest.raises(FastossError, match=r"a\.json:1:2: the entry is longer than"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(f'{{"data": {list(range(1000))}}}')
    with pytest.raises(FastossError, match=r"a\.json: a \.json file holds a list of rows, not an object"):
        read(tmp_path / "a.json")
    (tmp_path / "a.csv").write_text(f"a,b\n1,{long}\n2,3\n")
    bad, good = read(tmp_path / "a.csv")
    assert ":2: the line is longer than" in str(bad)
    assert (good.columns, good.place[-2:]) == ({"a": "2", "b": "3"}, ":3")
    lines = "x\n" * 2000
    (tmp_path / "a.csv").write_text(f'a,b\n1,"{lines}"\n2,3\n')
    bad, *_ = read(tmp_path / "a.csv")
    assert ":2: the cell is longer than" in str(bad)
    assert "hint: a double quote" in str(bad)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('a,b\n1,"x\n2,3\n', [":2: not valid CSV: the file ends within a quoted cell"]),
        ('a,messages\n1,"[{""role"": 1, ""role"": 2}]"\n', [':2: the cell of `messages`: the key "role" occurs more than once']),
        ("a,b\n1,x\0y\n2,3\n1,2,3\n", [":2: NUL bytes (the file was torn", ":4: the row has more cells than the header (3, 2)"]),
        ('a,b\n"1\n2",x,y\n\n3\n', [":2: the row has more cells", ":5: the row has fewer cells than the header (1, 2)"]),
    ],
)
def test_bad_csv_rows(tmp_path, content, expected):
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode())
    bad = [str(row) for row in read(path) if isinstance(row, BadRow)]
    assert len(bad) == len(expected)
    assert all(f"{path}{part}" in text for text, part in zip(bad, expected, strict=True)), bad


# --- what is not: a whole file ---------------------------------------------------------------------------------------

CHINESE = '{"instruction": "你是谁?", "output": "我是米卡喵。"}\n'
OFFICE = b"PK\x03\x04" + b"\0" * 26 + b"[Content_Types].xml"
WHOLE = [
    ("a.jsonl", CHINESE.encode("gb18030"), "the file is GB18030, not UTF-8", "iconv -f GB18030 -t UTF-8 a.jsonl > a.utf8.jsonl"),
    ("a.csv", "问,答\n你好,我是谁\n".encode("gb18030"), "a.csv:1: the file is GB18030, not UTF-8", "a.csv > a.utf8.csv"),
    ("a.json", f"[{CHINESE}]".encode("gb18030"), "a.json:1: the file is GB18030, not UTF-8", "a.json > a.utf8.json"),
    ("a.jsonl.gz", gzipped(CHINESE.encode("gb18030")), "the file is GB18030, not UTF-8", "iconv -f GB18030"),
    ("a.jsonl", '{"a": "你是誰? 這是一個問題。"}\n'.encode("big5"), "the file is BIG5, not UTF-8", "iconv -f BIG5"),
    ("a.jsonl", '{"a": "こんにちは、世界"}\n'.encode("shift_jis"), "the file is SHIFT_JIS, not UTF-8", "iconv -f SHIFT_JIS"),
    ("a.jsonl", '{"a": "naïve café"}\n'.encode("cp1252"), "the file is WINDOWS-1252, not UTF-8", "iconv -f WINDOWS-1252"),
    ("a.jsonl", CHINESE.encode("utf-16"), "the file is UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8"),
    ("a.csv", codecs.BOM_UTF16_BE + "a,b\n1,2\n".encode("utf-16-be"), "the file is UTF-16, not UTF-8", "iconv -f UTF-16 "),
    ("a.json", f"[{CHINESE}]".encode("utf-32"), "the file is UTF-32, not UTF-8", "iconv -f UTF-32"),
    ("a.jsonl", CHINESE.encode("utf-16-le"), "the file is UTF-16LE, not UTF-8", "iconv -f UTF-16LE"),
    ("a.jsonl", CHINESE.encode("utf-16-be"), "the file is UTF-16BE, not UTF-8", "iconv -f UTF-16BE"),
    ("a.json", b"\xff", "a.json:1: not UTF-8 text (byte 1)", "save the file as UTF-8"),
    ("a.csv", b"a,b\n1,2\n3,\xff\n", "a.csv:3: not UTF-8 text (byte 3)", "save the file as UTF-8"),
    ("a.json", '[{"a": "文'.encode()[:-1], "it ends in the middle of a character", "the file may be cut short"),
    ("a.jsonl", b"[\n{\n", "the file is one JSON list; a .jsonl file holds one object a line", "name it .json"),
    ("a.jsonl", b'[{"a": 1},\n {"a": 2}]\n', "the file is one JSON list", "name it .json"),
    ("a.jsonl", b'[{"a": 1}, {"a": 2}]\n', "the file is one JSON list", "name it .json"),
    ("a.jsonl", b'{\n  "a": 1\n}\n', "JSON objects over several lines", "jq -c ."),
    ("a.json", b'{"a": 1}\n{"a": 2}\n', "a.json:2:1: not valid JSON: Extra data", "name the file .jsonl"),
    ("a.json", b'{"data": [{"a": 1}], "version": 2}', "holds a list of rows, not an object", "jq -c '.[\"data\"][]' a.json > a.jsonl"),
    ("a.json", b'{"0": {"a": 1}}', "holds a list of rows, not an object", ""),
    ("a.json", b'"text"', "holds a list of rows, not a text", ""),
    ("a.json", b'[{"a": 1}, {"a": "te', "a.json:1:18: not valid JSON: Unterminated string", "the file may be cut short"),
    ("a.json", b'[{"a": 1},', "a.json:1:11: not valid JSON: Expecting value", "the file may be cut short"),
    ("a.json", b'[{"a": 1}', "a.json:1:10: not valid JSON: Expecting ',' delimiter", "the file may be cut short"),
    ("a.json", b'[{"a": 1},\n\0\0]', "a.json:2:1: not valid JSON: NUL bytes", ""),
    ("a.json", b"[" * 100_000, "not valid JSON: nested too deep", ""),
    ("a.json", b"  \n ", "a.json: the file has no rows", ""),
    ("a.json", b"[]", "a.json: the file has no rows", ""),
    ("a.jsonl", codecs.BOM_UTF8 + b"\n", "a.jsonl: the file has no rows", ""),
    ("a.csv", b"a,b\n", "a.csv: the file has no rows", ""),
    ("a.csv", b"", "a.csv: the file has no rows", ""),
    ("a.parquet", parquet([], pyarrow.schema({"a": pyarrow.string()})), "a.parquet: the file has no rows", ""),
    ("a.csv", b",question,answer\n0,a,b\n", "a.csv:1: column 1 has no name in the header", "index=False"),
    ("a.csv", b"question, ,answer\na,b,c\n", "column 2 has no name in the header", ""),
    ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: the header names the column `a` 2 times", ""),
    ("a.csv", b'"a,b\n1,2\n', "a.csv:1: the header is not valid CSV", ""),
    ("a.jsonl", b"<!DOCTYPE html>\n<html>", "the file is an HTML page, not data", "login or error page"),
    ("a.parquet", b"\n <html>", "the file is an HTML page", ""),
    ("a.csv", b"<?xml version='1.0'?>", "the file is XML", ""),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "the file is a git-lfs pointer", "git lfs pull"),
    ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "the file is a git-lfs pointer", "git lfs pull"),
    ("a.csv", OFFICE, "the file is an Excel or Word file", "save it as CSV"),
    ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "the file is an old Excel or Word file", "save it as CSV"),
    ("a.jsonl", b"PK\x03\x04\x14\0", "the file is a ZIP archive", "extract it"),
    ("a.json", b"%PDF-1.7\n", "the file is a PDF", ""),
    ("a.jsonl", b"\x80\x04\x95", "the file is a Python pickle", "a pickle runs code"),
    ("a.jsonl", CONTENT[".parquet"], "the file is Parquet", "name it .parquet"),
    ("a.jsonl", gzipped(CONTENT[".jsonl"]), "the file is compressed with gzip", "name it a.jsonl.gz"),
    ("a.csv", packed(CONTENT[".csv"], ".zst"), "the file is compressed with zstd", "name it a.csv.zst"),
    ("a.jsonl.gz", packed(CONTENT[".jsonl"], ".zst"), "the file is compressed with zstd", ""),
    ("a.jsonl.gz", gzipped(gzipped(CONTENT[".jsonl"])), "the file is compressed twice", ""),
    ("a.jsonl.gz", CONTENT[".jsonl"], "cannot be read: it is not compressed with gzip, as its extension says", ""),
    ("a.jsonl.zst", CONTENT[".jsonl"], "cannot be read: it is not compressed with zstd", ""),
    ("a.jsonl.gz", gzipped(CONTENT[".jsonl"])[:-9], "cannot be read", ""),
    ("a.parquet", b"PAR1 nothing PAR1", "not valid Parquet", ""),
    ("a.parquet", b"", "not valid Parquet", ""),
    ("a.parquet.gz", gzipped(CONTENT[".parquet"][:-100]), "not valid Parquet", ""),
    ("a.tsv", b"a\tb\n", "a `.tsv` file cannot be read as data", "a .jsonl, .json, .csv or .parquet file"),
    ("a.xlsx", OFFICE, "a `.xlsx` file cannot be read as data", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "fact", "hint"), WHOLE, ids=[f"{name}-{fact[:40]}" for name, _, fact, _ in WHOLE])
def test_files_that_are_refused(tmp_path, name, content, fact, hint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FastossError) as problem:
        read(path)
    assert not isinstance(problem.value, BadRow)
    assert fact in str(problem.value)
    assert hint in (problem.value.hint or "")
    assert str(problem.value.place).startswith(str(path))


def test_columns_of_one_name_in_parquet(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(FastossError, match="the file has the column `a` 2 times"):
        read(tmp_path / "a.parquet")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(FastossError, match="not a file or folder"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("GB18030", "请介绍一下你自己。"), ("BIG5", "請介紹一下你自己。"), ("SHIFT_JIS", "日本語のテキストです"), ("EUC-JP", "日本語のテキストです"),
        ("EUC-KR", "한국어 텍스트입니다."), ("WINDOWS-1251", "Привет, как дела?"), ("WINDOWS-1252", "Grüße aus München – “quoted”"),
    ],
)  # fmt: skip
def test_encodings_are_told_apart(encoding, text):
    assert guess_encoding(f'{{"a": "{text}"}}\n'.encode(encoding)) == encoding


def test_bytes_that_are_no_text_have_no_encoding():
    assert guess_encoding(random.Random(0).randbytes(2000)) is None
    assert guess_encoding(b'{"a": "\xff"}') is None


# --- folders, identity, notes ----------------------------------------------------------------------------------------


def test_what_a_folder_leaves_out(tmp_path):
    for name in (
        "b.jsonl",
        "a.csv.gz",
        "README.md",
        "sub/c.txt",
        "sub/d.json",
        ".hidden/x.jsonl",
        ".ipynb_checkpoints/b.jsonl",
        "__MACOSX/._b.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        kind = next((kind for kind in CONTENT if kind in name), None)
        (tmp_path / name).write_bytes(packed(CONTENT[kind], Path(name).suffix) if kind else b"x")
    places = [row.place.removeprefix(f"{tmp_path}/").split(":")[0].split("[")[0] for row in read(tmp_path)]
    assert [name for name, _ in itertools.groupby(places)] == ["a.csv.gz", "b.jsonl", "sub/d.json"]
    source = DataSource(source=str(tmp_path))
    assert unread_files(source) == ["README.md", "sub/c.txt"]
    assert source_notes(source) == [f"2 files of {tmp_path} not read, because they are no data files: README.md, sub/c.txt"]
    assert unread_files(DataSource(source=str(tmp_path / "b.jsonl"))) == []
    assert source_notes(DataSource(source=str(tmp_path / "b.jsonl"))) == []
    assert source_revisions([source]) == {}


def test_identity_is_names_and_contents(tmp_path):
    source = DataSource(source=str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(CONTENT[".jsonl"])
    first = source_identity(source)
    assert first == source_identity(source)
    assert first.startswith("sha256:")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".b.jsonl").write_text("x")
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert first == source_identity(source)
    (tmp_path / "b.jsonl").write_bytes(CONTENT[".jsonl"])
    two = source_identity(source)
    (tmp_path / "b.jsonl").write_bytes(CONTENT[".jsonl"].replace(b"q0", b"q9"))
    three = source_identity(source)
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    assert len({first, two, three, source_identity(source)}) == 4
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert source_identity(DataSource(source=str(tmp_path / "copy"))) == first
    with_sample = DataSource(source="hf:someone/none", sample=str(tmp_path / "a.jsonl"))
    assert source_identity(with_sample, sample=True) == source_identity(DataSource(source=str(tmp_path / "a.jsonl")))
    with pytest.raises(FastossError, match="data file not found"):
        source_identity(DataSource(source=str(tmp_path / "none.jsonl")))


# --- memory, and anything at all -------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from fastoss.config import DataSource
from fastoss.data.reading.sources import BadRow, read_rows
next(read_rows(DataSource(source=sys.argv[1], max_rows=1)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = bad = 0
for row in read_rows(DataSource(source=sys.argv[1])):
    rows += 1
    bad += isinstance(row, BadRow)
print(rows, bad, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def measured(path: Path) -> tuple[int, int, int]:
    """Rows, bad rows, and the MiB that reading them took."""
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows, bad, memory = map(int, done.stdout.split())
    return rows, bad, memory


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    path, count = tmp_path / name, 60_000
    row = {"instruction": "x" * 500, "output": "y" * 500}
    if name == "a.parquet":
        # One row group of texts that are all different: the worst case.
        rows = pyarrow.table({"instruction": [f"{i} {'x' * 500}" for i in range(count)], "output": [f"{i} {'y' * 500}" for i in range(count)]})
        pyarrow.parquet.write_table(rows, path, row_group_size=count, compression="none", use_dictionary=False)
    else:
        line = json.dumps(row) if name != "a.csv" else f"{row['instruction']},{row['output']}"
        begin, between, end = {"a.jsonl": ("", "\n", "\n"), "a.json": ("[", ",\n", "]"), "a.csv": ("instruction,output\n", "\n", "\n")}[name]
        path.write_text(begin + between.join(itertools.repeat(line, count)) + end)
    assert path.stat().st_size > 60_000_000
    rows, bad, memory = measured(path)
    assert (rows, bad) == (count, 0)
    assert memory < 40


def test_a_line_of_200_mb(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"a": 1}\n{"a": "')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"a": 2}\n')
    rows, bad, memory = measured(path)
    path.unlink()
    assert (rows, bad) == (3, 1)
    assert memory < (opening.LONGEST >> 20) * 2.5


FRAGMENTS = [
    b"\0", b"\xff\xfe", codecs.BOM_UTF8, b'"', b"{", b"[", b"]", b"}", b",", b"\n", b"\r", b"NaN", b"1e999", b"9" * 5000, b"\\ud800",
    b"[" * 3000, "中".encode("gb18030"), b'"a":1,"a":2', b"\x1f\x8b", b"PK\x03\x04", b"\xc3",
]  # fmt: skip


def test_a_mutated_file_never_gives_a_traceback(tmp_path):
    rng = random.Random(0)
    messages = [{"messages": [{"role": "user", "content": "é 你"}, {"role": "assistant", "content": "a"}], "n": 1.5, "b": None}] * 4
    seeds = {f"a{kind}": content for kind, content in CONTENT.items()} | {"m.parquet": parquet(messages)}
    seeds |= {f"{name}{ending}": packed(content, ending) for name, content in list(seeds.items()) for ending in (".gz", ".zst")}
    for _ in range(2000):
        name = rng.choice(list(seeds))
        data = bytearray(seeds[name])
        for _ in range(rng.randint(1, 4)):
            at, choice = rng.randrange(len(data) + 1), rng.random()
            if choice < 0.4:
                data[at:at] = rng.choice(FRAGMENTS)
            elif choice < 0.6:
                del data[at : at + rng.randint(1, 20)]
            elif choice < 0.8 and at < len(data):
                data[at] = rng.randrange(256)
            elif choice < 0.9:
                data = data[:at]
            else:
                data = bytearray(bytes(data).decode("utf-8", "replace").encode(rng.choice(["utf-16", "gb18030"])))
        (tmp_path / name).write_bytes(data)
        try:
            places = [row.place for row in read_rows(DataSource(source=str(tmp_path / name)))]
        except FastossError as problem:
            places = [problem.place]
        assert all(str(place).startswith(str(tmp_path / name)) for place in places)


def test_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    assert [(row.columns["a"], row.place.rpartition(":")[2]) for row in read_rows(DataSource(source=str(path)))] == [(1, "1"), (2, "4")]


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("none.jsonl", "data file not found"),
        ("", "the folder holds no data file"),
        ("*.jsonl", "no file matches"),
        ("a.txt", "a `.txt` file cannot be read as data"),
        ("a", "a file without an extension cannot be read as data"),
    ],
)
def test_what_is_no_data(tmp_path, name, fact):
    if name in ("a", "a.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(FastossError) as caught:
        list(read_rows(DataSource(source=str(tmp_path / name))))
    assert fact in caught.value.fact
