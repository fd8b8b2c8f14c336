"""Rows → dataset: reads the recipe's sources, judges and renders every row, keeps tokens and verdict in the cache.

Rows are taken one by one, so that memory holds neither files nor tokens. Nothing disappears uncounted: the `DataReport`
says what was read, what was dropped, why, and where it stood. A dataset that was built once is found again by everything
that can change a token of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy

from fastoss.config import DataSource, Recipe
from fastoss.data.data_report import DataReport, counted, report_from_plain, report_to_plain
from fastoss.data.judge import Judge, Refusals
from fastoss.data.reading.rows import shown
from fastoss.data.reading.sources import read_rows, source_identity, source_notes
from fastoss.data.store import KINDS, Examples, StoreWriter, TokenStore
from fastoss.data.tokenizer import TEMPLATE_SHA256, TOKENIZER_SHA256
from fastoss.data.trees import build_tree
from fastoss.errors import FastossError, RunFailed
from fastoss.run import cache_folder, file_lock, whole_folder
from fastoss.terminal import Counting

_UNUSED_DAYS = 30  # a cached dataset that nobody has opened for so long is removed
_HIGH_DPO_RATE = 1e-4

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Dataset:
    """Examples for training and evaluation, in the order of the sources, and the report on how they came about.

    `weights` says how often each training example is seen in an epoch. `store` holds them all on disk.
    """

    train: Examples
    eval: Examples
    weights: list[float]
    report: DataReport
    store: TokenStore


def build_dataset(recipe: Recipe, *, sample: bool = False, progress: Progress | None = None) -> Dataset:
    """Read, judge, render and split the recipe's data, or find it in the cache. Deterministic, and alike on every rank.

    Raises `FastossError` (exit 2) with `file:line` for whatever `[hygiene]` calls an error, and when nothing is left.
    """
    folder = cache_folder() / "data" / _cache_key(recipe, sample)
    anew = not all(source.cache for source in (*recipe.data, *recipe.eval.data)) and os.environ.get("RANK", "0") == "0"
    with file_lock(folder.with_suffix(".lock")):
        if anew or not TokenStore.is_complete(folder):
            _remove_unused(folder.parent)
            try:
                with whole_folder(folder) as beside:
                    _Build(recipe, beside, sample, progress or (lambda line: None)).run()
            except OSError as problem:
                hint = "make room, or set FASTOSS_CACHE to a folder with more"
                raise RunFailed(f"the tokens cannot be written: {problem.strerror}", place=str(folder.parent), hint=hint) from problem
        os.utime(folder)
    store = TokenStore(folder)
    held_out = numpy.load(folder / "held_out.npy", mmap_mode="r")
    train = Examples(store, numpy.flatnonzero(~held_out))
    weight_of = numpy.array([source.weight for source in recipe.data])
    weights: list[float] = weight_of[store.examples["source"][train.numbers]].tolist()
    return Dataset(train, Examples(store, numpy.flatnonzero(held_out)), weights, report_from_plain(store.meta["report"]), store)


def _cache_key(recipe: Recipe, sample: bool) -> str:
    """A hash of everything that can change a token, a place or a verdict: files, recipe, tokenizer, template, and this code."""
    sources = [[source_identity(s, sample=sample), s.model_dump(mode="json", exclude={"cache", "weight"})] for s in (*recipe.data, *recipe.eval.data)]
    sections = [section.model_dump(mode="json") for section in (recipe.format, recipe.hygiene, recipe.eval)]
    scored = recipe.dpo.score_on if recipe.dpo else None
    told = [
        recipe.method,
        scored,
        recipe.model.max_length,
        sample,
        sources,
        sections,
        TOKENIZER_SHA256,
        TEMPLATE_SHA256,
        _code_version(),
        os.getcwd(),
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _code_version() -> str:
    """A hash of the data package's own files: a change of the renderer makes every cached dataset stale."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _remove_unused(folder: Path) -> None:
    limit = time.time() - _UNUSED_DAYS * 86400
    for old in folder.iterdir():
        if old.is_dir() and old.stat().st_mtime < limit:
            shutil.rmtree(old, ignore_errors=True)
            old.with_suffix(".lock").unlink(missing_ok=True)


