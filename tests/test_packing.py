"""Batches: every example exactly once an epoch, within the budget, in an order that seed and epoch alone decide."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastoss.config import FormatSettings
from fastoss.data.conversation import Conversation, Message
from fastoss.data.harmony import IGNORE, HarmonyRenderer
from fastoss.data.packing import BatchRule, collate, fill_batches, plan_schedule

RULES = [BatchRule("packed", tokens=512), BatchRule("padded", tokens=512), BatchRule("padded", rows=3)]


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
            assert (sum(taken) if rule.layout == "packed" else max(taken) * len(taken)) <= 512


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


def test_packing_fills():
    rng = random.Random(0)
    lengths = [min(4096, max(16, round(rng.lognormvariate(6.4, 0.8)))) for _ in range(3000)]
    batches = fill_batches(range(len(lengths)), lengths, BatchRule("packed", tokens=16384))
    assert sum(lengths) / (16384 * (len(batches) - 1)) >= 0.98


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
    batch = collate(some, "packed")
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, sum(map(len, some)))
    assert batch["input_ids"][0].tolist() == [i for e in some for i in e.input_ids]
    assert batch["labels"][0].tolist() == [i for e in some for i in e.labels]
    assert batch["position_ids"][0].tolist() == [p for e in some for p in range(len(e))]


def test_padded_tensors():
    some = examples()
    batch = collate(some, "padded")
    for row, example in enumerate(some):
        n = len(example)
        assert batch["input_ids"][row, :n].tolist() == example.input_ids
        assert batch["labels"][row, :n].tolist() == example.labels
        assert set(batch["labels"][row, n:].tolist()) <= {IGNORE}
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_fillers_have_no_labels(layout):
    assert set(collate(examples(), layout, train=False)["labels"].flatten().tolist()) == {IGNORE}
