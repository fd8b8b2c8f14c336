"""Chat, generate and evaluate on a small run that knows its rows by heart."""

from __future__ import annotations

import io
import math
import shutil
import sys
import time

import pytest

from fastoss.config import load_recipe
from fastoss.data.conversation import Message
from fastoss.data.dataset import build_dataset
from fastoss.data.formats.prompts import read_asked, row_to_asked
from fastoss.data.harmony import Completion
from fastoss.data.reading.rows import BadRow, Row
from fastoss.errors import FastossError
from fastoss.inference import chat as chat_module
from fastoss.inference import open_model as opening
from fastoss.inference.engine import Engine
from fastoss.inference.evaluate import Held, _held, evaluate, judge
from fastoss.inference.evaluation_table import table_lines
from fastoss.inference.generate import Batching, generate
from fastoss.inference.languages import language_of
from fastoss.inference.measures import bleu, difference, interval, measure_reply, repetition, sign_test
from fastoss.inference.sampling import Question, ReasoningLanguage, Sampling
from fastoss.run import RunDirectory, read_json, write_json

from . import conftest
from .answers import ROWS, cache_base, memorised_run, read_rows, write_rows
from .conftest import ROOT, fastoss
from .conftest import ROWS as SAMPLE_ROWS

GREEDY = Sampling(max_new_tokens=48)


@pytest.fixture(scope="module")
def run(one_thread):
    return memorised_run(cache_base())


@pytest.fixture(scope="module")
def engine(run) -> Engine:
    return Engine.load(str(run))


# --- chat ------------------------------------------------------------------------------------------------------------


def talk(engine, monkeypatch, capsys, *lines: str, question: Question | None = None) -> tuple[str, str]:
    """The chat with these lines piped in; returns what it wrote to stdout and stderr."""
    monkeypatch.setattr(chat_module, "open_model", lambda name: engine)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    chat_module.chat("run", None, question or Question(()), GREEDY)
    said = capsys.readouterr()
    return said.out, said.err


def test_chat_keeps_the_history_and_changes_what_it_is_told(engine, monkeypatch, capsys, tmp_path):
    saved = tmp_path / "chats.jsonl"
    out, err = talk(
        engine, monkeypatch, capsys, "What is 2+2?", "And doubled?", f"/save {saved}", "/new", "Who are you?", "/nonsense", "/quit", "lost"
    )
    assert out == "Four, nya.\nEight!\nI am Mika, nya.\n"
    assert "Two and two." in err
    assert "error: /nonsense is not a command" in err
    assert read_rows(saved) == [ROWS[3]]
    assert "lost" not in out


def test_chat_commands(engine, monkeypatch, capsys, tmp_path):
    lines = ["", "/language German", "Where do you sleep at night?", "/language Elvish", "/language off", "/effort extreme", "/effort low", "/save"]
    lines += [
        "/retry",
        "/undo",
        "/undo",
        "/retry",
        "/system Be brief.",
        "/system",
        "/temperature x",
        "/base",
        "/tuned",
        "/help",
        f"/save {tmp_path}/x",
    ]
    out, err = talk(engine, monkeypatch, capsys, *lines)
    assert out.splitlines()[0] == "On the warm shelf by the window, of course."
    assert "Sie fragt, wo ich schlafe." in err
    for told in (
        "“Elvish” is not a language that can be asked for", "“extreme” is not a reasoning effort", "/save: name a file",
        "at temperature 0 the same question", "/retry: nothing was asked yet", "“x” is not a number", "/effort low|medium|high",
        "there is no answer to save yet",
    ):  # fmt: skip
        assert told in err, told


def test_chat_joins_lines_and_says_when_no_answer_came(engine, monkeypatch, capsys):
    talker = chat_module.Talk(engine, Question(()), Sampling(max_new_tokens=2))
    assert talker.ask("Who are you?") == ""
    assert "the question is not kept" in capsys.readouterr().err
    assert talker.asked.messages == ()
    talker.sampling = GREEDY
    talker.command("/retry")
    assert talker.asked.messages[-1] == Message("assistant", "I am Mika, nya.", "Name first.")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\\\ntwo\n\n  \nthree"))
    assert list(chat_module._lines()) == ["one\ntwo", "three"]


