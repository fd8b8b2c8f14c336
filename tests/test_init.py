"""`fastoss init`: rows of one's own → a recipe that `check` accepts and that trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastoss.config import load_recipe
from fastoss.errors import FastossError
from fastoss.init.write import Answers, write_recipe

from .conftest import ROOT, ROWS, fastoss, gzipped, losses

PAIRS = [
    {"prompt": f"Say {word} in Chinese.", "chosen": better, "rejected": "I would rather not say."}
    for word, better in (("cat", "猫。"), ("tea", "茶。"), ("moon", "月亮。"), ("river", "河。"), ("book", "书。"), ("snow", "雪。"))
]
FLAGS = ("--card", "24GB", "--name", "mine")


def written(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def two_steps(recipe: Path, run: Path) -> None:
    """`fastoss check` accepts it as it stands, and it trains."""
    checked = fastoss("check", recipe, "--card", "24GB", cwd=run.parent)
    assert (checked.code, f"{recipe} is fine\n" in checked.out) == (0, True), checked.err
    tiny = ("--set", "model.name=tiny", "--set", "train.max_steps=2", "--set", "samples.from_train=0")
    done = fastoss("train", recipe, "--output", run, *tiny, cwd=run.parent)
    assert done.code == 0, done.err
    assert len(losses(run)) == 2


def test_chats_become_a_recipe_that_trains(tmp_path):
    data = written(tmp_path / "rows" / "chats.jsonl", ROWS)
    output = tmp_path / "recipes" / "mine.toml"
    done = fastoss("init", "--data", data, *FLAGS, "--method", "sft", "--output", output, cwd=tmp_path)
    assert (done.code, done.out) == (0, f"{output}\n"), done.err
    assert "8 rows looked at: alpaca 8\nchats: 2 with several turns, 0 with a system text, 3 with reasoning, 5 without\n" in done.err
    recipe = load_recipe(output)
    assert (recipe.name, recipe.method, recipe.model.precision, recipe.data[0].source) == ("mine", "sft", "4bit", str(data))
    assert 'source = "../rows/chats.jsonl"' in output.read_text(encoding="utf-8"), "relative, so that both can be moved"
    two_steps(output, tmp_path / "run")
    before = output.read_bytes()
    again = fastoss("init", "--data", data, *FLAGS, "--yes", "--output", output, cwd=tmp_path)
    assert (again.code, "no file is overwritten" in again.err, output.read_bytes()) == (2, True, before)


def test_pairs_become_a_recipe_that_trains(tmp_path):
    data = written(tmp_path / "pairs.jsonl", PAIRS)
    done = fastoss("init", "--data", data, "--yes", cwd=tmp_path)
    assert (done.code, done.out) == (0, "pairs.toml\n"), done.err
    assert "pairs of answers: 0 with several turns" in done.err
    recipe = load_recipe(tmp_path / "pairs.toml")
    assert (recipe.method, recipe.eval.fraction, recipe.train.learning_rate) == ("dpo", 0.0, 1e-5)
    two_steps(tmp_path / "pairs.toml", tmp_path / "run")


def refused(tmp_path: Path, rows: list[dict] | bytes, **given: object) -> str:
    data = tmp_path / "rows.jsonl"
    if isinstance(rows, bytes):
        data.write_bytes(rows)
    else:
        written(data, rows)
    with pytest.raises(FastossError) as problem:
        write_recipe(Answers(str(data), **({"output": tmp_path / "mine.toml"} | given)))
    assert problem.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"], "nothing is left behind"
    return str(problem.value)


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        ([{"frage": "Wer?", "antwort": "Ich."}], {"yes": True}, "rows.jsonl:1: the columns are not understood (frage, antwort)"),
        (gzipped(b"{}"), {"yes": True}, "rows.jsonl: "),
        (ROWS, {"method": "dpo", "yes": True}, "rows.jsonl:1: the row is not a pair of answers"),
        (PAIRS, {"method": "sft", "yes": True}, 'train pairs with method = "dpo"'),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
            {"method": "reasoning", "yes": True},
            "no row has reasoning",
        ),
        (ROWS, {"method": "ppo", "yes": True}, "--method ppo: is not one of sft, dpo and reasoning"),
        (ROWS, {"name": "a/b", "yes": True}, "--name a/b: is not a valid name"),
        (ROWS, {"card": "H9000", "yes": True}, "--card H9000: not a card that is known here"),
        (ROWS, {"card": "4GB", "yes": True}, "no setting of a recipe makes these rows fit"),
        (ROWS, {"card": "24GB"}, "`--method` is missing, and there is no terminal to ask in"),
        (ROWS, {"method": "sft"}, "`--card` is missing, and there is no terminal to ask in"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path, rows, given, said):
    assert said in refused(tmp_path, rows, **given)


def test_columns_of_other_names_are_said_and_stand_in_the_recipe(tmp_path):
    rows = [{"frage": f"Wer ist Nummer {number}?", "die antwort": f"Ich bin {number}, nya."} for number in range(12)]
    data = written(tmp_path / "rows.jsonl", rows)
    asked = ("init", "--data", data, "--card", "24GB", "--yes", "--output", tmp_path / "mine.toml")
    refused = fastoss(*asked, cwd=tmp_path)
    assert refused.code == 2
    assert "--column instruction=" in refused.err, "the hint is one that can be followed here"
    done = fastoss(*asked, "--column", "instruction=frage", "--column", "output=die antwort", cwd=tmp_path)
    assert done.code == 0, done.err
    (source,) = load_recipe(tmp_path / "mine.toml").data
    assert source.columns == {"instruction": "frage", "output": "die antwort"}
    assert 'columns = { instruction = "frage", output = "die antwort" }' in (tmp_path / "mine.toml").read_text(encoding="utf-8")
    checked = fastoss("check", tmp_path / "mine.toml", cwd=tmp_path)
    assert checked.code == 0, checked.err
    assert "note: 5 steps teach little: a smaller train.tokens_per_batch or more train.num_train_epochs" in checked.out
    more = fastoss("check", tmp_path / "mine.toml", "--set", "train.num_train_epochs=20", cwd=tmp_path)
    assert (more.code, "teach little" in more.out) == (0, False)
    other = (*asked[:-1], tmp_path / "other.toml", "--column")
    assert "--column frage: is not of the form OURS=THEIRS" in fastoss(*other, "frage", cwd=tmp_path).err
    twice = fastoss(*other, "instruction=frage", "--column", "instruction=die antwort", cwd=tmp_path)
    assert (twice.code, "`instruction` is named twice, as `frage` before" in twice.err) == (2, True), twice.err
    wrong = fastoss(*other, "instruktion=frage", cwd=tmp_path)
    assert (wrong.code, "did you mean `instruction`?" in wrong.err) == (2, True), wrong.err


def test_without_data_there_is_nothing_to_suggest(tmp_path):
    done = fastoss("init", "--yes", cwd=tmp_path)
    assert (done.code, "`--data` is missing" in done.err, "--yes to take" in done.err) == (2, True, False)
    with pytest.raises(FastossError, match=r"--data none\.jsonl: there is no such file"):
        write_recipe(Answers("none.jsonl", yes=True))


def test_a_few_bad_rows_are_left_out_in_writing(tmp_path):
    """One of many is named and dropped by a line in the recipe; one of few is an error."""
    rows = [row | {"instruction": f"{row['instruction']} ({number})"} for number in range(4) for row in ROWS]
    data = written(tmp_path / "rows.jsonl", [*rows, {"instruction": "?", "output": None}])
    path = write_recipe(Answers(str(data), "sft", "24GB", "mine", tmp_path / "mine.toml"))
    assert 'malformed = "drop"' in path.read_text(encoding="utf-8")
    assert "1 row left out" in path.read_text(encoding="utf-8")
    assert load_recipe(path).hygiene.malformed == "drop"
    few = written(tmp_path / "few.jsonl", [*ROWS[:3], {"instruction": "?", "output": None}])
    with pytest.raises(FastossError, match="`output`"):
        write_recipe(Answers(str(few), "sft", "24GB", "mine", tmp_path / "few.toml"))


def test_a_larger_card_holds_the_base_in_more_bits_and_languages_are_asked_for(tmp_path, capsys):
    sample = ROOT / "recipes" / "data" / "multilingual.jsonl"
    recipe = load_recipe(write_recipe(Answers(str(sample), card="H200", output=tmp_path / "mine.toml", yes=True)))
    assert (recipe.name, recipe.model.precision, recipe.lora.expert_layers) == ("multilingual", "bf16", (7, 15, 23))
    assert "reasoning asked for in German 8, French 8" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_four_questions_in_a_terminal(tmp_path):
    """The first answer is a slip, and is asked again; an empty one takes what is proposed."""
    data = written(tmp_path / "chats.jsonl", ROWS)
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "fastoss", "init"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(ours, f"nowhere.jsonl\n{data.name}\n\nA100-80\nmika\n".encode())
    out, err = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert (process.returncode, out) == (0, "mika.toml\n"), err
    assert err.count("your rows: a file, a folder, or hf:NAME\n") == 2
    assert "[sft]\n" in err
    assert load_recipe(tmp_path / "mika.toml").model.precision == "bf16"
