"""Replies → numbers: what is measured of one reply, and what a mean over many is worth. Evaluation asks; nothing heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from fastoss.data.conversation import Message
from fastoss.data.harmony import Completion
from fastoss.data.tokenizer import encode
from fastoss.inference.languages import language_of
from fastoss.inference.sampling import ReasoningLanguage

RESAMPLED = 1000
_LONG = 100  # letters from which a text that is in no language for sure counts as not being in the one that was asked for
_GRAM = 4

Values = list[float | None]  # one a row; None where a measure does not apply


@dataclass(frozen=True)
class Measure:
    """`better`: up, down, or none where neither is. `unit`: share (0 to 1), tokens, score (0 to 100), nats."""

    name: str
    label: str
    better: str
    unit: str


REPLY_MEASURES = (
    Measure("well_formed", "replies in the right format", "up", "share"),
    Measure("finished", "replies that end by themselves", "up", "share"),
    Measure("answered", "replies with an answer", "up", "share"),
    Measure("empty_reasoning", "replies without reasoning", "down", "share"),
    Measure("reasoning_language", "reasoning in the language asked for", "up", "share"),
    Measure("answer_language", "answer in the right language", "up", "share"),
    Measure("exact_match", "answer is the expected one, word for word", "up", "share"),
    Measure("chrf", "likeness to the expected answer (chrF)", "up", "score"),
    Measure("repetition", "repeated passages", "down", "share"),
    Measure("reasoning_tokens", "length of the reasoning, in tokens", "none", "tokens"),
    Measure("answer_tokens", "length of the answer, in tokens", "none", "tokens"),
)


def measure_reply(
    said: Completion, finish_reason: str, question: str, reference: Message | None, language: ReasoningLanguage | None
) -> dict[str, float | None]:
    """The `REPLY_MEASURES` of one reply to `question` (the user's last text). `language` is what it was asked to reason in.

    An answer's right language is that of the `reference`, else of the question: a translation is not in its question's.
    Where rows expect a reply without reasoning, having none is no fault: `empty_reasoning` applies to the others.
    """
    thinking = (said.thinking or "").strip()
    content = said.content.strip()
    tokens = encode(thinking) + encode(content)
    expected = reference.content.strip() if reference is not None and reference.tool_call is None else None
    wanted = language_of(expected) if expected else language_of(question)
    reasons = reference is None or bool(reference.thinking)
    return {
        "well_formed": float(not said.problems),
        "finished": float(finish_reason in ("stop", "tool_calls")),
        "answered": float(bool(content) or said.tool_call is not None),
        "empty_reasoning": float(not thinking) if reasons else None,
        "reasoning_language": _is_in(thinking, language.value) if language is not None else None,
        "answer_language": _is_in(content, wanted) if wanted and said.tool_call is None else None,
        "exact_match": float(content == expected) if expected else None,
        "chrf": chrf(content, expected) if expected else None,
        "repetition": repetition(tokens),
        "reasoning_tokens": float(len(encode(thinking))),
        "answer_tokens": float(len(encode(content))),
    }


def _is_in(text: str, wanted: str) -> float | None:
    """1 or 0; None where the text is too short to tell. No text at all is not in the language."""
    if not text:
        return 0.0
    found = language_of(text)
    if found is None:
        return 0.0 if sum(map(str.isalpha, text)) >= _LONG else None
    return float(found == wanted)


def repetition(tokens: Sequence[int]) -> float | None:
    """Share of a text's runs of four tokens that it has said before; None for fewer than eight tokens."""
    if len(tokens) < 2 * _GRAM:
        return None
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams)


def chrf(text: str, expected: str) -> float:
    """Sentence chrF (Popović 2015) by sacrebleu, 0 to 100: shared runs of letters, alike for every script."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().sentence_score(text, [expected]).score)


@dataclass(frozen=True)
class Interval:
    """A mean over `count` rows and its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    count: int

    def to_plain(self) -> dict[str, float | int]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.count}


