"""Base and tuned compared on held-out rows: one pass over losses, one over replies. `evaluation_table` shows the result to people."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastoss.config import Recipe, recipe_of_run
from fastoss.data.conversation import Conversation, Message
from fastoss.data.dataset import build_dataset
from fastoss.data.formats.prompts import read_asked
from fastoss.errors import FastossError
from fastoss.inference.endpoint import is_endpoint
from fastoss.inference.gguf import is_gguf
from fastoss.inference.measures import REPLY_MEASURES, Interval, Measure, Values, bleu, difference, interval, measure_reply, ratio
from fastoss.inference.reply import Answer
from fastoss.inference.sampling import Question, ReasoningLanguage, Sampling, asked_language
from fastoss.model.lora import adapter_folder
from fastoss.run import RunDirectory, read_json, write_json, write_whole

CHANNELS = {"analysis": "reasoning", "commentary": "tool calls", "final": "answer"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Held:
    """A row to be judged by: `conversation` ends with the expected answer, if `has_reference`; `rejected` with the worse one of a pair."""

    conversation: Conversation
    has_reference: bool
    rejected: Conversation | None = None

    @property
    def reference(self) -> Message | None:
        return self.conversation.messages[-1] if self.has_reference else None

    def question(self, language: ReasoningLanguage | None) -> Question:
        said = self.conversation
        return Question(said.messages[:-1], said.reasoning_effort, language, said.tools, said.current_date)


def evaluate(
    name: str, source: Path | None, *, rows: int, output: Path | None, batch_size: int, language: ReasoningLanguage | None, max_new_tokens: int,
    say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Judge a run on its held-out rows, or on those of `source`. Writes evaluation.json and evaluation.jsonl; returns the former.

    Raises `FastossError` before a model is loaded where rows or places are not what they must be.
    """
    if is_endpoint(name):
        hint = "answer the file with `fastoss generate`, or evaluate the run itself"
        raise FastossError("a server gives no losses, and has no base to compare with", place=name, hint=hint)
    if is_gguf(name):
        hint = "evaluate the run it was made from; `fastoss verify` compares the file with it"
        raise FastossError("llama.cpp gives no losses for a GGUF file, and has no base to compare with", place=name, hint=hint)
    run = RunDirectory(Path(name).expanduser())
    recipe = recipe_of_run(run)
    folder = _folder(output, run)
    held, what = _held(name, recipe, source, say)
    total = len(held)
    held = [held[i * total // min(rows, total)] for i in range(min(rows, total))]
    say(f"loading {name} …")
    from fastoss.inference.engine import Engine

    engine = Engine.load(name)
    before = _before(engine, recipe, say)
    sides = ["base", "tuned"] if engine.has_adapter else ["tuned"]
    measures, replies = judge(engine, held, sides, batch_size, language, max_new_tokens, recipe, say)
    result = {
        "model": name, "rows": len(held), "of": total, "source": what, "compared": len(sides) == 2, "before": before,
        "settings": {"temperature": 0, "max_new_tokens": max_new_tokens, "language": language.value if language else None}, "measures": measures,
    }  # fmt: skip
    if folder is not None:
        write_whole(folder / "evaluation.jsonl", "".join(json.dumps(reply, ensure_ascii=False) + "\n" for reply in replies))
        write_json(folder / "evaluation.json", result)
        say(f"wrote {folder / 'evaluation.json'} and {folder / 'evaluation.jsonl'}")
    return result


def _before(engine: Any, recipe: Recipe | None, say: Say) -> str:
    """What stands beside the tuned model, under the key `base`: of a DPO run its reference, so that the pairs tell what training did."""
    if recipe is None or recipe.method != "dpo" or recipe.model.adapter is None or (recipe.dpo and recipe.dpo.reference == "adapter_off"):
        return "base"
    try:
        folder = adapter_folder(recipe.model.adapter)
        engine.put_beside(folder, recipe.lora)
    except FastossError as problem:
        say(f"note: {problem.place}: {problem.fact}; the run started from this adapter, but the base is compared instead")
        return "base"
    say(f"compared with {recipe.model.adapter}, the adapter that the run started from")
    return "start"


def _folder(output: Path | None, run: RunDirectory) -> Path | None:
    if output is None:
        return run.root if run.exists() else None
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise FastossError(f"cannot be made: {problem.strerror}", place=f"--output {output}") from None
    return output


def _held(name: str, recipe: Recipe | None, source: Path | None, say: Say) -> tuple[list[Held], str]:
    """The rows to judge by, and what they are, for people."""
    if source is not None:
        identity = recipe.format.identity if recipe else None
        columns = [one.columns for one in recipe.data] if recipe else []
        found = [Held(row.conversation, row.reference is not None, row.rejected) for row in read_asked(source, identity, columns=columns)]
        unanswered = sum(not row.has_reference for row in found)
        if unanswered:
            say(f"note: {unanswered} of {len(found)} rows have no answer to compare with: losses and likeness leave them out")
        return found, str(source)
    if recipe is None:
        raise FastossError("this is not a run directory, so it has no held-out rows", place=name, hint="give rows with --input FILE")
    path = RunDirectory(Path(name).expanduser()).manifest
    manifest = read_json(path) if path.is_file() else {}
    dataset = build_dataset(recipe, sample=manifest.get("sample", False), progress=say)
    conversations = [example.conversation for example in dataset.eval]
    if manifest and manifest.get("data", {}).get("fingerprint") != dataset.report.fingerprint:
        say("note: the data is not what the run was trained on: rows that are held out now may have been trained")
    if not conversations:
        hint = "give rows with --input FILE, or train with eval.fraction or [[eval.data]]"
        raise FastossError("the run held no rows out", place=name, hint=hint)
    if recipe.method == "dpo":
        found = [Held(chosen, True, rejected) for chosen, rejected in zip(conversations[::2], conversations[1::2], strict=True)]
    else:
        found = [Held(conversation, True) for conversation in conversations]
    return found, "held-out rows"


def judge(
    engine: Any, held: Sequence[Held], sides: Sequence[str], batch_size: int, language: ReasoningLanguage | None, max_new_tokens: int,
    recipe: Recipe | None, say: Say,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """All measures by name, and each question with every side's reply."""
    measures = _losses(engine, [row.conversation for row in held if row.has_reference], sides)
    measures |= _pairs(engine, [row for row in held if row.rejected is not None], sides, recipe)
    questions = [row.question(language) for row in held]
    answers: dict[str, list[Answer]] = {}
    for side in sides:
        say(f"asking {'the model' if len(sides) == 1 else f'the {side} model'} {len(held)} questions …")
        answers[side] = in_batches(engine, questions, batch_size, Sampling(max_new_tokens=max_new_tokens), tuned=side == "tuned")
    found = {side: [_measured(row, question, answer) for row, question, answer in zip(held, questions, answers[side], strict=True)] for side in sides}
    for measure in REPLY_MEASURES:
        values = {side: [entry[measure.name] for entry in found[side]] for side in sides}
        measures |= compared(measure, values)
    measures |= _bleu(held, answers)
    replies = []
    for place, (row, question) in enumerate(zip(held, questions, strict=True)):
        said: dict[str, Any] = {"place": row.conversation.place, "messages": [[m.role, m.content] for m in question.said()]}
        if row.reference is not None:
            said["expected"] = {"analysis": row.reference.thinking, "final": row.reference.content}
        for side in sides:
            answer = answers[side][place]
            said[side] = {
                "analysis": answer.completion.thinking, "final": answer.completion.content, "tokens": answer.tokens,
                "finish_reason": answer.finish_reason, "problems": answer.completion.problems, "measures": found[side][place],
            }  # fmt: skip
        replies.append(said)
    return measures, replies


def in_batches(engine: Any, questions: Sequence[Question], size: int, sampling: Sampling, *, tuned: bool) -> list[Answer]:
    """Answers in the order of the questions; those of like length are asked together."""
    order = sorted(range(len(questions)), key=lambda i: -len(engine.prompt_ids(questions[i])))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        found |= dict(zip(batch, engine.answers([questions[i] for i in batch], sampling, tuned=tuned), strict=True))
    return [found[i] for i in range(len(questions))]


def _measured(row: Held, question: Question, answer: Answer) -> dict[str, float | None]:
    asked = next((message.content for message in reversed(question.messages) if message.role == "user"), "")
    return measure_reply(answer.completion, answer.finish_reason, asked, row.reference, question.language or asked_language(question.messages))


def compared(measure: Measure, values: dict[str, Values]) -> dict[str, Any]:
    """A measure's entry: each side's interval, the difference, and what is to be thought of it. Nothing where no row has it."""
    found = {side: interval(of, share=measure.unit == "share") for side, of in values.items()}
    if not any(found.values()):
        return {}
    return _entry(measure, found, difference(values["base"], values["tuned"]) if "base" in values else None)


def _entry(measure: Measure, found: dict[str, Interval | None], gap: tuple[Interval, bool] | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"label": measure.label, "unit": measure.unit, "better": measure.better}
    entry |= {side: value.to_plain() if value else None for side, value in found.items()}
    if gap is not None:
        entry["difference"] = gap[0].to_plain()
        entry["verdict"] = verdict(measure.better, gap[0].mean, clear=gap[1])
    return {measure.name: entry}


def verdict(better: str, change: float, *, clear: bool) -> str:
    """In a word, for people."""
    if not clear:
        return "no clear difference"
    if better == "none":
        return "longer" if change > 0 else "shorter"
    return "better" if (change > 0) == (better == "up") else "worse"


def _losses(engine: Any, conversations: Sequence[Conversation], sides: Sequence[str]) -> dict[str, Any]:
    if not conversations:
        return {}
    import numpy

    from fastoss.inference.scores import channel_losses

    with engine.turns.turn():
        sums = {side: channel_losses(engine, conversations, tuned=side == "tuned") for side in sides}
    measures: dict[str, Any] = {}
    for channel, called in CHANNELS.items():
        rows = {side: [entry.get(channel, (0.0, 0)) for entry in sums[side]] for side in sides}
        if not any(count for _, count in rows["tuned"]):
            continue
        per_row = {side: [total / count if count else None for total, count in rows[side]] for side in sides}
        gap = difference(per_row["base"], per_row["tuned"]) if "base" in rows else None
        for name, label, of in (
            ("loss", f"loss on the expected {called} (surprise)", lambda loss: loss),
            ("perplexity", f"perplexity of the expected {called}", numpy.exp),
        ):
            found = {side: ratio([total for total, _ in rows[side]], [count for _, count in rows[side]], of) for side in sides}
            entry = _entry(Measure(f"{name}_{channel}", label, "down", "nats" if name == "loss" else "ppl"), found, gap if name == "loss" else None)
            measures |= entry
    return measures


def _pairs(engine: Any, held: Sequence[Held], sides: Sequence[str], recipe: Recipe | None) -> dict[str, Any]:
    """How often the chosen answer is found likelier than the rejected one, and how often training moved them apart (TRL's `rewards/accuracies`)."""
    if not held:
        return {}
    from fastoss.inference.scores import answer_logps

    channels = recipe.dpo.score_on if recipe and recipe.dpo else ("analysis", "final")
    margins: dict[str, list[float]] = {}
    with engine.turns.turn():
        for side in sides:
            chosen, rejected = (
                answer_logps(engine, conversations, channels, tuned=side == "tuned")
                for conversations in ([row.conversation for row in held], [row.rejected for row in held if row.rejected])
            )
            margins[side] = [c - r for c, r in zip(chosen, rejected, strict=True)]
    likelier: dict[str, Values] = {side: [float(margin > 0) for margin in margins[side]] for side in sides}
    measures = compared(Measure("prefers_chosen", "finds the better answer likelier", "up", "share"), likelier)
    if "base" in margins:
        moved: Values = [float(t > b) for b, t in zip(margins["base"], margins["tuned"], strict=True)]
        measures |= compared(Measure("dpo_accuracy", "training moved towards the better answer", "up", "share"), {"tuned": moved})
    return measures


def _bleu(held: Sequence[Held], answers: dict[str, list[Answer]]) -> dict[str, Any]:
    places = [i for i, row in enumerate(held) if row.reference is not None and row.reference.content.strip()]
    expected = [held[i].conversation.messages[-1].content.strip() for i in places]
    found = {side: bleu([answers[side][i].completion.content.strip() for i in places], expected) for side in answers}
    if not any(found.values()):
        return {}
    return _entry(Measure("bleu", "likeness to the expected answer (BLEU)", "up", "score"), found, None)