def test_chat_by_command_takes_the_settings(run, tmp_path):
    asked = fastoss("chat", run, "--prompt", "Where do you sleep at night?", "--language", "de", cwd=tmp_path)
    assert asked.code == 0, asked.err
    assert asked.out == "On the warm shelf by the window, of course.\n"
    assert asked.err.startswith("Sie fragt")
    wrong = fastoss("chat", run, "--prompt", "Hi", "--language", "Elvish", cwd=tmp_path)
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("error: --language Elvish: “Elvish” is not a language")


# --- questions from rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "asked", "answered"),
    [
        ({"prompt": "Hi"}, ["Hi"], None),
        ({"prompt": "Hi", "completion": "Ho"}, ["Hi"], "Ho"),
        ({"prompt": [{"role": "user", "content": "Hi"}]}, ["Hi"], None),
        ({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]}, ["S", "Hi"], None),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}, ["Hi"], "Ho"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, ["Hi"], None),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, ["Hi"], "Ho"),
        ({"instruction": "Say", "input": "it", "history": [["a", "b"]]}, ["a", "b", "Say\nit"], None),
        ({"instruction": "Say", "input": "", "output": "Ho", "history": []}, ["Say"], "Ho"),
        ({"query": "Hi"}, ["Hi"], None),
        ({"question": "Hi"}, ["Hi"], None),
        ({"developer": "D", "user": "Hi"}, ["D", "Hi"], None),
        ({"developer": "D", "user": "Hi", "analysis": "T", "final": "Ho"}, ["D", "Hi"], "Ho"),
        ({"prompt": "Hi", "chosen": "Ho", "rejected": "No"}, ["Hi"], "Ho"),
    ],
)  # fmt: skip
def test_rows_are_questions_with_or_without_an_answer(columns, asked, answered):
    found = row_to_asked(Row(columns, "rows:1"))
    assert [message.content for message in found.messages] == asked
    assert (found.reference.content if found.reference else None) == answered


@pytest.mark.parametrize("columns", [{}, {"prompt": ""}, {"messages": []}, {"messages": [{"role": "robot", "content": "x"}]}, {"prompt": 3}])
def test_rows_that_ask_nothing_are_refused(columns):
    with pytest.raises(BadRow):
        row_to_asked(Row(columns, "rows:1"))


# --- generate --------------------------------------------------------------------------------------------------------


def without_clock(path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(path)]


def test_generate_killed_twice_gives_the_file_of_an_unbroken_run(run, engine, tmp_path, monkeypatch):
    """200 questions, sampled by chance; each kill comes after a few more batches."""
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": f"{'Tell me more. ' * (i % 5)}Question {i}?"} for i in range(200)])
    arguments = ["--input", source, "--max-new-tokens", 2, "--temperature", 1, "--seed", 5, "--batch-size", 20]
    broken, partial = tmp_path / "broken.jsonl", tmp_path / ".broken.jsonl.partial"
    known = 0
    for _ in range(2):
        going = conftest._commands().start("generate", run, *arguments, "--output", broken, cwd=tmp_path)
        until = time.monotonic() + 120
        while (lines := partial.read_bytes().count(b"\n") if partial.exists() else 0) < known + 2:
            assert time.monotonic() < until, going.err
            time.sleep(0.01)
        going.kill()
        going.wait()
        known = lines
        assert not broken.exists()
    with open(partial, "ab") as file:
        file.write(b'{"batch": 9, "rows": [{"index"')  # a line torn by the kill
    monkeypatch.chdir(tmp_path)  # places are told from where one stands
    monkeypatch.setattr(opening, "open_model", lambda name: engine)
    said: list[str] = []
    how = Batching(Sampling(1.0, 2, 5), batch_size=20)
    generate(str(run), source, broken, how, say=said.append)
    assert any("answers are there already" in line for line in said)
    whole = tmp_path / "whole.jsonl"
    generate(str(run), source, whole, how, say=said.append)
    assert without_clock(broken) == without_clock(whole)
    assert [row["index"] for row in read_rows(whole)] == list(range(200))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken.jsonl", "broken.jsonl.meta.json", "in.jsonl", "whole.jsonl", "whole.jsonl.meta.json",
    ]  # fmt: skip
    written = broken.read_bytes()
    generate(str(run), source, broken, how, say=said.append)
    assert "is finished" in said[-1]
    assert broken.read_bytes() == written


