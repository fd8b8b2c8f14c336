"""What tests of attention, of trees and on the GPU share: a small gpt-oss with LoRA, its loss, and a flash kernel in plain torch."""

from __future__ import annotations

import torch

from fastoss.model.attention_kernels import FlashOperations
from fastoss.model.attention_layout import DocumentLayout

WINDOW = 8
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_TARGETS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def small_model(implementation: str, dtype: torch.dtype = torch.float64):
    """A random gpt-oss of 4 layers, vocabulary 300, windows of 8, with LoRA that has an effect. In training mode."""
    from peft import LoraConfig, get_peft_model
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=WINDOW, max_position_embeddings=512, pad_token_id=0,
        router_aux_loss_coef=0.0, use_cache=False,
    )  # fmt: skip
    config._attn_implementation, config._experts_implementation = implementation, "eager"  # torch's grouped products know no float64
    torch.manual_seed(0)
    base = GptOssForCausalLM(config).to(dtype)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=list(LORA_TARGETS), target_parameters=list(EXPERT_TARGETS))
    model = get_peft_model(base, lora).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
        elif parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def sum_of_losses(model, labels: torch.Tensor, weights: torch.Tensor | None = None, **arguments) -> torch.Tensor:
    """Cross-entropy of each label from the place before it, summed; `weights` (as labels) scale the tokens."""
    logits = model(use_cache=False, **arguments).logits[:, :-1].flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="none")
    return (each if weights is None else each * weights[:, 1:].flatten()).sum()


def plain_flash() -> FlashOperations:
    """A flash kernel's two halves in plain torch, without sinks: forward gives (output, log-sum-exp), backward is its formula."""

    def seen(starts, window):
        positions = torch.cat([torch.arange(n) for n in starts.diff().tolist()])
        return DocumentLayout.from_positions(positions[None]).visible(window)

    def logits_of(q, k, starts, scale, window):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~seen(starts, window), float("-inf"))

    def forward(q, k, v, starts, longest, scale, window):
        assert longest == starts.diff().max()
        logits = logits_of(q, k, starts, scale, window)
        lse = logits.logsumexp(-1)
        return torch.einsum("hij,jhd->ihd", (logits - lse[..., None]).exp(), v.repeat_interleave(q.shape[1] // v.shape[1], 1)), lse

    def backward(grad, q, k, v, output, lse, starts, longest, scale, window):
        groups = q.shape[1] // k.shape[1]
        weights = (logits_of(q, k, starts, scale, window) - lse[..., None]).exp()
        inner = (grad * output).sum(-1).t()  # rowsum(dO · O), as flash computes it from what it is given
        dlogits = weights * (torch.einsum("ihd,jhd->hij", grad, v.repeat_interleave(groups, 1)) - inner[..., None])
        dq = torch.einsum("hij,jhd->ihd", dlogits, k.repeat_interleave(groups, 1)) * scale
        dk = torch.einsum("hij,ihd->jhd", dlogits, q) * scale
        dv = torch.einsum("hij,ihd->jhd", weights, grad)
        dk, dv = (t.unflatten(1, (-1, groups)).sum(2) for t in (dk, dv))
        return dq, dk, dv

    return FlashOperations(forward, backward)


def random_layout(tokens: int, seed: int, device: str = "cpu", trees: bool = False) -> DocumentLayout:
    """Documents of chat-like lengths (lognormal, median 600 at 16k tokens), one of a single token; `trees`: with two branches each."""
    random = torch.Generator().manual_seed(seed)
    parts, left = [torch.arange(1)], tokens - 1
    while left:
        drawn = int((torch.randn((), generator=random) * 0.9 + torch.tensor(600.0 * tokens / 16384).log()).exp())
        length = min(max(2, drawn), left)
        trunk = max(1, length // 2) if trees else length
        first = (length - trunk) // 2
        branches = [n for n in (first, length - trunk - first) if n]
        forks = sorted((int(torch.randint(trunk, (), generator=random)) for _ in branches), reverse=True)
        parts += [torch.arange(trunk), *(fork + torch.arange(n) for fork, n in zip(forks, branches, strict=True))]
        left -= length
    return DocumentLayout.from_positions(torch.cat(parts)[None]).to(device)


def random_inputs(tokens: int, dtype: torch.dtype, device: str, heads: int = 64, kv_heads: int = 8, head_dim: int = 64, seed: int = 0):
    """Query, key, value (1, heads, tokens, head_dim), sinks (heads,) and an upstream gradient (tokens, heads, head_dim)."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, tokens, head_dim), (1, kv_heads, tokens, head_dim), (1, kv_heads, tokens, head_dim), (heads,), (tokens, heads, head_dim)]
    made = [torch.randn(shape, generator=random).to(device, dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made[:4]], made[4]


def output_and_gradients(kernel, inputs, upstream, *arguments) -> list[torch.Tensor]:
    """What a kernel gives: output, and the gradients of query, key, value and sinks."""
    output = kernel(*inputs, *arguments)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def check_kernel(kernel, reference, layout: DocumentLayout, window: int | None, dtype: torch.dtype, device: str, seed: int = 0, **shape) -> None:
    """Hold a kernel against the float64 reference: at most thrice as far from it as the reference computed in `dtype`."""
    inputs, upstream = random_inputs(layout.tokens, dtype, device, seed=seed, **shape)
    scaling = inputs[0].shape[-1] ** -0.5
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = output_and_gradients(reference, exact, upstream.double(), layout, window, scaling)
    rounded = output_and_gradients(reference, inputs, upstream, layout, window, scaling)
    poison = torch.full((64, *inputs[0].shape), float("nan"), dtype=dtype, device=device)  # what was not written should be seen
    del poison
    ours = output_and_gradients(kernel, inputs, upstream, layout, window, scaling)
    for name, got, near, want in zip(("output", "dq", "dk", "dv", "dsinks"), ours, rounded, expected, strict=True):
        error, allowed = (got.double() - want).abs().max().item(), (near.double() - want).abs().max().item()
        assert error <= 3 * allowed + 1e-5 * want.abs().max().item(), f"{name}: off by {error:.2e}, the reference in {dtype} by {allowed:.2e}"
