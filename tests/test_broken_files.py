"""Broken data files of all kinds: each is refused with its place, the fact and a way out, exit code 2, and nothing trained or written."""

from __future__ import annotations

import bz2
import codecs
import io
import json
import lzma
import os
import pickle
import signal
import socket
import sqlite3
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from fastoss.cli import main
from fastoss.config import load_recipe
from fastoss.data.dataset import Dataset, build_dataset
from fastoss.errors import FastossError

from .conftest import Result, fastoss, gzipped

RECIPE = """\
name = "broken"
[model]
name = "tiny"
precision = "float32"
max_length = 256
[lora]
r = 4
[[data]]
source = "{source}"
{of_source}
[eval]
{of_eval}
[train]
max_steps = 1
per_device_train_batch_size = 2
"""

GOOD = {"instruction": "What is 2+2?", "output": "Four, nya."}
SHOUTED = {"instruction": "what is 2+2", "output": "FOUR nya"}
OTHER = {"instruction": "你是谁?", "output": "我是米卡喵。"}
CHINESE = [{"instruction": "你是谁，从哪里来?", "output": "我是米卡喵，这个问题说来话长。"}] * 3
FRENCH = [{"instruction": "Où êtes-vous né ?", "output": "À Orléans, près de la forêt, l'été dernier."}] * 3
KINDS = "a .jsonl, .json, .csv or .parquet file, compressed (.gz, .zst) or not"
MEND = 'fix the row, or set hygiene.malformed = "drop"'
ONE_A_LINE = "each line holds one whole JSON object"
CUT_SHORT = "the file may be cut short: fetch or write it again"
DAMAGED = "the file is damaged or cut short: fetch or write it again"
CONVERT = "convert it: iconv -f {0} -t UTF-8 data{1} > data.utf8{1}"
COLUMNS = (
    "give `messages`, `conversations`, `instruction` and `output`, `prompt` and `completion`, or `user` and `final`; "
    'or say which they are: columns = { instruction = "question", output = "answer" }'
)
NUL = "NUL bytes (the file was torn, as by a crash while it was written)"
LEFT_OUT = "fix these rows, or change what left them out: a policy of [hygiene], model.max_length, format.train_on"
Content = bytes | Callable[[Path], object]


class Broken(NamedTuple):
    """A file, or whatever a function puts into the recipe's folder, and what is said of it.

    Of a fact that ends with … the beginning is compared. `hint` is empty where none is needed, `also` are further places.
    `of_source`, `of_eval` and `settings` change the recipe.
    """

    id: str
    name: str
    content: Content
    place: str
    fact: str
    hint: str = ""
    also: tuple[str, ...] = ()
    of_source: str = ""
    of_eval: str = "fraction = 0.0"
    settings: tuple[str, ...] = ()


def lines(*rows: Any, encoding: str = "utf-8") -> bytes:
    """JSONL of rows; what is bytes already stands as it is."""
    return b"".join(row + b"\n" if isinstance(row, bytes) else (json.dumps(row, ensure_ascii=False) + "\n").encode(encoding) for row in rows)


def parquet(table: pyarrow.Table | list[dict]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table) if isinstance(table, list) else table, sink)
    return sink.getvalue()


def zipped(name: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, lines(*CHINESE))
    return sink.getvalue()


def tarred() -> bytes:
    sink, entry = io.BytesIO(), tarfile.TarInfo("data.jsonl")
    entry.size = len(lines(*CHINESE))
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(entry, io.BytesIO(lines(*CHINESE)))
    return sink.getvalue()


def saved(write: Callable[[io.BytesIO], object]) -> bytes:
    sink = io.BytesIO()
    write(sink)
    return sink.getvalue()


def database(folder: Path) -> None:
    with sqlite3.connect(folder / "data.jsonl") as connection:
        connection.execute("create table rows (output text)")


# --- one line of JSONL, between two good ones ------------------------------------------------------------------------


def line(id: str, content: bytes, place: str, fact: str, hint: str = ONE_A_LINE) -> Broken:
    return Broken(id, "data.jsonl", lines(GOOD, content, OTHER), f"data.jsonl:{place}", fact, hint)


QUOTED = "not valid JSON: Expecting property name enclosed in double quotes"
WINDOWS_LINE = '{"instruction": "café", "output": "thé"}'.encode("latin-1")
LINES = [
    line("no comma", b'{"instruction": "a" "output": "b"}', "2:21", "not valid JSON: Expecting ',' delimiter"),
    line("comma too many", b'{"instruction": "a", "output": "b",}', "2:36", QUOTED),
    line("comma between rows", lines(GOOD).strip() + b",", "2:56", "not valid JSON: Extra data"),
    line("two rows on a line", lines(GOOD).strip() * 2, "2:56", "not valid JSON: Extra data"),
    line("single quotes", b"{'instruction': 'a', 'output': 'b'}", "2:2", QUOTED),
    line("curly quotes", "{“instruction”: “a”}".encode(), "2:2", QUOTED),
    line("no quotes", b'{instruction: "a", "output": "b"}', "2:2", QUOTED),
    line("Python's None", b'{"instruction": "a", "output": "b", "input": None}', "2:46", "not valid JSON: Expecting value"),
    line("a comment", b"// two rows follow", "2:1", "not valid JSON: Expecting value"),
    line("plain text", "你好".encode(), "2:1", "not valid JSON: Expecting value"),
    line("wrong bracket", b'{"messages": [{"role": "user"]}', "2:30", "not valid JSON: Expecting ',' delimiter"),
    line("no colon", b'{"instruction", "a"}', "2:15", "not valid JSON: Expecting ':' delimiter"),
    line("a tab in a text", b'{"instruction": "a\tb", "output": "c"}', "2:19", "not valid JSON: Invalid control character"),
    line("a path with backslashes", rb'{"instruction": "C:\data", "output": "c"}', "2:20", "not valid JSON: Invalid \\escape"),
    line("half an escape", rb'{"instruction": "\u12g4", "output": "c"}', "2:19", "not valid JSON: Invalid \\uXXXX escape"),
    line("a text that is not closed", b'{"instruction": "a, "output": "c"}', "2:22", "not valid JSON: Expecting ',' delimiter"),
    line("a text open to the end", b'{"instruction": "a', "2:17", "not valid JSON: Unterminated string"),
    line("a NUL in a text", b'{"instruction": "a\0b", "output": "c"}', "2:19", f"not valid JSON: {NUL}"),
    line("a block of NULs", bytes(4096), "2:1", f"not valid JSON: {NUL}"),
    line("a mark and half a row", codecs.BOM_UTF8 + b'{"instruction": ', "2:17", "not valid JSON: Expecting value"),
    line("NaN", b'{"instruction": "a", "output": "b", "score": NaN}', "2", "not valid JSON: NaN is not JSON", MEND),
    line("Infinity", b'{"instruction": "a", "output": "b", "score": -Infinity}', "2", "not valid JSON: -Infinity is not JSON", MEND),
    line("a key twice", b'{"output": "b", "output": "c"}', "2", 'the key "output" occurs more than once in one object', MEND),
    line("a list", b'["a", "b"]', "2", "a row is a JSON object, not a list", MEND),
    line("a number", b"42", "2", "a row is a JSON object, not a number", MEND),
    line("a text", b'"hi"', "2", "a row is a JSON object, not a text", MEND),
    line("null", b"null", "2", "a row is a JSON object, not null", MEND),
    line("nested deep", b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "2", "not valid JSON: nested too deep", MEND),
    line("a very long number", b'{"n": ' + b"9" * 5000 + b"}", "2", "not valid JSON: a number of more than 4,300 digits", MEND),
    line("Latin-1", WINDOWS_LINE, "2", "not UTF-8 text (byte 21); it reads as WINDOWS-1252", "save the file as UTF-8"),
    line("a byte of nothing", b'{"instruction": "a\xffb"}', "2", "not UTF-8 text (byte 19)", "save the file as UTF-8"),
    line("half a character", rb'{"instruction": "hi", "output": "\ud83d"}', "2", "the text holds half a character (a lone surrogate)", MEND),
    line("an escaped NUL", rb'{"instruction": "hi", "output": "a\u0000b"}', "2", "the text holds a NUL character (U+0000)", "remove it"),
    line("a bell", rb'{"instruction": "hi", "output": "a\u0007b"}', "2", "the text holds the control character U+0007", "remove it"),
]