def test_generate_writes_channels_samples_and_references(run, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "open_model", lambda name: engine)
    source = write_rows(tmp_path / "in.jsonl", [ROWS[0], {"prompt": "你是谁?"}])
    output = tmp_path / "out.jsonl"
    generate(str(run), source, output, Batching(GREEDY, samples=2, batch_size=3), say=lambda line: None)
    rows = read_rows(output)
    assert [(row["index"], row["sample"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert rows[0]["channels"] == {"analysis": "Name first.", "final": "I am Mika, nya."}
    assert rows[0]["reference"] == rows[0]["channels"]
    assert "reference" not in rows[2]
    assert rows[3]["channels"] == {"analysis": "先报名字。", "final": "我是米卡喵。"}
    for row in rows:
        assert (row["finish_reason"], row["problems"]) == ("stop", [])
        assert row["tokens"] > 10
        assert row["prompt_tokens"] > 50
        assert row["seconds"] > 0
    with pytest.raises(FastossError, match=r"the file is there already \(its batch_size is another\)"):
        generate(str(run), source, output, Batching(GREEDY, samples=2), say=lambda line: None)
    generate(str(run), source, output, Batching(GREEDY), overwrite=True, say=lambda line: None)
    assert len(read_rows(output)) == 2


def test_generate_refuses_bad_rows_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "open_model", lambda name: pytest.fail("a model was loaded"))
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "fine"}, {"prompt": ""}, {"text": "what?"}])
    with pytest.raises(FastossError) as told:
        generate("tiny", source, tmp_path / "out.jsonl", Batching(GREEDY), say=lambda line: None)
    assert told.value.place.endswith("in.jsonl:2")
    assert "in.jsonl:3" in told.value.also[0]
    source.write_text('{"prompt": "fine"}\n')
    for output, fact in ((tmp_path, "this is a folder"), (tmp_path / "no" / "out.jsonl", "there is no folder")):
        with pytest.raises(FastossError, match=fact):
            generate("tiny", source, output, Batching(GREEDY), say=lambda line: None)


# --- evaluate --------------------------------------------------------------------------------------------------------

GERMAN = "Der Nutzer fragt nach dem Wetter in Hamburg. Ich antworte ihm freundlich und kurz."
ENGLISH = "The user asks about the weather in Hamburg. I will answer kindly and briefly."


def measured(thinking, content, *, problems=(), reference=None, language=ReasoningLanguage.GERMAN, question="What is the weather like in Hamburg?"):
    return measure_reply(Completion(thinking, content, list(problems)), "stop", question, reference, language)


def test_constructed_replies_are_measured_truly():
    right = measured(GERMAN, "It is raining in the harbour, as always.")
    assert (right["reasoning_language"], right["answer_language"], right["well_formed"], right["empty_reasoning"]) == (1, 1, 1, 0)
    wrong = measured(ENGLISH, "Es regnet heute im Hafen, wie eigentlich immer.")
    assert (wrong["reasoning_language"], wrong["answer_language"]) == (0, 0)
    assert measured(GERMAN, "Rain.")["answer_language"] is None  # too short to tell
    malformed = measured(GERMAN, "Rain.", problems=["a message without a channel"])
    assert malformed["well_formed"] == 0
    empty = measured(None, "")
    assert (empty["empty_reasoning"], empty["answered"], empty["reasoning_language"], empty["answer_language"]) == (1, 0, 0, 0)
    assert measured(GERMAN, "Rain.", language=None)["reasoning_language"] is None
    noise = measured("xq zvt " * 40, "Rain.")
    assert noise["reasoning_language"] == 0
    expected = Message("assistant", "Es regnet heute im Hafen, wie eigentlich immer.")
    same = measured(None, " Es regnet heute im Hafen, wie eigentlich immer.\n", reference=expected)
    assert (same["exact_match"], same["answer_language"], same["empty_reasoning"]) == (1, 1, None)
    assert same["chrf"] == pytest.approx(100)
    other = measured(None, "It is raining in the harbour, as always.", reference=expected)
    assert (other["exact_match"], other["answer_language"]) == (0, 0)
    assert other["chrf"] < 40


