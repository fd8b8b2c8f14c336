"""Trees: examples that share their beginning are trained in one pass, and nothing but the time it takes is different."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastoss.config import CHANNELS, FormatSettings
from fastoss.data.conversation import Conversation, Message, ToolCall
from fastoss.data.harmony import Example, HarmonyRenderer, Span
from fastoss.data.trees import build_tree, collate_trees
from fastoss.model.attention import register_packed_attention
from fastoss.model.attention_layout import DocumentLayout

from .attention_helpers import WINDOW, small_model, sum_of_losses

pytestmark = pytest.mark.usefixtures("one_thread")

TURNS = (
    Message("user", "Who are you?"), Message("assistant", "Mika, nya.", "Name first."),
    Message("user", "Sing"), Message("assistant", "La la la."),
    Message("user", "Bye"), Message("assistant", "Sleep well.", "They leave."),
)  # fmt: skip


def rendered(*messages: Message, **settings) -> list[Example]:
    return HarmonyRenderer(FormatSettings(**settings)).render_examples(Conversation(messages))


def example(ids: list[int], prompt: int, weight: float = 1.0) -> Example:
    """`prompt` tokens of context, then trained ones."""
    spans = Span("user", None, 0, prompt, 0.0), Span("assistant", "final", prompt, len(ids), weight)
    return Example(ids, spans, Conversation(()), prompt)


def trained_of(batch, number: int | None = None) -> list[tuple[tuple[int, ...], int, float, int]]:
    """Each trained token as (all that it sees, itself, weight, channel), read off a batch with no help of the layout's code."""
    ids, positions = batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()
    path: list[int] = []
    trunk: list[int] = []
    in_trunk = True
    trained = []
    for place, (token, position) in enumerate(zip(ids, positions, strict=True)):
        if position == 0:
            trunk, in_trunk = [], True
            path = trunk
        elif position != len(path):
            in_trunk = False
            path = trunk[:position]
        if batch["labels"][0, place] != -100 and (number is None or batch["examples"][0, place] == number):
            assert batch["labels"][0, place] == token
            trained.append((tuple(path), token, float(batch["loss_weights"][0, place]), int(batch["channels"][0, place])))
        path.append(token)
        assert in_trunk == (path is trunk)
    return sorted(trained)


def trained_alone(one: Example) -> list[tuple[tuple[int, ...], int, float, int]]:
    ids = list(one.input_ids)
    spans = [span for span in one.spans if span.trained]
    return sorted((tuple(ids[:i]), ids[i], s.weight, CHANNELS.index(s.channel) + 1) for s in spans for i in range(s.start, s.end))


