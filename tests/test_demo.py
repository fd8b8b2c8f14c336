"""The demo without a browser: what it refuses, who may come in, whose conversation is whose, votes as rows."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fastoss.config import FormatSettings
from fastoss.data.conversation import Message
from fastoss.data.formats.preferences import row_to_preference
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.reading.rows import Row
from fastoss.demo.guard import Guard
from fastoss.demo.limits import Limits
from fastoss.demo.login import Lockout, Users, hash_password
from fastoss.demo.models import Models
from fastoss.demo.server import DemoSettings
from fastoss.demo.talk import Asking, Mode, Spoken, Talk, Turn
from fastoss.demo.view import live_html, markdown
from fastoss.demo.votes import VoteFile, liked_row, pair_row, thumb_pairs
from fastoss.errors import FastossError

from .answers import cache_base, memorised_run
from .commands import ROOT
from .demo import Visitor, demo, running

LIMITS = Limits(waiting=4, reply_tokens=2048, question_chars=4000)


@pytest.fixture(scope="module")
def votes(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("votes") / "preferences.jsonl"


@pytest.fixture(scope="module")
def settings(one_thread, votes) -> DemoSettings:
    return DemoSettings(str(memorised_run(cache_base())), preferences=votes, limits=LIMITS)


@pytest.fixture(scope="module")
def served(settings):
    with demo(settings) as (url, _):
        yield url


# -- what becomes of a text on the screen

PAYLOADS = [
    "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "![x](http://evil.example/x.png)", "[click](javascript:alert(1))",
    "<http://evil.example>", "[r]\n\n[r]: http://evil.example", "<svg/onload=alert(1)>", "**b** <b onclick=x>b</b>",
    "```html\n<script>alert(1)</script>\n```", "</div></section><iframe src=//evil.example>", "| <img src=x> |\n|---|\n| <a href=x>y</a> |",
]  # fmt: skip


@pytest.mark.parametrize("text", PAYLOADS)
def test_a_text_makes_no_element_that_acts(text):
    reply = Spoken("tuned", True, state="done", thinking=text, content=text, tokens=9, seconds=1.0, problems=[text])
    talk = Talk()
    talk.turns.append(Turn(text, Asking(), (Message("user", text),), None, [reply]))
    page = live_html(talk, reasoning=True)
    for sign in ("<img", "<script", "<svg", "<iframe", "<a ", "<a>", "href", "<b "):
        assert sign not in page.replace("href=x&gt;", "").replace("[click]", ""), sign
    assert "\n" not in page  # an empty line would end the block that Markdown leaves alone


def test_markdown_still_is_markdown():
    assert markdown("- a\n- **b**") == "<ul>\n<li>a</li>\n<li><strong>b</strong></li>\n</ul>\n"
    assert "<pre><code>x &lt; y\n</code></pre>" in markdown("```\nx < y\n```")


def test_reasoning_can_be_kept_on_the_server():
    reply = Spoken("tuned", True, state="done", thinking="SECRET", content="hi", tokens=3, seconds=1.0, thinking_seconds=0.5)
    talk = Talk()
    talk.turns.append(Turn("q", Asking(), (Message("user", "q"),), None, [reply]))
    assert "SECRET" in live_html(talk, reasoning=True)
    hidden = live_html(talk, reasoning=False)
    assert "SECRET" not in hidden
    assert "Thought for 0.5 s" in hidden


# -- votes


def _turn(left: str = "Four, nya.", right: str = "Fish.") -> Turn:
    asked = (Message("system", "reasoning language: German"), Message("user", "What is 2+2?"))
    replies = [Spoken("base", False, "done", content=left, thinking="Zwei und zwei."), Spoken("tuned", True, "done", content=right)]
    return Turn("What is 2+2?", Asking(effort="high"), asked, None, replies)


def test_a_preference_is_a_row_that_training_reads(tmp_path):
    turn = _turn()
    row = pair_row(turn, *turn.replies)
    pair = row_to_preference(Row(row, "here"))
    assert pair.chosen.messages == (*turn.asked, Message("assistant", "Four, nya.", "Zwei und zwei."))
    assert pair.rejected.messages[-1] == Message("assistant", "Fish.")
    assert pair.chosen.reasoning_effort == "high"
    file = VoteFile(tmp_path / "p.jsonl")
    file.add(row)
    file.add(pair_row(turn, *reversed(turn.replies)))
    file.remove(row)
    assert [kept["chosen"][0]["content"] for kept in file.rows()] == ["Fish."]
    assert liked_row(turn, turn.replies[1])["messages"][-1] == {"role": "assistant", "content": "Fish."}


def test_a_pair_that_the_run_would_drop_for_its_length_is_not_kept():
    turn = _turn(left="so " * 50)
    pair = row_to_preference(Row(pair_row(turn, *turn.replies), "here"))
    tokens = len(HarmonyRenderer(FormatSettings()).render_last(pair.chosen))
    for replies in (turn.replies, turn.replies[::-1]):
        pair_row(turn, *replies, limit=tokens)
        with pytest.raises(FastossError, match=f"{tokens} tokens, and the run takes {tokens - 1} "):
            pair_row(turn, *replies, limit=tokens - 1)


def test_thumbs_on_two_tries_make_a_pair_which_a_changed_thumb_takes_back():
    turn = _turn()
    first, second = turn.replies
    turn.before, turn.replies = [first], [second]
    assert thumb_pairs(turn, second, "up") == []
    first.vote = "down"
    assert thumb_pairs(turn, second, None) == thumb_pairs(turn, second, "down") == []
    assert thumb_pairs(turn, second, "up") == [pair_row(turn, second, first)]
    first.vote = "up"
    assert thumb_pairs(turn, second, "down") == [pair_row(turn, first, second)]


@pytest.mark.parametrize(("left", "words"), [("", "no text"), ("Fish.", "the same"), ("a <|end|> b", "control token"), ("a\x00b", "NUL")])
def test_answers_that_cannot_be_trained_on_are_no_pair(left, words):
    turn = _turn(left)
    turn.replies[0].thinking = ""
    with pytest.raises(FastossError, match=words):
        pair_row(turn, *turn.replies)


def test_many_voters_lose_no_vote(tmp_path):
    file = VoteFile(tmp_path / "p.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: file.add({"n": number, "said": "one\u2028row"}), range(64)))
    assert sorted(row["n"] for row in file.rows()) == list(range(64))


# -- who may come in


def test_other_machines_need_a_word_about_it(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTOSS_DEMO_USERS", raising=False)
    assert DemoSettings("tiny").users() is None
    assert DemoSettings("tiny", host="0.0.0.0", no_auth=True).users() is None
    assert DemoSettings("tiny", host="::1").local
    assert not DemoSettings("tiny", host="::").local
    with pytest.raises(FastossError, match="without signing in"):
        DemoSettings("tiny", host="0.0.0.0").users()
    with pytest.raises(FastossError, match="contradict"):
        DemoSettings("tiny", auth=tmp_path / "users", no_auth=True).users()
    monkeypatch.setenv("FASTOSS_DEMO_USERS", hash_password("mika", "purr purr"))
    users = DemoSettings("tiny", host="0.0.0.0").users()
    assert users is not None
    assert users.verify("mika", "purr purr")
    assert not users.verify("mika", "purr")
    assert not users.verify("nobody", "purr purr")
    (tmp_path / "users").write_text("mika:purr purr\n")
    with pytest.raises(FastossError, match="this is not a user line") as refused:
        Users.load(tmp_path / "users")
    assert refused.value.place == f"{tmp_path / 'users'}:1"
    with pytest.raises(FastossError, match="8 characters"):
        hash_password("mika", "short")


def test_the_lock_grows_and_opens_again():
    now = [0.0]
    lock = Lockout(free=3, first=10, longest=60, clock=lambda: now[0])
    for _ in range(2):
        lock.wrong("a")
    assert lock.seconds_left("a") == 0
    lock.wrong("a")
    assert lock.seconds_left("a") == 10
    now[0] = 11
    lock.wrong("a")
    assert lock.seconds_left("a") == 20
    assert lock.seconds_left("b") == 0
    now[0] = 200  # quiet for longer than the longest lock: forgotten
    lock.wrong("a")
    assert lock.seconds_left("a") == 0
    lock.right("a")
    assert lock.seconds_left("a") == 0


async def _inside(scope, receive, send) -> None:
    """What the guard guards, for tests of the guard alone: it says what reached it."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html"), (b"x-frame-options", b"ALLOWALL")]})
    await send({"type": "http.response.body", "body": b"<html><script>1</script>" + scope["path"].encode()})


