"""Thousands of damaged rows and files: each is understood or refused in words, none is lost, and what is kept can be trained."""

from __future__ import annotations

import copy
import csv
import datetime
import gzip
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fastoss.config import Recipe, load_recipe
from fastoss.data import judge
from fastoss.data.dataset import Dataset, build_dataset
from fastoss.data.formats.columns import ANY_COLUMNS, COLUMNS, PAIR_COLUMNS
from fastoss.data.formats.preferences import row_to_preference
from fastoss.data.harmony import IGNORE, Example, HarmonyRenderer, parse_completion
from fastoss.data.hygiene import without_empty_reasoning
from fastoss.data.reading.rows import BadRow, Row
from fastoss.data.tokenizer import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, SPECIAL, START
from fastoss.errors import FastossError

from .conftest import ROOT

ROWS = 10_000
PAIRS = 2_000
FILES = 600
SEED = 20261121

SHIPPED = [json.loads(line) for line in (ROOT / "recipes/data/catgirl.jsonl").read_text(encoding="utf-8").splitlines()]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": {
    "type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "description": "where"}, "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        "days": {"type": "array", "items": {"type": "integer"}}, "how": {"oneOf": [{"type": "string"}, {"type": "null"}]},
    },
}}}]  # fmt: skip
CALLS = [{"id": f"c{n}", "type": "function", "function": {"name": "weather", "arguments": f'{{"city": "{city}"}}'}} for n, city in enumerate("吴AB")]
RESULTS = [{"role": "tool", "tool_call_id": f"c{n}", "name": "weather", "content": f'{{"sky": "blue", "n": {n}}}'} for n in range(3)]
USER = {"role": "user", "content": "How is the weather in 吴?"}
ANSWER = {"role": "assistant", "content": "Blue, nya. 🐾", "thinking": "It said blue."}
HARMONY = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\n"
    "Reasoning: high\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
    "<|start|>developer<|message|># Instructions\n\nBe a cat.\n\n<|end|><|start|>user<|message|>Hi<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>A greeting.<|end|><|start|>assistant<|channel|>final<|message|>Meow.<|return|>"
)
HAND_MADE: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Be a cat."}, USER, ANSWER, {"role": "user", "content": "And you?"}, ANSWER | {"weight": 0.5}]},
    {"messages": [USER, ANSWER, USER, ANSWER | {"train": False}]},
    {"messages": [USER, {"role": "assistant", "content": "<think>hm</think>Blue.", "train": True}], "reasoning_effort": "low", "date": "2026-02-28"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ANSWER], "system": "s"},
    {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALLS[:1]}, RESULTS[0], ANSWER], "tools": TOOLS},
    {"messages": [USER, ANSWER | {"tool_calls": CALLS}, *RESULTS, ANSWER, USER, ANSWER | {"tool_calls": CALLS[:1]}], "tools": json.dumps(TOOLS)},
    {"messages": [USER, {"role": "assistant", "content": "", "function_call": CALLS[0]["function"]},
                  {"role": "function", "name": "weather", "content": "blue"}, ANSWER], "functions": [TOOLS[0]["function"]]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}] * 2},
    {"conversations": [{"from": "human", "value": "weather?"}, {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "A"}}'},
                       {"from": "observation", "value": "blue"}, {"from": "gpt", "value": "Blue."}], "tools": json.dumps(TOOLS), "system": "s"},
    {"prompt": "Say 喵", "completion": "喵", "reasoning": "easy"},
    {"prompt": [USER], "completion": [ANSWER], "current_date": "2026-01-01"},
    {"developer": "Be brief.", "user": "hi", "analysis": "A greeting.", "final": "Hi.", "reasoning_language": "English"},
    {"instruction": "Translate", "input": "猫", "output": "cat", "history": [["a", "b"], ["c", "d"]], "system": "s", "reasoning_content": "hm"},
    {"query": "hi", "response": "ho", "history": []},
    {"text": HARMONY},
]  # fmt: skip
PAIRED: list[dict[str, Any]] = [
    {"prompt": "hi", "chosen": "ho", "rejected": "hu", "system": "s"},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "No."}], "tools": TOOLS},
    {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "No."}], "score_chosen": 1.5},
    {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "ho"}, "rejected": {"from": "gpt", "value": "hu"}},
    {"messages": [USER, ANSWER], "rejected_response": "No."},
    {"messages": [USER, ANSWER | {"tool_calls": CALLS[:1]}], "rejected_messages": [{"role": "assistant", "content": "No."}], "tools": TOOLS},
    {"chosen": "\n\nHuman: hi\n\nAssistant: ho", "rejected": "\n\nHuman: hi\n\nAssistant: hu"},
    {"instruction": "hi", "input": "x", "history": [["a", "b"]], "chosen": "ho", "rejected": "hu"},
    {"question": "hi", "chosen": "ho", "rejected": "hu"},
    {"text": HARMONY, "rejected_response": "Woof."},
]

