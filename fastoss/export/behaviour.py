"""The second part of verification: on fixed prompts, does the export answer as the adapter does?

Both are asked for the log-probabilities of the same next tokens, along the tuned model's own replies. Where the likeliest token
is the reply's at every place, the greedy reply is that reply, word for word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastoss.data.tokenizer import STOP_IDS, decode
from fastoss.export.forward import Weights, log_probabilities
from fastoss.inference.llama_cpp import LlamaServer

TOP = 20  # tokens of the reference that are compared at each place
_LIKELY = 0.01  # of tokens below this probability a large difference means nothing
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """A prompt, and the reply along which distributions are compared; both as ids."""

    prompt: list[int]
    reply: list[int]
    shown: str  # the last message, for people

    @property
    def text(self) -> list[int]:
        """The last token of the reply ends it, and is only predicted."""
        return [*self.prompt, *self.reply[:-1]]

    @property
    def places(self) -> range:
        """Positions whose next token is compared."""
        return range(len(self.prompt) - 1, len(self.prompt) + len(self.reply) - 1)


@dataclass
class Distributions:
    """For each question and place the reference's likeliest tokens (places, TOP) and their log-probabilities in float32."""

    tokens: list[torch.Tensor]
    values: list[torch.Tensor]


@dataclass
class Behaviour:
    """How far two sets of answers are apart, in nats of log-probability: `mean` weighs each token by its probability."""

    mean: float
    largest: float
    same_token: float  # share of places with the same likeliest token
    replies: int
    same_replies: int
    differing: list[str] = field(default_factory=list)

    def to_plain(self) -> dict[str, Any]:
        return {
            "mean_difference": float(f"{self.mean:.4g}"),
            "largest_difference": float(f"{self.largest:.4g}"),
            "same_likeliest_token": round(self.same_token, 4),
            "greedy_replies": self.replies,
            "greedy_replies_same": self.same_replies,
            "first_differences": self.differing[:5],
        }


def reference(weights: Weights, questions: Sequence[Question], progress: Progress) -> Distributions:
    """The tuned model's answers (base with the adapter applied but not merged)."""
    full = ask(weights, questions, progress)
    best = [values.topk(TOP, dim=-1) for values in full]
    return Distributions([found.indices for found in best], [found.values for found in best])


def ask(weights: Weights, questions: Sequence[Question], progress: Progress) -> list[torch.Tensor]:
    return log_probabilities(weights, [q.text for q in questions], [q.places for q in questions], progress)


def compare(expected: Distributions, found: list[torch.Tensor], questions: Sequence[Question]) -> Behaviour:
    """`found` as `ask` gives it: (places, vocabulary) for each question."""
    chosen = [values.argmax(dim=-1) for values in found]
    there = [values.gather(1, tokens) for values, tokens in zip(found, expected.tokens, strict=True)]
    return _judge(expected, there, chosen, questions)


def compare_llama(expected: Distributions, server: LlamaServer, questions: Sequence[Question]) -> Behaviour:
    """The same for llama.cpp, asked place by place; then it writes its greedy replies itself."""
    there, chosen = [], []
    for question, tokens in zip(questions, expected.tokens, strict=True):
        rows, best = [], []
        for step, wanted in enumerate(tokens.tolist()):
            given = server.next_token([*question.prompt, *question.reply[:step]], 4 * TOP)
            lowest = min(given.values())
            rows.append([given.get(token, lowest) for token in wanted])
            best.append(max(given, key=lambda token: given[token]))
        there.append(torch.tensor(rows))
        chosen.append(torch.tensor(best))
    result = _judge(expected, there, chosen, questions)
    written = [_until_stop(server.greedy(question.prompt, len(question.reply))) for question in questions]
    result.same_replies, result.differing = 0, []
    for question, tokens, theirs in zip(questions, expected.tokens, written, strict=True):
        ours = _until_stop(tokens[:, 0].tolist())
        # Where the reference leaves the reply along which it was asked, only what came before (and that token) is its own reply.
        along = next((i + 1 for i, (a, b) in enumerate(zip(tokens[:, 0].tolist(), question.reply, strict=True)) if a != b), None)
        same = theirs[:along] == ours[:along]
        result.same_replies += same
        if not same:
            result.differing.append(f"{question.shown!r}: {decode(theirs)[:120]!r}, the adapter {decode(ours)[:120]!r}")
    return result


def _judge(expected: Distributions, there: list[torch.Tensor], chosen: list[torch.Tensor], questions: Sequence[Question]) -> Behaviour:
    ours, theirs = torch.cat(expected.values), torch.cat(there)
    difference = (ours - theirs).abs()
    weight = ours.exp()
    likely = weight >= _LIKELY
    best = torch.cat([tokens[:, 0] for tokens in expected.tokens])
    result = Behaviour(
        mean=float((weight * difference).sum(dim=1).mean()),
        largest=float(difference[likely].max()) if bool(likely.any()) else 0.0,
        same_token=float((best == torch.cat(chosen)).float().mean()),
        replies=len(questions),
        same_replies=0,
    )
    for question, tokens, mine in zip(questions, expected.tokens, chosen, strict=True):
        different = (tokens[:, 0] != mine).nonzero().flatten().tolist()
        result.same_replies += not different
        if different:
            at = different[0]
            after = decode(question.reply[max(0, at - 4) : at])
            result.differing.append(
                f"{question.shown!r}, token {at}, after {after!r}: {decode([int(mine[at])])!r}, the adapter {decode([int(tokens[at, 0])])!r}"
            )
    return result


def _until_stop(ids: list[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in STOP_IDS:
            return ids[:place]
    return ids
