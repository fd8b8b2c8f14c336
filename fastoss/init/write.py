"""`fastoss init`: a person's rows → a commented recipe that `fastoss check` accepts. Looks, asks, plans, and writes; needs no torch."""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastoss.config import DataSource, DpoSettings, EvalSettings, Hygiene, ModelConfig, Recipe, TrainSettings, load_recipe
from fastoss.data.data_report import counted
from fastoss.data.dataset import Dataset, build_dataset
from fastoss.data.reading.sources import NotCached
from fastoss.errors import FastossError
from fastoss.init.look import Look, look_at
from fastoss.init.text import PURPOSES, Method, Settings, recipe_text
from fastoss.model.cards import Card, card_for, parse_card
from fastoss.recipe_edit import set_value
from fastoss.terminal import say
from fastoss.training.planning.outlook import Outlook, judge
from fastoss.training.planning.run_plan import gib

_PLACE = "fastoss init"
_LONGEST = 8192  # tokens of a row, where the rows do not ask for less: what 24 GB hold
_STEP = 16384  # tokens of a step at most
_STEPS = 10  # steps of an epoch that there should be at least, if need be with smaller ones
_ROOM = 0.9  # of a card that a larger precision than 4 bits may take: the plan is an estimate
_SMALL = 30 * 2**30  # bytes of a card on which 4 bits are taken, as recipes/catgirl.toml does, though MXFP4 might just fit
_BAD = 0.1  # share of the rows that may be left out for being malformed
_HUBS = ("hf:", "modelscope:")


@dataclass(frozen=True)
class Answers:
    """What was given on the command line; None is asked for."""

    data: str | None = None
    method: str | None = None
    card: str | None = None
    name: str | None = None
    output: Path | None = None
    yes: bool = False
    columns: tuple[str, ...] = ()  # ours=theirs


def write_recipe(answers: Answers) -> Path:
    """Write the recipe and return its path. Nothing is written over.

    Raises `FastossError` when an answer is missing and nobody can be asked, when the rows are no data or do not suit the method, and when
    nothing that a recipe can say fits on the card.
    """
    if answers.output is not None:
        _refuse_existing(answers.output)
    data = _answer(answers, "data", "your rows: a file, a folder, or hf:NAME", None, _source)
    try:
        source = DataSource(source=data, columns=_columns(answers.columns))
        look = look_at(source)
    except NotCached as missing:
        raise FastossError(missing.fact, place=data, hint="check the network, or name files of yours") from None
    for line in look.lines():
        say(line)
    purposes = "; ".join(f"{name}: {what}" for name, what in PURPOSES.items())
    method = _method(_answer(answers, "method", f"what it is for ({purposes})", _proposed(look), _method))
    if method == "reasoning" and not look.reasoned:
        raise FastossError("no row has reasoning that could be learned", place=data, hint="--method sft; docs/data.md says where reasoning goes")
    card = _answer(answers, "card", "which card: 24GB, 4090, A100-80, H200, …", _card_here(), _card)
    name = _answer(answers, "name", "a name: the run goes to runs/NAME", _name_of(data), _name)
    output = answers.output or Path(f"{name}.toml")
    _refuse_existing(output)

    dataset, hygiene = _read(source, method)
    settings = _settings(name, method, source, parse_card(card), look, dataset, hygiene)
    text, outlook = _fitting(settings, parse_card(card), output)
    _write_new(output, text)
    try:
        precision = load_recipe(output).model.precision
    except FastossError:
        output.unlink()
        raise
    needed = outlook.fit.bytes if outlook.fit else outlook.plan.memory.card_bytes
    say(f"planned for {settings.card}: {precision}, {gib(needed)} ({outlook.plan.source})")
    if method == "reasoning" and not look.reasoning_languages:
        say("no row asks for a reasoning language: let the system text begin with a line such as “reasoning language: German”")
    file = shlex.quote(str(output))
    say(f"wrote {output}. Then:\n  fastoss check {file}\n  fastoss show {file}\n  fastoss train {file}")
    return output


# --- what is not given --------------------------------------------------------------------------------------------------------


