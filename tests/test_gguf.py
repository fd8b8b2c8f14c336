"""A GGUF export answers in llama.cpp as its run does in the engine: the same prompt tokens, the same parser."""

from __future__ import annotations

import importlib.util
import threading
import time

import pytest
from starlette.testclient import TestClient

from fastoss.data.conversation import Message
from fastoss.errors import FastossError
from fastoss.inference import llama_cpp
from fastoss.inference.engine import Engine
from fastoss.inference.evaluate import evaluate
from fastoss.inference.generate import Batching, generate
from fastoss.inference.gguf import CHATS, GgufEngine, is_gguf
from fastoss.inference.open_model import open_model
from fastoss.inference.sampling import Question, ReasoningLanguage, Sampling
from fastoss.inference.serve import build_app

from .answers import read_rows, write_rows
from .export_helpers import expected_replies, shared  # noqa: F401

GREEDY = Sampling(max_new_tokens=40)
CHATTER = [Message("user", "Tell me everything you know about boats")]


@pytest.fixture(scope="module")
def folder(shared):  # noqa: F811
    return shared.exports("experts") / "gguf"


@pytest.fixture(scope="module")
def gguf(folder):
    engine = open_model(str(folder))
    yield engine
    engine.close()


def chats() -> list[list[Message]]:
    return [[Message(role, content) for role, content in chat] for chat, _, _ in expected_replies()]


def test_it_answers_word_for_word_as_the_run_does(shared, gguf):  # noqa: F811
    """What was learned by heart, Chinese whose characters need several tokens, and a question that never was trained."""
    engine = Engine.load(str(shared.run("experts")))
    assert isinstance(gguf, GgufEngine)
    for chat in [*chats(), [Message("user", "Any tea? 你是谁?")]]:
        assert gguf.prompt_ids(Question(tuple(chat))) == engine.prompt_ids(Question(tuple(chat)))
        ours, theirs = engine.stream(chat, GREEDY), gguf.stream(chat, GREEDY)
        assert ours.answer().completion == theirs.answer().completion
        assert (ours.tokens, ours.finish_reason, ours.prompt_tokens) == (theirs.tokens, theirs.finish_reason, theirs.prompt_tokens)
        assert 0 < theirs.first_token_seconds < theirs.seconds
    for (_, thinking, content), said in zip(expected_replies(), gguf.complete(chats(), GREEDY), strict=True):
        assert (said.thinking, said.content, said.problems) == (thinking, content, [])
    pieces = [delta.text for delta in gguf.stream(chats()[0], GREEDY)]
    assert len(pieces) > 3
    cut = gguf.stream(chats()[0], Sampling(max_new_tokens=3)).answer()
    assert (cut.finish_reason, cut.tokens, cut.completion.problems) == ("length", 3, ["no answer"])


def test_effort_language_and_settings_reach_it(shared, gguf):  # noqa: F811
    engine = Engine.load(str(shared.run("experts")))
    question = Question((Message("user", "Hi"),), "high", ReasoningLanguage.GERMAN, current_date="2025-12-24")
    assert gguf.prompt_ids(question) == engine.prompt_ids(question)
    warm = Sampling(temperature=3.0, max_new_tokens=12, seed=7)
    one, same = (gguf.stream(CHATTER, warm).answer().completion for _ in range(2))
    assert one == same
    assert len({str(gguf.stream(CHATTER, Sampling(3.0, 12, seed)).answer().completion) for seed in range(4)}) > 1
    greedy = gguf.stream(CHATTER, Sampling(max_new_tokens=12)).answer().completion
    for narrow in (Sampling(3.0, 12, 7, top_p=1e-6), Sampling(3.0, 12, 7, top_k=1)):
        assert gguf.stream(CHATTER, narrow).answer().completion == greedy
    together = gguf.answers([Question(tuple(CHATTER))] * 4, warm)
    assert len({str(answer.completion) for answer in together}) > 1  # each its own chance
    known, penalty = chats()[0], Sampling(max_new_tokens=6, repetition_penalty=2.0)
    penalised = gguf.stream(known, penalty).answer().completion
    assert penalised == engine.stream(known, penalty).answer().completion
    assert penalised != gguf.stream(known, Sampling(max_new_tokens=6)).answer().completion
    with pytest.raises(FastossError, match="there is no adapter to switch off"):
        gguf.stream(CHATTER, tuned=False)
    with pytest.raises(FastossError, match="“extreme” is not a reasoning effort"):
        gguf.stream(CHATTER, GREEDY, "extreme")
    with pytest.raises(FastossError, match="does not end with a question"):
        gguf.stream([Message("assistant", "Hi")])


def test_a_reply_is_cancelled_and_the_place_is_free_again(gguf):
    """By the reader, from another thread, and while it waits for one of the places."""
    endless = Sampling(temperature=3.0, max_new_tokens=8000, seed=1)
    replies = [gguf.stream(CHATTER, endless) for _ in range(CHATS + 1)]
    readers = [threading.Thread(target=list, args=(reply,)) for reply in replies]
    for reader in readers[:CHATS]:
        reader.start()
    until = time.monotonic() + 120
    while not all(reply.tokens for reply in replies[:CHATS]):
        assert time.monotonic() < until
        time.sleep(0.01)
    readers[CHATS].start()
    while not gguf.turns.waiting:
        assert time.monotonic() < until
        time.sleep(0.01)
    for reply in reversed(replies):
        reply.cancel()
    for reader in readers:
        reader.join()
    assert {reply.finish_reason for reply in replies} == {"cancelled"}
    assert replies[CHATS].tokens == 0
    read = gguf.stream(chats()[0], GREEDY)
    next(read)
    read.close()
    assert read.finish_reason == "cancelled"
    while any(slot["is_processing"] for slot in gguf.server.get("/slots")):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert gguf.stream(chats()[0], GREEDY).answer().completion.content == expected_replies()[0][2]


def test_generate_and_serve_take_it(gguf, folder, tmp_path, monkeypatch):
    from fastoss.inference import open_model as opening

    monkeypatch.setattr(opening, "open_engine", lambda name: gguf)
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "你是谁?"}, {"prompt": "Any tea?"}])
    generate(str(folder), source, tmp_path / "out.jsonl", Batching(GREEDY), say=lambda line: None)
    assert [row["channels"]["final"] for row in read_rows(tmp_path / "out.jsonl")] == ["我是米卡喵。", "Jasmine, always jasmine."]
    with TestClient(build_app(gguf, "mika"), base_url="http://127.0.0.1") as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["mika"]
        body = {"model": "mika", "messages": [{"role": "user", "content": "你是谁?"}], "temperature": 0, "max_tokens": 40}
        message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("先报名字。", "我是米卡喵。")


def test_what_cannot_be_asked_is_refused_before_anything_starts(folder, tmp_path, monkeypatch):
    (file,) = folder.glob("*.gguf")
    assert is_gguf(str(file))
    assert not is_gguf(str(folder.parent / "merged"))
    with pytest.raises(FastossError, match="file not found"):
        open_model(str(tmp_path / "no.gguf"))
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(FastossError, match="2 GGUF files"):
        open_model(str(tmp_path))
    with pytest.raises(FastossError, match=r"llama\.cpp gives no losses"):
        evaluate(str(folder), None, rows=1, output=None, batch_size=1, language=None, max_new_tokens=1, say=print)
    with pytest.raises(FastossError, match="does not load the file"):
        open_model(str(tmp_path / "a.gguf"))
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else importlib.util.find_spec(name))
    with pytest.raises(FastossError) as told:
        open_model(str(file))
    assert "pip install 'fastoss[gguf]'" in told.value.hint