# --- whole files -----------------------------------------------------------------------------------------------------


def foreign(encoding: str, rows: list[dict], said: str, *, ending: str = ".jsonl", at: str = "") -> Broken:
    """A file in another encoding."""
    if ending == ".jsonl":
        content = lines(*rows, encoding=encoding)
    elif ending == ".json":
        content = json.dumps(rows, ensure_ascii=False).encode(encoding)
    else:
        content = "\n".join(["instruction,output", *(f'"{row["instruction"]}","{row["output"]}"' for row in rows), ""]).encode(encoding)
    fact, hint = f"the file is {said}, not UTF-8", CONVERT.format(said, ending)
    return Broken(f"{encoding} as {ending}", f"data{ending}", content, f"data{ending}{at}", fact, hint)


def disguised(what: str, content: Content, hint: str, name: str = "data.jsonl") -> Broken:
    """A file that is something else than its extension says."""
    return Broken(f"{what} as {name}", name, content, name, f"the file is {what}", hint)


BIG5 = [{"instruction": "請問你是誰，從哪裡來？", "output": "我是米卡，這個問題說來話長，我們的時間不多。"}] * 3
JAPANESE = [{"instruction": "あなたは誰ですか？", "output": "わたしはミカです。よろしくおねがいします。"}] * 3
RUSSIAN = [{"instruction": "Кто ты такая?", "output": "Я кошка Мика, живу у моря и пью чай."}] * 3
KOREAN = [{"instruction": "당신은 누구입니까?", "output": "저는 미카입니다. 안녕하세요, 고양이가 말하고 있어요."}] * 3
ENCODINGS = [
    foreign("utf-16", CHINESE, "UTF-16"), foreign("utf-16-le", FRENCH, "UTF-16LE"), foreign("utf-16-be", FRENCH, "UTF-16BE"),
    foreign("utf-32", CHINESE, "UTF-32"), foreign("utf-16", CHINESE, "UTF-16", ending=".json"), foreign("utf-16", FRENCH, "UTF-16", ending=".csv"),
    foreign("gb18030", CHINESE, "GB18030", at=":1"), foreign("gb18030", CHINESE, "GB18030", ending=".json", at=":1"),
    foreign("gb18030", CHINESE, "GB18030", ending=".csv", at=":2"), foreign("latin-1", FRENCH, "WINDOWS-1252", at=":1"),
    foreign("latin-1", FRENCH, "WINDOWS-1252", ending=".csv", at=":2"), foreign("big5", BIG5, "BIG5", at=":1"),
    foreign("shift-jis", JAPANESE, "SHIFT_JIS", at=":1"), foreign("cp1251", RUSSIAN, "WINDOWS-1251", at=":1"),
    foreign("euc-kr", KOREAN, "EUC-KR", at=":1"),
]  # fmt: skip

ROWS = lines(*CHINESE)
GZIP = gzipped(ROWS * 50)
ZSTD = pyarrow.compress(ROWS * 50, codec="zstd", asbytes=True)
PARQUET = parquet(CHINESE)
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0\0\0\1\0\x08\6\0\0\0" + zipped("image")
ONE = pyarrow.table({"a": [1]})
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"
LOOK = "a download may have saved a login or error page: look into it"
DISGUISED = [
    disguised("compressed with gzip", GZIP, "give it its extension: name it data.jsonl.gz"),
    disguised("compressed with zstd", ZSTD, "give it its extension: name it data.jsonl.zst"),
    disguised("compressed with gzip", GZIP, "give it its extension: name it data.jsonl.gz", "data.jsonl.zst"),
    disguised("compressed twice", gzipped(GZIP), "decompress it once", "data.jsonl.gz"),
    disguised("compressed with bzip2", bz2.compress(ROWS), "decompress it: bzip2 -d (gzip and zstd are read as they are)"),
    disguised("compressed with xz", lzma.compress(ROWS), "decompress it: xz -d (gzip and zstd are read as they are)"),
    disguised("a ZIP archive", zipped("data.jsonl"), "extract it, and give the files in it"),
    disguised("a tar archive", tarred(), "extract it, and give the files in it"),
    disguised("a tar archive", gzipped(tarred()), "extract it, and give the files in it", "data.jsonl.gz"),
    disguised("a 7z archive", b"7z\xbc\xaf\x27\x1c" + bytes(30), "extract it"),
    disguised("an Excel or Word file", zipped("[Content_Types].xml"), "save it as CSV (UTF-8)", "data.csv"),
    disguised("an old Excel or Word file", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(60), "save it as CSV (UTF-8)", "data.csv"),
    disguised("Parquet", PARQUET, "name it .parquet"),
    disguised("Parquet", PARQUET, "name it .parquet", "data.csv"),
    disguised("an Arrow file", saved(lambda sink: pyarrow.feather.write_feather(ONE, sink, "uncompressed")), "write it as Parquet"),
    disguised("a Python pickle", pickle.dumps(CHINESE), "write it as JSONL: a pickle runs code when it is read"),
    disguised("a NumPy array", saved(lambda sink: numpy.save(sink, numpy.arange(3))), "write it as Parquet or JSONL"),
    disguised("an SQLite database", database, "export the table as CSV or JSONL"),
    disguised("a PDF", b"%PDF-1.7\n%\xe2\xe3", "rows are read from JSONL, JSON, CSV or Parquet"),
    disguised("an HTML page, not data", PAGE, LOOK),
    disguised("an HTML page, not data", PAGE, LOOK, "data.csv"),
    disguised("XML, not data", b'<?xml version="1.0"?><rows/>', LOOK),
    disguised("a git-lfs pointer, not the data itself", LFS, "fetch the data: git lfs pull"),
    disguised("a git-lfs pointer, not the data itself", LFS, "fetch the data: git lfs pull", "data.parquet"),
    disguised("binary, not text", PNG, "rows are read from JSONL, JSON, CSV or Parquet"),
    disguised("JSON, not CSV", json.dumps(CHINESE).encode(), "name it .json", "data.csv"),
    disguised("JSON, not CSV", gzipped(ROWS), "name it .jsonl", "data.csv.gz"),
]