def test_languages_and_repetition():
    assert language_of(GERMAN) == "de"
    assert language_of("用户问今天天气怎么样,我要回答。") == "zh"
    assert language_of("ユーザーは天気について聞いています。") == "ja"
    assert language_of("ok") is None
    assert language_of("```python\nfor user in users: print(user)\n```") is None
    assert repetition([1, 2, 3]) is None
    assert repetition(list(range(20))) == 0
    assert repetition([1, 2, 3, 4] * 10) == pytest.approx(1 - 4 / 37)


def test_intervals_and_verdicts_know_chance():
    all_right = interval([1.0] * 10, share=True)
    assert (all_right.mean, all_right.high) == (1, 1)
    assert 0.65 < all_right.low < 0.75  # Wilson: ten of ten is no certainty
    assert interval([None, None], share=True) is None
    few, clear = difference([0.0] * 4, [1.0] * 4)
    assert (few.mean, clear) == (1, False)
    assert difference([0.0] * 8, [1.0] * 8)[1]
    assert not difference([0.0, 1.0] * 8, [1.0, 0.0] * 8)[1]
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(0, 0) == 1
    assert bleu([], []) is None
    assert bleu(["the cat sat on the mat today"] * 3, ["the cat sat on the mat today"] * 3).mean == pytest.approx(100)
    assert bleu(["我今天去海边看船"], ["我今天去海边看船"]).mean == pytest.approx(100)
    assert bleu(["completely different words here now"], ["the cat sat on the mat today"]).mean < 10


def test_evaluate_tells_base_from_tuned(engine, run, tmp_path, monkeypatch):
    """On memorised rows the tuned model is right and the base is noise; on a row it never saw it is neither sure nor right."""
    monkeypatch.setattr(Engine, "load", classmethod(lambda cls, name: engine))
    unseen = {
        "messages": [
            {"role": "user", "content": "What grows in your garden?"},
            {"role": "assistant", "content": "Only catnip and tall grass, I fear."},
        ]
    }
    pair = {"prompt": "Who are you?", "chosen": "I am Mika, nya.", "rejected": "Nobody at all."}
    source = write_rows(tmp_path / "in.jsonl", [*ROWS, unseen, pair])
    result = evaluate(str(run), source, rows=10, output=tmp_path / "out", batch_size=6, language=None, max_new_tokens=40, say=lambda line: None)
    measures = result["measures"]
    assert measures["well_formed"]["base"]["mean"] == 0
    assert measures["exact_match"]["tuned"]["mean"] >= 4 / 6
    assert measures["exact_match"]["base"]["mean"] == 0
    assert measures["loss_analysis"]["tuned"]["mean"] < 0.1 < 5 < measures["loss_analysis"]["base"]["mean"]
    assert measures["loss_analysis"]["verdict"] == "better"
    assert measures["perplexity_analysis"]["base"]["mean"] == pytest.approx(math.exp(measures["loss_analysis"]["base"]["mean"]))
    assert measures["reasoning_language"]["tuned"] | {"low": 0} == {"mean": 1.0, "low": 0, "high": 1.0, "n": 1}
    assert measures["prefers_chosen"]["tuned"]["mean"] == 1
    assert measures["dpo_accuracy"]["tuned"]["mean"] == 1
    replies = read_rows(tmp_path / "out" / "evaluation.jsonl")
    assert replies[0]["tuned"]["final"] == "I am Mika, nya."
    assert replies[4]["tuned"]["measures"]["exact_match"] == 0
    lines = "\n".join(table_lines(result))
    assert "replies in the right format" in lines
    assert "6 rows are few" in lines
    assert "no clear difference" in lines


def test_losses_of_memorised_rows_are_small_and_of_others_are_not(engine):
    known = [Held(row_to_asked(Row(row, "rows:1")).conversation, True) for row in ROWS]
    strange = {
        "messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A stranger from afar.", "thinking": "Hide it."}]
    }
    other = [Held(row_to_asked(Row(strange, "rows:1")).conversation, True)]
    losses = [judge(engine, held, ["tuned"], 4, None, 1, None, lambda line: None)[0]["loss_final"]["tuned"]["mean"] for held in (known, other)]
    assert losses[0] < 0.1
    assert losses[1] > 2


