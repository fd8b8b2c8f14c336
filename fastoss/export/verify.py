"""An export is verified or it is not an export: weights accounted for, answers compared, templates compared with training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastoss.errors import FastossError, RunFailed
from fastoss.export.accounting import Accounting, account, inert_groups, rounding
from fastoss.export.adapter_layouts import Adapter
from fastoss.export.base import Base
from fastoss.export.behaviour import Behaviour, ask, compare, compare_llama
from fastoss.export.format_check import FormatCheck, check_rows, jinja_renderer
from fastoss.export.forward import Adapted, Weights
from fastoss.export.gguf_weights import GgufWeights
from fastoss.export.ollama import MODELFILE, can_render, modelfile_render
from fastoss.export.subject import Subject
from fastoss.inference.llama_cpp import LlamaServer, running
from fastoss.model.adapter import STAMP
from fastoss.model.checkpoint_source import check_folder
from fastoss.run import read_json

RESULT = "verification.json"
FORMATS = ("adapter", "merged", "mxfp4", "gguf")
# The mean difference in nats that a format may make where the base's own rounding makes less (measured: docs/export.md).
_FLOORS = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.02, "bf16": 0.02, "f16": 0.02, "q8_0": 0.05, "mxfp4": 0.05}
_TIMES = 4.0  # how many times as far an export may be from the adapter as the rounded base is from the base
_LLAMA = 0.02  # llama.cpp computes YaRN's range and some products otherwise than transformers
_LLAMA_ROWS = 60
_OFF_GRID = 1.25  # times this, values from MXFP4 lie between its steps


@dataclass
class Verification:
    """The three verdicts on one export."""

    format: str
    accounting: Accounting | None = None
    behaviours: dict[str, dict[str, Any]] = field(default_factory=dict)
    templates: list[FormatCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.all_problems()

    def all_problems(self) -> list[str]:
        weights = self.accounting.problems if self.accounting else []
        return [*weights, *self.problems, *(problem for check in self.templates for problem in check.problems)]

    def to_plain(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "passed": self.passed,
            "problems": self.all_problems(),
            "weights": self.accounting.to_plain() if self.accounting else None,
            "behaviour": self.behaviours,
            "templates": [check.to_plain() for check in self.templates],
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """The verdict for people, a line a part."""
        lines = []
        if self.accounting:
            a = self.accounting
            zero = f", {a.zero_pairs} of them zero" if a.zero_pairs else ""
            lines.append(
                f"weights: {a.pairs} LoRA pairs{zero}, {a.kept:.1%} of their change in the export; {a.unchanged} tensors as the base has them"
            )
        for name, found in self.behaviours.items():
            allowed = f" (allowed {found['allowed']:g})" if found.get("allowed") is not None else ""
            replies = f"{found['greedy_replies_same']} of {found['greedy_replies']} greedy replies the same"
            lines.append(f"answers, {name}: mean difference {found['mean_difference']:g} nats{allowed}, {replies}")
        for check in self.templates:
            lines.append(f"template, {check.name}: {check.rows - check.differing} of {check.rows} texts as in training")
        return [*lines, *(f"note: {note}" for note in self.notes), *(f"failed: {problem}" for problem in self.all_problems())]


def format_of(folder: Path) -> str:
    """Which kind of export lies in a folder. `FastossError` when none does."""
    if folder.is_file() and folder.suffix == ".gguf":
        return "gguf"
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if any(folder.glob("*.gguf")):
        return "gguf"
    if (folder / "config.json").is_file():
        quantization = read_json(folder / "config.json").get("quantization_config") or {}
        return "mxfp4" if quantization.get("quant_method") == "mxfp4" else "merged"
    raise FastossError("there is no export in this folder", place=str(folder), hint="name a folder such as runs/<name>/exports/merged")


def verify(folder: Path, format: str, subject: Subject) -> Verification:
    """Verify what lies in a folder. Damage is a problem of the verdict like any other."""
    result = Verification(format)
    try:
        if format == "adapter":
            _verify_adapter(folder, subject, result)
        elif format == "gguf":
            _verify_gguf(folder, subject, result)
        else:
            _verify_checkpoint(folder, format, subject, result)
    except FastossError as problem:
        result.problems.append(f"{problem.place or folder}: {problem.fact}")
    result.notes += [note for note in subject.notes if note not in result.notes]
    return result


def _verify_checkpoint(folder: Path, format: str, subject: Subject, result: Verification) -> None:
    check_folder(folder)
    export = Base(folder)
    result.accounting = account(export, subject.base, subject.adapter, subject.progress)
    _check_stamp(folder, subject, result)
    _check_jinja(folder, subject, result)
    changed = next(iter(subject.adapter.groups()["experts"] or subject.adapter.names()))
    kind, _ = rounding(export, changed if format == "merged" else "model.layers.0.mlp.experts.gate_up_proj")
    subject.progress(f"asking the {format} weights …")
    found = ask(export, subject.questions, subject.progress)
    _judge(result, "float32 arithmetic", compare(subject.answers, found, subject.questions), kind, export, subject)


def _verify_adapter(folder: Path, subject: Subject, result: Verification) -> None:
    export = Adapter(folder)
    if export.layout != "peft":
        result.problems.append(f"its layout is `{export.layout}`, which stock PEFT does not read")
    result.accounting = Accounting(
        pairs=len(subject.adapter.groups()["attention"]) + len(subject.adapter.groups()["experts"]) * subject.adapter.experts
    )
    result.accounting.zero_pairs = len(list(subject.adapter.zero_pairs()))
    for name in sorted(set(subject.adapter.names()) ^ set(export.names())):
        result.problems.append(f"the pair of `{name}` is in one of run and export only")
    if export.scale != subject.adapter.scale:
        result.problems.append(f"its scale is {export.scale:g}, the run's {subject.adapter.scale:g}")
    for name in [name for name in export.names() if name in subject.adapter.where]:
        ours, theirs = subject.adapter.pair(name), export.pair(name)
        if not (torch.equal(ours.a, theirs.a) and torch.equal(ours.b, theirs.b)):
            result.problems.append(f"the pair of `{name}` is not the run's")
    result.problems += inert_groups(export)
    from fastoss.export.stock import check_peft_places, is_small, stock_answers

    result.problems += check_peft_places(folder, subject.base)
    _check_stamp(folder, subject, result)
    _check_jinja(folder, subject, result)
    if is_small(subject.base):
        subject.progress("asking stock PEFT …")
        found = stock_answers(subject.base, folder, subject.questions)
        where = "stock PEFT on stock transformers"
    else:
        found, where = ask(Adapted(subject.base, export), subject.questions, subject.progress), "float32 arithmetic"
    _judge(result, where, compare(subject.answers, found, subject.questions), "float32", None, subject)


def _verify_gguf(folder: Path, subject: Subject, result: Verification) -> None:
    files = [folder] if folder.is_file() else sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise FastossError(f"{len(files)} GGUF files", place=str(folder), hint="one export is one file")
    export = GgufWeights(files[0], subject.base)
    result.accounting = account(export, subject.base, subject.adapter, subject.progress)
    result.problems += _metadata_problems(export, subject)
    template = export.field("tokenizer.chat_template")
    result.templates.append(check_rows("GGUF (Jinja)", jinja_renderer(template), subject.rows, ("prompt", "example")))
    if (folder / MODELFILE).is_file():
        rows = [row for row in subject.rows if can_render(row.conversation)]
        result.templates.append(check_rows(f"{MODELFILE} (Go)", modelfile_render(folder / MODELFILE), rows, ("prompt",)))
        result.notes.append(f"{MODELFILE}: chats with tools or a date of their own were not compared ({len(subject.rows) - len(rows)})")
    kind = export.quantization
    found = ask(export, subject.questions, subject.progress)
    _judge(result, "float32 arithmetic", compare(subject.answers, found, subject.questions), kind, export, subject)
    subject.progress("asking llama.cpp …")
    context = max(len(question.text) for question in subject.questions) + 64
    with running(files[0], max(1024, context), torch.get_num_threads()) as server:
        _check_llama_rendering(server, subject, result)
        _judge(result, "llama.cpp", compare_llama(subject.answers, server, subject.questions), kind, export, subject, more=_LLAMA)


def _judge(
    result: Verification, where: str, found: Behaviour, kind: str, export: Base | GgufWeights | None, subject: Subject, more: float = 0.0
) -> None:
    """Hold a behaviour against its tolerance; the base's own rounding calibrates it."""
    plain = found.to_plain()
    result.behaviours[where] = plain | {"allowed": None, "base_itself_rounded": None, "adapter_against_base": float(f"{subject.effect:.4g}")}
    allowed = _FLOORS[kind]
    if kind == "mxfp4" and not subject.base.is_mxfp4:
        note = "the base never was MXFP4: its requantised weights are judged value by value, the change of the answers is reported only"
        if note not in result.notes:
            result.notes.append(note)
        return
    if export is not None and kind != "float32":
        own = _own_rounding(export, kind, subject)
        allowed = max(allowed, _TIMES * own)
        result.behaviours[where]["base_itself_rounded"] = float(f"{own:.4g}")
    allowed += more
    result.behaviours[where]["allowed"] = float(f"{allowed:.4g}")
    if not found.mean <= allowed:
        first = f"; {found.differing[0]}" if found.differing else ""
        result.problems.append(f"{where}: the answers are {found.mean:.3g} nats from the adapter's on average, {allowed:.3g} are allowed{first}")
    elif subject.effect > 2 * _FLOORS[kind] and found.mean > 0.5 * subject.effect:
        result.problems.append(
            f"{where}: the answers are {found.mean:.3g} nats from the adapter's, and training moved them by {subject.effect:.3g} only"
        )