def _answer(answers: Answers, flag: str, question: str, proposal: str | None, check: Callable[[str], str]) -> str:
    """The flag, checked; else the proposal, with --yes; else what a person types."""
    given = getattr(answers, flag)
    if given is not None:
        return check(given)
    if answers.yes and proposal is not None:
        return check(proposal)
    if not sys.stdin.isatty():
        hint = f"give --{flag}" + (", or --yes to take what the rows suggest" if proposal is not None else "")
        raise FastossError(f"`--{flag}` is missing, and there is no terminal to ask in", place=_PLACE, hint=hint)
    while True:
        say(f"{question}{f' [{proposal}]' if proposal else ''}")
        typed = sys.stdin.readline()
        if not typed:
            raise FastossError("the questions were not answered", place=_PLACE, hint=f"give --{flag}")
        try:
            if typed.strip() or proposal:
                return check(typed.strip() or str(proposal))
        except FastossError as problem:
            say(str(problem), "error")


def _source(text: str) -> str:
    """A source as `DataSource` takes it; a local one absolute, and there."""
    if text.startswith(_HUBS):
        return text
    path = os.path.abspath(Path(text).expanduser())
    if not os.path.lexists(path) and not any(letter in text for letter in "*?["):
        raise FastossError(
            "there is no such file", place=f"--data {text}", hint="a .jsonl, .json, .csv or .parquet file, a folder of them, or hf:NAME"
        )
    return path


def _columns(given: tuple[str, ...]) -> dict[str, str]:
    """`columns` of a recipe, from OURS=THEIRS."""
    columns: dict[str, str] = {}
    for text in given:
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs):
            hint = "our name, then the file's: --column instruction=question --column output=answer"
            raise FastossError("is not of the form OURS=THEIRS", place=f"--column {text}", hint=hint)
        if ours in columns:
            raise FastossError(f"`{ours}` is named twice, as `{columns[ours]}` before", place=f"--column {text}")
        columns[ours] = theirs
    return columns


def _card(text: str) -> str:
    parse_card(text)
    return text


def _method(text: str) -> Method:
    for method in PURPOSES:
        if text == method:
            return method
    raise FastossError("is not one of sft, dpo and reasoning", place=f"--method {text}")


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise FastossError("is not a valid name", place=f"--name {text}", hint="letters, digits, dots, dashes, underscores: it names a folder")
    return text


def _proposed(look: Look) -> Method:
    if look.pairs * 2 > look.understood:
        return "dpo"
    return "reasoning" if look.reasoning_languages and look.reasoned * 2 > look.understood else "sft"


def _card_here() -> str:
    """The card of this machine by its size, which `parse_card` takes whatever it is called; else 24GB."""
    found = card_for(None)
    return f"{found.memory / 2**30:.1f}GB" if found.found else "24GB"


