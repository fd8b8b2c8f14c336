"""The dataset: every row's fate is counted, the split stands still, the cache is whole or absent, and nothing is silently lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastoss.config import FormatSettings, load_recipe
from fastoss.data.conversation import Conversation, Message, Tool, ToolCall
from fastoss.data.dataset import build_dataset
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.hygiene import content_key, near_key
from fastoss.data.show import example_lines
from fastoss.data.store import Examples, StoreWriter, TokenStore, part_of
from fastoss.data.units import tree_units
from fastoss.errors import FastossError

from .conftest import ROOT, ROWS, fastoss

MOJIBAKE = "你好，我是米卡".encode().decode("latin-1")


def built(folder, *overrides):
    return build_dataset(load_recipe(folder.recipe, overrides))


def lines_of(folder, *overrides) -> list[str]:
    return built(folder, *overrides).report.lines()


def rows_of(count: int, first: int = 0) -> list[dict]:
    return [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(first, first + count)]


def asked(examples) -> set[str]:
    return {e.conversation.messages[0].content for e in examples}


def test_counts(folder):
    dataset = built(folder)
    report = dataset.report
    assert (report.rows, report.train_examples, report.eval_examples) == (8, 11, 0)  # two pairs of history, one pair
    assert report.train_tokens == sum(len(e) for e in dataset.train)
    assert report.trained_tokens == sum(e.trained_tokens for e in dataset.train) == sum(report.trained_by_channel.values())
    assert report.longest == max(map(len, dataset.train))


# --- every policy: error, drop, keep ---------------------------------------------------------------------------------


def test_malformed_is_an_error_that_names_all(folder):
    folder.rows([*ROWS, {"instruction": "x"}, *ROWS, {"instruction": "y", "output": "  "}])
    with pytest.raises(FastossError, match=r"data\.jsonl:9: `output` is missing or null") as caught:
        built(folder)
    (other,) = caught.value.also
    assert other.endswith("data.jsonl:18: the answer is empty")
    assert "\n  also " in str(caught.value)


def test_malformed_rows_are_dropped_and_listed(folder):
    folder.rows([*ROWS, {"instruction": "x"}, {"instruction": "y"}])
    (line,) = [line for line in lines_of(folder, "hygiene.malformed=drop") if line.startswith("dropped")]
    assert line.startswith("dropped 2 of 10 rows: `output` is missing or null (")
    assert "data.jsonl:9" in line
    assert "data.jsonl:10" in line


def test_mojibake(folder):
    folder.rows([*ROWS, {"instruction": "hi", "output": MOJIBAKE}])
    with pytest.raises(FastossError, match=r'data\.jsonl:9: looks like UTF-8 .*“.*” for “你好，我是米卡”\nhint: set hygiene.mojibake = "repair"'):
        built(folder)
    assert any(line.startswith("dropped 1 of 9 rows: mojibake (") for line in lines_of(folder, "hygiene.mojibake=drop"))
    kept = built(folder, "hygiene.mojibake=keep")
    assert kept.train[len(kept.train) - 1].conversation.messages[-1].content == MOJIBAKE
    assert any(line.startswith("1 of 9 rows: look like mojibake, and kept") and "data.jsonl:9" in line for line in kept.report.lines())
    mended = built(folder, "hygiene.mojibake=repair")
    assert mended.train[len(mended.train) - 1].conversation.messages[-1].content == "你好，我是米卡"
    assert any(line.startswith("1 of 9 rows: mojibake, repaired") for line in mended.report.lines())


def test_empty_reasoning(folder):
    folder.rows([*ROWS, {"instruction": "hi", "output": "ho", "thinking": " \n"}])
    dataset = built(folder)
    assert any(line.startswith("1 of 9 rows: with empty reasoning, read as none (") for line in dataset.report.lines())
    last = dataset.train[len(dataset.train) - 1]
    assert [span.channel for span in last.spans if span.trained] == ["final"]
    assert last.conversation.messages[-1].thinking is None
    assert any("the reasoning is empty" in line for line in lines_of(folder, "hygiene.empty_reasoning=drop"))
    with pytest.raises(FastossError, match=r"data\.jsonl:9: the reasoning is empty"):
        built(folder, "hygiene.empty_reasoning=error")


def test_over_length(folder):
    long = {"instruction": "more " * 300, "output": "no", "history": []}
    folder.rows([*ROWS, long])
    report = built(folder).report
    assert any(line.startswith("dropped 1 of 12 examples: longer than max_length 256") and "data.jsonl:9" in line for line in report.lines())
    assert report.longest > 300
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
    assert any(line.startswith("1 of 1 examples: early turns left out to fit max_length") for line in dataset.report.lines())


def test_duplicates(folder):
    folder.rows([*ROWS, ROWS[0]])
    assert any(line.startswith("1 of 9 rows: the same as an earlier row, and kept") for line in lines_of(folder))
    assert built(folder, "hygiene.duplicates=drop").report.train_examples == 11
    with pytest.raises(FastossError, match=r"data\.jsonl:9: the row is the same as an earlier row \(.*data\.jsonl:1\)"):
        built(folder, "hygiene.duplicates=error")


def test_near_duplicates(folder):
    folder.rows([*ROWS, {"instruction": "what is  2+2", "output": "Four - nya!"}, {"instruction": "What is 2+2", "output": "FOUR, NYA"}])
    assert any(line.startswith("1 of 10 rows: nearly the same as an earlier row, and kept") and "jsonl:10" in line for line in lines_of(folder))
    assert built(folder, "hygiene.near_duplicates=drop").report.train_examples == 12
    with pytest.raises(FastossError, match=r"data\.jsonl:10: the row is nearly the same as an earlier row"):
        built(folder, "hygiene.near_duplicates=error")


def test_operators_are_not_punctuation():
    sums = [Conversation((Message("user", f"1{sign}1"), Message("assistant", "?"))) for sign in "+-*/<="]
    assert len({near_key([chat]) for chat in sums}) == len(sums)


@pytest.fixture
def with_eval(folder):
    folder.rows(rows_of(20))
    text = folder.recipe.read_text().replace("[eval]\nfraction = 0.0\n", '[[eval.data]]\nsource = "eval.jsonl"\n')
    folder.recipe.write_text(text)
    (folder.root / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(5, first=100)))
    return folder


def test_eval_rows_of_their_own(with_eval):
    dataset = built(with_eval)
    assert (dataset.report.train_rows, dataset.report.eval_rows) == (20, 5)
    assert asked(dataset.eval) == {f"question {i}" for i in range(100, 105)}


def test_leakage(with_eval):
    with_eval.rows([*rows_of(20), {"instruction": "Question 103", "output": "answer 103."}])
    with pytest.raises(FastossError, match=r"data\.jsonl:21: the row is in the evaluation data as well \(.*eval\.jsonl:4\)"):
        built(with_eval)
    assert any("dropped 1 of 26 rows: in the evaluation data as well" in line for line in lines_of(with_eval, "hygiene.leakage=drop"))
    kept = built(with_eval, "hygiene.leakage=keep")
    assert kept.report.train_rows == 21
    assert any("1 of 26 rows: in the evaluation data as well, and kept" in line for line in kept.report.lines())


def test_fraction_and_eval_data_contradict_each_other(with_eval):
    with pytest.raises(FastossError, match=r"`eval.fraction` and `\[\[eval.data\]\]` contradict each other"):
        built(with_eval, "eval.fraction=0.1")


def test_columns_that_nobody_reads_are_said(folder):
    message = {"role": "assistant", "content": "a", "wieght": 1}
    folder.rows([{"instruction": "a", "output": "b", "histroy": [], "id": 3}, {"messages": [{"role": "user", "content": "u"}, message]}])
    lines = lines_of(folder)
    assert "the column `histroy` of 1 row is not read: did you mean `history`?" in lines
    assert "the column `id` of 1 row is not read" in lines
    assert "the column `messages.wieght` of 1 row is not read" in lines


def test_sample_stands_in_and_its_absence_is_said(folder):
    (folder.root / "small.jsonl").write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    assert build_dataset(load_recipe(folder.recipe, ["data.0.sample=small.jsonl"]), sample=True).report.rows == 1
    assert any("no sample is named for" in line for line in build_dataset(load_recipe(folder.recipe), sample=True).report.lines())


def test_nothing_left(folder):
    with pytest.raises(FastossError, match="no training example is left"):
        built(folder, "model.max_length=16")


# --- which tokens carry loss -----------------------------------------------------------------------------------------


def test_untrained_reasoning_is_an_error_unless_it_is_meant(folder):
    with pytest.raises(FastossError, match=r"the data has reasoning \(3 examples\), but `format.train_on` leaves it out") as caught:
        built(folder, 'format.train_on=["final"]')
    assert caught.value.hint == 'add "analysis", or write { analysis = 0.0, final = 1.0 } if you mean it'
    assert built(folder, "format.train_on={analysis = 0.0, final = 1.0}").report.trained_by_channel.keys() == {"final"}


def test_untrained_tool_calls_are_an_error(folder):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
    folder.rows([{"messages": [{"role": "user", "content": "u"}, call]}])
    assert built(folder).report.trained_by_channel.keys() == {"commentary"}
    with pytest.raises(FastossError, match=r"the data has tool calls \(1 example\)"):
        built(folder, 'format.train_on=["analysis", "final"]')


def test_examples_with_nothing_to_train_are_dropped_and_counted(folder):
    report = built(folder, 'format.train_on=["analysis"]').report
    assert report.train_examples == 3
    assert any(line.startswith("dropped 8 of 11 examples: nothing in them is trained (format.train_on)") for line in report.lines())
    folder.rows(rows_of(3))
    with pytest.raises(FastossError, match=r"no training example is left \(3 × nothing in them is trained"):
        built(folder, 'format.train_on=["analysis"]')


def test_weights_of_channels_and_messages(folder):
    said = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "thinking": "t", "weight": 0.5}]
    more = [{"role": "user", "content": "v"}, {"role": "assistant", "content": "b", "train": False}]
    last = [{"role": "user", "content": "w"}, {"role": "assistant", "content": "c"}]
    folder.rows([{"messages": [*said, *more, *last]}])
    first, third = built(folder, "format.train_on={analysis = 0.5, final = 2.0}").train
    assert [(span.channel, span.weight) for span in first.spans if span.trained] == [("analysis", 0.25), ("final", 1.0)]
    assert [(span.channel, span.weight) for span in third.spans if span.trained] == [("final", 2.0)]
    assert [m.content for m in third.conversation.messages] == ["u", "a", "v", "b", "w", "c"]


# --- the split -------------------------------------------------------------------------------------------------------


def test_split_by_content(folder):
    folder.rows(rows_of(400))
    dataset = built(folder, "eval.fraction=0.1")
    assert len(dataset.eval) + len(dataset.train) == 400
    assert 20 <= len(dataset.eval) <= 60
    folder.rows(rows_of(400)[::-1])
    assert asked(built(folder, "eval.fraction=0.1").eval) == asked(dataset.eval)
    assert not asked(dataset.eval) & asked(dataset.train)


def test_rows_that_are_added_move_no_other(folder):
    folder.rows(rows_of(200))
    before = built(folder, "eval.fraction=0.1")
    folder.rows([*rows_of(150, first=500), *rows_of(200), *rows_of(50, first=300)])
    after = built(folder, "eval.fraction=0.1")
    assert asked(before.eval) <= asked(after.eval)
    assert asked(before.train) <= asked(after.train)


def test_near_copies_of_a_row_are_never_split(folder):
    rows = rows_of(60)
    folder.rows([*rows, *({key: value.upper() + "!" for key, value in row.items()} for row in rows)])
    dataset = built(folder, "eval.fraction=0.1")
    held_out = {text.lower().rstrip("!") for text in asked(dataset.eval)}
    assert held_out
    assert not held_out & {text.lower().rstrip("!") for text in asked(dataset.train)}
    assert len(dataset.eval) == 2 * len(held_out)


def test_no_eval_on_few_rows_is_said(folder):
    report = built(folder, "eval.fraction=0.02").report
    assert any(line == "no evaluation: 0.02 of 8 rows is less than half a row" for line in report.lines())


def test_a_small_set_has_one_row_held_out_at_least(folder):
    for count in range(6, 16):
        folder.rows(rows_of(count))
        assert built(folder, "eval.fraction=0.1").report.eval_rows >= 1


def test_not_everything_is_held_out(folder):
    assert built(folder, "eval.fraction=0.99").report.train_examples > 0


# --- several sources -------------------------------------------------------------------------------------------------


def test_weights_of_sources(folder):
    (folder.root / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(4)))
    with open(folder.recipe, "a") as recipe:
        recipe.write('[[data]]\nsource = "more.jsonl"\nweight = 2.5\nmax_rows = 3\n')
    dataset = built(folder)
    assert dataset.weights == [1.0] * 11 + [2.5] * 3


def test_columns_are_mapped(folder):
    folder.rows([{"question": "u", "meta": {"reply": "a"}}])
    dataset = built(folder, 'data.0.columns={instruction = "question", output = "meta.reply"}')
    assert [m.content for m in dataset.train[0].conversation.messages] == ["u", "a"]


# --- the store and the cache -----------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
assistant = st.builds(
    Message,
    st.just("assistant"),
    texts,
    st.none() | texts,
    st.none() | st.builds(ToolCall, st.just("f"), st.just("{}")),
    weight=st.sampled_from([1.0, 0.5, 2.0]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, assistant), min_size=1, max_size=4), st.none() | texts, st.sampled_from([None, "low"]), st.booleans())
def test_what_is_stored_comes_back(tmp_path_factory, turns, system, effort, with_tools):
    messages = [Message("system", system)] if system else []
    for question, answer in turns:
        messages += [Message("user", question), answer]
        if answer.tool_call:
            messages += [Message("tool", "x", name="f"), Message("assistant", "done")]
    tools = (Tool("f", "does", {"type": "object", "properties": {"a": {"type": "string"}}}),) if with_tools else ()
    chat = Conversation(tuple(messages), "x:1", effort, "2026-02-03" if effort else None, tools)
    folder = tmp_path_factory.mktemp("store")
    writer = StoreWriter(folder)
    rendered = HarmonyRenderer(FormatSettings()).render_examples(chat)
    row = writer.add_row(chat)
    for example in rendered:
        writer.add_example(0, row, len(example.conversation.messages) - 1, 0, example)
    writer.close()
    examples = Examples(TokenStore(folder), numpy.arange(len(rendered)))
    assert list(examples) == rendered
    assert [examples[i].labels for i in range(len(examples))] == [example.labels for example in rendered]
    assert examples.lengths == [len(example) for example in rendered]


def test_a_part_of_a_conversation():
    m = [Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    assert part_of(Conversation(tuple(m)), 2).messages == tuple(m[:3])
    assert part_of(Conversation(tuple(m)), 4, 3).messages == (m[0], m[3], m[4])


def test_the_cache_is_used_and_made_anew_when_anything_changes(folder):
    def folder_of(*overrides):
        return built(folder, *overrides).store.folder

    first = folder_of()
    made = (first / "meta.json").stat().st_mtime_ns
    assert folder_of() == first
    assert (first / "meta.json").stat().st_mtime_ns == made
    others = {
        folder_of(change)
        for change in (
            "format.current_date=2026-02-02", "format.reasoning_effort=low", "format.turns=last", "model.max_length=300",
            "eval.fraction=0.2", "hygiene.duplicates=drop", "data.0.max_rows=7", "format.train_on={analysis = 0.5, final = 1.0}",
        )
    }  # fmt: skip
    assert len(others | {first}) == 9
    folder.rows(ROWS[:-1])
    assert folder_of() not in others | {first}
    # Neither rate nor rank of the training changes a token.
    folder.rows(ROWS)
    assert folder_of("train.learning_rate=1.0", "lora.r=16", "data.0.weight=2.0") == first


def test_cache_false_reads_anew(folder):
    first = built(folder, "data.0.cache=false").store.folder
    made = (first / "meta.json").stat().st_mtime_ns
    again = built(folder, "data.0.cache=false")
    assert again.store.folder == first
    assert (first / "meta.json").stat().st_mtime_ns > made


def test_nothing_is_cached_of_bad_data(folder, cache):
    folder.rows([*ROWS, {"instruction": "unheard of"}])
    before = {path.name for path in (cache / "data").iterdir() if path.is_dir()} if (cache / "data").is_dir() else set()
    with pytest.raises(FastossError):
        built(folder)
    assert {path.name for path in (cache / "data").iterdir() if path.is_dir()} == before


def _fingerprint(recipe, queue):
    queue.put(build_dataset(load_recipe(recipe)).report.fingerprint)


def test_processes_that_build_at_once_get_the_same(folder):
    folder.rows(rows_of(400))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_fingerprint, args=(folder.recipe, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1


def test_killed_while_building_leaves_nothing_half(folder, tmp_path):
    folder.rows(rows_of(20_000))
    environment = os.environ | {"FASTOSS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastoss", "check", str(folder.recipe)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        data = tmp_path / "cache" / "data"
        deadline = time.monotonic() + 60
        while not list(data.glob(".*.tmp/input_ids.bin")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert not [path for path in data.iterdir() if path.is_dir() and not path.name.startswith(".")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "20,000 rows → 20,000 training examples" in done.stdout


def test_content_keys():
    chat = Conversation((Message("user", "u"), Message("assistant", "a", "t")))
    assert content_key([chat]) == content_key([Conversation(chat.messages, "elsewhere:9")])
    others = [
        Conversation((Message("user", "u"), Message("assistant", "a"))),
        Conversation((Message("user", "u"), Message("assistant", "a", "t")), reasoning_effort="low"),
        Conversation((Message("user", "ua"), Message("assistant", "", "t"))),
    ]
    assert len({content_key([c]) for c in [chat, *others]}) == 4


# --- show and check --------------------------------------------------------------------------------------------------


def test_show_prints_the_trainers_tokens(folder):
    result = fastoss("show", folder.recipe, "--rows", 1)
    assert result.code == 0
    lines = result.out.splitlines()
    example = built(folder).train[0]
    assert lines == [*example_lines(example, colour=False)]
    count = sum(s.end - s.start for s in example.spans if s.channel == "analysis")
    assert [line for line in lines if line.startswith("+ analysis")] == [f"+ analysis   {count:>5}  <|channel|>analysis<|message|>先报名字。<|end|>"]
    assert re.fullmatch(r".*data\.jsonl:1  \d+ tokens, \d+ trained \(analysis \d+, final \d+\)", lines[0])


def test_check(folder):
    result = fastoss("check", folder.recipe, cwd=folder.root)
    assert (result.code, result.err) == (0, "")
    assert "8 rows → 11 training examples" in result.out
    assert re.search(r"tokens an example: shortest \d+, median \d+, 95 % \d+, longest \d+", result.out)
    folder.data.write_text(json.dumps({"instruction": "x"}) + "\n")
    result = fastoss("check", folder.recipe, cwd=folder.root)
    assert (result.code, result.out) == (2, "")
    assert "data.jsonl:1: `output` is missing or null\nhint: " in result.err


def test_check_as_json(folder):
    result = fastoss("check", folder.recipe, "--json", "--set", "train.per_device_train_batch_size=0")
    assert result.code == 2
    assert json.loads(result.out)["ok"] is False
    folder.recipe.write_text(folder.recipe.read_text().replace("per_device_train_batch_size = 2", "tokens_per_batch = 256"))
    result = fastoss("check", folder.recipe, "--json")
    verdict = json.loads(result.out)
    assert verdict["ok"] is True
    assert verdict["data"]["train_examples"] == 11
    assert sum(kind["tokens"] for kind in verdict["tokens_by_channel"].values()) == verdict["data"]["train_tokens"]
    assert sum(kind["trained"] for kind in verdict["tokens_by_channel"].values()) == verdict["data"]["trained_tokens"]
    assert 0.5 < verdict["packing"]["fill"] <= 1
    folder.data.write_text(json.dumps({"instruction": "x"}) + "\n")
    result = fastoss("check", folder.recipe, "--json", cwd=folder.root)
    assert result.code == 2
    error = json.loads(result.out)["error"]
    assert (error["place"], error["fact"]) == ("data.jsonl:1", "`output` is missing or null")


def test_ten_thousand_rows_are_checked_in_seconds(folder):
    rng = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "猫", "在", "睡觉"]
    folder.rows([{"instruction": " ".join(rng.choices(words, k=40)), "output": " ".join(rng.choices(words, k=80))} for _ in range(10_000)])
    begun = time.monotonic()
    assert fastoss("check", folder.recipe).code == 0
    assert time.monotonic() - begun < 10


def test_check_compares_templates(folder):
    result = fastoss("check", folder.recipe, "--template")
    assert result.code == 0
    assert "your rows, the official chat template (transformers, Unsloth and llama.cpp ask with it): 11 of 11 prompts and 11 of 11" in result.out
    verdict = json.loads(fastoss("check", folder.recipe, "--template", "--json").out)
    assert verdict["template"]["rows"][0]["equal_examples"] == 11


def test_show_writes_the_page(folder):
    page = folder.root / "sub" / "page.html"
    assert fastoss("show", folder.recipe, "--html", page).code == 0
    text = page.read_text(encoding="utf-8")
    assert "我是米卡喵。" in text
    assert "data.jsonl:8" in text
    assert text.count("<script") == 2  # the data and the one that draws it
    assert fastoss("show", folder.recipe, "--html", "/proc/nowhere/page.html").code == 2


def test_a_hub_out_of_reach_is_a_note_for_check_and_an_error_for_train(folder):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    folder.recipe.write_text(folder.recipe.read_text().replace("data.jsonl", "hf:some/rows"))
    result = fastoss("check", folder.recipe, **nowhere)
    assert result.code == 0
    assert "note: hf:some/rows: the dataset is not in the cache" in result.out
    assert json.loads(fastoss("check", folder.recipe, "--json", **nowhere).out)["data"] is None
    assert "note: hf:some/rows" in fastoss("train", folder.recipe, "--dry-run", **nowhere).out
    result = fastoss("train", folder.recipe, cwd=folder.root, **nowhere)
    assert (result.code, "hf:some/rows: the dataset is not in the cache" in result.err) == (2, True)
    assert not (folder.root / "runs").exists()


def test_a_chat_is_a_tree_where_it_fits_and_single_examples_where_it_does_not(folder):
    """All its examples either way; the tree is longer than the longest of them, and shorter than all together."""
    turns = [{"role": role, "content": f"{role} says {'something ' * 8}{i}"} for i in range(4) for role in ("user", "assistant")]
    folder.rows([{"messages": turns}])
    dataset = built(folder, "model.max_length=1024")
    (tree,) = tree_units(dataset.train, [1.0] * 4, 4096).lengths
    longest, together = max(dataset.train.lengths), sum(dataset.train.lengths)
    assert longest < tree < together
    for budget, lengths in ((tree, [tree]), (tree - 1, list(dataset.train.lengths))):
        units = tree_units(dataset.train, [1.0] * 4, budget)
        assert units.lengths == lengths
        assert [e.input_ids for unit in units for e in unit] == [e.input_ids for e in dataset.train]
        assert (units.saved > 0.1) == (len(lengths) == 1)


@pytest.mark.parametrize(("named", "hint"), [("thinkin", "did you mean `thinking`?"), ("xyz", "the rows have `history`, `input`, `instruction`, ")])
def test_a_column_that_no_row_has_is_an_error_also_where_rows_need_not_have_it(folder, named, hint):
    """Reasoning that is named wrongly would be left out of training without a word."""
    with pytest.raises(FastossError, match=f"`columns` says that `thinking` is `{named}`, and no row has that") as caught:
        built(folder, f'data.0.columns={{thinking="{named}"}}')
    assert hint in caught.value.hint
    assert built(folder, 'data.0.columns={system="thinking"}').report.rows == 8, "three of eight rows have it"