MAGIC = "not valid Parquet: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file."
PRETTY = "the file holds JSON objects over several lines; a .jsonl file holds one a line"
JQ = "write one object a line: jq -c . data.jsonl > lines.jsonl"
ONE_LIST = "the file is one JSON list; a .jsonl file holds one object a line"
IS_CSV = "is it a table with commas? then name it .csv"
DEEP_LIST = json.dumps([GOOD, OTHER], ensure_ascii=False, indent=1).encode()
A, B = b'{"instruction": "a", "output": "b"}', b'{"instruction": "c", "output": "d"}'
NO_LIST = "a .json file holds a list of rows, not an object"
EXTRACT = "the rows seem to be in `data`: jq -c '.[\"data\"][]' data.json > data.jsonl"
SUFFIX = "a `{}` file cannot be read as data"


def whole(id: str, name: str, content: Content, at: str, fact: str, hint: str = "", *also: str, **recipe: Any) -> Broken:
    return Broken(id, name, content, f"{name}{at}", fact, hint, tuple(f"{name}{place}" for place in also), **recipe)


FILES = [
    # JSONL as a whole
    whole("torn in a character", "data.jsonl", lines(GOOD, OTHER)[:-10], ":2", "not UTF-8 text (byte 51): it ends in the middle of a character",
          CUT_SHORT),
    whole("torn", "data.jsonl", lines(GOOD, GOOD)[:-12], ":2:43", "not valid JSON: Unterminated string", CUT_SHORT),
    whole("objects over several lines", "data.jsonl", json.dumps(GOOD, indent=1).encode() + b"\n", "", PRETTY, JQ),
    whole("one list", "data.jsonl", json.dumps([GOOD, OTHER]).encode(), "", ONE_LIST, "name it .json"),
    whole("one list over several lines", "data.jsonl", DEEP_LIST, "", ONE_LIST, "name it .json"),
    whole("line breaks of an old Mac", "data.jsonl", lines(GOOD, OTHER).replace(b"\n", b"\r"), ":1:57", "not valid JSON: Extra data", ONE_A_LINE),
    whole("YAML", "data.jsonl", b"- instruction: a\n  output: b\n", ":1:1", "not valid JSON: Expecting value", ONE_A_LINE, ":2:3"),
    whole("CSV as JSONL", "data.jsonl", b"instruction,output\nhi,ho\n", ":1:1", "not valid JSON: Expecting value", IS_CSV, ":2:1"),
    whole("zeros only", "data.jsonl", bytes(4096), ":1:1", f"not valid JSON: {NUL}", CUT_SHORT),
    # nothing in it
    whole("empty", "data.jsonl", b"", "", "the file has no rows"),
    whole("blank lines only", "data.jsonl", b"\n \n\t\r\n\n", "", "the file has no rows"),
    whole("a mark only", "data.jsonl", codecs.BOM_UTF8, "", "the file has no rows"),
    whole("an empty archive", "data.jsonl.gz", gzipped(b""), "", "the file has no rows"),
    whole("empty .json", "data.json", b"\n", "", "the file has no rows"),
    whole("an empty list", "data.json", b"[ ]", "", "the file has no rows"),
    whole("a header only", "data.csv", b"instruction,output\n", "", "the file has no rows"),
    whole("a table without rows", "data.parquet", parquet(ONE.slice(0, 0)), "", "the file has no rows"),
    whole("empty .parquet", "data.parquet", b"", "", "not valid Parquet: Parquet file size is 0 bytes"),
    whole("empty objects", "data.jsonl", b"{}\n{}\n", ":1", "the columns are not understood (none)", COLUMNS, ":2"),
    # JSON
    whole("an object", "data.json", json.dumps(GOOD).encode(), "", NO_LIST),
    whole("a list within an object", "data.json", json.dumps({"version": 1, "data": CHINESE}).encode(), "", NO_LIST, EXTRACT),
    whole("a text as .json", "data.json", b'"hi"', "", "a .json file holds a list of rows, not a text"),
    whole("JSONL as .json", "data.json", ROWS, ":2:1", "not valid JSON: Extra data", "one object a line is JSONL: name the file .jsonl"),
    whole("CSV as .json", "data.json", b"instruction,output\nhi,ho\n", ":1:1", "not valid JSON: Expecting value"),
    whole("a torn list", "data.json", DEEP_LIST[:-30], ":8:3", "not valid JSON: Unterminated string", CUT_SHORT),
    whole("a list without an end", "data.json", DEEP_LIST[:-1], ":10:1", "not valid JSON: Expecting ',' delimiter", CUT_SHORT),
    whole("a comma after the last row", "data.json", b"[" + A + b",\n]", ":2:1", "not valid JSON: Expecting value"),
    whole("no comma between rows", "data.json", b"[" + A + b"\n" + B + b"]", ":2:1", "not valid JSON: Expecting ',' delimiter"),
    whole("text after the list", "data.json", b"[" + A + b"]\nend", ":2:1", "not valid JSON: Extra data"),
    whole("rows of other kinds", "data.json", b"[" + A + b", [1], 2]", "[1]", "a row is a JSON object, not a list", MEND, "[2]"),
    whole("NaN in a list", "data.json", b'[{"score": NaN}]', "[0]", "not valid JSON: NaN is not JSON", MEND),
    whole("NULs in a list", "data.json", b"[" + A + b",\n" + bytes(40), ":2:1", f"not valid JSON: {NUL}"),
    whole("a byte of nothing in a list", "data.json", b"[" + A + b",\n" + A[:20] + b"\xff", ":2", "not UTF-8 text (byte …", "save the file as UTF-8"),
    # archives
    whole("not packed", "data.jsonl.gz", lines(GOOD), "", "cannot be read: it is not compressed with gzip, as its extension says",
          "name it data.jsonl"),
    whole("torn gzip", "data.jsonl.gz", GZIP[: len(GZIP) // 2], "", "cannot be read: Compressed file ended before…", DAMAGED),
    whole("gzip with a wrong sum", "data.jsonl.gz", GZIP[:-8] + bytes(8), "", "cannot be read: CRC check failed…", DAMAGED),
    whole("gzip and something else", "data.jsonl.gz", GZIP + b"and so on", "", "cannot be read: Not a gzipped file…", DAMAGED),
    whole("torn zstd", "data.jsonl.zst", ZSTD[:-5], "", "cannot be read: Truncated compressed stream", DAMAGED),
    # CSV
    whole("cells too many between semicolons", "data.csv", b"instruction;output\nhi;ho\nhi;ho;ha\n", ":3",
          "the row has more cells than the header (3, 2)", "put a text with `;` between double quotes"),
    whole("cells too many", "data.csv", b"instruction,output\nhi,ho\nhi,ho,ha\n", ":3", "the row has more cells than the header (3, 2)",
          "put a text with commas between double quotes"),
    whole("cells too few", "data.csv", b"instruction,output\nhi,ho\nhi\n", ":3", "the row has fewer cells than the header (1, 2)",
          "put a text with commas between double quotes"),
    whole("a quote that is not closed", "data.csv", b'instruction,output\nhi,ho\nhi,"ho\nhi,ho\n', ":3",
          "not valid CSV: the file ends within a quoted cell", f'a double quote (") opened in this row is never closed, or {CUT_SHORT}'),
    whole("a quote in the middle", "data.csv", b'instruction,output\n"hi" there,ho\n', ":2", "not valid CSV: ',' expected after '\"'",
          'put texts with commas or line breaks between double quotes (")'),
    whole("a header twice", "data.csv", b"instruction,output,output\na,b,c\n", ":1", "the header names the column `output` 2 times"),
    whole("a column without a name", "data.csv", b",instruction,output\n0,a,b\n", ":1", "column 1 has no name in the header",
          "a table saved by pandas? df.to_csv(path, index=False)"),
    whole("no header", "data.csv", b"hi,ho\nwhat,that\n", ":2", "the columns are not understood (hi, ho)", COLUMNS),
    whole("a space in the header", "data.csv", b"instruction, output\nhi,ho\n", ":2", "`output` is missing or null",
          "the row has ` output`: did you mean `output`?"),
    whole("a list that is none", "data.csv", b'instruction,output,history\na,b,"[c"\n', ":2", "the cell of `history` is not a JSON list", MEND),
    whole("an empty cell", "data.csv", b"instruction,output\nhi,\n", ":2", "`output` is missing or null", MEND),
    whole("a cell of spaces", "data.csv", b'instruction,output\nhi,"  "\n', ":2", "the answer is empty", MEND),
    whole("a NUL in a cell", "data.csv", b"instruction,output\nhi,ho\nhi,h\0o\n", ":3", NUL, MEND),
    # Parquet
    whole("torn Parquet", "data.parquet", PARQUET[:-20], "", MAGIC),
    whole("JSONL as Parquet", "data.parquet", lines(GOOD), "", MAGIC),
    whole("a damaged footer", "data.parquet", PARQUET[:-30] + b"\xff" * 20 + PARQUET[-10:], "", "cannot be read: Couldn't deserialize…", DAMAGED),
    whole("other columns", "data.parquet", parquet([{"q": "a", "r": "b"}]), "[0]", "the columns are not understood (q, r)", COLUMNS),
    whole("a column twice", "data.parquet", parquet(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["output"] * 2)), "",
          "the file has the column `output` 2 times"),
    whole("bytes in place of text", "data.parquet", parquet([{"instruction": "a", "output": b"x"}]), "[0]", "`output` is not a text", MEND),
    whole("a null in a column", "data.parquet", parquet([GOOD, {"instruction": "b", "output": None}]), "[1]", "`output` is missing or null", MEND),
    whole("numbers in place of text", "data.parquet", parquet([{"instruction": 1, "output": "b"}]), "[0]", "`instruction` is not a text", MEND),
    # endings
    *(whole(f"ending {name}", name, ROWS, "", SUFFIX.format(suffix), f"give {KINDS}") for name, suffix in (
        ("data.txt", ".txt"), ("data.jsonl.bz2", ".bz2"), ("data.xlsx", ".xlsx"), ("data.tar.gz", ".tar.gz"), ("data.ndjson", ".ndjson"),
    )),
    whole("no ending", "data", ROWS, "", "a file without an extension cannot be read as data", f"give {KINDS}"),
]  # fmt: skip


# --- rows: the second of two, the first is good ----------------------------------------------------------------------


def row(id: str, columns: dict[str, Any], fact: str, hint: str = MEND, *settings: str) -> Broken:
    return Broken(f"row: {id}", "data.jsonl", lines(GOOD, columns), "data.jsonl:2", fact, hint, settings=settings)


def chat(*messages: str | dict, **columns: Any) -> dict[str, Any]:
    """A row of messages; `u:hi` is the user's hi."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [m if isinstance(m, dict) else {"role": roles[m[0]], "content": m[2:]} for m in messages], **columns}


def answer(content: Any = "ho", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def said(text: str, **columns: Any) -> dict[str, Any]:
    return {"instruction": "hi", "output": text, **columns}


def turns(*said: str) -> dict[str, Any]:
    return {"conversations": [dict(zip(("from", "value"), entry.split(":", 1), strict=True)) for entry in said]}


TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}}
RESULT = {"role": "tool", "content": "2", "tool_call_id": "c1"}


def tooled(*messages: str | dict, tools: Any = (TOOL,)) -> dict[str, Any]:
    return chat("u:add", *messages, "a:done", tools=tools if isinstance(tools, str | dict) else list(tools))


def call(id: str = "c1", **function: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "add", "arguments": "{}", **function}}


def calls(*made: dict, **keys: Any) -> dict[str, Any]:
    return answer("", tool_calls=list(made), **keys)


TOKENS = ("start", "end", "message", "channel", "constrain", "return", "call", "startoftext", "endoftext", "endofprompt", "reserved_200000")
ROLES = "system, user, assistant or tool"
REMOVE = "remove it: fastoss writes the control tokens itself"
THINK = "a <think> tag is not closed, or not at the beginning"
WRITE_THINK = "write <think>reasoning</think> and then the answer"
PAIR = "the row is a preference pair (`chosen` and `rejected`)"
ONE_CALL = "gpt-oss makes one call at a time, and each needs its result before the next"
DATE = "YYYY-MM-DD: it is the date that the system message says; give the column another name if it means something else"
ASKED, LAST = "<|start|>user<|message|>hi<|end|>", "<|start|>assistant<|channel|>final<|message|>ho<|return|>"
MOJIBAKE = "你好，我是米卡".encode().decode("latin-1")
LOOKS = r"looks like UTF-8 that was read as Latin-1: “ä½\xa0å¥½ï¼\x8cæ\x88\x91æ\x98¯ç±³å\x8d¡” for “你好，我是米卡”"
REPAIR = 'set hygiene.mojibake = "repair" to have it repaired, or "keep" if it is meant'
LONGER = 'raise model.max_length, or set hygiene.over_length = "drop" or "truncate_left_turns"'

ROW_FAULTS = [
    # roles and whose turn it is
    row("unknown role", chat("u:hi", {"role": "asistant", "content": "ho"}), "message 2 has the unknown role 'asistant'", ROLES),
    row("no role", chat({"content": "hi"}, "a:ho"), "message 1 has the unknown role null", ROLES),
    row("unknown speaker", turns("human:hi", "bot:ho"), "message 2 has the unknown role 'bot'", ROLES),
    row("a system text in the middle", chat("u:hi", "a:ho", "s:be nice", "u:hi", "a:ho"), "a system message that is not the first",
        "harmony has one, at the beginning: join them there"),
    row("two users", chat("u:hi", "u:hi", "a:ho"), "message 2 is of the user, but it is the assistant's turn"),
    row("two answers", chat("u:hi", "a:ho", "a:ho"), "message 3 is of the assistant, but it is the user's turn"),
    row("an answer first", chat("a:ho", "u:hi", "a:ho"), "message 1 is of the assistant, but it is the user's turn"),
    row("a question last", chat("u:hi", "a:ho", "u:hi"), "the conversation does not end with an answer"),
    row("only a system text", chat("s:be nice"), "the conversation does not end with an answer"),
    # texts
    row("null answer", chat("u:hi", answer(None)), "the text of message 2 (assistant) is missing or null"),
    row("no answer", chat("u:hi", {"role": "assistant"}), "the text of message 2 (assistant) is missing or null"),
    row("an empty answer", chat("u:hi", "a:"), "the answer is empty"),
    row("an answer of wide spaces", chat("u:hi", "a:\u3000\n "), "the answer is empty"),
    row("a number as an answer", chat("u:hi", answer(42)), "the text of message 2 (assistant) is not a text"),
    row("an empty question", chat("u:", "a:ho"), "the user's text is empty"),
    row("an empty system text", chat("s: ", "u:hi", "a:ho"), "the system text is empty"),
    row("an image", chat({"role": "user", "content": [{"type": "image_url"}]}, "a:ho"), "message 1 (user) holds a part of the type 'image_url'",
        "only text can be trained"),
    row("texts as messages", {"messages": ["hi", "ho"]}, "message 1 is not an object"),
    row("a text as messages", {"messages": "hi"}, "`messages` is not a list of messages"),
    row("no messages", {"messages": []}, "`messages` is not a list of messages: it is empty"),
    row("null messages", {"messages": None}, "`messages` is not a list of messages: it is missing or null"),
    row("reasoning of the user", chat({"role": "user", "content": "hi", "thinking": "hm"}, "a:ho"), "message 1 has reasoning, but its role is user"),
    row("two reasonings", chat("u:hi", answer(thinking="a", reasoning="b")), "`thinking` and `reasoning` of message 2 differ", "keep one"),
    row("no output", {"instruction": "hi"}, "`output` is missing or null"),
    row("null output", {"instruction": "hi", "output": None}, "`output` is missing or null"),
    row("a misspelled column", {"instuction": "hi", "output": "ho"}, "`instruction` is missing or null",
        "the row has `instuction`: did you mean `instruction`?"),
    row("a number as output", {"instruction": "hi", "output": 4}, "`output` is not a text"),
    row("history as a text", said("ho", history="x"), "`history` is not a list of [user, assistant] pairs"),
    row("half a pair of history", said("ho", history=[["a", "b"], ["c"]]), "pair 2 of `history` is not [user, assistant]"),
    row("a null in history", said("ho", history=[["a", None]]), "the answer in pair 1 of `history` is missing or null"),
    row("unknown columns", {"q": "hi", "a": "ho"}, "the columns are not understood (q, a)", COLUMNS),
    row("plain text", {"text": "hi"}, "the columns are not understood (text)", COLUMNS),
    row("null completion", {"prompt": "hi", "completion": None}, "`completion` is missing or null"),
    row("null final", {"user": "hi", "analysis": "hm", "final": None}, "`final` is missing or null"),
    # control tokens, and reasoning in tags
    *(row(f"<|{token}|>", said(f"a <|{token}|> b"), f"the text holds the control token <|{token}|>", REMOVE) for token in TOKENS),
    row("a token of the user", {"instruction": "<|end|>", "output": "ho"}, "the text holds the control token <|end|>", REMOVE),
    row("a token in reasoning", said("ho", thinking="<|call|>"), "the text holds the control token <|call|>", REMOVE),
    row("a token in a tool", tooled(tools=[{"name": "x", "description": "<|end|>"}]), "the text holds the control token <|end|>", REMOVE),
    row("an open <think>", said("<think>hm"), THINK, WRITE_THINK),
    row("a late <think>", said("ho <think>hm</think>"), THINK, WRITE_THINK),
    row("a lone </think>", said("hm</think>ho"), THINK, WRITE_THINK),
    row("<think> twice", said("<think>a</think><think>b</think>ho"), THINK, WRITE_THINK),
    row("<think> and no answer", said("<think>hm</think>"), "the answer is empty"),
    row("<think> and reasoning", said("<think>a</think>ho", thinking="b"), "the answer has a <think> part and other reasoning as well", "keep one"),
    # tools
    row("an unknown function", tooled(calls(call(name="sub")), RESULT), "the tool `sub` is called, but not defined in `tools`"),
    row("a result without a call", tooled(RESULT), "message 2 is a tool's result, but no tool was called"),
    row("an observation without a call", turns("human:x", "observation:1", "gpt:y"), "message 2 is a tool's result, but no tool was called"),
    row("arguments that are no JSON", tooled(calls(call(arguments="{a: 1}")), RESULT), "`arguments` of the call of message 2 is not valid JSON"),
    row("a list of arguments", tooled(calls(call(arguments="[1]")), RESULT), "`arguments` of the call of message 2 is not a JSON object"),
    row("no arguments", tooled(calls({"function": {"name": "add"}}), RESULT), "the call of message 2 has no `arguments`", "write {} for none"),
    row("a function without a name", tooled(calls({"function": {"arguments": {}}}), RESULT), "the name of the call of message 2 is missing or null"),
    row("a name with a space", tooled(calls(call(name="add up")), RESULT), "the call of message 2 has the name 'add up'",
        "a name is made of letters, digits, _, . and -"),
    row("parallel calls without results", tooled(calls(call(), call("c2")), "u:well?"), "message 2 makes 2 calls, but 0 results follow", ONE_CALL),
    row("parallel calls with one result", tooled(calls(call(), call("c2")), RESULT), "message 2 makes 2 calls, but 1 result follows", ONE_CALL),
    row("a call without a result", tooled(calls(call()), "u:well?"), "message 3 is of the user, but the result of `add` must follow its call"),
    row("a result too many", tooled(calls(call()), RESULT, RESULT), "message 4 is one tool result too many: message 2 makes 1 call"),
    row("a result of another call", tooled(calls(call()), RESULT | {"tool_call_id": "c9"}), "message 3 answers the call 'c9', which was not made"),
    row("two calls of one id", tooled(calls(call(), call()), RESULT, RESULT), "the id 'c1' stands for more than one call or result"),
    row("a result of another name", tooled(calls(call()), RESULT | {"name": "sub"}), "message 3 is a result of 'sub', but `add` was called"),
    row("the user calls", chat({"role": "user", "content": "x", "tool_calls": [call()]}, "a:y"), "message 1 calls a tool, but its role is user"),
    row("two kinds of calls", tooled(calls(call(), function_call={"name": "add"})), "message 2 has both `tool_calls` and `function_call`",
        "keep one"),
    row("a call that is no JSON", turns("human:x", "function_call:add(1)", "observation:1", "gpt:y"), "the call of message 2 is not valid JSON"),
    row("a null result", tooled(calls(call()), RESULT | {"content": None}), "the text of message 3 (tool) is missing or null"),
    row("a result last", chat("u:x", calls(call()), RESULT), "the conversation does not end with an answer"),
    row("a tool twice", tooled(tools=[TOOL, TOOL]), "the tool `add` is defined twice"),
    row("tools that are no JSON", tooled(tools="[{"), "`tools` is not valid JSON"),
    row("tools as an object", tooled(tools={"add": {}}), "`tools` is not a list of functions"),
    row("tools as names", tooled(tools=["add"]), "tool 1 is not an object"),
    row("a tool without a name", tooled(tools=[{"type": "function", "function": {}}]), "the name of tool 1 is missing or null"),
    row("a tool of another type", tooled(tools=[{"type": "web_search"}]), "tool 1 is of the type 'web_search'", "only functions are understood"),
    row("parameters as a text", tooled(tools=[{"name": "x", "parameters": "y"}]), "`parameters` of tool 1 is not an object", "give a JSON Schema"),
    # what a row says besides
    row("a preference pair", {"prompt": "a", "chosen": "b", "rejected": "c"}, PAIR, 'train pairs with method = "dpo"'),
    row("a pair of conversations", {"chosen": chat("u:a", "a:b")["messages"], "rejected": []}, PAIR, 'train pairs with method = "dpo"'),
    row("trained and not", chat("u:hi", answer(train=True, weight=0)), "`train` and `weight` of message 2 contradict each other", "keep one"),
    row("two weights", chat("u:hi", answer(weight=1, loss_weight=2)), "`weight` and `loss_weight` of message 2 contradict each other", "keep one"),
    row("a negative weight", chat("u:hi", answer(weight=-1)), "`weight` of message 2 is -1", "a number from 0"),
    row("train as a text", chat("u:hi", answer(train="yes")), "`train` of message 2 is 'yes'", "true or false"),
    row("a trained question", chat({"role": "user", "content": "hi", "train": True}, "a:ho"), "message 1 is to be trained, but its role is user",
        "only the assistant's messages are trained"),
    row("nothing to train", chat("u:hi", answer(train=False)), "nothing in the row is trained", "`train` or `weight` leaves out every answer"),
    row("unknown effort", said("ho", reasoning_effort="max"), "`reasoning_effort` is 'max'", "low, medium or high"),
    row("a date that is none", said("ho", current_date="2026-13-01"), "`current_date` is '2026-13-01'", DATE),
    row("two dates", said("ho", date="2026-01-01", current_date="2026-01-02"),
        "`current_date` is '2026-01-02', but the row says '2026-01-01' as well", "keep one"),
    # harmony text
    row("harmony: open", {"text": ASKED + LAST[:-10]}, "message 2 of the harmony text is not closed"),
    row("harmony: unknown channel", {"text": ASKED + LAST.replace("final", "finale")},
        "message 2 of the harmony text has the unknown channel 'finale'", "analysis, commentary or final"),
    row("harmony: reasoning only", {"text": ASKED + LAST.replace("final", "analysis").replace("return", "end")},
        "message 2 of the harmony text is analysis that is followed by no answer"),
    row("harmony: a system text", {"text": "<|start|>system<|message|>You are a cat.<|end|>" + ASKED + LAST},
        "message 1 of the harmony text is another system text than gpt-oss's own", "give your instructions in the developer message"),
    # what [hygiene] finds
    row("mojibake", said(MOJIBAKE), LOOKS, REPAIR),
    row("mojibake in reasoning", said("ho", thinking=MOJIBAKE), LOOKS, REPAIR),
    row("mojibake of Windows", said("Itâ€™s a cafÃ©"), "looks like UTF-8 that was read as Latin-1: “Itâ€™s a cafÃ©” for “It’s a café”", REPAIR),
    row("empty reasoning", said("ho", thinking=" "), "the reasoning is empty",
        'set hygiene.empty_reasoning = "keep" to read it as an answer without reasoning', "hygiene.empty_reasoning=error"),
    row("the same row", GOOD, "the row is the same as an earlier row (data.jsonl:1)",
        'remove it, or set hygiene.duplicates = "drop" or "keep"', "hygiene.duplicates=error"),
    row("nearly the same row", SHOUTED, "the row is nearly the same as an earlier row",
        'remove it, or set hygiene.near_duplicates = "drop" or "keep"', "hygiene.near_duplicates=error"),
    row("too long", said("x " * 600), "an example of 673 tokens is longer than model.max_length 256", LONGER, "hygiene.over_length=error"),
]  # fmt: skip


# --- paths -----------------------------------------------------------------------------------------------------------


def holding(**files: bytes) -> Callable[[Path], None]:
    """Makes files of these names; `__` stands for a folder's slash, `_` for a dot."""

    def make(folder: Path) -> None:
        for name, content in files.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    return make


def nothing(folder: Path) -> None: ...


def unreadable(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    (folder / "data.jsonl").touch(mode=0)


def closed(folder: Path) -> None:
    """A folder with data, and within it one that may not be read."""
    if os.geteuid() == 0:
        pytest.skip("root may read every folder")
    holding(data__a_jsonl=ROWS)(folder)
    (folder / "data/b").mkdir(mode=0)


def a_socket(folder: Path) -> None:
    os.chdir(folder)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("data.jsonl")


MISSING, RELATIVE = "data file not found", "data paths are relative to the recipe file"
NO_FILE, NO_DATA = "not a file or folder", f"the folder holds no data file ({KINDS})"
PLACES = [
    Broken("a near name", "data.jsonl", holding(date_jsonl=ROWS), "data.jsonl", MISSING, "did you mean date.jsonl?"),
    Broken("another ending", "data.json", holding(data_jsonl=ROWS), "data.json", MISSING, "did you mean data.jsonl?"),
    Broken("another case", "Data.jsonl", holding(data_jsonl=ROWS), "Data.jsonl", MISSING, "did you mean data.jsonl?"),
    Broken("no file", "data.jsonl", nothing, "data.jsonl", MISSING, RELATIVE),
    Broken("no folder", "sub/data.jsonl", nothing, "sub/data.jsonl", MISSING, RELATIVE),
    Broken("a file as a folder", "data.jsonl/more.jsonl", holding(data_jsonl=ROWS), "data.jsonl/more.jsonl", MISSING, RELATIVE),
    Broken("a very long name", "x" * 300 + ".jsonl", nothing, "x" * 300 + ".jsonl", "cannot be read: File name too long"),
    Broken(
        "an address", "https://example.com/a.jsonl", nothing, "https:/example.com/a.jsonl", MISSING, "download it first: only files and hubs are read"
    ),
    Broken("a folder without data", "data", holding(data__readme_md=b"x"), "data", NO_DATA),
    Broken("a folder named like a file", "data.jsonl", lambda folder: (folder / "data.jsonl").mkdir(), "data.jsonl", NO_DATA),
    Broken(
        "a bad file in a folder",
        "data",
        holding(data__a_jsonl=ROWS, data__b_jsonl=b"[1]"),
        "data/b.jsonl:1",
        "a row is a JSON object, not a list",
        MEND,
    ),
    Broken("an empty file in a folder", "data", holding(data__a_jsonl=ROWS, data__b_jsonl=b""), "data/b.jsonl", "the file has no rows"),
    Broken("a glob of nothing", "*.csv", holding(data_jsonl=ROWS), "*.csv", "no file matches", RELATIVE),
    Broken("a glob of other files", "*.md", holding(a_md=b"x"), "a.md", "a `.md` file cannot be read as data", f"give {KINDS}"),
    Broken("a pipe", "data.jsonl", lambda folder: os.mkfifo(folder / "data.jsonl"), "data.jsonl", NO_FILE),
    Broken("a packed pipe", "data.jsonl.gz", lambda folder: os.mkfifo(folder / "data.jsonl.gz"), "data.jsonl.gz", NO_FILE),
    Broken("a socket", "data.jsonl", a_socket, "data.jsonl", NO_FILE),
    Broken("a device", "/dev/null", nothing, "/dev/null", NO_FILE),
    Broken("a link to a device", "data.jsonl", lambda folder: (folder / "data.jsonl").symlink_to("/dev/zero"), "data.jsonl", NO_FILE),
    Broken("a file nobody may read", "data.jsonl", unreadable, "data.jsonl", "cannot be read: Permission denied"),
    Broken("a folder nobody may read", "data", closed, "data/b", "cannot be read: Permission denied"),
]


# --- recipes that do not fit the data --------------------------------------------------------------------------------

HELD = "fraction = 0.0\n[[eval.data]]\nsource = 'held.jsonl'"
ASK = lines({"question": "hi", "reply": {"text": "ho"}})
HAS = "`columns` says that it is `instruction`; the row has `question`, `reply`"
NOT_REASONING = "the data has reasoning (1 example), but `format.train_on` leaves it out: the model would not learn to reason"
NOT_CALLING = "the data has tool calls (1 example), but `format.train_on` leaves it out: the model would not learn to call tools"
RECIPES = [
    whole("columns that are not there", "data.jsonl", ASK, ":1", "the column `questoin` is not there", HAS,
          of_source='columns = { instruction = "questoin" }'),
    whole("columns within that are not there", "data.jsonl", ASK, ":1", "the column `reply.body` is not there",
          HAS.replace("instruction", "output"), of_source='columns = { instruction = "question", output = "reply.body" }'),
    whole("columns of no format", "data.jsonl", ASK, ":1", "`columns` names `instructoin`, a column that no format knows",
          "did you mean `instruction`?", of_source='columns = { instructoin = "question" }'),
    whole("columns for a half", "data.jsonl", ASK, ":1", "`output` is missing or null", MEND, of_source='columns = { instruction = "question" }'),
    Broken("an unknown format", "data.jsonl", ROWS, "recipe.toml:10",
           "`data.0.format`: should be 'auto', 'messages', 'sharegpt', 'alpaca', 'prompt_completion', 'flat' or 'harmony', not \"alpacca\"",
           of_source='format = "alpacca"'),
    whole("another format", "data.jsonl", lines(GOOD), ":1", "`messages` is not a list of messages: it is missing or null", MEND,
          of_source='format = "messages"'),
    whole("harmony that is none", "data.jsonl", lines({"text": "hi"}), ":1", "message 1 of the harmony text does not begin with <|start|>", MEND,
          of_source='format = "harmony"'),
    Broken("a split of a file", "data.jsonl", ROWS, "recipe.toml:10", "a local file has no splits", "remove `split`, or name the file of that split",
           of_source='split = "test"'),
    whole("all too long", "data.jsonl", lines(said("x " * 600)), "",
          "no training example is left (1 × longer than max_length 256: data.jsonl:1)", LEFT_OUT),
    whole("all malformed", "data.jsonl", lines({"instruction": "x"}, {"q": 1}), "", "no training example is left (1 × `output` is missing or null: "
          "data.jsonl:1; 1 × the columns are not understood (q): data.jsonl:2)", LEFT_OUT, settings=("hygiene.malformed=drop",)),
    whole("all mojibake", "data.jsonl", lines(said(MOJIBAKE), said(MOJIBAKE + "!")), "",
          "no training example is left (2 × mojibake: data.jsonl:1, data.jsonl:2)", LEFT_OUT, settings=("hygiene.mojibake=drop",)),
    whole("all in the evaluation", "data.jsonl", holding(data_jsonl=lines(GOOD), held_jsonl=lines(GOOD)), "",
          "no training example is left (1 × in the evaluation data as well: data.jsonl:1)", LEFT_OUT,
          of_eval=HELD, settings=("hygiene.leakage=drop",)),
    whole("nothing that is trained", "data.jsonl", lines(GOOD), "",
          "no training example is left (1 × nothing in them is trained (format.train_on): data.jsonl:1)", LEFT_OUT,
          settings=('format.train_on=["analysis"]',)),
    Broken("reasoning that is not trained", "data.jsonl", lines(GOOD, said("ho", thinking="hm")), "format.train_on", NOT_REASONING,
           'add "analysis", or write { analysis = 0.0, final = 1.0 } if you mean it', settings=('format.train_on=["final"]',)),
    Broken("calls that are not trained", "data.jsonl", lines(tooled(calls(call()), RESULT)), "format.train_on", NOT_CALLING,
           'add "commentary", or write { commentary = 0.0, final = 1.0 } if you mean it', settings=('format.train_on=["final"]',)),
    whole("leakage", "data.jsonl", holding(data_jsonl=lines(OTHER, GOOD), held_jsonl=lines(SHOUTED)), ":2",
          "the row is in the evaluation data as well (held.jsonl:1)", 'remove it, or set hygiene.leakage = "drop" or "keep"', of_eval=HELD),
    Broken("a bad row of the evaluation", "data.jsonl", holding(data_jsonl=ROWS, held_jsonl=lines(OTHER, {"instruction": "x"})), "held.jsonl:2",
           "`output` is missing or null", MEND, of_eval=HELD),
    Broken("no evaluation", "data.jsonl", holding(data_jsonl=ROWS), "held.jsonl", MISSING, RELATIVE, of_eval=HELD),
    whole("more than twenty bad rows", "data.jsonl", lines(*({"instruction": str(i)} for i in range(25))), ":1", "`output` is missing or null", MEND,
          *(f":{number}" for number in range(2, 21))),
]  # fmt: skip

CORPUS = [*LINES, *ENCODINGS, *DISGUISED, *FILES, *ROW_FAULTS, *PLACES, *RECIPES]


# --- the tests -------------------------------------------------------------------------------------------------------


def written(folder: Path, case: Broken) -> list[str]:
    """Put the file and its recipe into a folder; returns the arguments for the command line."""
    if callable(case.content):
        case.content(folder)
    else:
        (folder / case.name).write_bytes(case.content)
    recipe = RECIPE.format(source=case.name, of_source=case.of_source, of_eval=case.of_eval)
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    return ["recipe.toml", *(part for setting in case.settings for part in ("--set", setting))]


def checked(case: Broken, result: Result) -> None:
    """Exit code 2, nothing on stdout, and on stderr this message and no other."""
    assert (result.code, result.out) == (2, ""), result.err
    message = "error: " + result.err.partition("error: ")[2].rstrip("\n")
    first, _, rest = message.partition("\n")
    shared = f"error: {case.place}: "
    assert first.startswith(shared)
    assert matches(first.removeprefix(shared), case.fact)
    rest = rest.replace("\n  also maybe more: the reading ended here", "") if len(case.also) >= 19 else rest
    *also, hint = [*rest.split("\n")] if case.hint else [*rest.split("\n"), ""] if rest else [""]
    assert [entry.split(": ")[0] for entry in also] == [f"  also {place}" for place in case.also]
    assert matches(hint.removeprefix("hint: "), case.hint)
    assert "Traceback" not in result.err


def matches(text: str, expected: str) -> bool:
    return text.startswith(expected[:-1]) if expected.endswith("…") else text == expected


@contextmanager
def soon(seconds: int) -> Iterator[None]:
    """Fail where the block hangs, as it would on a pipe that nobody writes into."""

    def too_late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def left_by_us(folder: Path, before: set[Path]) -> list[str]:
    """What a command has written, locks aside: they are empty."""
    return sorted(str(path.relative_to(folder)) for path in {*folder.rglob("*")} - before if path.is_file() and path.suffix != ".lock")


def test_the_corpus():
    ids = [case.id for case in CORPUS]
    assert len(ids) == len(set(ids)) >= 60


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CORPUS])
def test_a_broken_file(case, tmp_path, monkeypatch, capsys):
    """As the command line says it, for `check` and for `train`, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTOSS_CACHE", str(tmp_path / "cache"))
    arguments = written(tmp_path, case)
    before = {*tmp_path.rglob("*")}
    for command in ("check", "train"):
        monkeypatch.setattr(sys, "argv", ["fastoss", command, *arguments])
        with soon(60), pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        checked(case, Result(ended.value.code, out, err))
    assert left_by_us(tmp_path, before) == []
    assert not (tmp_path / "runs").exists()


PROCESSES = [
    "no comma", "half a character", "utf-16 as .jsonl", "gb18030 as .csv", "a Python pickle as data.jsonl", "torn gzip", "empty", "torn Parquet",
    "row: <|return|>", "row: an unknown function", "a pipe", "leakage",
]  # fmt: skip


@pytest.mark.parametrize("id", PROCESSES)
def test_a_broken_file_in_a_process_of_its_own(id, tmp_path):
    (case,) = [case for case in CORPUS if case.id == id]
    arguments = written(tmp_path, case)
    before = {*tmp_path.rglob("*")}
    for command in ("check", "train"):
        checked(case, fastoss(command, *arguments, cwd=tmp_path, timeout=120, FASTOSS_CACHE=str(tmp_path / "cache")))
    assert left_by_us(tmp_path, before) == []
    assert not (tmp_path / "runs").exists()


# --- faults that do not end the run ----------------------------------------------------------------------------------

HALF = rb'{"instruction": "hi", "output": "\ud83d"}'


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        (lines(GOOD, HALF), ("hygiene.malformed=drop",), "dropped 1 of 2 rows: the text holds half a character (a lone surrogate) (data.jsonl:2)"),
        (lines(GOOD, rb'{"\ud83d": 1}'), ("hygiene.malformed=drop",),
         r"dropped 1 of 2 rows: the columns are not understood (\ud83d) (data.jsonl:2)"),
        (lines(rb'{"instruction": "hi", "output": "ho", "\ud83d\u001b[31m\n": 1}'), (), r"the column `\ud83d\x1b[31m\n` of 1 row is not read"),
        (lines(GOOD, chat("u:hi", "a:ho", "u:hi", answer(train=False))), ("format.turns=last",),
         "dropped 1 of 2 rows: the last answer is not to be trained (format.turns) (data.jsonl:2)"),
        (lines(GOOD, OTHER), ("eval.fraction=0.999999",), "no evaluation: 0.999999 of 2 rows: they are too few, or too much alike, to be split"),
        (lines(*CHINESE * 40), ("eval.fraction=0.1",), "no evaluation: 0.1 of 120 rows: they are too few, or too much alike, to be split"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_said(content, settings, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = written(tmp_path, Broken("", "data.jsonl", content, "", ""))
    assert said in build_dataset(load_recipe(Path(arguments[0]), settings)).report.lines()


def test_an_evaluation_of_which_nothing_is_left_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = holding(data_jsonl=ROWS, held_jsonl=lines({"instruction": "x"}))
    written(tmp_path, Broken("", "data.jsonl", made, "", "", of_eval=HELD))
    report = build_dataset(load_recipe(Path("recipe.toml"), ("hygiene.malformed=drop",))).report
    assert report.lines()[-1] == "no evaluation: no row of [[eval.data]] is left"


def test_rows_that_differ_in_their_tools_are_no_duplicates(tmp_path, monkeypatch):
    """The tools stand in the developer message: the examples are different ones."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, Broken("", "data.jsonl", lines(*(tooled(tools=[{"name": name}]) for name in "aba")), "", ""))
    report = build_dataset(load_recipe(Path("recipe.toml"), ("hygiene.duplicates=drop",))).report
    assert report.train_rows == 2
    assert report.drops["the same as an earlier row"].places == ["data.jsonl:3"]


