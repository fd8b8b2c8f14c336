"""SFT, votes in the demo, DPO on them, GGUF: the last model answers in llama.cpp as it does in its run."""

from __future__ import annotations

import json

import pytest

from ..answers import RECIPE, ROWS, read_rows, write_rows
from ..demo_page import ask_and_wait, choose, page, set_tokens
from .steps import opened_report, screen

QUESTIONS = ("What is 2+2?", "你是谁?")


def test_from_answers_to_preferences_to_a_gguf(journey, browser):
    write_rows(journey.home / "data.jsonl", ROWS)
    journey.write("cat.toml", RECIPE.replace("memorised", "cat"))
    journey.run("fastoss train cat.toml")

    votes = journey.directory("cat").root / "preferences.jsonl"
    with journey.demo("runs/cat") as url, page(browser, url, viewport={"width": 1280, "height": 900}) as opened:
        choose(opened, "mode", "base | tuned")
        set_tokens(opened, 32)
        for question in QUESTIONS:
            ask_and_wait(opened, question, new=question != QUESTIONS[0])
            opened.click("#prefer-right")
            opened.wait_for_selector(".reply.preferred")
        screen(opened, "preferences-compare")
        opened.get_by_role("tab", name="Preferences").click()
        opened.wait_for_selector(".votes >> text=2 preferences in")
        screen(opened, "preferences-votes")
    assert [row["prompt"][-1]["content"] for row in read_rows(votes)] == list(QUESTIONS)
    assert [row["chosen"][-1]["content"] for row in read_rows(votes)] == ["Four, nya.", "我是米卡喵。"]

    # The demo wrote the recipe beside the votes; it names the run whose adapter DPO begins from.
    recipe = votes.with_name("preferences-dpo.toml").relative_to(journey.home)
    assert "2 training pairs" in journey.run(f"fastoss check {recipe}").out
    short = "--set train.max_steps=6 --set train.learning_rate=1e-3 --set samples.from_train=2 --set samples.max_new_tokens=24"
    trained = journey.run(f"fastoss train {recipe} --output runs/better {short}")
    assert "runs/cat/adapter" in trained.err
    steps = [json.loads(line) for line in journey.read("runs/better/metrics.jsonl").splitlines()]
    margins = [entry["rewards/margins"] for entry in steps if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-4)  # the reference is summed in float64, the answers in float32
    assert margins[-1] > 0.01
    with opened_report(browser, journey.directory("better").root / "report.html") as report:
        assert "margin" in report.inner_text("body")
        screen(report, "preferences-dpo-report")

    journey.run("fastoss export runs/better --format gguf")
    gguf = "runs/better/exports/gguf"
    assert "same" in journey.run(f"fastoss verify {gguf} --against runs/better").out
    for question in QUESTIONS:
        from_run, from_llama = (journey.run(f"fastoss chat {model} --prompt '{question}' --max-new-tokens 24") for model in ("runs/better", gguf))
        assert from_run.out == from_llama.out
        assert from_run.out.strip()
