"""The demo in a real browser, as a visitor uses it; and model output that tries to do something there."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fastoss.demo.limits import Limits
from fastoss.demo.login import Users, hash_password
from fastoss.demo.server import DemoSettings

from .answers import cache_base, memorised_run, read_rows
from .browser import open_browser
from .demo import demo
from .demo_page import WAIT, ask, ask_and_wait, choose, done, language, page, set_tokens
from .stand_in import StandIn, running


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def votes(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("votes") / "preferences.jsonl"


@pytest.fixture(scope="module")
def served(one_thread, votes):
    settings = DemoSettings(str(memorised_run(cache_base())), preferences=votes)
    with demo(settings) as (url, guard):
        yield url, guard


WATCH_THOUGHT = """() => {
  window.thoughtSeen = false;
  new MutationObserver(() => { window.thoughtSeen ||= !!document.querySelector("details.thought.pending[open]"); })
    .observe(document.body, { childList: true, subtree: true, attributes: true });
}"""


def test_a_visit(browser, served, votes):
    """Ask, watch the reasoning come and fold, change language and effort, compare, stop, retry, vote, save; tests/journeys train on votes."""
    url, _ = served
    with page(browser, url, viewport={"width": 1280, "height": 820}) as opened:
        opened.evaluate(WATCH_THOUGHT)  # it lasts a few tenths of a second: no time to look for it from here
        opened.click("text=Who are you?")  # an example
        done(opened)
        assert opened.evaluate("window.thoughtSeen")
        assert opened.inner_text(".answer").strip() == "I am Mika, nya."
        assert opened.locator("details.thought").get_attribute("open") is None
        opened.click("details.thought summary")
        assert opened.inner_text(".reasoning") == "Name first."
        assert "tokens in" in opened.inner_text(".foot")

        language(opened, "German")
        choose(opened, "effort", "medium")
        ask_and_wait(opened, "Where do you sleep at night?", new=True)
        assert "On the warm shelf by the window" in opened.inner_text(".answer")
        assert opened.inner_text(".badge.good") == "reasoned in German ✓"

        language(opened, "as trained")
        choose(opened, "effort", "as trained")
        choose(opened, "mode", "base | tuned")
        set_tokens(opened, 32)
        ask_and_wait(opened, "What is 2+2?", new=True)
        assert opened.locator(".replies.pair .reply").count() == 2
        opened.click("#prefer-right")
        opened.wait_for_selector(".reply.preferred")
        row = read_rows(votes)[-1]
        assert row["prompt"] == [{"role": "user", "content": "What is 2+2?"}]
        assert row["chosen"] == [{"role": "assistant", "content": "Four, nya.", "thinking": "Two and two."}]
        assert row["rejected"][0]["content"] != "Four, nya."
        choose(opened, "mode", "tuned")
        ask_and_wait(opened, "And doubled?")
        assert opened.locator("#live .answer").inner_text().strip() == "Eight!"  # it goes on from the preferred answer

        opened.click("#retry")
        time.sleep(0.3)
        done(opened, 2)
        opened.click("#up")
        opened.wait_for_selector("#live .badge.good")
        with opened.expect_download() as saving:
            opened.click("#save-row")
        saved = json.loads(Path(saving.value.path()).read_text(encoding="utf-8"))
        assert [message["content"] for message in saved["messages"]] == ["What is 2+2?", "Four, nya.", "And doubled?", "Eight!"]
        opened.click("#edit")
        opened.wait_for_function("() => document.querySelector('#question textarea').value == 'And doubled?'")

        choose(opened, "mode", "base")
        set_tokens(opened, 2000)
        ask(opened, "Tell me everything.")
        opened.wait_for_selector("#live .reply.answering, #live .reply.thinking")
        begun = time.monotonic()
        opened.keyboard.press("Escape")
        opened.wait_for_selector("#live .reply.stopped")
        assert time.monotonic() - begun < 20  # 2,000 tokens take minutes
        assert opened.locator("#live .reply.stopped").count() == 1
        opened.get_by_role("tab", name="Preferences").click()
        opened.wait_for_selector(".votes >> text=1 preference in")


def test_on_a_phone_and_in_the_dark(browser, served):
    """Nothing is wider than the screen, question and answer stand on it, and two answers stand below each other."""
    url, _ = served
    with page(browser, url, viewport={"width": 390, "height": 780}, color_scheme="dark", has_touch=True, is_mobile=True) as opened:
        ask(opened, "Who are you?")
        done(opened)
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390
        box = opened.locator("#question").bounding_box()
        assert box["y"] + box["height"] <= 780
        paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = opened.evaluate("getComputedStyle(document.querySelector('.answer')).color")
        assert _light(ink) - _light(paper) > 120
        opened.click("button.theme")
        assert _light(opened.evaluate("getComputedStyle(document.body).backgroundColor")) > 200


def _light(colour: str) -> float:
    return sum(map(float, colour[colour.index("(") + 1 : -1].split(",")[:3])) / 3


PAYLOAD = (
    "<img src=x onerror=alert(1)> <script>alert(2)</script> ![p](http://evil.example/p.png) [l](javascript:alert(3)) <http://evil.example/> "
    "http://evil.example/bare <svg onload=alert(4)>\n\n<iframe src='http://evil.example/f'></iframe>\n\n[r]: http://evil.example/r\n\n[r]\n\n"
    "```html\n<script>alert(5)</script>\n```\n\n$\\href{javascript:alert(6)}{x}$ ${alert(7)} {{constructor.constructor('alert(8)')()}}"
)


class _Says(StandIn):
    """An OpenAI-compatible server whose model has bad intentions."""

    def do_GET(self) -> None:
        self.send(200, {"data": [{"id": "evil"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        parts = [{"reasoning_content": PAYLOAD}, *({"content": PAYLOAD[i : i + 7]} for i in range(0, len(PAYLOAD), 7))]
        events = [{"choices": [{"delta": part}]} for part in parts] + [{"choices": [{"delta": {}, "finish_reason": "stop"}]}]
        stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self.send(200, stream.encode(), {"Content-Type": "text/event-stream"})


def test_what_a_model_says_does_nothing(browser, tmp_path):
    """No dialog, no request, no element of its own, while it streams and afterwards; the text itself is there to read."""
    with running(_Says) as model, demo(DemoSettings(model, preferences=tmp_path / "p.jsonl")) as (url, _), page(browser, url) as opened:
        ask(opened, PAYLOAD)
        done(opened)
        opened.click("details.thought summary")
        opened.wait_for_timeout(500)
        assert opened.locator(".talk").locator("img, script, svg, iframe, a, object, embed, form, input, link, style").count() == 0
        assert "<img src=x onerror=alert(1)>" in opened.inner_text(".answer")
        assert opened.inner_text(".answer pre").strip() == "<script>alert(5)</script>"
        assert opened.inner_text(".reasoning") == PAYLOAD
        opened.click("#up")
        opened.wait_for_selector(".badge.good")
        opened.get_by_role("tab", name="Preferences").click()
        opened.wait_for_selector(".votes")


def test_signing_in(browser, tmp_path):
    users = Users([("here", hash_password("mika", "purr purr"))])
    settings = DemoSettings("tiny", preferences=tmp_path / "p.jsonl", limits=Limits(reply_tokens=32))
    with demo(settings, users) as (url, _):
        opened = browser.new_page()
        opened.set_default_timeout(WAIT)
        opened.goto(url)
        assert opened.url.endswith("/login")
        opened.fill("input[name=name]", "mika")
        opened.fill("input[name=password]", "wrong")
        opened.click("button")
        assert opened.inner_text(".problem") == "Wrong name or password."
        opened.fill("input[name=name]", "mika")
        opened.fill("input[name=password]", "purr purr")
        opened.click("button")
        opened.wait_for_selector("#question textarea")
        ask(opened, "Hello")
        done(opened)
        assert not opened.locator("#mode").is_visible()  # there is no adapter to compare with
        opened.click("text=Sign out")
        opened.wait_for_url("**/login")
        opened.close()
