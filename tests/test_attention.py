"""Packed attention: every kernel computes what the reference computes, and a packed document is as if it were alone."""

from __future__ import annotations

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastoss.errors import FastossError
from fastoss.model import attention, attention_kernels, attention_layout
from fastoss.model.attention import choose_kernel, kernel_line, register_packed_attention
from fastoss.model.attention_layout import DocumentLayout

from .attention_helpers import check_kernel, plain_flash, random_layout, small_model, sum_of_losses

pytestmark = pytest.mark.usefixtures("one_thread")


class Doc(NamedTuple):
    """A trunk's length, and its branches as (fork, length), the latest fork first."""

    trunk: int
    branches: tuple[tuple[int, int], ...] = ()


@st.composite
def docs(draw, branches=True):
    trunk = draw(st.integers(1, 30))
    forks = draw(st.lists(st.integers(1, trunk - 1), max_size=3)) if branches and trunk > 1 else []
    return Doc(trunk, tuple((fork, draw(st.integers(1, 9))) for fork in sorted(forks, reverse=True)))


ROWS = st.lists(docs(), min_size=1, max_size=5)
PLAIN_ROWS = st.lists(docs(branches=False), min_size=1, max_size=5)
WINDOWS = st.sampled_from([None, 1, 4, 8, 15])
quick = settings(max_examples=30, deadline=None)


def positions_of(row: list[Doc]) -> torch.Tensor:
    parts = [part for doc in row for part in [torch.arange(doc.trunk), *(fork + torch.arange(n) for fork, n in doc.branches)]]
    return torch.cat(parts)[None]


def seen_by_rule(row: list[Doc], window: int | None) -> torch.Tensor:
    """Who sees whom, from the rule alone: a branch the trunk before its fork and itself, the trunk only the trunk, windows in positions."""
    tokens = []
    for d, doc in enumerate(row):
        for s, (fork, length) in enumerate([(0, doc.trunk), *doc.branches]):
            tokens += [(d, s, fork, fork + i) for i in range(length)]
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q, (doc, segment, fork, position) in enumerate(tokens):
        for k, (other_doc, other_segment, _, other) in enumerate(tokens[: q + 1]):
            related = other_segment == segment or (other_segment == 0 and other < fork)
            seen[q, k] = doc == other_doc and related and (window is None or position - other < window)
    return seen


def tensors(tokens: int, dtype=torch.float64, heads=4, kv_heads=2, seed=0, dim=8):
    random = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, h, tokens, dim, generator=random, dtype=dtype) for h in (heads, kv_heads, kv_heads)]
    return [tensor.requires_grad_() for tensor in (*made, torch.randn(heads, generator=random, dtype=dtype))]


def dense(q, k, v, sinks, seen, scaling):
    """Attention with sinks by its definition: (tokens, heads, head_dim)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = (q @ k.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    weights = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    return (weights @ v)[0].transpose(0, 1)


def assert_same(ours, theirs, inputs, tolerance=1e-10):
    """Same output, same gradient of every input for the same upstream gradient."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(9), dtype=theirs.dtype)
    for one, other in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# --- the layout ------------------------------------------------------------------------------------------------------------


@quick
@given(ROWS, WINDOWS)
def test_layout_sees_what_the_rule_says(row, window):
    layout = DocumentLayout.from_positions(positions_of(row))
    seen = seen_by_rule(row, window)
    assert torch.equal(layout.visible(window), seen)
    assert layout.has_branches == any(doc.branches for doc in row)
    assert list(layout.lengths) == [doc.trunk + sum(n for _, n in doc.branches) for doc in row]
    for parts in layout.parts(5, window):
        for document, first, last, keys in parts:
            places = torch.cat([torch.arange(*run) for run in keys])
            assert torch.equal(layout.visible(window, slice(first, last), keys), seen[first:last, places])
            assert seen[first:last].any(0).nonzero().flatten().tolist() == places.tolist()
            assert document <= places[0]