class _Rounded:
    """The base as an export's format would store it. Values that lie on MXFP4's steps are moved off them first: by their own steps
    nothing would be rounded, and merged values lie anywhere."""

    def __init__(self, base: Base, export: Base | GgufWeights):
        self.base, self.export = base, export
        self.config, self.layers, self.experts = base.config, base.layers, base.experts

    def matrix(self, name: str) -> torch.Tensor:
        weight = self.base.matrix(name).float()
        return rounding(self.export, name)[1](weight) if weight.dim() > 1 else weight

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        return (rounding(self.export, name)[1](piece.float()) for piece in self.base.rows(name))

    def expert(self, name: str, number: int) -> torch.Tensor:
        weight = self.base.expert(name, number).T
        kind, round_as = rounding(self.export, name)
        factor = _OFF_GRID if kind == "mxfp4" and self.base.is_packed(name) else 1.0
        return (round_as(weight * factor) / factor).T


def _own_rounding(export: Base | GgufWeights, kind: str, subject: Subject) -> float:
    """The mean difference between the base and the base rounded as this format rounds, on the same prompts."""
    kept: dict[str, float] = subject.__dict__.setdefault("_own_rounding", {})
    if kind not in kept:
        subject.progress(f"asking the base, rounded to {kind} …")
        rounded: Weights = _Rounded(subject.base, export)
        kept[kind] = compare(subject.base_distributions, ask(rounded, subject.questions, subject.progress), subject.questions).mean
    return kept[kind]