class _Build:
    """One pass over all sources."""

    def __init__(self, recipe: Recipe, folder: Path, sample: bool, progress: Progress):
        self.recipe, self.folder, self.sample, self.progress = recipe, folder, sample, progress
        self.report = DataReport()
        self.writer = StoreWriter(folder)
        self.refusals = Refusals()
        self.row_keys: list[int] = []  # of each row that was kept: where it goes depends on this alone
        self.first_train_row = 0

    def run(self) -> None:
        with open(self.folder / "dropped.jsonl", "w", encoding="utf-8") as dropped:
            self.judge = Judge(self.recipe, self.report, self.refusals, dropped)
            for source in self.recipe.eval.data:
                self._read(source, 0, held_out=True)
            self.first_train_row = self.writer.rows
            for number, source in enumerate(self.recipe.data):
                self._read(source, number, held_out=False)
        self.refusals.raise_if_any()
        self.writer.close()
        self._finish(TokenStore(self.folder))

    def _read(self, source: DataSource, number: int, *, held_out: bool) -> None:
        if self.sample and source.sample is None:
            self.report.notes.append(f"no sample is named for {source.source}: it is read in full")
        self.report.sources[source.source] = source_identity(source, sample=self.sample)
        self.report.notes += source_notes(source, sample=self.sample)
        begun, counting = time.monotonic(), Counting(self.progress)
        first = self.report.rows
        for row in read_rows(source, sample=self.sample):
            self.report.rows += 1
            said = self.judge.understood(row, source, held_out=held_out)
            if self.refusals.enough():
                break
            if counting.due():
                done = self.report.rows - first
                counting.at(f"reading {source.source}: {done:,} rows, {done / (time.monotonic() - begun):,.0f} a second")
            if said is None or self.refusals.any():
                continue  # an error is certain: the rest is read for further mistakes only
            rendered = self.judge.examples(said)
            together = [[example for *_, example in turns] for turns in rendered]
            if len(rendered) == 2:  # a pair: the tree over both stands with the chosen one
                together = [together[0] + together[1], []]
            for conversation, turns, tree in zip(said, rendered, together, strict=True):
                if turns:
                    stored = self.writer.add_row(conversation, len(build_tree(tree)) if len(tree) > 1 else 0)
                    self.row_keys.append(self.judge.near)
                    for turn, cut, example in turns:
                        self.writer.add_example(number, stored, turn, cut, example)
        self.judge.check_columns(source, self.report.rows - first)

    def _finish(self, store: TokenStore) -> None:
        """Split, count, and say what there is to say."""
        held_out_row = self._held_out_rows()
        held_out = held_out_row[store.examples["row"]] if len(store.examples) else numpy.zeros(0, bool)
        report = self.report
        report.pairs = self.recipe.method == "dpo"
        stored = 2 if report.pairs else 1  # conversations a row
        report.eval_rows = int(held_out_row.sum()) // stored
        report.train_rows = len(held_out_row) // stored - report.eval_rows
        report.eval_examples = int(held_out.sum())
        report.train_examples = len(held_out) - report.eval_examples
        self._refuse_untrained()
        if report.train_examples == 0:
            gone = [f"{tally.count:,} × {reason}: {tally.listed()}" for reason, tally in report.drops.items()]
            hint = "fix these rows, or change what left them out: a policy of [hygiene], model.max_length, format.train_on"
            place = shown(Path(self.recipe.data[0].source))
            raise FastossError(f"no training example is left ({'; '.join(gone)})", place=place, hint=hint)
        lengths, spans = store.examples["length"], store.spans
        in_train = numpy.repeat(~held_out, store.examples["spans"])
        sizes = (spans["end"] - spans["start"]).astype(numpy.int64)
        by_kind = numpy.bincount(spans["kind"][in_train], sizes[in_train], len(KINDS)).astype(int)
        trained = in_train & (spans["weight"] > 0)
        trained_by_kind = numpy.bincount(spans["kind"][trained], sizes[trained], len(KINDS)).astype(int)
        report.train_tokens = int(lengths[~held_out].sum(dtype=numpy.int64))
        report.trained_tokens = int(trained_by_kind.sum())
        report.trained_by_channel = {str(channel): int(n) for (_, channel), n in zip(KINDS, trained_by_kind, strict=True) if channel and n}
        report.longest = max([int(lengths.max()), *self.judge.too_long])
        report.fingerprint = _fingerprint(self.folder, held_out)
        if not report.eval_examples:
            report.notes += self._why_no_evaluation()
        rate = self.recipe.train.learning_rate
        if self.recipe.method == "dpo" and rate > _HIGH_DPO_RATE:
            report.notes.append(f"train.learning_rate = {rate:g} is high for DPO: 5e-7 to 5e-5 is common with LoRA")
        numpy.save(self.folder / "held_out.npy", held_out)
        kinds = [[channel or role, int(n), int(t)] for (role, channel), n, t in zip(KINDS, by_kind, trained_by_kind, strict=True)]
        meta = {"report": report_to_plain(report), "kinds": kinds, "too_long": _histogram(self.judge.too_long)}
        self.writer.complete(meta)

    def _why_no_evaluation(self) -> list[str]:
        settings, rows = self.recipe.eval, self.report.train_rows
        if settings.data:
            return ["no evaluation: no row of [[eval.data]] is left"]
        if not settings.fraction:
            return []
        share = f"no evaluation: {settings.fraction:g} of {counted(rows, 'row')}"
        return [
            f"{share} is less than half a row"
            if round(settings.fraction * rows) < 1
            else f"{share}: they are too few, or too much alike, to be split"
        ]

    def _held_out_rows(self) -> numpy.ndarray:
        """Which rows are held out: those of `[[eval.data]]`, or those whose hash lies below `eval.fraction`.

        Where a row goes depends on its content alone, so rows that are added move none. Rows that say (nearly) the same have the
        same hash and go the same way, so that no training row stands in eval.
        """
        keys = numpy.array(self.row_keys, numpy.uint64)
        held_out = numpy.arange(len(keys)) < self.first_train_row
        fraction = self.recipe.eval.fraction
        if fraction and len(keys):
            below = keys < numpy.uint64(int(fraction * 2.0**64))
            if not below.any() and round(fraction * len(keys)) >= 1:
                # Too few rows for chance to choose one of them: the smallest hash is held out.
                below = keys == keys.min()
            held_out = below if not below.all() else held_out
        return held_out

    def _refuse_untrained(self) -> None:
        if self.recipe.method == "dpo":
            return  # which channels are scored is a choice of its own
        train_on = self.recipe.format.train_on
        for channel, what, lost in (("analysis", "reasoning", "reason"), ("commentary", "tool calls", "call tools")):
            count = self.judge.targets[channel]
            if count and channel not in train_on:
                fact = f"the data has {what} ({counted(count, 'example')}), but `format.train_on` leaves it out: the model would not learn to {lost}"
                mean = ", ".join(f"{name} = {weight}" for name, weight in ({channel: 0.0} | dict(train_on)).items())
                raise FastossError(fact, place="format.train_on", hint=f'add "{channel}", or write {{ {mean} }} if you mean it')


def _fingerprint(folder: Path, held_out: numpy.ndarray) -> str:
    """A hash of every token, its weight, and its side. Read as files: mapped pages would count as this process's memory."""
    digest = hashlib.blake2b(held_out.tobytes(), digest_size=32)
    for name in ("input_ids.bin", "spans.bin"):
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _histogram(lengths: list[int]) -> list[list[int]]:
    """Lengths and how often each occurs."""
    return [list(pair) for pair in sorted(Counter(lengths).items())]