def _name_of(data: str) -> str:
    last = data.removesuffix("/").rpartition("/")[2].partition(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._") or "mine"


def _refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise FastossError("the file exists already", place=str(output), hint="give another --output: no file is overwritten")


def _write_new(output: Path, text: str) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        _refuse_existing(output)
    except OSError as problem:
        raise FastossError(f"cannot be written: {problem.strerror}", place=str(output)) from None


# --- what is chosen -----------------------------------------------------------------------------------------------------------

_POLICIES: tuple[dict[str, str], ...] = ({}, {"malformed": "drop"}, {"malformed": "drop", "mojibake": "repair"})


def _read(source: DataSource, method: Method) -> tuple[Dataset, tuple[tuple[str, str, str], ...]]:
    """All rows, however long, and the hygiene that they need to be read: none, where every row is sound.

    Raises the first row's error when too many would have to be left out.
    """
    first: FastossError | None = None
    for policy in _POLICIES:
        try:
            dataset = build_dataset(_draft(source, method, policy), progress=say)
        except NotCached:
            raise
        except FastossError as problem:
            first = first or problem
            continue
        report = dataset.report
        left_out = sum(tally.count for tally in report.drops.values() if tally.unit == "rows")
        if first is not None and left_out > _BAD * report.rows:
            break
        why = f"{counted(left_out, 'row')} left out, see fastoss check" if left_out else "damaged text is repaired"
        return dataset, tuple((key, value, why if key == "malformed" else "damaged text is repaired") for key, value in policy.items())
    assert first is not None
    raise first


def _draft(source: DataSource, method: Method, policy: dict[str, str]) -> Recipe:
    """A recipe under which no row is too long, to see how long they are."""
    dpo = method == "dpo"
    return Recipe(
        name="draft",
        method="dpo" if dpo else "sft",
        model=ModelConfig(max_length=131072),
        data=(source,),
        hygiene=Hygiene.model_validate(policy),
        eval=EvalSettings(fraction=0.0),
        train=TrainSettings(per_device_train_batch_size=2),
        dpo=DpoSettings() if dpo else None,
    )


def _settings(
    name: str, method: Method, source: DataSource, card: Card, look: Look, dataset: Dataset, hygiene: tuple[tuple[str, str, str], ...]
) -> Settings:
    """Lengths, batches and epochs that suit the rows."""
    lengths = list(dataset.train.lengths)
    rows, tokens, longest = dataset.report.train_rows, sum(lengths), max(lengths)
    max_length = min(_LONGEST, max(1024, 1 << (longest - 1).bit_length()))
    if method == "dpo":
        accumulation = 4 if rows >= 8 * _STEPS else 2 if rows >= 4 * _STEPS else 1
        batch, steps_an_epoch, epochs = 0, max(1, rows // (2 * accumulation)), 1 if rows >= 200 else 2
    else:
        step = next((size for size in (_STEP, _STEP // 2, _STEP // 4) if tokens >= _STEPS * size), _STEP // 8)
        step = max(step, max_length)
        batch = min(step, max(_STEP // 2, max_length))
        accumulation = step // batch
        steps_an_epoch, epochs = max(1, tokens // step), 5 if rows < 200 else 3 if rows < 5000 else 2 if rows < 50_000 else 1
    steps = steps_an_epoch * epochs
    quantiles = sorted(lengths)
    measured = (
        f"{counted(len(lengths), 'training example')} of {quantiles[0]:,} to {longest:,} tokens, half of them below {quantiles[len(lengths) // 2]:,}"
    )
    say(measured)
    return Settings(
        name=name,
        method=method,
        source=source.source,
        columns=tuple(source.columns.items()),
        card=card.line(),
        seen=(*look.lines()[:4], measured),
        max_length=max_length,
        tokens_per_batch=batch,
        accumulation=accumulation,
        epochs=epochs,
        held_out=0.0 if rows < 50 else 0.05 if rows < 500 else 0.02,
        eval_every=max(5, min(50, steps // 5)),
        log_every=1 if steps < 100 else 5,
        over_length=sum(length > max_length for length in lengths),
        hygiene=hygiene,
    )


def _fitting(settings: Settings, card: Card, output: Path) -> tuple[str, Outlook]:
    """The recipe's text with the largest precision that has room on the card, and its plan; where 4 bits do not fit, with what would."""
    outlook: Outlook | None = None
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "recipe.toml"
        draft.write_text(recipe_text(settings, shlex.quote(str(output))), encoding="utf-8")
        recipe = load_recipe(draft)
        dataset = build_dataset(recipe, progress=say)
    for precision in ("4bit",) if card.memory < _SMALL else ("bf16", "mxfp4", "4bit"):
        settings = replace(settings, precision=precision)
        attempt = recipe.model_copy(update={"model": recipe.model.model_copy(update={"precision": precision})})
        outlook = judge(attempt, dataset, card=_spoken(card))
        if outlook.plan.memory.card_bytes <= card.memory * (1 if precision == "4bit" else _ROOM):
            break
    assert outlook is not None
    source = settings.source if settings.source.startswith(_HUBS) else os.path.relpath(settings.source, output.resolve().parent)
    text = recipe_text(replace(settings, source=source), shlex.quote(str(output)))
    if outlook.plan.fits:
        return text, outlook
    if outlook.fit is None:
        raise FastossError(f"no setting of a recipe makes these rows fit on {card.line()}", place=_PLACE, hint="name a larger --card")
    for change in outlook.fit.changes:
        text = set_value(text, change.key, change.new, place=str(output))
    return text, outlook


def _spoken(card: Card) -> str:
    return card.name if card.flops and not card.found else f"{card.memory / 2**30:g}GB"