def _check_jinja(folder: Path, subject: Subject, result: Verification) -> None:
    path = folder / "chat_template.jinja"
    if not path.is_file():
        result.problems.append(f"{path.name} is missing")
        return
    render = jinja_renderer(path.read_text(encoding="utf-8"))
    result.templates.append(check_rows(path.name, render, subject.rows, ("prompt", "example")))


def _check_stamp(folder: Path, subject: Subject, result: Verification) -> None:
    told = read_json(folder / STAMP).get("format") if (folder / STAMP).is_file() else None
    if told != subject.stamp.format.model_dump(mode="json"):
        result.problems.append(f"{STAMP} does not hold the run's format settings")


def _metadata_problems(export: GgufWeights, subject: Subject) -> Iterator[str]:
    """Keys without which llama.cpp would compute another model."""
    from fastoss.export.gguf_file import expected_metadata

    for key, wanted in expected_metadata(subject.base).items():
        have = export.field(key)
        if (abs(have - wanted) > 1e-6 * abs(wanted)) if isinstance(wanted, float) else have != wanted:
            yield f"the key {key} is {have}, the model has {wanted}"


def _check_llama_rendering(server: LlamaServer, subject: Subject, result: Verification) -> None:
    """llama.cpp's own Jinja and its own tokenizer on some of the prompts. It writes tool calls' arguments anew, so chats with tools stay out."""
    from fastoss.data.conversation import Conversation
    from fastoss.data.other_renderers import Kind, Refusal, as_chat_message

    def render(conversation: Conversation, kind: Kind) -> list[int]:
        settings = {"reasoning_effort": conversation.reasoning_effort, "current_date": conversation.current_date}
        asked = {
            "messages": [as_chat_message(message, parsed=False) for message in conversation.messages],
            "chat_template_kwargs": {key: value for key, value in settings.items() if value is not None},
        }
        try:
            return server.tokenize(server.post("/apply-template", asked)["prompt"])
        except RunFailed as problem:
            raise Refusal(problem.fact) from None

    plain = [row for row in subject.rows if not row.conversation.tools and len(row.ids) < 4_000]
    count = min(_LLAMA_ROWS, len(plain))
    result.templates.append(check_rows("llama.cpp", render, [plain[i * len(plain) // count] for i in range(count)], ("prompt",)))


@contextmanager
def threads(count: int | None = None) -> Iterator[None]:
    """Use the machine's cores while an export runs (training without a GPU keeps to one)."""
    import os

    before = torch.get_num_threads()
    torch.set_num_threads(count or int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    try:
        yield
    finally:
        torch.set_num_threads(before)
