"""The endpoint, asked by OpenAI's own client and by our engine for endpoints."""

from __future__ import annotations

import threading
import time

import httpx
import openai
import pytest
import uvicorn

from fastoss.data.conversation import Message
from fastoss.errors import FastossError, RunFailed
from fastoss.inference.endpoint import EndpointEngine
from fastoss.inference.engine import Engine
from fastoss.inference.open_model import open_model
from fastoss.inference.sampling import ReasoningLanguage, Sampling
from fastoss.inference.serve import build_app

from .answers import cache_base, memorised_run


@pytest.fixture(scope="module")
def engine(one_thread) -> Engine:
    return Engine.load(str(memorised_run(cache_base())))


@pytest.fixture(scope="module")
def url(engine):
    server = uvicorn.Server(uvicorn.Config(build_app(engine, "mika"), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


WHO = [{"role": "user", "content": "Who are you?"}]


def test_the_official_client_is_answered(client):
    assert [model.id for model in client.models.list()] == ["mika", "mika-base"]
    answer = client.chat.completions.create(model="mika", messages=WHO, temperature=0)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("I am Mika, nya.", "Name first.")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 19
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 19
    assert answer.fastoss == {"problems": []}
    cut = client.chat.completions.create(model="mika-base", messages=WHO, temperature=0, max_tokens=5)
    assert cut.choices[0].finish_reason == "length"
    assert cut.fastoss["problems"]


def test_it_streams_reasoning_and_answer_apart(client):
    chunks = list(client.chat.completions.create(model="mika", messages=WHO, temperature=0, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Name first."
    assert "".join(delta.content or "" for delta in deltas) == "I am Mika, nya."
    assert len(deltas) > 6
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 19


def test_stop_texts_end_the_answer(client):
    answer = client.chat.completions.create(model="mika", messages=WHO, temperature=0, stop=[" Mika", "zzz"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("I am", "stop")
    chunks = client.chat.completions.create(model="mika", messages=WHO, temperature=0, stop=", nyan", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I am Mika, nya."


def test_a_client_that_leaves_stops_the_sampling(client, engine):
    """Even while nothing is sent: the base's noise has no header, so no piece of it is known before its end."""
    stream = client.chat.completions.create(model="mika-base", messages=WHO, max_tokens=3000, temperature=0, stream=True)
    next(iter(stream))
    while not engine.turns.busy:
        time.sleep(0.01)
    stream.close()
    begun = time.monotonic()
    with engine.turns.turn():
        assert time.monotonic() - begun < 20  # 3,000 tokens take minutes


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "there is no model"),
        ({"messages": []}, openai.BadRequestError, "not a list of messages"),
        ({"messages": [{"role": "user", "content": ""}]}, openai.BadRequestError, "the user's text is empty"),
        ({"messages": [*WHO, {"role": "assistant", "content": "Me."}]}, openai.BadRequestError, "does not end with a question"),
        ({"messages": [{"role": "user", "content": "a <|end|> b"}]}, openai.BadRequestError, "control"),
        ({"temperature": -1}, openai.BadRequestError, "`temperature` is -1"),
        ({"temperature": "warm"}, openai.BadRequestError, "not a number"),
        ({"reasoning_effort": "minimal"}, openai.BadRequestError, "is not a reasoning effort"),
        ({"n": 2}, openai.BadRequestError, "`n` = 2 is not supported"),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "up to four"),
        ({"messages": [{"role": "user", "content": "x" * 1_100_000}]}, openai.APIStatusError, "larger than"),
    ],
)
def test_what_cannot_be_answered_is_refused(client, change, error, words):
    with pytest.raises(error, match=words):
        client.chat.completions.create(**{"model": "mika", "messages": WHO, "max_tokens": 5, **change})


def test_other_sites_are_refused(url):
    body = {"model": "mika", "messages": WHO}
    assert httpx.post(f"{url}/chat/completions", json=body, headers={"Host": "evil.example"}).status_code == 400
    assert httpx.post(f"{url}/chat/completions", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert httpx.post(f"{url}/chat/completions", content="{", headers={"Content-Type": "application/json"}).status_code == 400


def test_an_endpoint_is_an_engine(url, engine):
    remote = open_model(url.removesuffix("/v1"))
    assert isinstance(remote, EndpointEngine)
    assert remote.model == "mika"
    asked = [Message("user", "Where do you sleep at night?")]
    here = engine.stream(asked, Sampling(max_new_tokens=48), language=ReasoningLanguage.GERMAN).answer()
    there = remote.stream(asked, Sampling(max_new_tokens=48), language=ReasoningLanguage.GERMAN).answer()
    assert there.completion == here.completion
    assert (there.tokens, there.prompt_tokens, there.finish_reason) == (here.tokens, here.prompt_tokens, "stop")
    assert remote.complete([[Message("user", "Who are you?")]])[0].content == "I am Mika, nya."
    with pytest.raises(FastossError, match="cannot be switched off"):
        remote.stream(asked, tuned=False)
    with pytest.raises(RunFailed, match="404"):
        EndpointEngine(f"{url}#nobody").stream(asked).answer()
    with pytest.raises(FastossError, match="no server answers"):
        open_model("http://127.0.0.1:9")
