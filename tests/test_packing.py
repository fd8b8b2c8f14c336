"""Batches: every example exactly once an epoch, within the budget, in an order that seed and epoch alone decide."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastoss.config import CHANNELS, FormatSettings
from fastoss.data.conversation import Conversation, Message
from fastoss.data.harmony import IGNORE, HarmonyRenderer
from fastoss.data.packing import BatchRule, collate, fill_batches, plan_schedule

RULES = [BatchRule("packed", tokens=512), BatchRule("padded", rows=3)]


def schedule(lengths, rule, **changes):
    arguments = {"epochs": 2, "max_steps": 0, "batches_per_step": 1, "ranks": 1, "seed": 1} | changes
    return plan_schedule(lengths, rule, **arguments)


@settings(deadline=None)
@given(st.lists(st.integers(1, 512), min_size=1, max_size=200), st.sampled_from(RULES))
def test_every_example_once_within_the_budget(lengths, rule):
    batches = fill_batches(range(len(lengths)), lengths, rule)
    assert sorted(i for members in batches for i in members) == list(range(len(lengths)))
    for members in batches:
        taken = [lengths[i] for i in members]
        if rule.rows:
            assert len(members) <= rule.rows
        else:
            assert sum(taken) <= 512


@pytest.mark.parametrize("rule", RULES)
def test_epochs_have_their_own_order_from_the_seed(rule):
    rng = random.Random(0)
    lengths = [rng.randint(20, 200) for _ in range(60)]
    plan = schedule(lengths, rule)
    assert plan == schedule(lengths, rule)
    assert plan != schedule(lengths, rule, seed=2)
    first, second = plan.batches[: plan.epoch_ends[0]], plan.batches[plan.epoch_ends[0] :]
    for epoch in (first, second):
        assert sorted(i for members in epoch for i in members) == list(range(60))
    assert first != second


def chat_lengths(count):
    rng = random.Random(0)
    return [min(4096, max(16, round(rng.lognormvariate(6.4, 0.8)))) for _ in range(count)]


@pytest.mark.parametrize("budget", [4096, 8192, 16384])
def test_packing_fills(budget):
    lengths = chat_lengths(3000)
    batches = fill_batches(range(len(lengths)), lengths, BatchRule("packed", tokens=budget))
    assert sum(lengths) / (budget * len(batches)) >= 0.98


def test_a_million_lengths_are_packed_in_seconds():
    lengths = chat_lengths(1_000_000)
    begun = time.process_time()
    plan = schedule(lengths, BatchRule("packed", tokens=16384), epochs=1, batches_per_step=8, ranks=8)
    assert time.process_time() - begun < 10
    assert sum(map(len, plan.batches)) == 1_000_000 + plan.fillers


def test_ranks_get_batches_of_like_cost():
    rng = random.Random(1)
    lengths = [rng.choice([100, 200, 400]) for _ in range(30_000)] + [30_000] * 200
    rng.shuffle(lengths)
    plan = schedule(lengths, BatchRule("packed", tokens=32_768), epochs=1, batches_per_step=4, ranks=4)

    def spread(batches):
        costs = [sum(lengths[i] ** 2 for i in members) for members in batches]
        steps = [costs[i : i + 4] for i in range(0, len(costs) - 4, 4)]
        return sum(max(step) - min(step) for step in steps) / sum(max(step) for step in steps)

    shuffled = list(plan.batches)
    rng.shuffle(shuffled)
    assert spread(plan.batches) < 0.05 < spread(shuffled)


def test_what_a_step_holds_hangs_not_on_the_ranks():
    lengths = chat_lengths(500)
    rule = BatchRule("packed", tokens=4096)
    one, four = (schedule(lengths, rule, batches_per_step=4, ranks=ranks) for ranks in (1, 4))
    assert one.batches == four.batches[: len(one.batches)]


def test_weights_of_sources():
    rule = BatchRule("padded", rows=1)
    weights = [1.0] * 4 + [2.0] * 3 + [0.25] * 8
    plan = schedule([10] * 15, rule, epochs=4, weights=weights)
    epochs = [plan.batches[a:b] for a, b in zip([0, *plan.epoch_ends], plan.epoch_ends, strict=False)]
    assert len(epochs) == 4
    for epoch in epochs:
        seen = sorted(members[0] for members in epoch)
        assert [i for i in seen if i < 7] == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6]
        assert len(seen) == 12
    # A quarter of them each epoch: over four epochs each exactly once.
    assert sorted(i for epoch in epochs for (i,) in epoch if i >= 7) == list(range(7, 15))


def test_too_long_for_the_budget():
    with pytest.raises(ValueError, match="600 tokens does not fit into a batch of 512"):
        fill_batches([0, 1], [5, 600], RULES[0])


def test_max_steps_and_fractions_of_epochs():
    lengths = [10] * 10
    plan = schedule(lengths, BatchRule("padded", rows=2), max_steps=7, batches_per_step=2)
    assert (len(plan.batches), plan.epoch_ends) == (14, [5, 10, 14])
    assert plan.epoch(14) == 2.8
    plan = schedule(lengths, BatchRule("padded", rows=2), epochs=1.4)
    assert plan.epoch_ends == [5, 7]
    assert plan.epoch(5) == 1.0
    assert plan.epoch(6) == 1.2
    assert plan.epoch(7) == 1.4


def test_ranks_get_as_many_batches_and_fillers_carry_no_loss():
    plan = schedule([10] * 5, BatchRule("padded", rows=1), epochs=1, ranks=2)
    assert len(plan.batches) == 6
    assert plan.fillers == 1


def examples():
    renderer = HarmonyRenderer(FormatSettings())
    chats = [("hi", "there", None), ("你好", "喵 喵 喵", "想一想"), ("a longer question, much longer", "ok", None)]
    return [renderer.render_examples(Conversation((Message("user", q), Message("assistant", a, t))))[0] for q, a, t in chats]


def test_packed_tensors():
    some = examples()
    batch = collate([[e] for e in some], "packed")
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, sum(map(len, some)))
    assert batch["input_ids"][0].tolist() == [i for e in some for i in e.input_ids]
    assert batch["labels"][0].tolist() == [i for e in some for i in e.labels]
    assert batch["loss_weights"][0].tolist() == [float(i != IGNORE) for e in some for i in e.labels]
    channels = [CHANNELS.index(s.channel) + 1 if s.trained else 0 for e in some for s in e.spans for _ in range(s.start, s.end)]
    assert batch["channels"][0].tolist() == channels
    assert batch["position_ids"][0].tolist() == [p for e in some for p in range(len(e))]


def test_padded_tensors():
    some = examples()
    batch = collate([[e] for e in some], "padded")
    for row, example in enumerate(some):
        n = len(example)
        assert batch["input_ids"][row, :n].tolist() == example.input_ids
        assert batch["labels"][row, :n].tolist() == example.labels
        assert set(batch["labels"][row, n:].tolist()) <= {IGNORE}
        assert set(batch["loss_weights"][row, n:].tolist()) | set(batch["channels"][row, n:].tolist()) <= {0}
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_fillers_have_no_labels(layout):
    batch = collate([[e] for e in examples()], layout, train=False)
    assert set(batch["labels"].flatten().tolist()) == {IGNORE}
    assert batch["loss_weights"].sum() == 0


def test_fractions_that_do_not_divide_the_rows_take_turns():
    """Half of three examples: two in one epoch, one in the next, each once in both."""
    plan = schedule([10] * 3, BatchRule("padded", rows=1), epochs=2, weights=[0.5] * 3)
    assert plan.epoch_ends == [2, 3]
    assert sorted(i for (i,) in plan.batches) == [0, 1, 2]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_weights_of_channels_reach_the_batch(layout):
    renderer = HarmonyRenderer(FormatSettings(train_on={"analysis": 0.5, "final": 2.0}))
    (example,) = renderer.render_examples(Conversation((Message("user", "u"), Message("assistant", "a", "t"))))
    batch = collate([[example]], layout)
    said = {(CHANNELS[c - 1] if c else None, w) for c, w in zip(batch["channels"][0].tolist(), batch["loss_weights"][0].tolist(), strict=True)}
    assert said == {(None, 0.0), ("analysis", 0.5), ("final", 2.0)}
