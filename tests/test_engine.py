"""The engine: its tokens are plain `generate`'s, whatever is cached, switched off, cancelled or asked at once."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from fastoss.data.conversation import Message
from fastoss.data.formats.prompts import row_to_asked
from fastoss.data.harmony import parse_completion
from fastoss.data.reading.rows import Row
from fastoss.errors import FastossError
from fastoss.inference.engine import Engine
from fastoss.inference.sampling import Question, ReasoningLanguage, Sampling, asked_language, in_language
from fastoss.inference.turns import Busy, Turns

from .answers import ROWS, cache_base, memorised_run

GREEDY = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def engine(one_thread) -> Engine:
    return Engine.load(str(memorised_run(cache_base())))


def user(text: str) -> Message:
    return Message("user", text)


def plain_tokens(engine: Engine, messages: list[Message], sampling: Sampling = GREEDY) -> list[int]:
    """What transformers' `generate` samples by itself, with its own cache."""
    prompt = engine.prompt_ids(Question(tuple(messages)))
    arguments = sampling.generate_arguments()
    with torch.no_grad():
        output = engine.model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **arguments)
    return output[0, len(prompt) :].tolist()


def streamed(engine: Engine, messages: list[Message], **how):
    reply = engine.stream(messages, how.pop("sampling", GREEDY), **how)
    reply.answer()
    return reply


def same(reply, tokens: list[int]) -> bool:
    """The channels and the count say the same as the tokens; 100,000 random logits leave no room for chance."""
    ours, theirs = reply.completion(), parse_completion(tokens)
    return (ours.thinking, ours.content, ours.problems, reply.tokens) == (theirs.thinking, theirs.content, theirs.problems, len(tokens))


def test_tokens_are_those_of_plain_generate_over_the_turns_of_a_chat(engine):
    """Later turns reuse what earlier ones computed, past the sliding window; a question that is edited too."""
    history = [user("Tell me about the harbour and all its boats. " * 16), Message("assistant", "There are many."), user("Who are you?")]
    assert len(engine.prompt_ids(Question(tuple(history)))) > engine.model.config.sliding_window
    first = streamed(engine, history)
    assert same(first, plain_tokens(engine, history))
    later = [*history, Message("assistant", "I am Mika, nya."), user("And where do you sleep?")]
    second = streamed(engine, later)
    assert second.reused_tokens >= first.prompt_tokens
    assert same(second, plain_tokens(engine, later))
    edited = [*history[:2], user("Who is that?")]
    third = streamed(engine, edited)
    assert first.prompt_tokens - 12 < third.reused_tokens < first.prompt_tokens
    assert same(third, plain_tokens(engine, edited))
    again = streamed(engine, edited)
    assert again.reused_tokens == again.prompt_tokens - 1
    assert same(again, plain_tokens(engine, edited))


def test_it_answers_what_it_learned_and_says_how_it_went(engine):
    reply = engine.stream([user("Who are you?")])
    deltas = list(reply)
    assert "".join(delta.text for delta in deltas if delta.channel == "analysis") == "Name first."
    assert "".join(delta.text for delta in deltas if delta.channel == "final") == "I am Mika, nya."
    assert reply.finish_reason == "stop"
    assert reply.problems == []
    assert reply.tokens == len(plain_tokens(engine, [user("Who are you?")]))
    assert 0 < reply.first_token_seconds < reply.seconds
    cut = streamed(engine, [user("Who are you?")], sampling=Sampling(max_new_tokens=3))
    assert (cut.finish_reason, cut.tokens, cut.completion().problems) == ("length", 3, ["no answer"])


def test_base_and_tuned_come_from_one_loaded_model(engine):
    """With the adapter off its tokens are those of the base loaded by itself; then it is the tuned one again."""
    base = Engine.load("tiny")
    asked = [user("Who are you?")]
    off = streamed(engine, asked, tuned=False)
    assert off.problems
    assert same(off, plain_tokens(base, asked))
    on = streamed(engine, asked)
    assert on.completion().content == "I am Mika, nya."
    assert on.reused_tokens < on.prompt_tokens or on.reused_tokens == 0
    assert engine.complete([asked], GREEDY, tuned=False)[0].problems == off.completion().problems
    with pytest.raises(FastossError, match="no adapter to switch off"):
        base.stream(asked, GREEDY, tuned=False)


def test_keys_of_base_and_tuned_are_kept_apart(engine):
    asked = [user("What is 2+2?")]
    streamed(engine, asked)
    streamed(engine, asked, tuned=False)
    more = [*asked, Message("assistant", "Four, nya."), user("And doubled?")]
    assert streamed(engine, more).completion().content == "Eight!"
    assert same(streamed(engine, more), plain_tokens(engine, more))