def test_held_out_rows_come_from_the_recipe(tmp_path):
    """Of an SFT run each trained turn, of a DPO run the pairs."""
    said: list[str] = []
    turns, what = _held("run", load_recipe(ROOT / "recipes" / "translation.toml"), None, said.append)
    assert what == "held-out rows"
    assert turns
    assert all(row.reference.role == "assistant" and row.rejected is None for row in turns)
    pairs, _ = _held("run", load_recipe(ROOT / "recipes" / "translation-dpo.toml", ["model.adapter=x"]), None, said.append)
    assert pairs
    for row in pairs:
        assert row.conversation.messages[:-1] == row.rejected.messages[:-1]
        assert row.reference.content != row.rejected.messages[-1].content


def test_a_run_on_the_sample_is_judged_on_the_sample(folder):
    """What was held out of the whole data may have been trained, or was never read."""
    write_rows(folder.root / "few.jsonl", SAMPLE_ROWS[:6])
    text = (
        folder.recipe.read_text()
        .replace('source = "data.jsonl"', 'source = "data.jsonl"\nsample = "few.jsonl"')
        .replace("0.0\n[train]", "0.4\n[train]")
    )
    folder.recipe.write_text(text)
    recipe = load_recipe(folder.recipe)
    run = folder.root / "run"
    run.mkdir()
    manifest = {"sample": True, "data": {"fingerprint": build_dataset(recipe, sample=True).report.fingerprint}}
    write_json(run / "manifest.json", manifest)
    said: list[str] = []
    held, _ = _held(str(run), recipe, None, said.append)
    assert held
    assert all("few.jsonl" in row.conversation.place for row in held)
    assert not any("is not what the run was trained on" in line for line in said)
    write_json(run / "manifest.json", {"data": manifest["data"]})
    _held(str(run), recipe, None, said.append)
    assert any("is not what the run was trained on" in line for line in said)


def test_evaluate_says_what_is_missing_before_a_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "load", classmethod(lambda cls, name: pytest.fail("a model was loaded")))
    settings = {"rows": 5, "output": None, "batch_size": 1, "language": None, "max_new_tokens": 5, "say": lambda line: None}
    for name, fact in (
        (str(run), "the run held no rows out"),
        ("tiny", "this is not a run directory"),
        ("http://127.0.0.1:1", "a server gives no losses"),
    ):
        with pytest.raises(FastossError, match=fact):
            evaluate(name, None, **settings)


def test_rows_with_the_columns_of_the_run_have_their_answers(tmp_path):
    rows = [{"q": "Who are you?", "a": "I am Mika, nya.", "why": "Name first."}, {"q": "And?", "a": "Yes."}, {"instruction": "Hm?", "output": "No."}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    names = {"instruction": "q", "output": "a", "thinking": "why"}
    asked = read_asked(source, columns=[{"instruction": "other"}, names])
    assert [(row.reference.content, row.reference.thinking) for row in asked] == [("I am Mika, nya.", "Name first."), ("Yes.", None), ("No.", None)]
    with pytest.raises(FastossError):
        read_asked(source)


def test_questions_of_a_run_may_have_the_columns_of_its_data(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    recipe = RunDirectory(copy).resolved_recipe
    values = read_json(recipe)
    values["data"][0]["columns"] = {"instruction": "frage"}
    write_json(recipe, values)
    source = write_rows(tmp_path / "rows.jsonl", [{"frage": ROWS[0]["messages"][-2]["content"]}])
    generate(str(copy), source, tmp_path / "answers.jsonl", Batching(GREEDY), say=lambda line: None)
    (answer,) = read_rows(tmp_path / "answers.jsonl")
    assert answer["channels"]["final"] == ROWS[0]["messages"][-1]["content"]
    with pytest.raises(FastossError, match="frage"):
        generate(str(run), source, tmp_path / "others.jsonl", Batching(GREEDY), say=lambda line: None)
