"""Samples: the same questions before and after training, and held-out ones meanwhile, so that people see what the model learns."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch

from fastoss.config import Recipe
from fastoss.data.conversation import Conversation, Message, Tool
from fastoss.data.dataset import Dataset
from fastoss.data.harmony import Completion
from fastoss.inference.engine import Engine, Sampling
from fastoss.inference.measures import REPLY_MEASURES, measure_reply
from fastoss.inference.reply import Answer
from fastoss.inference.sampling import Question as Asked
from fastoss.inference.sampling import asked_language
from fastoss.model.backend import ModelPlan, ready_for_inference, ready_for_training
from fastoss.run import RunDirectory, read_json_lines, write_whole
from fastoss.terminal import working
from fastoss.training.progress import Console, rank
from fastoss.training.shared_base import agreed, is_shared_out

_AT_ONCE = 16  # questions answered in one batch
# Of a handful of rows: what goes wrong in training shows here first. Likeness to the expected answer is for `fastoss evaluate`.
MEASURED = tuple(measure.name for measure in REPLY_MEASURES if measure.name not in ("exact_match", "chrf"))


@dataclass
class Question:
    """A chat to answer; `expected` is the answer that training shows, where it is one of its examples."""

    messages: tuple[Message, ...]
    expected: Message | None = None
    reasoning_effort: str | None = None  # the row's own, where it has one: what was trained is what is asked
    held_out: bool = False  # never trained: asked at each evaluation as well
    tools: tuple[Tool, ...] = ()
    current_date: str | None = None
    during: list[dict[str, Any]] = field(default_factory=list)  # replies at evaluations, each with its step

    @classmethod
    def of(cls, chat: Conversation, *, held_out: bool) -> Question:
        return cls(chat.messages[:-1], chat.messages[-1], chat.reasoning_effort, held_out, chat.tools, chat.current_date)


class Samples:
    """Asks the recipe's prompts, `from_train` training examples and `eval.replies` held-out rows; keeps the answers in `samples.jsonl`.

    "Before" is the model that the run starts from: the base, or with `model.adapter` what that adapter made of it.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, dataset: Dataset, console: Console):
        self.recipe, self.run, self.console = recipe, run, console
        count = min(recipe.samples.from_train, len(dataset.train))
        chosen = [dataset.train[i * len(dataset.train) // count].conversation for i in range(count)]
        taught = [Question.of(chat, held_out=False) for chat in chosen]
        prompts = [Question((Message("user", prompt),)) for prompt in dict.fromkeys(recipe.samples.prompts)]
        # A prompt that is one of the rows is asked once, as the row: its answer is compared.
        self.questions = [prompt for prompt in prompts if prompt.messages not in [question.messages for question in taught]] + taught
        self.questions += [Question.of(chat, held_out=True) for chat in _held_out(recipe, dataset)]
        self.start = recipe.model.adapter  # None: the base
        # A base that is shared out is asked by all processes together, token by token; process 0 keeps the answers.
        self.together = is_shared_out(recipe)
        self.asks = rank() == 0 or self.together
        self.before: list[dict[str, Any]] = []

    def answer_before(self, model: Any, plan: ModelPlan, step: int = 0) -> None:
        """Answer with the model as the run starts, unless an earlier start of this run did so; `step` is the one it resumes from."""
        self.plan = plan
        if not self.questions or not self.asks:
            return
        entries = self._kept()
        if entries is not None:
            self.before = [entry["before"] for entry in entries]
            for question, entry in zip(self.questions, entries, strict=True):
                question.during = [reply for reply in entry.get("during", []) if reply["step"] <= step]  # later ones will come again
            return
        count = len(self.questions)
        whom = f"the model as it starts ({self.start})" if self.start else "the base model"
        self.console.say(f"asking {whom} {count} question{'' if count == 1 else 's'} …")
        if self.together:
            limit = self.recipe.samples.max_new_tokens
            self.console.say(f"note: every token of a reply (at most {limit:,}) fetches the whole base from all processes, which takes time")
        if plan.source is None and not self.start:
            self.console.say("note: the tiny base has random weights, so its replies are noise; tuned, it knows its training rows and nothing else")
        with contextlib.nullcontext() if self.start else model.disable_adapter(), working(f"asking {count} question{'' if count == 1 else 's'}"):
            self.before = [_plain(answer.completion) for answer in self._answers(model, self.questions)]
        self._write([None] * len(self.questions))

    def _kept(self) -> list[dict[str, Any]] | None:
        """What an earlier start of this run was answered to the same questions; None where it was not."""
        entries = None
        if rank() == 0 and self.run.samples.is_file():
            entries = read_json_lines(self.run.samples)
            limit = self.recipe.samples.max_new_tokens
            known = [(entry["messages"], entry["reasoning_effort"], entry["max_new_tokens"], entry.get("start")) for entry in entries]
            if known != [(self._shown(q), q.reasoning_effort, limit, self.start) for q in self.questions]:
                entries = None
        return agreed(entries) if self.together else entries

    def answer_during(self, model: Any, step: int) -> dict[str, float]:
        """Answer the held-out questions as far as the model has learned: means of the reply measures, as metrics of an evaluation.

        Replies are the likeliest tokens, and the random state of training is restored: no later loss depends on this. Metrics are rank 0's.
        """
        asked = [question for question in self.questions if question.held_out]
        if not asked or not self.asks:
            return {}
        answers = self._answers(model, asked)
        found: dict[str, list[float]] = {}
        for question, answer in zip(asked, answers, strict=True):
            question.during.append({"step": step, **_plain(answer.completion)})
            text = next((message.content for message in reversed(question.messages) if message.role == "user"), "")
            measured = measure_reply(answer.completion, answer.finish_reason, text, question.expected, asked_language(question.messages))
            for name in MEASURED:
                if (value := measured[name]) is not None:
                    found.setdefault(name, []).append(value)
        self._write([None] * len(self.questions))
        return {f"eval_{name}": fmean(values) for name, values in found.items()}

    def answer_after(self, model: Any, plan: ModelPlan) -> None:
        """Answer with the tuned model, print both side by side, and count the answers given word for word."""
        if not self.questions or not self.asks:
            return
        with working("asking the tuned model"):
            after = [_plain(answer.completion) for answer in self._answers(model, self.questions)]
        self._write(after)
        for question, before, tuned in zip(self.questions, self.before, after, strict=True):
            self._print(question, before, tuned)
        known = [(q, b, a) for q, b, a in zip(self.questions, self.before, after, strict=True) if q.expected is not None and not q.held_out]
        if known:
            base = sum(_same(q.expected, b) for q, b, _ in known)
            tuned_right = sum(_same(q.expected, a) for q, _, a in known)
            self.console.say(f"word for word, in every channel: {self._whom()} {base} of {len(known)}, tuned {tuned_right} of {len(known)}")

    def suggestion(self) -> str:
        """A question for the first chat: one that the model has seen alone, if there is one."""
        # A row's text goes into a line that people copy into their shell: none that means something else there.
        alone = [q for q in self.questions if len(q.messages) == 1 and not q.held_out and not set('"$`\\!\n') & set(q.messages[0].content)]
        asked = next((q for q in alone if q.expected), alone[0] if alone else None)
        return f' --prompt "{asked.messages[0].content}"' if asked else ""

    def _whom(self) -> str:
        return "start" if self.start else "base"

    def _answers(self, model: Any, questions: Sequence[Question]) -> list[Answer]:
        engine = Engine(ready_for_inference(model, self.plan), self.recipe.format)
        sampling = Sampling(temperature=0, max_new_tokens=self.recipe.samples.max_new_tokens)
        answers: list[Answer] = []
        with torch.random.fork_rng():
            for start in range(0, len(questions), _AT_ONCE):
                asked = [Asked(q.messages, q.reasoning_effort, None, q.tools, q.current_date) for q in questions[start : start + _AT_ONCE]]
                answers += engine.answers(asked, sampling)
        ready_for_training(model, self.plan)
        return answers

    def _write(self, after: list[Any]) -> None:
        if rank() != 0:
            return
        entries = [
            {
                "messages": self._shown(q),
                "reasoning_effort": q.reasoning_effort,
                "max_new_tokens": self.recipe.samples.max_new_tokens,
                "expected": asdict(q.expected) if q.expected else None,
                "start": self.start,
                "held_out": q.held_out,
                "before": b,
                "during": q.during,
                "after": a,
            }
            for q, b, a in zip(self.questions, self.before, after, strict=True)
        ]
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        write_whole(self.run.samples, "".join(line + "\n" for line in lines))

    @staticmethod
    def _shown(question: Question) -> list[dict[str, Any]]:
        return [asdict(message) for message in question.messages]

    def _print(self, question: Question, before: dict[str, Any], after: dict[str, Any]) -> None:
        said = [f"{message.role}: {message.content}" for message in question.messages]
        mark = "" if question.expected is None else "  ✓" if _same(question.expected, after) else "  ✗"
        self.console.say("\n" + "\n".join(said))
        self.console.say(f"   {self._whom() + ':':<6} {_one_line(before)}")
        self.console.say(f"   tuned: {_one_line(after)}{mark}")
        if question.expected is not None and mark.strip() == "✗":
            self.console.say(f"   {'held out:' if question.held_out else 'shown:'} {_one_line(asdict(question.expected))}")


def _held_out(recipe: Recipe, dataset: Dataset) -> list[Conversation]:
    """`eval.replies` held-out rows, spread over all; of a pair the chosen answer is the expected one."""
    rows = [example.conversation for example in dataset.eval][:: 2 if recipe.method == "dpo" else 1] if recipe.eval.replies else []
    count = min(recipe.eval.replies, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _plain(reply: Completion) -> dict[str, Any]:
    return {"thinking": reply.thinking, "content": reply.content, "problems": reply.problems}


def _same(expected: Message | None, reply: dict[str, Any]) -> bool:
    return expected is not None and not reply["problems"] and (expected.thinking, expected.content) == (reply["thinking"], reply["content"])


def _one_line(reply: dict[str, Any]) -> str:
    """Reasoning in brackets, then the answer. Of a malformed reply (an untrained model's noise) the beginning is enough."""
    thinking = f"({' '.join(reply['thinking'].split())}) " if reply["thinking"] else ""
    text = thinking + " ".join(reply["content"].split())
    if reply.get("problems"):
        return f"{text[:40]}… (malformed)"
    return text if len(text) <= 200 else text[:199] + "…"
