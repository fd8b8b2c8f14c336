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
from fastoss.training.progress import Console, rank

_AT_ONCE = 16  # questions answered in one batch


@dataclass
class Question:
    """A chat to answer; `expected` is the answer that training shows, where it is one of its examples."""

    messages: tuple[Message, ...]
    expected: Message | None = None


class Samples:
    """Asks the recipe's prompts (and `from_train` training examples), keeps the answers in `samples.jsonl`."""

    def __init__(self, recipe: Recipe, run: RunDirectory, dataset: Dataset, console: Console):
        self.recipe, self.run, self.console = recipe, run, console
        count = min(recipe.samples.from_train, len(dataset.train))
        chosen = [dataset.train[i * len(dataset.train) // count].conversation.messages for i in range(count)]
        self.questions = [Question((Message("user", prompt),)) for prompt in recipe.samples.prompts]
        self.questions += [Question(messages[:-1], messages[-1]) for messages in chosen]
        self.before: list[dict[str, Any]] = []

    def answer_before(self, model: Any, plan: ModelPlan) -> None:
        """Answer with the base model (the adapter switched off), unless an earlier start of this run did so."""
        if not self.questions or rank() != 0:
            return
        if self.run.samples.is_file():
            entries = [json.loads(line) for line in self.run.samples.read_text(encoding="utf-8").splitlines()]
            if [entry["messages"] for entry in entries] == [self._shown(q) for q in self.questions]:
                self.before = [entry["before"] for entry in entries]
                return
        self.console.say(f"asking the base model {len(self.questions)} questions …")
        with model.disable_adapter():
            self.before = [_plain(reply) for reply in self._answers(model, plan)]
        self._write([None] * len(self.questions))

    def answer_after(self, model: Any, plan: ModelPlan) -> None:
        """Answer with the tuned model, print both beside each other, and count the answers given word for word."""
        if not self.questions:
            return
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

    def _answers(self, model: Any, plan: ModelPlan) -> list[Completion]:
        engine = Engine(ready_for_inference(model, plan), self.recipe.format)
        sampling = Sampling(temperature=0, max_new_tokens=self.recipe.samples.max_new_tokens)
        chats = [question.messages for question in self.questions]
        replies = [reply for start in range(0, len(chats), _AT_ONCE) for reply in engine.complete(chats[start : start + _AT_ONCE], sampling)]
        ready_for_training(model, plan)
        return replies

    def _write(self, after: list[Any]) -> None:
        entries = [
            {"messages": self._shown(q), "expected": asdict(q.expected) if q.expected else None, "before": b, "after": a}
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