def from_blocks(mask, tokens: int, block: int) -> torch.Tensor:
    """A block mask spelled out place by place; each block is of one kind, and none that nobody sees is visited."""
    place = torch.arange(tokens)
    asked = mask.mask_mod(0, 0, place[:, None], place[None])
    seen = torch.zeros(tokens, tokens, dtype=torch.int)
    for numbers, indices, whole in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        for q, count in enumerate(numbers[0, 0].tolist()):
            for k in indices[0, 0, q, :count].tolist():
                where = slice(q * block, (q + 1) * block), slice(k * block, (k + 1) * block)
                assert asked[where].any()
                seen[where] += 1 if whole else asked[where].int()
    assert seen.max() <= 1
    return seen.bool()


@quick
@given(ROWS, WINDOWS)
def test_block_mask_is_the_mask_place_by_place(row, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_layout, "BLOCK", 8)
        layout = DocumentLayout.from_positions(positions_of(row))
        assert torch.equal(from_blocks(layout.block_mask(window), layout.tokens, 8), layout.visible(window))


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("row", [[Doc(300), Doc(1), Doc(211)], [Doc(400, ((390, 30), (150, 200))), Doc(77)], [Doc(1024)]])
def test_block_mask_is_torchs_own(row, window):
    from torch.nn.attention.flex_attention import create_block_mask

    layout = DocumentLayout.from_positions(positions_of(row))
    ours = layout.block_mask(window)
    theirs = create_block_mask(ours.mask_mod, None, None, layout.tokens, layout.tokens, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_layout_is_refused_where_positions_jump():
    with pytest.raises(ValueError, match="position 7 at place 3 follows 2 and is beyond the trunk"):
        DocumentLayout.from_positions(torch.tensor([[0, 1, 2, 7, 8]]))


def test_rows_may_begin_anywhere():
    layout = DocumentLayout.from_positions(torch.tensor([[5, 6, 7, 6], [3, 4, 5, 6]]))
    assert (layout.lengths, layout.rows, layout.fork.tolist()) == ((4, 4), 2, [0, 0, 0, 1, 0, 0, 0, 0])
    assert layout.visible(None)[3].tolist() == [True, False, False, True, *[False] * 4]
    assert DocumentLayout.from_positions(torch.tensor([[1, 1, 1, 0, 1, 2]])).lengths == (1, 1, 1, 3)


def test_layout_of_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    layout = DocumentLayout.from_padding(mask)
    assert (layout.lengths, layout.rows, layout.has_branches) == ((2, 3, 4, 1, 5), 3, False)
    assert DocumentLayout.from_padding(torch.tensor([[1, 0, 1]], dtype=torch.bool)) is None


def test_layout_travels():
    layout = DocumentLayout.from_positions(positions_of([Doc(9, ((4, 3),)), Doc(2)]))
    assert layout.to("cpu") is layout
    again = pickle.loads(pickle.dumps(layout))  # a loader's worker hands it over like this
    assert torch.equal(again.visible(4), layout.visible(4))
    assert layout.to("meta").starts.device.type == "meta"
    assert layout.block_mask(4) is layout.block_mask(4)
    assert torch.equal(pickle.loads(pickle.dumps(layout)).visible(4), layout.visible(4))


# --- the kernels -----------------------------------------------------------------------------------------------------------


@quick
@given(ROWS, WINDOWS, st.integers(0, 99), st.sampled_from([3, 128]))
def test_eager_is_exact(row, window, seed, rows):
    layout = DocumentLayout.from_positions(positions_of(row))
    inputs = tensors(layout.tokens, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_kernels, "EAGER_ROWS", rows)
        assert_same(attention_kernels.eager(*inputs, layout, window, 0.3), dense(*inputs, seen_by_rule(row, window), 0.3), inputs)


def test_eager_is_transformers_own_to_the_bit():
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = 2, torch.nn.Parameter(torch.randn(4))
    q, k, v = torch.randn(2, 4, 30, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    bias = torch.zeros(30, 30).masked_fill(torch.ones(30, 30).triu(1).bool(), torch.finfo().min)[None, None]
    theirs = eager_attention_forward(module, q, k, v, bias, scaling=0.25)
    ours = attention_kernels.eager_with_bias(q, k, v, module.sinks, bias, 0.25)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_who_sees_nothing_gets_zeros():
    q, k, v, sinks = tensors(3, torch.float32)
    bias = torch.full((3, 3), torch.finfo().min)
    output, _ = attention_kernels.eager_with_bias(q, k, v, sinks, bias, 1.0)
    assert output.abs().max() == 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(output.sum(), [q, k, v, sinks]))


def test_a_document_is_the_same_bits_whatever_lies_beside_it():
    q, k, v, sinks = (t.detach() for t in tensors(200, torch.float32, dim=16))
    middle = slice(70, 130)
    outputs = []
    for before, after in ((70, 70), (3, 1), (0, 0)):
        parts = [t[:, :, middle.start - before : middle.stop + after] for t in (q, k, v)]
        row = [Doc(n) for n in (before, 60, after) if n]
        layout = DocumentLayout.from_positions(positions_of(row))
        outputs.append(attention_kernels.eager(*parts, sinks, layout, 8, 0.25)[before : before + 60])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@quick
@given(PLAIN_ROWS, WINDOWS, st.integers(0, 99), st.sampled_from([(4, 4), (4, 2), (8, 1)]))
def test_flash_with_sinks_is_exact(row, window, seed, heads):
    """Our half of the kernel, around plain operations in float64: gradients of q, k, v and sinks as autograd has them."""
    layout = DocumentLayout.from_positions(positions_of(row))
    inputs = tensors(layout.tokens, seed=seed, heads=heads[0], kv_heads=heads[1])
    ours = attention_kernels.flash(*inputs, layout, window, 0.3, plain_flash())
    assert_same(ours, dense(*inputs, seen_by_rule(row, window), 0.3), inputs)


def test_flash_takes_frozen_sinks_and_refuses_trees():
    layout = DocumentLayout.from_positions(positions_of([Doc(5)]))
    q, k, v, sinks = tensors(5)
    attention_kernels.flash(q, k, v, sinks.detach(), layout, None, 0.3, plain_flash()).sum().backward()
    assert q.grad.abs().sum() > 0
    with pytest.raises(AssertionError, match="a tree needs a block mask"):
        attention_kernels.flash(q, k, v, sinks, DocumentLayout.from_positions(positions_of([Doc(3, ((1, 2),))])), None, 0.3, plain_flash())


def test_flash_calls_torchs_operations():
    """They have no CPU kernel, but shapes on the meta device: names, order and shapes of what we hand over are held against those."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name.startswith("_flash_attention"):
                names = [argument.name for argument in function._schema.arguments]
                called[name] = dict(zip(names, args, strict=False)) | kwargs
            return function(*args, **(kwargs or {}))

    layout = DocumentLayout.from_positions(positions_of([Doc(4), Doc(3)])).to("meta")
    for window, left, causal in ((None, -1, True), (128, 127, False)):
        inputs = [t.detach().to("meta", torch.bfloat16).requires_grad_() for t in tensors(7)]
        with Watch():
            output = attention_kernels.flash(*inputs, layout, window, 0.5)
            output.sum().backward()
        assert (output.shape, output.dtype) == ((7, 4, 8), torch.bfloat16)
        for half in ("_flash_attention_forward", "_flash_attention_backward"):
            got = called[half]
            assert (got["cum_seq_q"].shape, got["cum_seq_k"].dtype) == ((3,), torch.int32)
            assert (got["max_q"], got["max_k"], got["dropout_p"], got["is_causal"], got["scale"]) == (4, 4, 0.0, causal, 0.5)
            assert (got["window_size_left"], got["window_size_right"]) == (left, 0)
        assert got["logsumexp"].shape == (4, 7)
        assert got["out"] is not output
        assert [t.grad.shape for t in inputs] == [t.shape for t in inputs]


@settings(max_examples=8, deadline=None)
@given(ROWS, WINDOWS)
def test_flex_forward_on_the_cpu(row, window):
    layout = DocumentLayout.from_positions(positions_of(row))
    q, k, v, sinks = (t.detach() for t in tensors(layout.tokens, torch.float32))
    ours = attention_kernels.flex(q, k, v, sinks, layout, window, 0.3)
    torch.testing.assert_close(ours, dense(q, k, v, sinks, seen_by_rule(row, window), 0.3), rtol=1e-5, atol=1e-5)


@quick
@given(ROWS, WINDOWS)
def test_flex_with_sinks_is_exact(row, window):
    """Flex has no backward on a CPU, so the sink's part is held around an operation that has: through output and log-sum-exp."""
    layout = DocumentLayout.from_positions(positions_of(row))
    seen = seen_by_rule(row, window)

    def operation(q, k, v, mask, scale):
        assert mask is layout.block_mask(window)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        logits = (q @ k.transpose(2, 3) * scale).masked_fill(~seen, float("-inf"))
        return logits.softmax(-1) @ v, logits.logsumexp(-1)

    inputs = tensors(layout.tokens)
    assert_same(attention_kernels.flex(*inputs, layout, window, 0.3, operation), dense(*inputs, seen, 0.3), inputs)


def test_flex_is_compiled_for_kinds_of_rows_and_not_for_each():
    """Traced by dynamo as on a GPU, then run as it is: full and windowed layers share a graph, new lengths ask for none."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(flex_attention, backend=backend)

    def operation(q, k, v, mask, scale):
        output, extra = compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True))
        return output, extra.lse

    def run(*lengths):
        layout = DocumentLayout.from_positions(positions_of([Doc(n) for n in lengths]))
        q, k, v, sinks = (t.detach() for t in tensors(layout.tokens, torch.float32))
        for window in (None, 64):
            attention_kernels.flex(q, k, v, sinks, layout, window, 0.3, operation)

    run(200, 40), run(170, 150, 9)
    made = len(graphs)
    run(300, 1), run(5, 6, 7, 180), run(512), run(129), run(90, 400)
    assert (made, len(graphs)) == (2, 2)


def test_flash4_calls_the_interface_as_its_source_says(monkeypatch):
    import sys
    import types

    called = {}

    def flash_attn_varlen_func(q, k, v, **arguments):
        called.update(arguments, shapes=(q.shape, k.shape))
        return q, None

    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    layout = DocumentLayout.from_positions(positions_of([Doc(4), Doc(3)]))
    q, k, v, sinks = tensors(7)
    assert attention_kernels.flash4(q, k, v, sinks, layout, 128, 0.3).shape == (7, 4, 8)
    assert called["shapes"] == ((7, 4, 8), (7, 2, 8))
    assert (called["causal"], called["window_size"], called["max_seqlen_q"]) == (True, (127, 0), 4)
    assert called["learnable_sink"] is sinks


def test_what_holds_kernels_on_a_gpu_runs_here():
    """tests/test_gpu.py's yardstick, around a kernel that is right and one whose sinks are off."""
    for trees, kernel in ((False, lambda *a: attention_kernels.flash(*a, plain_flash())), (True, attention_kernels.eager)):
        layout = random_layout(130, 1, trees=trees)
        assert layout.tokens == 130
        assert layout.has_branches == trees
        check_kernel(kernel, attention_kernels.eager, layout, 16, torch.float32, "cpu", heads=4, kv_heads=2)
    wrong = lambda q, k, v, sinks, *rest: attention_kernels.eager(q, k, v, sinks + 0.01, *rest)  # noqa: E731
    with pytest.raises(AssertionError, match="output: off by"):
        check_kernel(wrong, attention_kernels.eager, layout, 16, torch.float32, "cpu", heads=4, kv_heads=2)


# --- the choice ------------------------------------------------------------------------------------------------------------


def test_kernel_is_chosen_by_the_machine(monkeypatch):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    attention._choose.cache_clear()
    assert choose_kernel(cpu, torch.float32, 64) == ("eager", "no GPU")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "triton")
    for capability, dtype, branches, kernel in (
        ((9, 0), torch.bfloat16, False, "flash"),
        ((9, 0), torch.bfloat16, True, "flex"),
        ((8, 9), torch.float32, False, "flex"),
        ((7, 5), torch.float16, False, "eager"),
    ):
        attention._choose.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert choose_kernel(gpu, dtype, 64, branches).kernel == kernel
    attention._choose.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert kernel_line(gpu, torch.bfloat16, 64) == (
        "attention: flash (torch's own FlashAttention, with the sink put in exactly); trees: flex (trees need a block mask)"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    attention._choose.cache_clear()
    assert choose_kernel(gpu, torch.float32, 64).kernel == "eager"
    attention._choose.cache_clear()


def test_kernel_can_be_named(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("FASTOSS_ATTENTION", "flash")
    assert choose_kernel(cpu, torch.bfloat16, 64).kernel == "flash"
    assert choose_kernel(cpu, torch.bfloat16, 64, branches=True).kernel == "flex"
    monkeypatch.setenv("FASTOSS_ATTENTION", "warp")
    with pytest.raises(FastossError, match='"warp" is not an attention kernel'):
        choose_kernel(cpu, torch.bfloat16, 64)


# --- in the model ----------------------------------------------------------------------------------------------------------

LENGTHS = (1, 5, 40, 9, 1, 23)  # windows of 8 would reach over every border


@pytest.fixture(scope="module")
def stock():
    """transformers' own eager attention, float64, LoRA on attention and experts."""
    return small_model("eager")


@pytest.fixture(scope="module")
def packed(stock):
    model = copy.deepcopy(stock)
    model.get_base_model().config._attn_implementation = register_packed_attention()
    return model


@pytest.fixture(scope="module")
def rows():
    random = torch.Generator().manual_seed(3)
    return [torch.randint(1, 300, (n,), generator=random) for n in LENGTHS]


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_by_one(model, rows):
    return sum(sum_of_losses(model, row[None], input_ids=row[None]) for row in rows if len(row) > 1)


def packed_batch(rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, position_ids, labels: (1, tokens) each, the first label of a document -100."""
    labels = torch.cat([torch.cat([torch.tensor([-100]), row[1:]]) for row in rows])[None]
    return torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None], labels


@pytest.mark.parametrize("handed", ["positions", "documents", "masks", "checkpointed", "reentrant"])
def test_packed_equals_unpacked(stock, packed, rows, handed):
    """Loss and every LoRA gradient, whichever way the layout comes, against separate rows under stock transformers."""
    ids, positions, labels = packed_batch(rows)
    layout = DocumentLayout.from_positions(positions)
    arguments = {"input_ids": ids, "position_ids": positions}
    if handed == "documents":
        arguments["documents"] = layout
    if handed == "masks":
        arguments["attention_mask"] = {"full_attention": layout, "sliding_attention": layout}
    if handed in ("checkpointed", "reentrant"):
        packed.enable_input_require_grads()
        packed.gradient_checkpointing_enable({"use_reentrant": handed == "reentrant"})
    try:
        ours = sum_of_losses(packed, labels, **arguments)
        our_gradients = gradients(packed, ours)
    finally:
        packed.gradient_checkpointing_disable()
    theirs = one_by_one(stock, rows)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    their_gradients = gradients(stock, theirs)
    assert len(our_gradients) == len(their_gradients) > 30
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=0, atol=1e-5)


def test_layout_is_made_once_a_pass(packed, rows, monkeypatch):
    made = []
    original = DocumentLayout.from_positions.__func__
    monkeypatch.setattr(DocumentLayout, "from_positions", classmethod(lambda cls, p: (made.append(1), original(cls, p))[1]))
    ids, positions, labels = packed_batch(rows)
    packed.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        sum_of_losses(packed, labels, input_ids=ids, position_ids=positions).backward()
    finally:
        packed.gradient_checkpointing_disable()
    assert len(made) == 1
    sum_of_losses(packed, labels, input_ids=ids, position_ids=positions, documents=DocumentLayout.from_positions(positions))
    assert len(made) == 2
    positions[0, :1] += 0  # changed in place: read anew
    sum_of_losses(packed, labels, input_ids=ids, position_ids=positions)
    assert len(made) == 3


def test_a_packed_documents_loss_does_not_change_with_its_neighbours(packed, rows):
    def loss_of_third(row):
        ids, positions, labels = packed_batch(row)
        start = len(row[0]) + len(row[1])
        labels[:, :start], labels[:, start + len(row[2]) :] = -100, -100
        with torch.no_grad():
            return sum_of_losses(packed, labels, input_ids=ids, position_ids=positions).item()

    others = [torch.randint(1, 300, (len(row),)) for row in rows]
    one = loss_of_third(rows)
    assert loss_of_third([*others[:2], rows[2], *others[3:]]) == pytest.approx(one, abs=1e-9)
    assert loss_of_third([others[0], others[4], rows[2]]) == pytest.approx(one, abs=1e-9)


@pytest.mark.parametrize("side", ["left", "right", "hole"])
def test_padding_equals_stock(stock, packed, side):
    """2D masks, batches of several rows; a mask that is no padding goes through a dense one."""
    ids = torch.randint(1, 300, (3, 30), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, n in enumerate((0, 13, 29)):
        where = {"left": slice(0, n), "right": slice(30 - n, 30), "hole": slice(10, 10 + n // 2)}[side]
        mask[row, where] = 0
    with torch.no_grad():
        one, other = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (packed, stock))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_generation_equals_stock(stock, packed, cache):
    ids = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :19] = 0, 0
    arguments = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    made = [m.eval().generate(input_ids=ids, attention_mask=mask, cache_implementation=cache, **arguments) for m in (packed, stock)]
    packed.train(), stock.train()
    assert torch.equal(made[0].sequences, made[1].sequences)
    torch.testing.assert_close(torch.stack(made[0].logits), torch.stack(made[1].logits), rtol=0, atol=1e-5)


def test_rows_without_a_mask_equal_stock(stock, packed):
    ids = torch.randint(1, 300, (2, 25), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        torch.testing.assert_close(packed(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_layout_survives_ddp_and_accelerate(packed, rows, tmp_path):
    from accelerate import Accelerator

    ids, positions, labels = packed_batch(rows)
    layout = DocumentLayout.from_positions(positions)
    expected = sum_of_losses(packed, labels, input_ids=ids, position_ids=positions)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        loader = torch.utils.data.DataLoader([0], collate_fn=lambda _: {"input_ids": ids, "documents": layout}, batch_size=1)
        accelerator = Accelerator(cpu=True)
        (batch,) = accelerator.prepare(loader)
        parallel = torch.nn.parallel.DistributedDataParallel(packed)
        loss = sum_of_losses(parallel, labels, position_ids=positions, **batch)
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert loss.item() == expected.item()


def test_layout_survives_trls_chunked_forward(stock, packed, rows):
    """And a dict of layouts does not survive TRL's token counter, which sums the mask: so training hands `documents` over."""
    from trl.trainer.sft_trainer import _patch_chunked_ce_lm_head

    ids, positions, labels = packed_batch(rows)
    patched = copy.deepcopy(packed)
    _patch_chunked_ce_lm_head(patched.get_base_model(), chunk_size=64)
    layout = DocumentLayout.from_positions(positions)
    with torch.no_grad():
        loss = patched(input_ids=ids, position_ids=positions, labels=labels, documents=layout, use_cache=False).loss
        trained = sum(len(row) - 1 for row in rows)
        torch.testing.assert_close(loss.double(), one_by_one(stock, rows) / trained, rtol=1e-5, atol=0)