TEXTS = [
    "", " ", "\n", "\r\n", "\u3000", "\0", "\ud83d", "\udc00x", "\ufeff", "\ufeffhi", "\u202e", "\u2028", "\x85", "a\x1b[31m", "e\u0301" * 9,
    "👩\u200d👩\u200d👧", "ﷺ", "\U0010ffff", "ä½\xa0å¥½", "Itâ€™s cafÃ©", "Ã", "中" * 300, "x " * 400, "{{NAME}}", "low", "2026-02-30", HARMONY,
    "<think>", "<think>a</think>", "</think>", "<think></think>x", "<|unknown|>", "<|end", "|>", "<|reserved_200000|>", *SPECIAL.values(),
    "null", "NaN", "{", "[]", '{"name": "weather", "arguments": {}}', '[{"role": "user"}]', "user", "assistant", "tool", "system", "human", "gpt",
    "function_call", "observation", "weather", "functions.weather", "\n\nHuman: hi\n\nAssistant: ho",
]  # fmt: skip
OTHERS: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    0.5,
    -0.0,
    1e308,
    10**30,
    [],
    {},
    [[]],
    [None],
    {"a": None},
    [{}],
    {"role": "user"},
    {"type": "text"},
]
SPLICES = [
    b"\0", b"\n", b"\r", b'"', b"\\", b"\xef\xbb\xbf", b"\xff\xfe", b"9" * 5000, b"1e999", b"-", b"\\ud83d", b"\\u0000", b"NaN", b"[" * 2000,
]  # fmt: skip
NAMES = sorted(
    ANY_COLUMNS.union(PAIR_COLUMNS, *COLUMNS.values())
    | {"role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "id", "type", "function", "name", "arguments", "parameters"}
    | {"train", "loss", "weight", "loss_weight", "description", "properties", "required", "enum", "items", "oneOf", "\ud83d", "a\nb", "", "$ref"}
)


# --- damage to a row -------------------------------------------------------------------------------------------------


def parts_of(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a value."""
    found: list[tuple[Any, Any]] = []
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for key, entry in inner:
        found.append((value, key))
        found += parts_of(entry)
    return found


def deep(chance: random.Random) -> Any:
    value: Any = chance.choice([1, "x", None])
    for _ in range(chance.choice([3, 30, 300])):
        value = chance.choice([[value], {"a": value}, {"type": "array", "items": value}, {"oneOf": [value]}])
    return value


def odd_value(chance: random.Random) -> Any:
    kind = chance.random()
    if kind < 0.6:
        return chance.choice(TEXTS)
    if kind < 0.63:
        return deep(chance)
    return copy.deepcopy(chance.choice(OTHERS)) if kind < 0.95 else "".join(chr(chance.randrange(0x110000)) for _ in range(chance.randrange(1, 9)))


def damaged(row: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """The row after one to three changes of its keys and values."""
    row = copy.deepcopy(row)
    for _ in range(chance.choice([1, 1, 2, 3])):
        where = parts_of(row)
        if not where:
            break
        inside, key = chance.choice(where)
        change = chance.randrange(8)
        if change == 0:
            del inside[key]
        elif change == 1 and isinstance(inside, dict):
            name = chance.choice([chance.choice(NAMES), str(key)[:-1], str(key) + "s", str(key).upper(), f" {key}"])
            inside[name] = inside.pop(key)
        elif change == 2 and isinstance(inside, list):
            inside.insert(chance.randrange(len(inside) + 1), copy.deepcopy(inside[key]))
        elif change == 3 and isinstance(inside, list):
            chance.shuffle(inside)
        elif change == 4 and isinstance(inside[key], str):
            at = chance.randrange(len(inside[key]) + 1)
            inside[key] = inside[key][:at] + chance.choice(TEXTS) + inside[key][at:]
        elif change == 5:
            inside[key] = chance.choice([[inside[key]], {"text": inside[key]}, json.dumps(inside[key])])
        elif change == 6 and isinstance(inside, dict):
            inside[chance.choice(NAMES)] = odd_value(chance)
        else:
            inside[key] = odd_value(chance)
    return row


def garbled(data: bytes, chance: random.Random, other: bytes) -> bytes:
    """The bytes after a change that knows nothing of what they mean."""
    at = chance.randrange(len(data) + 1)
    to = min(len(data), at + chance.randrange(1, 20))
    changes: list[Callable[[], bytes]] = [
        lambda: data[:at],
        lambda: data[:at] + data[to:],
        lambda: data[:at] + data[at:to] * 3 + data[to:],
        lambda: data[:at] + other[len(other) // 2 :],
        lambda: data[:at] + chance.randbytes(chance.randrange(1, 5)) + data[to:],
        lambda: data[:at] + chance.choice(SPLICES) + data[at:],
        lambda: data.translate(bytes.maketrans(*chance.choice([(b"[]", b"]["), (b"{}", b"}{"), (b"[]{}", b"{}[]"), (b'"', b"'"), (b":", b",")]))),
        lambda: re.sub(rb'("\w+":)', rb"\1 1, \1", data, count=1),  # a key twice
        lambda: data.decode("utf-8", "ignore").encode(chance.choice(["gb18030", "utf-16", "utf-8-sig", "cp1252"]), "ignore"),
    ]  # fmt: skip
    return chance.choice(changes)()


def as_line(row: dict[str, Any], chance: random.Random) -> bytes:
    """JSON of a row; half a character (a lone surrogate) can stand in it as an escape only."""
    text = json.dumps(row, ensure_ascii=chance.random() < 0.3)
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text).encode()


def mutated_lines(count: int, chance: random.Random) -> list[bytes]:
    """Lines of which two in three say other things than before, and the others are no longer what they were at all."""
    made = []
    sound = SHIPPED + HAND_MADE * 6
    while len(made) < count:
        row = chance.choice(sound)
        if chance.random() < 0.67:
            made.append(as_line(damaged(row, chance), chance))
        else:
            made.append(garbled(as_line(row, chance), chance, as_line(chance.choice(sound), chance)))
    return made


# --- what is asked of all that is kept -------------------------------------------------------------------------------


def check_example(example: Example, renderer: HarmonyRenderer) -> None:
    """The labels are the target's own tokens and nothing else; the target says what the row says; no content became a control token."""
    ids, conversation = list(example.input_ids), example.conversation
    start = example.prompt_length
    assert example.labels == [IGNORE] * start + ids[start:]
    *before, last = conversation.messages
    asked = renderer.render_prompt(before, conversation.reasoning_effort, conversation.tools, conversation.current_date)
    assert ids[:start] == asked
    reply = parse_completion(ids[start:])
    assert reply.problems == []
    assert (reply.thinking, reply.content, reply.tool_call) == (last.thinking, last.content, last.tool_call)
    assert reply.stop == ids[-1] == (CALL if last.tool_call else RETURN)
    letters = {START: "s", CHANNEL: "c", CONSTRAIN: "j", MESSAGE: "m", END: "e", RETURN: "r", CALL: "k"}
    shape = "".join(letters.get(i, "?") for i in ids if i >= 199_998)
    assert re.fullmatch(r"(sc?j?m[ek])*sc?j?m[rk]", shape)
    assert shape.count("m") == len(example.spans) - 1  # `<|start|>assistant` of the target is a span of its own


def outcome(make: Callable[[], Any]) -> Any:
    """What a function returns, or the error in words that it raises; other exceptions are a test's failure."""
    try:
        return make()
    except FastossError as error:
        return error


def built(folder: Path, name: str, *settings: str, method: str = "sft") -> Dataset:
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text(f'name = "fuzz"\n[model]\nname = "tiny"\nprecision = "float32"\nmax_length = 512\n[[data]]\nsource = "{name}"\n')
    recipe: Recipe = load_recipe(recipe_file, ("eval.fraction=0.1", *settings))
    return build_dataset(recipe.model_copy(update={"method": method}))


def line_numbers(data: bytes) -> set[int]:
    """The lines that hold something: each is a row."""
    return {number for number, line in enumerate(data.split(b"\n"), 1) if line and not line.isspace()}


def line_of(place: str) -> int:
    """The line's number, of a place that may say the column as well."""
    return int(place.split("jsonl:")[1].split(":")[0])


def refused(error: FastossError) -> Counter[int]:
    return Counter(line_of(place) for place in [str(error.place), *(line.split(": ")[0] for line in error.also)])


LENIENT = ("hygiene.malformed=drop", "hygiene.mojibake=keep")
THOROUGH = (
    "hygiene.malformed=drop", "hygiene.mojibake=repair", "hygiene.duplicates=drop", "hygiene.near_duplicates=drop",
    "hygiene.empty_reasoning=drop", "hygiene.over_length=truncate_left_turns", "format.turns=last",
)  # fmt: skip


def accounted(dataset: Dataset, numbers: set[int]) -> set[int]:
    """Each row is kept, or it stands in the list of what was dropped, and the report's counts say the same. Returns those dropped as rows."""
    report = dataset.report
    assert report.rows == len(numbers)
    entries = [json.loads(line) for line in (dataset.store.folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    gone = {unit: Counter(line_of(entry["place"]) for entry in entries if entry["unit"] == unit) for unit in ("rows", "examples")}
    examples = [*dataset.train, *dataset.eval]
    kept = Counter(line_of(example.conversation.place) for example in examples)
    assert set(gone["rows"].values()) <= {1}
    assert not kept.keys() & gone["rows"].keys()
    assert kept.keys() | gone["rows"].keys() | gone["examples"].keys() == numbers
    for unit, counts in gone.items():
        assert sum(tally.count for tally in report.drops.values() if tally.unit == unit) == counts.total()
    assert report.train_rows + report.eval_rows == len(kept)
    assert len(examples) + gone["examples"].total() == report.examples == report.train_examples + report.eval_examples + gone["examples"].total()
    assert report.lines()
    return set(gone["rows"])


@pytest.mark.parametrize("part", range(10))
def test_mutated_rows(part, tmp_path, monkeypatch):
    """Each is kept or told; `error` refuses the very rows that `drop` leaves out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judge, "_LISTED", ROWS)
    monkeypatch.setattr(judge, "_LOOKED_S", 600.0)
    chance = random.Random(SEED + part)
    data = b"".join(line + b"\n" for line in [as_line(SHIPPED[0], chance), *mutated_lines(ROWS // 10, chance)])
    (tmp_path / "rows.jsonl").write_bytes(data)
    numbers = line_numbers(data)
    dataset = built(tmp_path, "rows.jsonl", *LENIENT)
    dropped = accounted(dataset, numbers)
    assert 0.2 * len(numbers) < len(dropped) < 0.9 * len(numbers)
    renderer = HarmonyRenderer(load_recipe(tmp_path / "recipe.toml").format)
    for example in (*dataset.train, *dataset.eval):
        check_example(example, renderer)
    with pytest.raises(FastossError) as caught:
        built(tmp_path, "rows.jsonl", "hygiene.mojibake=keep")
    assert caught.value.exit_code == 2
    assert refused(caught.value) == Counter(dropped)
    assert "\ud83d" not in str(caught.value)
    thorough = built(tmp_path, "rows.jsonl", *THOROUGH)
    assert accounted(thorough, numbers) >= dropped
    for example in thorough.train[:50]:
        check_example(example, renderer)


# --- damaged files ---------------------------------------------------------------------------------------------------


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    names = sorted({name for row in rows for name in row})
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(names)
    for row in rows:
        writer.writerow([value if isinstance(value := row.get(name, ""), str) else json.dumps(value, ensure_ascii=False) for name in names])
    return text.getvalue().encode("utf-8", "replace")


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def a_file(ending: str, chance: random.Random) -> bytes:
    """A file of a few rows, that may be damaged themselves."""
    rows = [chance.choice(SHIPPED) for _ in range(3)] if ending == ".parquet" else [chance.choice(SHIPPED + HAND_MADE) for _ in range(3)]
    if chance.random() < 0.3 and ending != ".parquet":
        rows = [damaged(row, chance) for row in rows]
    if ending.startswith(".jsonl"):
        plain = b"".join(as_line(row, chance) + b"\n" for row in rows)
        if ending.endswith(".gz"):
            return gzip.compress(plain)
        return pyarrow.compress(plain, codec="zstd", asbytes=True) if ending.endswith(".zst") else plain
    if ending == ".json":
        return b"[" + b",\n".join(as_line(row, chance) for row in rows) + b"]"
    return as_csv(rows) if ending == ".csv" else as_parquet(rows)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".jsonl.zst"])
def test_mutated_files(ending, tmp_path, monkeypatch):
    """Damage anywhere in a file, also where it shows what it is: a dataset or an error in words, never anything else."""
    monkeypatch.chdir(tmp_path)
    chance = random.Random(SEED + len(ending))
    fates: Counter[str] = Counter()
    for number in range(FILES // 6):
        name = f"{number}{ending}"
        data = garbled(a_file(ending, chance), chance, a_file(ending, chance))
        if chance.random() < 0.3:
            data = garbled(data, chance, a_file(".csv", chance))
        (tmp_path / name).write_bytes(data)
        for settings in (LENIENT, ("hygiene.mojibake=error",)):
            found = outcome(partial(built, tmp_path, name, *settings))
            if isinstance(found, FastossError):
                assert found.exit_code == 2
                assert str(found.place).startswith(name)
                assert found.fact
                assert "\n" not in found.fact
                fates["refused"] += 1
            else:
                assert found.report.rows
                fates["read"] += 1
    assert min(fates["refused"], fates["read"]) > 10 or ending == ".parquet"


# --- preferences -----------------------------------------------------------------------------------------------------


def test_mutated_pairs():
    """Two answers after one and the same conversation, both of which can be rendered, or a `BadRow`."""
    chance = random.Random(SEED)
    renderer = HarmonyRenderer(Recipe.model_validate({"name": "x", "data": [{"source": "x"}]}).format)
    odd: list[Any] = [b"x", float("nan"), float("inf"), datetime.datetime(2026, 1, 1), datetime.date(2026, 1, 1), datetime.timedelta(1), {1: 2}, (1,)]
    understood = 0
    for number in range(PAIRS):
        columns = damaged(chance.choice(PAIRED), chance)
        if chance.random() < 0.1 and (where := parts_of(columns)):
            inside, key = chance.choice(where)
            inside[key] = chance.choice(odd)  # values that only Parquet has
        pair = outcome(partial(row_to_preference, Row(columns, f"rows.jsonl:{number}")))
        if isinstance(pair, BadRow):
            assert pair.place == f"rows.jsonl:{number}"
            assert pair.fact
            continue
        understood += 1
        assert pair.chosen.messages[:-1] == pair.rejected.messages[:-1]
        assert pair.chosen.messages[-1] != pair.rejected.messages[-1]
        for conversation in (pair.chosen, pair.rejected):
            check_example(renderer.render_last(without_empty_reasoning(conversation)), renderer)
    assert PAIRS // 5 < understood < PAIRS * 0.9


def test_mutated_pairs_of_a_file(tmp_path, monkeypatch):
    """The same by way of the dataset: of each pair both answers are kept, or neither."""
    monkeypatch.chdir(tmp_path)
    chance = random.Random(SEED)
    data = b"".join(as_line(damaged(chance.choice(PAIRED), chance), chance) + b"\n" for _ in range(PAIRS // 2))
    (tmp_path / "rows.jsonl").write_bytes(data)
    dataset = built(tmp_path, "rows.jsonl", *LENIENT, method="dpo")
    report = dataset.report
    kept = Counter(line_of(example.conversation.place) for example in (*dataset.train, *dataset.eval))
    assert set(kept.values()) == {2}
    assert report.rows == len(line_numbers(data))
    entries = [json.loads(line) for line in (dataset.store.folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept.keys() | {line_of(entry["place"]) for entry in entries} == line_numbers(data)