def test_a_file_name_in_another_encoding(tmp_path, monkeypatch):
    """As `unzip` leaves them: the place is spelled out, and the rows are read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    try:
        for name, content in ((b"\xc4\xe3.jsonl", lines(GOOD, {"instruction": "x"})), (b"\xba\xc3.txt", b"x")):
            Path(os.fsdecode(b"data/" + name)).write_bytes(content)
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    written(tmp_path, Broken("", "data", nothing, "", ""))
    report = build_dataset(load_recipe(Path("recipe.toml"), ("hygiene.malformed=drop",))).report
    assert report.lines()[2:] == [
        r"dropped 1 of 2 rows: `output` is missing or null (data/\udcc4\udce3.jsonl:2)",
        r"1 file of data not read, because they are no data files: \udcba\udcc3.txt",
    ]


# --- links -----------------------------------------------------------------------------------------------------------


def linked(folder: Path, target: str) -> Dataset:
    (folder / "data.jsonl").symlink_to(target)
    (folder / "recipe.toml").write_text(RECIPE.format(source="data.jsonl", of_source="", of_eval="fraction = 0.0"), encoding="utf-8")
    return build_dataset(load_recipe(folder / "recipe.toml"))


def test_a_link_that_leads_nowhere_is_told_by_its_own_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FastossError) as caught:
        linked(tmp_path, "gone.jsonl")
    assert caught.value.place == "data.jsonl"


def test_a_link_to_a_file_without_an_ending_is_read(tmp_path, monkeypatch):
    """So the hub's cache and git-annex keep their files: `data.jsonl` is a link to `blobs/5c4f…`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "5c4f").write_bytes(ROWS)
    assert linked(tmp_path, "5c4f").report.rows == 3