@pytest.fixture(scope="module")
def guarded():
    users = Users([("here", hash_password("mika", "purr purr"))])
    with running(Guard(_inside, report=lambda: "<h1>report</h1>", users=users)) as url:
        yield url


def test_nothing_but_the_login_without_a_login(guarded):
    with httpx.Client(base_url=guarded) as client:
        assert (client.get("/").status_code, client.get("/").headers["location"]) == (303, "/login")
        for path in ("/demo/report", "/demo/demo.js", "/assets/x.js", "/theme.css", "/gradio_api/queue/data?session_hash=a"):
            assert client.get(path).status_code == 401, path
        assert client.post("/gradio_api/queue/join", json={"session_hash": "a"}).status_code == 401
        assert client.get("/health").text == "ok\n"
        answer = client.post("/login", data={"name": "mika", "password": "purr purr"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert "HttpOnly; SameSite=Lax" in answer.headers["set-cookie"]
        page = client.get("/")
        assert page.status_code == 200
        assert f"'nonce-{page.text.split('nonce=')[1].split(chr(34))[1]}'" in page.headers["content-security-policy"]
        assert "unsafe-eval" not in page.headers["content-security-policy"]
        for name, value in (("x-content-type-options", "nosniff"), ("x-frame-options", "SAMEORIGIN"), ("referrer-policy", "same-origin")):
            assert page.headers.get_list(name) == [value]
        report = client.get("/demo/report")
        assert report.headers["content-security-policy"].startswith("sandbox;")
        assert client.get("/logout").status_code == 303
        assert client.get("/demo/report").status_code == 401


def test_who_guesses_is_locked_out(guarded):
    """300 tries at once, some with the right password among them after the lock has closed."""
    users = Users([("here", hash_password("mika", "purr purr"))])
    with running(Guard(_inside, report=lambda: None, users=users)) as url, httpx.Client(base_url=url, timeout=60) as client:

        def wrong(number: int) -> int:
            return client.post("/login", data={"name": "mika" if number % 2 else f"user{number}", "password": f"guess {number}"}).status_code

        with ThreadPoolExecutor(16) as pool:
            codes = list(pool.map(wrong, range(300)))
        assert codes.count(401) == 5
        assert codes.count(429) == 295
        locked = client.post("/login", data={"name": "mika", "password": "purr purr"})
        assert locked.status_code == 429
        assert 0 < int(locked.headers["retry-after"]) <= 901
        assert "Too many wrong tries" in locked.text


# -- what is refused

PROBES = [
    "/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/gradio_api/proxy=http://127.0.0.1:22/",
    "/proxy=http://169.254.169.254/", "/static/..%2f..%2f..%2fetc/passwd", "/assets/%2e%2e/%2e%2e/etc/passwd", "/static/%252e%252e/x",
    "/assets/..\\..\\x", "/demo/../app.py", "/demo/x", "/gradio_api/info", "/gradio_api/openapi.json", "/openapi.json", "/docs", "/config",
    "/manifest.json", "/monitoring", "/monitoring/summary", "/gradio_api/runs", "/gradio_api/upload", "/gradio_api/stream/a",
    "/gradio_api/token", "/gradio_api/app_id", "/gradio_api/user", "/gradio_api/dev/reload", "/gradio_api/vibe-code", "/gradio_api/deep_link",
    "/svelte/x",
]  # fmt: skip


def test_only_the_routes_of_a_chat_exist(served):
    with httpx.Client(base_url=served) as client:
        assert client.get("/").status_code == 200
        for path in PROBES:
            for method in ("GET", "HEAD"):
                assert client.request(method, path).status_code == 404, (method, path)
        for path in (
            "/gradio_api/run/ask",
            "/gradio_api/call/ask",
            "/gradio_api/upload",
            "/gradio_api/reset",
            "/gradio_api/component_server",
            "/login",
            "/",
        ):
            assert client.post(path, json={"session_hash": "a", "data": []}).status_code == 404, path
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 421
        assert client.post("/gradio_api/queue/join", json={}, headers={"Origin": "http://evil.example"}).status_code == 403
        assert client.post("/gradio_api/queue/join", content=b"{").status_code == 400
        assert client.post("/gradio_api/queue/join", content=b"[" * 100_000).status_code == 400
        assert client.post("/gradio_api/queue/join", content=b" " * (5 << 20)).status_code == 413


def test_a_file_is_not_fetched_for_anybody(served):
    visitor = Visitor(served, "files")
    for url in ("http://127.0.0.1:9/x", "/etc/passwd"):
        file = {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}
        assert visitor.join("send", [file, "tuned", "as trained", "as trained", 0, 48, ""]).status_code == 400
    disguised = '{"session_hash":"files","data":[{"path":"/etc/passwd","meta":{"_type":"gradio.File\\u0044ata"}}]}'
    assert visitor.client.post(f"{served}/gradio_api/queue/join", content=disguised).status_code == 400


def test_a_conversation_is_its_own_browsers(served):
    mine = Visitor(served, "mine")
    assert "I am Mika, nya." in mine.ask("Who are you?")
    with httpx.Client(base_url=served) as other:
        other.get("/")
        assert other.get("/gradio_api/queue/data", params={"session_hash": "mine"}).status_code == 403
        assert other.get("/gradio_api/heartbeat/mine").status_code == 403
        assert other.post("/gradio_api/queue/join", json={"session_hash": "mine", "data": []}).status_code == 403
    assert httpx.get(f"{served}/gradio_api/queue/data", params={"session_hash": "mine"}).status_code == 403


def test_limits_are_said_before_anything_is_counted(served, monkeypatch):
    from fastoss.inference import engine

    rendered = []
    real = engine.Engine.prompt_ids
    monkeypatch.setattr(engine.Engine, "prompt_ids", lambda self, question: rendered.append(1) or real(self, question))
    visitor = Visitor(served, "limits")
    assert "The question has 1,000,000 characters, 4,000 are allowed (shorten it)." in visitor.ask("x" * 1_000_000)
    assert "The question cannot be asked: the text holds the control token" in visitor.ask("a <|end|> b")
    assert "The question is empty." in visitor.ask("  ")
    assert visitor.join("send", ["half a character: \ud800", "tuned", "as trained", "as trained", 0, 48, ""]).status_code == 400
    for mode, language, effort in (("root", "as trained", "low"), ("tuned", "Klingon", "low"), ("tuned", "German", "most")):
        assert '"success": false' in visitor.call("send", ["Hi", mode, language, effort, 0, 48, ""])  # Gradio knows the choices
    assert "these settings are not offered" in str(_refusal("tuned", "German", "low", -1.0, 48, ""))
    assert "these settings are not offered" in str(_refusal("tuned", "German", "low", 0.0, 0, ""))
    assert rendered == []
    with pytest.raises(FastossError, match="20,000 tokens, 16,384 are allowed"):
        Limits().check_prompt(20_000)
    with pytest.raises(FastossError, match="50 turns"):
        Limits().check_length(50)


def _refusal(*settings) -> FastossError:
    from fastoss.demo.page import asking_of

    with pytest.raises(FastossError) as refused:
        asking_of(*settings)
    return refused.value


# -- many at once


def test_fifty_at_once_are_answered_or_told_that_it_is_busy(served):
    """No crossed text: each asks of a number of its own, and nobody sees another's."""
    visitors = [Visitor(served, f"crowd{number}") for number in range(50)]
    start = threading.Barrier(50)

    def asks(visitor: Visitor) -> str:
        start.wait()
        return visitor.ask(f"Number {visitor.name}?", tokens=16)

    def crowd() -> list[str]:
        with ThreadPoolExecutor(50) as pool:
            return list(pool.map(asks, visitors))

    pages = crowd()
    for page, visitor in zip(pages, visitors, strict=True):
        assert f"Number {visitor.name}?" in page
        assert page.count("Number crowd") == page.count(f"Number {visitor.name}?")
    busy = sum("Many people are asking just now" in page for page in pages)
    assert 1 <= busy <= 45  # at least one is answered and four wait
    assert sum("tokens in" in page for page in pages) == 50 - busy
    for _ in range(3):  # threads, connections and kept prefixes find their size
        crowd()
    settled = _resident()
    for _ in range(2):
        crowd()
    assert _resident() - settled < 50 << 20, "memory grows with each crowd"


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


# -- talking


def test_a_talk_remembers_what_was_preferred_and_can_be_stopped(settings):
    models = Models(settings.model, LIMITS)
    models.load()
    talk = Talk()
    with models.using() as engine:
        for _ in talk.ask(engine, "What is 2+2?", Asking(Mode.BOTH, max_new_tokens=24), LIMITS):
            pass
        base, tuned = talk.turns[0].replies
        assert (tuned.content, tuned.thinking, tuned.state) == ("Four, nya.", "Two and two.", "done")
        assert base.label == "base"
        assert talk.turns[0].kept is tuned
        for _ in talk.ask(engine, "And doubled?", Asking(max_new_tokens=48), LIMITS):
            pass
        assert talk.turns[1].kept.content == "Eight!"
        assert [message.content for message in talk.turns[1].asked] == ["What is 2+2?", "Four, nya.", "And doubled?"]
        pictures = talk.ask(engine, "Tell me all.", Asking(Mode.BASE, max_new_tokens=2048), LIMITS)
        next(pictures)
        with pytest.raises(FastossError, match="under way already"):
            next(talk.ask(engine, "And?", Asking(), LIMITS))
        talk.stop()
        list(pictures)
        assert talk.turns[2].replies[0].state == "stopped"
        short = Limits(reply_seconds=0.3)
        list(talk.ask(engine, "Tell me all.", Asking(Mode.BASE, max_new_tokens=2048), short))
        assert talk.turns[3].replies[0].fault == "stopped after 0 seconds"


def test_the_command_refuses_what_is_not_safe(tmp_path):
    def app(*arguments: str, **more) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(ROOT / "app.py"), *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120, **more)

    open_to_all = app("tiny", "--host", "0.0.0.0")
    assert open_to_all.returncode == 2
    assert "without signing in" in open_to_all.stderr
    assert "Traceback" not in open_to_all.stderr
    assert app().returncode == 2
    line = app("--hash-password", "mika", input="purr purr\n")
    assert Users([("here", line.stdout)]).verify("mika", "purr purr")
    assert line.stderr == ""
