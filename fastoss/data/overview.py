"""Dataset → what people look at: the lines and JSON of `fastoss check`, the data of `fastoss show --html`."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

import fastoss
from fastoss.config import Recipe, resolved_dict
from fastoss.data.conformance import OFFICIAL, Conformance, check_templates
from fastoss.data.data_page import page_html
from fastoss.data.data_report import report_to_plain
from fastoss.data.dataset import Dataset
from fastoss.data.harmony import Example
from fastoss.data.other_renderers import read_template
from fastoss.data.packing import BatchRule, fill_batches
from fastoss.data.tokenizer import decode
from fastoss.errors import FastossError
from fastoss.run import read_json_lines, write_whole

_PAGE_EXAMPLES = 10_000
_PAGE_CHARACTERS = 20_000_000  # of example text on one page: a browser opens that without a pause
_BARS = 48
_PROFILE_EXAMPLES = 4
_PROFILE_DROPPED = 50
_PROFILE_TEXT = 4_000  # characters of a text that a run keeps for its report
_PROFILE_READ = 400


def overview_lines(dataset: Dataset, recipe: Recipe) -> list[str]:
    """The report, how long the examples are, and how they fill batches."""
    lines = dataset.report.lines()
    quantiles = _quantiles(dataset)
    lines.append("tokens an example: " + ", ".join(f"{name} {count:,}" for name, count in quantiles.items()))
    packing = _packing(dataset, recipe)
    if packing:
        lines.append(
            f"packed into {packing['tokens_per_batch']:,} tokens: {_counted(packing['batches'])} an epoch, {100 * packing['fill']:.1f} % full"
        )
    return lines


def _counted(batches: int) -> str:
    return f"{batches:,} micro-batch{'' if batches == 1 else 'es'}"


def overview_plain(dataset: Dataset, recipe: Recipe, recipe_path: str) -> dict[str, Any]:
    """What `fastoss check --json` prints of a recipe that is fine."""
    kinds = {name: {"tokens": tokens, "trained": trained} for name, tokens, trained in _kinds(dataset)}
    return {
        "recipe": recipe_path,
        "ok": True,
        "data": report_to_plain(dataset.report),
        "tokens_by_channel": kinds,
        "tokens_an_example": _quantiles(dataset),
        "packing": _packing(dataset, recipe),
        "lines": overview_lines(dataset, recipe),
        "resolved": resolved_dict(recipe),
    }


def write_page(path: Path, dataset: Dataset, recipe: Recipe, recipe_path: str) -> None:
    """Write the page of `fastoss show --html`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page_html(page_data(dataset, recipe, recipe_path)))
    except OSError as problem:
        raise FastossError(f"cannot be written: {problem.strerror}", place=str(path)) from None


def compare_templates(dataset: Dataset, recipe: Recipe) -> Conformance:
    """Our rendering of the recipe's rows beside those that inference may use. The model's own template, where it is a folder that has one."""
    folder = Path(recipe.model.name).expanduser()
    template = read_template(folder) if folder.is_dir() else None
    store = dataset.store
    rows = (store.conversation(row) for row in numpy.unique(store.examples["row"]).tolist())
    name = f"the chat template of {recipe.model.name}" if template else OFFICIAL
    return check_templates(rows, recipe.format, template, name)


def page_data(dataset: Dataset, recipe: Recipe, recipe_path: str) -> dict[str, Any]:
    """What the page shows: see `page_html`."""
    report = dataset.report
    examples = list(_listed(dataset))
    dropped = read_json_lines(dataset.store.folder / "dropped.jsonl")
    return {
        "title": recipe.name,
        "recipe": recipe_path,
        "version": fastoss.__version__,
        "max_length": recipe.model.max_length,
        "train_on": dict(recipe.format.train_on),
        "summary": overview_lines(dataset, recipe),
        "totals": {
            "rows": report.rows,
            "train_examples": report.train_examples,
            "eval_examples": report.eval_examples,
            "tokens": report.train_tokens,
            "trained_tokens": report.trained_tokens,
        },
        "channels": [{"name": name, "tokens": tokens, "trained": trained} for name, tokens, trained in _kinds(dataset)],
        "histogram": _histogram(dataset, recipe.model.max_length),
        "examples": examples,
        "shown_of": report.train_examples + report.eval_examples,
        "dropped": dropped,
        "dropped_total": sum(tally.count for tally in report.drops.values()),
    }


def profile_plain(dataset: Dataset, recipe: Recipe) -> dict[str, Any]:
    """What a run keeps of its data for its report: counts, lengths, scripts, what was dropped, and a few examples with their masks.

    channels, histogram, dropped, dropped_total, examples: as in `page_html`; an example of a pair has a `label`, texts are cut
    lengths: {name: tokens} · packing: {tokens_per_batch, batches, fill} or None · scripts: {name: letters} of trained texts
    """
    with open(dataset.store.folder / "dropped.jsonl", encoding="utf-8") as file:
        dropped = [json.loads(line) for line in itertools.islice(file, _PROFILE_DROPPED)]
    return {
        "max_length": recipe.model.max_length,
        "train_on": dict(recipe.format.train_on),
        "channels": [{"name": name, "tokens": tokens, "trained": trained} for name, tokens, trained in _kinds(dataset)],
        "lengths": _quantiles(dataset),
        "histogram": _histogram(dataset, recipe.model.max_length),
        "packing": _packing(dataset, recipe),
        "scripts": _scripts(dataset),
        "dropped": [entry | {"excerpt": entry["excerpt"][:_PROFILE_TEXT]} for entry in dropped],
        "dropped_total": sum(tally.count for tally in dataset.report.drops.values()),
        "examples": list(_few_examples(dataset, pairs=recipe.method == "dpo")),
    }


