"""The report of a run, opened in a real browser with nothing but itself: what happened is told, and no text of a run becomes markup."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fastoss.errors import FastossError
from fastoss.report.compare import differences
from fastoss.report.facts import read_facts
from fastoss.report.html import Html, tag, text
from fastoss.report.plot import decades, ticks
from fastoss.report.report import write_comparison, write_report
from fastoss.report.story import sentences
from fastoss.run import RunDirectory, read_json_lines

from .browser import open_browser
from .conftest import fastoss
from .report_runs import HOSTILE, steps, written_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PLAIN = "Translate into Chinese: Let's call it a day."


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


class Opened:
    """A page in a context of its own; `complaints` are errors, violations of its policy, and whatever it asked of a network."""

    def __init__(self, browser: Browser, file: Path, *, width: int = 1280, scheme: Any = "light", scripts: bool = True):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts, offline=True)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("request", lambda request: self.complaints.append(request.url) if request.url != file.as_uri() else None)
        self.failed: list[tuple[str, str | None]] = []
        self.page.on("requestfailed", lambda request: self.failed.append((request.url, request.failure)))
        self.page.goto(file.as_uri())

    def close(self) -> None:
        self.context.close()
        assert self.complaints == []


def seen(page: Page) -> str:
    return page.inner_text("body")


def test_texts_of_a_run_stay_texts(browser: Browser, tmp_path: Path) -> None:
    """Everything a row, a reply, a path or a warning can hold tries to run a script, to load a picture, to end an element."""
    run = written_run(tmp_path / "run")
    opened = Opened(browser, write_report(run))
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.mouse.move(400, 400)
    assert page.title() == "run · fastoss report"
    assert page.evaluate("document.querySelectorAll('script, img, iframe, object, a, [onload], [onerror], [onmouseover], [style]').length") == 0
    # One of them for each place that holds it, letter by letter as it was written (control characters as their pictures).
    shown = HOSTILE.replace("\x00", "\u2400").replace("\x1b", "\u241b").replace("\ud800", "\ufffd")
    count = page.evaluate("text => document.body.textContent.split(text).length - 1", shown)
    assert count >= 20
    assert page.evaluate("document.querySelectorAll('section').length") == 9
    opened.close()


def test_the_policy_lets_nothing_in(browser: Browser, tmp_path: Path) -> None:
    """Should markup ever slip through, it runs and loads nothing."""
    run = written_run(tmp_path / "run", text=PLAIN)
    file = write_report(run)
    file.write_text(file.read_text().replace("<header>", f"<header>{HOSTILE[HOSTILE.index('<script>') : HOSTILE.index('<!--')]}"))
    opened = Opened(browser, file)
    assert opened.page.title() == "run · fastoss report"
    refused = [said for said in opened.complaints if "Content Security Policy" in said]
    assert len(refused) >= 3
    assert opened.failed == [("http://example.org/x.png", "csp")]  # stopped before any network was asked
    opened.complaints = [said for said in opened.complaints if said not in (*refused, "http://example.org/x.png")]
    opened.close()


@pytest.mark.parametrize(("scheme", "width", "scripts"), [("light", 1280, True), ("dark", 1280, True), ("light", 390, True), ("light", 1280, False)])
def test_light_dark_phone_and_without_scripts(browser: Browser, tmp_path: Path, scheme: str, width: int, scripts: bool) -> None:
    run = written_run(tmp_path / "run", text=PLAIN, method="dpo")
    opened = Opened(browser, write_report(run), width=width, scheme=scheme, scripts=scripts)
    page = opened.page
    if scripts:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        paper, ink = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        assert (paper, ink) == (("rgb(247, 246, 242)", "rgb(36, 39, 44)") if scheme == "light" else ("rgb(21, 23, 26)", "rgb(228, 227, 222)"))
        box = page.locator("svg.curves").first.bounding_box()
        assert box
        assert box["width"] > 300  # figures of 11 px stay readable
    assert page.locator("svg.curves").count() >= 9
    assert page.locator("svg.curves").first.is_visible()
    picture = tmp_path / "page.png"
    page.screenshot(path=picture)  # of what is seen: Chromium without a GPU now and then fails to take the whole page
    assert picture.stat().st_size > 20_000
    opened.close()


def test_what_happened_stands_at_the_top(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", text=PLAIN)
    assert sentences(read_facts(run)) == [
        "The embedded tiny gpt-oss was trained on 110 conversations by supervised fine-tuning with LoRA: 40 steps, 2 epochs of the data, in 1m20s.",
        "On the way it was interrupted twice: killed (and resumed after step 12), then stopped by a signal (and resumed after step 24). "
        "It ran to its end.",
        "The training loss went from 3.2 to 0.539 (mean of the last 4 steps); on rows held out from training from 2.35 (step 5) to 0.789.",
        "Of 1 training question asked back, 0 got the word-for-word answer before training, 1 after it.",
    ]


def test_each_way_to_end_is_told(tmp_path: Path) -> None:
    def told(name: str, **manifest: Any) -> str:
        run = written_run(tmp_path / name, text=PLAIN, started=["2026-01-01T10:00:00"], resumed_after_step=[], **manifest)
        (run.adapter / "adapter_model.safetensors").unlink()
        return sentences(read_facts(run))[1]

    end = {"start": 1, "at": "2026-01-01T11:00:00", "said": "the loss is nan at step 7\nmore"}
    assert told("killed", ends=[]) == "It was killed; run the same command again to resume from the last checkpoint."
    assert told("stopped", ends=[end | {"how": "stopped"}]) == "It was stopped by a signal: the loss is nan at step 7."
    assert told("failed", ends=[end | {"how": "failed"}]) == "It failed: the loss is nan at step 7."
    run = RunDirectory(tmp_path / "killed")
    with run.lock():
        assert read_facts(run).state == "training"
    # A run of before the ends were kept.
    old = RunDirectory(tmp_path / "failed")
    old.manifest.write_text(json.dumps({"started": ["a"]}))
    assert read_facts(old).state == "unfinished"
    with open(old.metrics, "a") as file:
        file.write('{"step": 41, "failed": "the loss is nan"}\n')
    assert read_facts(old).state == "failed"


def test_learned_by_heart_is_said(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", text=PLAIN)
    with open(run.metrics, "a") as file:
        file.write('{"step": 40, "eval_loss": 1.5}\n')
    assert "after a low of 0.789 at step 40: what came later was learned by heart" in sentences(read_facts(run))[2]


def test_a_line_of_samples_ends_where_json_lines_end(tmp_path: Path) -> None:
    """What training writes leaves U+2028 and U+0085 as they are, at which str.splitlines would cut."""
    run = written_run(tmp_path / "run", text=PLAIN)
    samples = read_json_lines(run.samples)
    samples[0]["after"]["content"] = "one\u2028two\x85three"
    run.samples.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in samples), encoding="utf-8")
    facts = read_facts(run)
    assert (facts.samples, facts.damaged) == (samples, [])


def test_one_evaluation_is_no_way_from_one_to_another(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", text=PLAIN)
    run.metrics.write_text('{"step": 1, "loss": 2.5}\n{"step": 1, "eval_loss": 1.25}\n')
    page = write_report(run).read_text()
    assert "<b>1.25</b><span>held-out loss</span>" in page
    assert "1.25 → 1.25" not in page


def test_what_is_missing_or_damaged_is_left_out(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", text=PLAIN)
    run.samples.write_text("{torn")
    run.profile.write_text("[1]")
    (run.root / "plan.json").unlink()
    run.manifest.write_text('{"started": [')
    page = write_report(run).read_text()
    for name in ("samples.jsonl", "profile.json", "manifest.json"):
        assert f"{name} is damaged and was left out of this page" in page
    assert 'id="plan"' not in page
    bare = RunDirectory(tmp_path / "bare")
    bare.root.mkdir()
    bare.resolved_recipe.write_text("{}")
    assert "no step was completed" in write_report(bare).read_text()
    with pytest.raises(FastossError, match="no run in this folder"):
        write_report(RunDirectory(tmp_path / "none"))


def test_runs_are_compared(browser: Browser, tmp_path: Path) -> None:
    recipes = [{"train": {"learning_rate": rate, "seed": 42}, "data": [{"source": "a"}]} for rate in (1e-4, 2e-4)]
    runs = [written_run(tmp_path / name, text=PLAIN, recipe=recipe) for name, recipe in zip(("slow", "fast"), recipes, strict=True)]
    runs[1].metrics.write_text(runs[1].metrics.read_text().replace('"eval_loss": 0.78', '"eval_loss": 0.70'))
    assert differences([read_facts(run) for run in runs]) == [("train.learning_rate", [1e-4, 2e-4])]
    done = fastoss("report", runs[0].root, runs[1].root)
    assert (done.code, done.out) == (0, f"{tmp_path / 'comparison.html'}\n")
    opened = Opened(browser, tmp_path / "comparison.html", width=390)
    said = seen(opened.page)
    assert "The recipes differ in train.learning_rate." in said
    assert "“fast” ends lowest" in said
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
    strokes = "[...document.querySelector('svg.curves').querySelectorAll('path.line')].map(each => getComputedStyle(each).stroke)"
    lines = opened.page.evaluate(strokes)
    assert len(set(lines)) == len(runs)
    opened.close()
    with pytest.raises(FastossError, match="named twice"):
        write_comparison([runs[0], runs[0]])


def test_hostile_names_in_a_comparison(browser: Browser, tmp_path: Path) -> None:
    runs = [written_run(tmp_path / f"{number}<img src=x onerror=alert(1)>", recipe={"dpo": {"beta": HOSTILE * number}}) for number in (1, 2)]
    opened = Opened(browser, write_comparison(runs))
    assert opened.page.evaluate("document.querySelectorAll('script, img, a').length") == 0
    assert "1<img src=x onerror=alert(1)>" in seen(opened.page)
    opened.close()


def test_text_is_text_and_markup_is_markup() -> None:
    assert tag("p", "<b>", Html("<i>x</i>"), class_='a"b', open=True, hidden=None) == '<p class="a&quot;b" open>&lt;b&gt;<i>x</i></p>'
    assert tag("p", ["a", None, [Html("<br>"), "&"]]) == "<p>a<br>&amp;</p>"
    assert text("\x1b[31m\ud800\t\n") == "␛[31m\ufffd\t\n"
    assert html.unescape(text(HOSTILE)).startswith("</title></style>")


def test_axes_have_round_figures() -> None:
    assert ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(3, 47, 5) == [10, 20, 30, 40]
    assert ticks(1, 1, 5) == [1]
    assert decades(0.5, 300) == [1, 10, 100]
    assert decades(2, 40) == [2, 5, 10, 20]


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", text=PLAIN)
    run.metrics.write_text("".join(json.dumps(entry) + "\n" for entry in steps(2_000)))
    page = write_report(run).read_text()
    assert len(page) < 400_000
    assert not re.search(r"\bnan\b|\binf\b", page)