def interval(values: Values, *, share: bool) -> Interval | None:
    """Of shares Wilson's interval (1927): a bootstrap of ten hits in ten would claim certainty. Of other numbers the bootstrap's."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean, n = sum(known) / len(known), len(known)
    if share and set(known) <= {0.0, 1.0}:
        z = 1.96
        middle, reach = (mean + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return Interval(mean, max(0.0, min(mean, middle - reach)), min(1.0, max(mean, middle + reach)), n)
    low, high = _bootstrap(numpy.array(known)[:, None], lambda means: means[:, 0])
    return Interval(mean, low, high, n)


def difference(base: Values, tuned: Values) -> tuple[Interval, bool] | None:
    """Tuned minus base over the rows that both have, and whether it is more than chance: the paired bootstrap's interval leaves out 0.

    Of yes-or-no measures the exact sign test must say so too (p < 0.05): on a few rows alone the bootstrap is too sure.
    """
    pairs = [(b, t) for b, t in zip(base, tuned, strict=True) if b is not None and t is not None]
    if not pairs:
        return None
    gaps = numpy.array([t - b for b, t in pairs])
    low, high = _bootstrap(gaps[:, None], lambda means: means[:, 0])
    clear = len(pairs) >= 3 and (low > 0 or high < 0)
    if {value for pair in pairs for value in pair} <= {0.0, 1.0}:
        clear = clear and sign_test(int((gaps > 0).sum()), int((gaps < 0).sum())) < 0.05
    return Interval(float(gaps.mean()), low, high, len(pairs)), clear


def sign_test(up: int, down: int) -> float:
    """Two-sided p of `up` against `down` changes if either were as likely."""
    n, k = up + down, min(up, down)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def ratio(sums: Sequence[float], counts: Sequence[float], of: Callable[[Any], Any] = lambda value: value) -> Interval | None:
    """`of(sum of sums / sum of counts)`, rows resampled: a mean over tokens whose rows belong together."""
    rows = numpy.array([[s, c] for s, c in zip(sums, counts, strict=True) if c], dtype=float)
    if not len(rows):
        return None
    low, high = _bootstrap(rows, lambda means: of(means[:, 0] / means[:, 1]))
    return Interval(float(of(rows[:, 0].sum() / rows[:, 1].sum())), low, high, len(rows))


def _bootstrap(rows: numpy.ndarray, of: Callable[[numpy.ndarray], numpy.ndarray]) -> tuple[float, float]:
    """95 % percentile interval (Efron 1979) of a function of the column means, rows drawn with replacement. The same numbers every time."""
    chance = numpy.random.default_rng(0)
    means = numpy.stack([rows[chance.integers(0, len(rows), len(rows))].mean(0) for _ in range(RESAMPLED)])
    low, high = numpy.percentile(of(means), [2.5, 97.5])
    return float(low), float(high)


def bleu(texts: Sequence[str], expected: Sequence[str]) -> Interval | None:
    """Corpus BLEU by sacrebleu, 0 to 100, with a bootstrap over sentences; words are cut as the expected texts' languages need it."""
    if not texts:
        return None
    from sacrebleu.metrics import BLEU

    languages = [language_of(text) for text in expected]
    common = max(set(languages), key=languages.count)
    cut = "zh" if common == "zh" else "char" if common in ("ja", "ko", "th") else "13a"
    metric = BLEU(tokenize=cut, effective_order=True)
    scores = [metric.sentence_score(text, [reference]) for text, reference in zip(texts, expected, strict=True)]
    rows = numpy.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores], dtype=float)

    def corpus(sums: numpy.ndarray) -> float:
        counts, totals = sums[:4].round().astype(int).tolist(), sums[4:8].round().astype(int).tolist()
        return float(BLEU.compute_bleu(counts, totals, int(sums[8].round()), int(sums[9].round()), smooth_method="exp").score)

    low, high = _bootstrap(rows, lambda means: numpy.array([corpus(row * len(rows)) for row in means]))
    return Interval(corpus(rows.sum(0)), low, high, len(rows))