def _few_examples(dataset: Dataset, *, pairs: bool) -> Iterator[dict[str, Any]]:
    """Examples from the whole breadth of the data; of pairs both answers."""
    step = 2 if pairs else 1
    units = len(dataset.train) // step
    wanted = min(_PROFILE_EXAMPLES if not pairs else 2, units)
    for number in sorted({(2 * i + 1) * units // (2 * wanted) for i in range(wanted)}):
        for place, label in zip(range(number * step, number * step + step), ("chosen", "rejected") if pairs else ("",), strict=True):
            example = _plain_example(dataset.train[place], "train")
            for span in example["spans"]:
                span["cut"] = max(0, len(span["text"]) - _PROFILE_TEXT)
                span["text"] = span["text"][:_PROFILE_TEXT]
            yield example | {"label": label}


def _scripts(dataset: Dataset) -> dict[str, int]:
    """Letters by writing system in the answers of a limited number of examples, spread over all; the most frequent first."""
    found: Counter[str] = Counter()
    count = len(dataset.train)
    for number in sorted({i * count // _PROFILE_READ for i in range(_PROFILE_READ)} if count > _PROFILE_READ else range(count)):
        target = dataset.train[number].conversation.messages[-1]
        for letter in f"{target.thinking or ''}{target.content}"[:_PROFILE_TEXT]:
            if letter.isalpha():
                found[unicodedata.name(letter, "OTHER").split(" ", 1)[0].capitalize().replace("Cjk", "Han")] += 1
    return dict(found.most_common())


def _kinds(dataset: Dataset) -> list[tuple[str, int, int]]:
    """(name, tokens, trained tokens) of each channel or role that the training examples have; headers count as context."""
    return [(name, tokens, trained) for name, tokens, trained in dataset.store.meta["kinds"] if tokens]


def _quantiles(dataset: Dataset) -> dict[str, int]:
    lengths = numpy.array(dataset.train.lengths)
    return {name: int(numpy.quantile(lengths, q)) for name, q in (("shortest", 0), ("median", 0.5), ("95 %", 0.95), ("longest", 1))}


def _packing(dataset: Dataset, recipe: Recipe) -> dict[str, Any] | None:
    budget = recipe.train.tokens_per_batch
    if budget is None:
        return None
    lengths = dataset.train.lengths
    batches = fill_batches(range(len(lengths)), lengths, BatchRule("packed", tokens=budget))
    return {"tokens_per_batch": budget, "batches": len(batches), "fill": round(sum(lengths) / (budget * len(batches)), 4)}


def _histogram(dataset: Dataset, max_length: int) -> dict[str, list[int]]:
    kept = numpy.array(dataset.store.examples["length"], numpy.int64)
    dropped = numpy.array([length for length, count in dataset.store.meta["too_long"] for _ in range(count)], numpy.int64)
    longest = int(max(kept.max(), dropped.max(initial=0)))
    # The cut-off falls on an edge: of the bars as many as it takes lie below it.
    below = _BARS if longest <= max_length else max(1, round(_BARS * max_length / longest))
    step = min(longest, max_length) / below
    edges = numpy.unique(numpy.round(numpy.arange(0, longest + step, step)).astype(int))

    def counts(lengths: numpy.ndarray) -> list[int]:
        """How many lengths lie above an edge and not above the next."""
        found: list[int] = numpy.bincount(numpy.searchsorted(edges, lengths) - 1, minlength=len(edges) - 1).tolist()
        return found

    return {"edges": edges.tolist(), "kept": counts(kept), "dropped": counts(dropped)}


def _listed(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """As many examples as one page can hold, the held-out ones first: they are few."""
    characters = 0
    numbered = itertools.chain(((example, "eval") for example in dataset.eval), ((example, "train") for example in dataset.train))
    for example, split in itertools.islice(numbered, _PAGE_EXAMPLES):
        plain = _plain_example(example, split)
        characters += sum(len(span["text"]) for span in plain["spans"])
        if characters > _PAGE_CHARACTERS:
            return
        yield plain


def _plain_example(example: Example, split: str) -> dict[str, Any]:
    spans: list[dict[str, Any]] = [
        {
            "name": span.channel or span.role,
            "trained": span.trained,
            "weight": span.weight,
            "tokens": span.end - span.start,
            "text": decode(example.input_ids[span.start : span.end]),
        }
        for span in example.spans
    ]
    return {
        "place": example.conversation.place,
        "split": split,
        "tokens": len(example),
        "trained": example.trained_tokens,
        "spans": spans,
    }