def test_a_reply_is_cancelled_within_a_token(engine):
    """From another thread, by the reader, and before it has begun; the model is free afterwards."""
    reply = engine.stream([user("Tell me everything at once")], Sampling(max_new_tokens=3000), tuned=False)
    reader = threading.Thread(target=list, args=(reply,))
    reader.start()
    while reply.tokens < 2:
        time.sleep(0.01)
    reply.cancel()
    reader.join()
    assert reply.finish_reason == "cancelled"
    assert 2 <= reply.tokens < 300
    read = engine.stream([user("Where do you sleep at night?")], GREEDY, language=ReasoningLanguage.GERMAN)
    next(read)
    read.close()
    assert read.finish_reason == "cancelled"
    assert read.tokens < 24
    with engine.stream([user("Who are you?")]) as unread:
        pass
    assert unread.tokens == 0
    assert streamed(engine, [user("Who are you?")]).completion().content == "I am Mika, nya."


def test_several_threads_are_answered_each_with_its_own(engine):
    asked = [("Who are you?", "I am Mika, nya."), ("你是谁?", "我是米卡喵。"), ("What is 2+2?", "Four, nya.")] * 3
    found: list[tuple[str, str]] = []

    def ask(text: str) -> None:
        found.append((text, engine.stream([user(text)], GREEDY).answer().completion.content))

    threads = [threading.Thread(target=ask, args=(text,)) for text, _ in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(asked)


def test_turns_go_round_in_the_order_of_coming_and_a_full_queue_says_so():
    turns = Turns(limit=2)
    order: list[int] = []
    given_up = threading.Event()

    def come(number: int) -> None:
        with turns.turn(given_up if number == 1 else None) as ours:
            if ours:
                order.append(number)

    threads = [threading.Thread(target=come, args=(number,)) for number in range(3)]
    with turns.turn():
        for waiting, thread in enumerate(threads[:2]):
            thread.start()
            while turns.waiting == waiting:
                time.sleep(0.001)
        with pytest.raises(Busy, match="2 questions are waiting already"), turns.turn():
            pass
        given_up.set()  # the second leaves, so the third fits
        while turns.waiting == 2:
            time.sleep(0.001)
        threads[2].start()
        while turns.waiting == 1:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == [0, 2]


def test_reasoning_language_is_asked_as_it_was_trained(engine):
    trained = row_to_asked(Row(ROWS[2], "rows:3")).messages
    bare = [message for message in trained if message.role != "system"]
    question = Question(tuple(bare), language=ReasoningLanguage.GERMAN)
    assert engine.prompt_ids(question) == engine.prompt_ids(Question(trained))
    reply = streamed(engine, bare, language=ReasoningLanguage.GERMAN, sampling=Sampling(max_new_tokens=60))
    assert reply.completion().thinking == ROWS[2]["messages"][2]["thinking"]
    system = in_language([Message("system", "reasoning language: French\n\nBe kind."), user("Hi")], ReasoningLanguage.named("german"))
    assert system[0].content == "reasoning language: German\n\nBe kind."
    assert asked_language(system) == ReasoningLanguage.GERMAN
    assert asked_language([Message("system", "Be kind."), user("Hi")]) is None
    with pytest.raises(FastossError, match="Klingon"):
        ReasoningLanguage.named("Klingon")


def test_effort_is_in_the_prompt_and_others_are_refused(engine):
    low, high = (engine.prompt_ids(Question((user("Hi"),), effort)) for effort in ("low", "high"))
    assert low != high
    with pytest.raises(FastossError, match="“extreme” is not a reasoning effort"):
        engine.stream([user("Hi")], GREEDY, "extreme")
    with pytest.raises(FastossError, match="does not end with a question"):
        engine.stream([user("Hi"), Message("assistant", "Hello")], GREEDY)
    with pytest.raises(FastossError, match="tokens, the model reads"):
        engine.stream([user("word " * (engine.context_length + 1))], GREEDY)


def test_sampling_follows_its_seed_and_its_settings(engine):
    asked = [user("Tell me more")]
    warm = Sampling(temperature=1.5, max_new_tokens=12, seed=7)
    one, other = (streamed(engine, asked, sampling=warm, tuned=False) for _ in range(2))
    assert one.completion() == other.completion()
    seeds = {streamed(engine, asked, sampling=Sampling(1.5, 12, seed), tuned=False).completion().content for seed in range(3)}
    assert len(seeds) > 1
    narrow = streamed(engine, asked, sampling=Sampling(1.5, 12, 7, top_p=1e-6), tuned=False)
    assert narrow.completion() == streamed(engine, asked, sampling=Sampling(max_new_tokens=12), tuned=False).completion()
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"repetition_penalty": 0}, {"max_new_tokens": 0}, {"temperature": float("nan")}):
        with pytest.raises(FastossError, match=next(iter(wrong))):
            Sampling(**wrong)


def test_a_batch_gives_what_single_questions_give(engine):
    asked = [[user(row["messages"][0]["content"])] for row in (ROWS[0], ROWS[1], ROWS[3])]
    together = engine.complete(asked, GREEDY)
    alone = [streamed(engine, chat).completion() for chat in asked]
    assert together == alone
    for one, other in itertools.pairwise(engine.answers([Question(tuple(chat)) for chat in asked], GREEDY)):
        assert one.seconds == other.seconds