def expanded(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Examples end to end, each with all that comes before it, made without the code of trees."""
    row = {"input_ids": [], "labels": [], "loss_weights": [], "channels": [], "position_ids": []}
    for one in examples:
        row["input_ids"] += one.input_ids
        row["labels"] += [-100, *one.labels[1:]]
        row["position_ids"] += range(len(one))
        for span in one.spans:
            row["loss_weights"] += [span.weight] * (span.end - span.start)
            row["channels"] += [CHANNELS.index(span.channel) + 1 if span.trained else 0] * (span.end - span.start)
    kinds = {"loss_weights": torch.float32, "channels": torch.uint8}
    return {name: torch.tensor([values], dtype=kinds.get(name, torch.int64)) for name, values in row.items()}


CHAINS = {
    "chat": rendered(*TURNS),
    "no reasoning": rendered(*(m if m.role == "user" else Message("assistant", m.content) for m in TURNS)),
    "weights": rendered(*TURNS, train_on={"analysis": 0.5, "final": 1.0}),
    "tools": rendered(
        Message("user", "Weather?"),
        Message("assistant", "", "Ask.", ToolCall("weather", '{"where":"here"}')),
        Message("tool", "rain", name="weather"),
        Message("assistant", "Rain.", "It says rain."),
        Message("user", "And there?"),
        Message("assistant", "Wait.", "Again.", ToolCall("weather", '{"where":"there"}')),
        Message("tool", "sun", name="weather"),
        Message("assistant", "Sun.", "It says sun."),
    ),
    "one turn": rendered(*TURNS[:2]),
    "pair": [*rendered(*TURNS[:4]), *rendered(*TURNS[:3], Message("assistant", "La la no."))][1::2],
    "the same twice": [*rendered(*TURNS[:2]), *rendered(*TURNS[:2])],
}


@pytest.mark.parametrize("name", CHAINS)
def test_every_token_is_trained_once_after_what_comes_before_it(name):
    examples = CHAINS[name]
    tree = build_tree(examples)
    batch = collate_trees([tree])
    for number, one in enumerate(examples):
        assert trained_of(batch, number) == trained_alone(one)
    assert tree.trained_tokens == sum(one.trained_tokens for one in examples) == int((batch["labels"] != -100).sum())
    assert tree.expanded_tokens == sum(map(len, examples))
    assert len(tree) == batch["input_ids"].size <= tree.expanded_tokens


def test_what_a_tree_costs():
    chat, plain, tools = (build_tree(CHAINS[name]) for name in ("chat", "no reasoning", "tools"))
    last = len(CHAINS["chat"][-1])
    second, first = chat.segments[1:]  # "La la la." without reasoning, then Mika's with it
    assert (len(chat), len(second)) == (last + len(first) + len(second), 2)
    assert len(first) == len(CHAINS["chat"][0]) - CHAINS["chat"][0].prompt_length  # its first, <|channel|>, stands in the trunk
    assert [len(branch) for branch in plain.segments[1:]] == [2, 2]  # the token before <|return|>, and <|return|>
    assert [branch.fork for branch in plain.segments] == [0, *sorted((b.fork for b in plain.segments[1:]), reverse=True)]
    assert len(tools.segments) == 3  # the second chain's call stands in the trunk with its reasoning
    assert build_tree(CHAINS["one turn"]).saved == 0
    pair = build_tree(CHAINS["pair"])
    assert pair.segments[1].fork == CHAINS["pair"][0].prompt_length - 1  # both train what their answers have in common
    assert pair.saved > 0.3


def test_rows_of_trees_are_laid_out_by_their_positions():
    trees = [build_tree(CHAINS[name]) for name in ("chat", "one turn", "pair")]
    batch = collate_trees(trees)
    layout = DocumentLayout.from_positions(torch.from_numpy(batch["position_ids"]))
    assert layout.lengths == tuple(map(len, trees))
    assert layout.has_branches
    assert batch["examples"].max() == 3 + 1 + 2 - 1
    assert {values.shape for values in batch.values()} == {(1, sum(map(len, trees)))}
    filler = collate_trees(trees, train=False)
    assert (filler["labels"] == -100).all()
    assert filler["loss_weights"].sum() == filler["channels"].sum() == 0


def test_trees_without_other_branches_are_laid_as_examples_are():
    plain = [CHAINS["one turn"][0], CHAINS["chat"][1]]
    ours, theirs = collate_trees([build_tree([one]) for one in plain]), expanded(plain)
    assert ours.keys() == theirs.keys() | {"examples"}
    for name, values in theirs.items():
        assert (ours[name] == values.numpy()).all(), name
        assert ours[name].dtype == values.numpy().dtype, name


def test_examples_with_nothing_in_common_are_refused():
    with pytest.raises(ValueError, match="begin with the same token"):
        build_tree([example([1, 2, 3], 1), example([4, 2, 3], 1)])


@st.composite
def families(draw):
    """Examples that share beginnings by chance, of few different tokens."""
    token = st.integers(1, 3)
    base = draw(st.lists(token, min_size=4, max_size=12))
    examples = []
    for _ in range(draw(st.integers(1, 4))):
        shared = draw(st.integers(1, len(base)))
        ids = [9, *base[:shared], *draw(st.lists(token, max_size=5))]
        examples.append(example(ids, draw(st.integers(1, len(ids) - 1)), draw(st.sampled_from([0.5, 1.0]))))
    return examples


@settings(max_examples=100, deadline=None)
@given(st.lists(families(), min_size=1, max_size=3))
def test_any_tree_trains_what_its_examples_train(groups):
    batch = collate_trees([build_tree(group) for group in groups])
    examples = [one for group in groups for one in group]
    for number, one in enumerate(examples):
        assert trained_of(batch, number) == trained_alone(one)


# --- in the model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock():
    return small_model("eager")


@pytest.fixture(scope="module")
def packed(stock):
    model = copy.deepcopy(stock)
    model.get_base_model().config._attn_implementation = register_packed_attention()
    return model


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(1, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def chat_of(history: list[int], turns: list[tuple[int, int]], seed: int) -> list[Example]:
    """Turns as (tokens of the history before, tokens of the target); weights differ from turn to turn."""
    return [example(history[:n] + random_ids(m, seed + i), n, 0.5 + i) for i, (n, m) in enumerate(turns)]


def check_exact(stock, packed, trees, **arguments):
    """Loss and every LoRA gradient of a row of trees against their examples one by one under stock transformers."""
    batch = {name: torch.from_numpy(values) for name, values in collate_trees([build_tree(examples) for examples in trees]).items()}
    ours = sum_of_losses(packed, batch["labels"], batch["loss_weights"], **{n: batch[n] for n in ("input_ids", "position_ids")}, **arguments)
    our_gradients = gradients(packed, ours)
    theirs = 0
    for one in (one for examples in trees for one in examples):
        alone = expanded([one])
        theirs = theirs + sum_of_losses(stock, alone["labels"], alone["loss_weights"], input_ids=alone["input_ids"])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    their_gradients = gradients(stock, theirs)
    assert len(our_gradients) == len(their_gradients) > 30
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=0, atol=1e-5)


SHORT, LONG = random_ids(WINDOW - 3, 1), random_ids(5 * WINDOW, 2)
ROWS = {
    "reference": [chat_of(LONG, [(12, 9), (26, 15), (40, 11)], 10)],
    "trunk shorter than the window": [chat_of(SHORT, [(2, 4), (5, 3)], 20)],
    "forks at both ends": [chat_of(LONG, [(1, 2), (40, 1), (39, 20)], 30)],
    "a pair": [[example(LONG + random_ids(9, 40), 40), example(LONG + random_ids(14, 41), 40)]],
    "several": [
        chat_of(LONG, [(12, 9), (26, 15)], 50),
        [example(random_ids(3, 60), 1)],
        chat_of(SHORT, [(2, 14), (5, 3)], 70),
        [example(SHORT + random_ids(9, 80), 5), example(SHORT + random_ids(2, 81), 5)],
    ],
}


@pytest.mark.parametrize("name", ROWS)
def test_tree_equals_the_expanded_examples(stock, packed, name):
    check_exact(stock, packed, ROWS[name])


def test_tree_equals_the_expanded_examples_with_a_layout_and_recomputation(stock, packed):
    batch = collate_trees([build_tree(examples) for examples in ROWS["several"]])
    layout = DocumentLayout.from_positions(torch.from_numpy(batch["position_ids"]))
    packed.enable_input_require_grads()
    packed.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        check_exact(stock, packed, ROWS["several"], documents=layout)
    finally:
        packed.gradient_checkpointing_disable()


@pytest.mark.parametrize("backend", ["transformers", "unsloth"])
def test_a_rendered_chat_equals_its_expanded_examples(backend):
    """Real tokens, the embedded tiny model with its window of 128, float32: a trunk longer than the window, and a pair."""
    from fastoss.config import LoraSettings, ModelConfig
    from fastoss.model.backend import attach_lora, load_model, plan_model
    from fastoss.model.head import TrainedTokenLoss

    if backend == "unsloth" and importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    config = ModelConfig(name="tiny", precision="float32", max_length=1024, backend=backend)
    plan = plan_model(config, gpu=False)
    model, _, _ = attach_lora(load_model(config, plan), LoraSettings(r=4), plan)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    long = rendered(TURNS[0], Message("assistant", "word " * 60, "Name first."), TURNS[2], Message("assistant", "la " * 80), *TURNS[4:])
    groups = [long, CHAINS["pair"]]
    trees = [build_tree(group) for group in groups]
    assert len(trees[0].segments[0]) > 200

    def trained(batch) -> tuple[float, dict[str, torch.Tensor]]:
        hidden = model.get_base_model().model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        head = TrainedTokenLoss(len(CHANNELS))
        head.mark(batch["loss_weights"], batch["channels"])
        loss = head.chunked(hidden.last_hidden_state, model.get_base_model().lm_head.weight, labels=batch["labels"])[0]
        return loss.item(), gradients(model, loss)

    tree_loss, tree_gradients = trained({name: torch.from_numpy(values) for name, values in collate_trees(trees).items()})
    loss, expected = trained(expanded([one for group in groups for one in group]))
    assert tree_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(tree_gradients[name], gradient, rtol=0, atol=1e-5)
