"""What an export is made from and compared with: a run's adapter, the original base, the prompts and the training rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastoss.config import Recipe, recipe_of_run
from fastoss.data.conformance import builtin_chats
from fastoss.data.conversation import Conversation, Message, ToolCall
from fastoss.data.harmony import HarmonyRenderer
from fastoss.errors import FastossError
from fastoss.export.adapter_layouts import Adapter
from fastoss.export.base import Base, fetch, original_source
from fastoss.export.behaviour import Distributions, Question, ask, compare, reference
from fastoss.export.format_check import Row, builtin_rows, training_rows
from fastoss.export.forward import Adapted
from fastoss.export.merge import Merged, Progress
from fastoss.model.adapter import AdapterStamp, check_adapter, read_stamp
from fastoss.model.lora import adapter_folder
from fastoss.run import RunDirectory, read_json, read_json_lines

_QUESTIONS = 8
_PROMPT_TOKENS, _REPLY_TOKENS = 512, 48


@dataclass
class Subject:
    """A run (or an adapter's folder) with its base. What costs time is computed once and shared by all formats."""

    run: RunDirectory | None
    adapter: Adapter
    base: Base
    source: str  # the base's name, as people know it
    stamp: AdapterStamp
    progress: Progress
    notes: list[str] = field(default_factory=list)

    @cached_property
    def merged(self) -> Merged:
        return Merged(self.base, self.adapter)

    @cached_property
    def recipe(self) -> Recipe | None:
        return recipe_of_run(self.run) if self.run else None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.run.manifest) if self.run and self.run.manifest.is_file() else {}

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        path = self.run.samples if self.run else None
        return read_json_lines(path) if path and path.is_file() else []

    @cached_property
    def rows(self) -> list[Row]:
        """The recipe's training examples, and chats that reach every corner of the format."""
        builtin = builtin_rows(self.stamp.format)
        if self.recipe is None:
            self.notes.append("no recipe lies beside the adapter: templates were compared on built-in chats only")
            return builtin
        wanted = (self.manifest.get("data") or {}).get("fingerprint")
        for sample in (False, True):
            rows, note, fingerprint = training_rows(self.recipe, sample)
            if rows and fingerprint == wanted:
                return rows + builtin
        self.notes.append(note or "the recipe's rows were not compared: its data has changed since the run")
        return builtin

    @cached_property
    def questions(self) -> list[Question]:
        """The run's sample questions with the tuned replies; a reply that was cut or malformed gives way to the one that was shown."""
        renderer = HarmonyRenderer(self.stamp.format)
        found = []
        for entry in self.samples:
            asked = tuple(_message(message) for message in entry["messages"])
            after, expected = entry.get("after"), entry.get("expected")
            reply = after if after and not after["problems"] and after["content"] else expected
            if reply and asked and asked[-1].role in ("user", "tool"):
                answer = Message("assistant", reply["content"], reply["thinking"])
                found.append(Conversation((*asked, answer), reasoning_effort=entry.get("reasoning_effort")))
        if not found:
            self.notes.append("the run has no samples with replies: answers were compared on built-in chats")
            found = [chat for chat in builtin_chats() if not chat.tools]
        questions = []
        for chat in found:
            example = renderer.render_last(chat)
            prompt, reply_ids = list(example.input_ids[: example.prompt_length]), list(example.input_ids[example.prompt_length :])
            if len(prompt) <= _PROMPT_TOKENS:
                questions.append(Question(prompt, reply_ids[:_REPLY_TOKENS], chat.messages[-2].content[:60]))
        count = min(_QUESTIONS, len(questions))
        return [questions[index * len(questions) // count] for index in range(count)]

    @cached_property
    def answers(self) -> Distributions:
        """What the tuned model answers: original base with the adapter applied but not merged, in float32."""
        self.progress("asking the adapter …")
        return reference(Adapted(self.base, self.adapter), self.questions, self.progress)

    @cached_property
    def base_answers(self) -> list[torch.Tensor]:
        self.progress("asking the base …")
        return ask(self.base, self.questions, self.progress)

    @cached_property
    def base_distributions(self) -> Distributions:
        from fastoss.export.behaviour import TOP

        best = [values.topk(TOP, dim=-1) for values in self.base_answers]
        return Distributions([found.indices for found in best], [found.values for found in best])

    @cached_property
    def effect(self) -> float:
        """How far training has moved the answers: mean difference of adapter and base, in nats."""
        return compare(self.answers, self.base_answers, self.questions).mean


def load_subject(name: str, *, base: str | None = None, layout: str | None = None, progress: Progress) -> Subject:
    """Read a run, or an adapter's folder. `FastossError` when it has no adapter, or the base cannot be had or does not fit."""
    folder = adapter_folder(name)
    root = Path(name).expanduser()
    run = RunDirectory(root) if RunDirectory(root).exists() else None
    stamp = read_stamp(folder)
    adapter = Adapter(folder, layout)
    if not adapter.names():
        raise FastossError("the adapter holds no LoRA", place=str(folder))
    source = base or original_source(stamp.model)
    if base is None and not Path(source).is_dir():
        progress(f"fetching {source} …")
    folder_of_base = fetch(source)
    check_adapter(folder, str(folder_of_base) if base else source)
    subject = Subject(run, adapter, Base(folder_of_base), base or stamp.model.name, stamp, progress)
    _ = subject.merged  # an adapter that does not fit is told of before anything is planned
    return subject


def _message(entry: dict[str, Any]) -> Message:
    call = entry.get("tool_call")
    return Message(
        entry["role"], entry["content"], entry.get("thinking"), ToolCall(**call) if call else None, entry.get("name"), entry.get("weight", 1.0)
    )
