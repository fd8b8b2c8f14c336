"""Samples: the same questions before and after training, so that people see what the model learned."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from fastoss.config import Recipe
from fastoss.data.conversation import Message
from fastoss.data.dataset import Dataset
from fastoss.data.harmony import Completion
from fastoss.inference.engine import Engine, Sampling
from fastoss.model.backend import ModelPlan, ready_for_inference, ready_for_training
from fastoss.run import RunDirectory, write_whole
from fastoss.terminal import working
from fastoss.training.progress import Console, rank

_AT_ONCE = 16  # questions answered in one batch


@dataclass
class Question:
    """A chat to answer; `expected` is the answer that training shows, where it is one of its examples."""

    messages: tuple[Message, ...]
    expected: Message | None = None
    reasoning_effort: str | None = None  # the row's own, where it has one: what was trained is what is asked


class Samples:
    """Asks the recipe's prompts (and `from_train` training examples), keeps the answers in `samples.jsonl`."""

    def __init__(self, recipe: Recipe, run: RunDirectory, dataset: Dataset, console: Console):
        self.recipe, self.run, self.console = recipe, run, console
        count = min(recipe.samples.from_train, len(dataset.train))
        chosen = [dataset.train[i * len(dataset.train) // count].conversation for i in range(count)]
        self.questions = [Question((Message("user", prompt),)) for prompt in recipe.samples.prompts]
        self.questions += [Question(chat.messages[:-1], chat.messages[-1], chat.reasoning_effort) for chat in chosen]
        self.before: list[dict[str, Any]] = []

    def answer_before(self, model: Any, plan: ModelPlan) -> None:
        """Answer with the base model (the adapter switched off), unless an earlier start of this run did so."""
        if not self.questions or rank() != 0:
            return
        if self.run.samples.is_file():
            entries = [json.loads(line) for line in self.run.samples.read_text(encoding="utf-8").splitlines()]
            limit = self.recipe.samples.max_new_tokens
            known = [(entry["messages"], entry["reasoning_effort"], entry["max_new_tokens"]) for entry in entries]
            if known == [(self._shown(q), q.reasoning_effort, limit) for q in self.questions]:
                self.before = [entry["before"] for entry in entries]
                return
        count = len(self.questions)
        self.console.say(f"asking the base model {count} question{'' if count == 1 else 's'} …")
        if plan.source is None:
            self.console.say("note: the tiny base has random weights, so its replies are noise; tuned, it knows its training rows and nothing else")
        with model.disable_adapter(), working(f"asking {count} question{'' if count == 1 else 's'}"):
            self.before = [_plain(reply) for reply in self._answers(model, plan)]
        self._write([None] * len(self.questions))

    def answer_after(self, model: Any, plan: ModelPlan) -> None:
        """Answer with the tuned model, print both beside each other, and count the answers given word for word."""
        if not self.questions:
            return
        with working("asking the tuned model"):
            replies = self._answers(model, plan)
        after = [_plain(reply) for reply in replies]
        self._write(after)
        for question, before, tuned in zip(self.questions, self.before, after, strict=True):
            self._print(question, before, tuned)
        known = [(q, b, a) for q, b, a in zip(self.questions, self.before, after, strict=True) if q.expected is not None]
        if known:
            base = sum(_same(q.expected, b) for q, b, _ in known)
            tuned_right = sum(_same(q.expected, a) for q, _, a in known)
            self.console.say(f"word for word, in every channel: base {base} of {len(known)}, tuned {tuned_right} of {len(known)}")

    def suggestion(self) -> str:
        """A question for the first chat: one that the model has seen alone, if there is one."""
        alone = [q for q in self.questions if len(q.messages) == 1 and '"' not in q.messages[0].content]
        asked = next((q for q in alone if q.expected), alone[0] if alone else None)
        return f' --prompt "{asked.messages[0].content}"' if asked else ""

    def _answers(self, model: Any, plan: ModelPlan) -> list[Completion]:
        engine = Engine(ready_for_inference(model, plan), self.recipe.format)
        sampling = Sampling(temperature=0, max_new_tokens=self.recipe.samples.max_new_tokens)
        replies: list[Completion] = []
        for start in range(0, len(self.questions), _AT_ONCE):
            asked = self.questions[start : start + _AT_ONCE]
            replies += engine.complete([q.messages for q in asked], sampling, [q.reasoning_effort for q in asked])
        ready_for_training(model, plan)
        return replies

    def _write(self, after: list[Any]) -> None:
        entries = [
            {
                "messages": self._shown(q),
                "reasoning_effort": q.reasoning_effort,
                "max_new_tokens": self.recipe.samples.max_new_tokens,
                "expected": asdict(q.expected) if q.expected else None,
                "before": b,
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
        self.console.say(f"   base:  {_one_line(before)}")
        self.console.say(f"   tuned: {_one_line(after)}{mark}")
        if question.expected is not None and mark.strip() == "✗":
            self.console.say(f"   shown: {_one_line(asdict(question.expected))}")


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
