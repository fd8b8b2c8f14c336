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
