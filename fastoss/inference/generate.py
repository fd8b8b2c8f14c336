"""Questions of a file → answers in a file: batches, kept as they come, so that a killed run resumes where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastoss.config import recipe_of_run
from fastoss.data.conversation import Message
from fastoss.data.formats.prompts import Asked, read_asked
from fastoss.errors import FastossError, RunFailed
from fastoss.inference.endpoint import is_endpoint
from fastoss.inference.reply import Answer
from fastoss.inference.sampling import Question, ReasoningLanguage, Sampling
from fastoss.run import RunDirectory, file_digest, file_lock, write_json, write_whole

_PROGRESS_S = 10.0
_LATER = "give the same settings to resume, --overwrite to start over, or another --output"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Batching:
    """What a file is answered with. Effort, language and system text override the rows' own."""

    sampling: Sampling
    samples: int = 1
    batch_size: int = 8
    effort: str | None = None
    language: ReasoningLanguage | None = None
    system: str | None = None
    tuned: bool = True

    def question(self, asked: Asked) -> Question:
        messages, said = asked.messages, asked.conversation
        if self.system is not None:
            messages = (Message("system", self.system), *(m for m in messages if m.role != "system"))
        return Question(messages, self.effort or said.reasoning_effort, self.language, said.tools, said.current_date)


def generate(model: str, source: Path, output: Path, how: Batching, *, overwrite: bool = False, max_rows: int | None = None, say: Say) -> None:
    """Answer every question of `source` into `output` (JSONL, in the order of the input; docs/answers.md lists the fields).

    Finished batches lie in a hidden file beside it; the same command resumes after them. Raises `FastossError` with `file:line` for
    what cannot be asked, before a model is loaded, and where the output belongs to other settings.
    """
    recipe = recipe_of_run(RunDirectory(Path(model).expanduser()))  # its rows may have columns of other names
    asked = read_asked(source, columns=[one.columns for one in recipe.data] if recipe else [], max_rows=max_rows)
    questions = [how.question(row).checked() for row in asked]
    _check_place(output)
    with _held(output):
        files = _Files(output, _settings(model, source, asked, how))
        if overwrite:
            files.remove()
        done = files.found()
        if done is None:
            say(f"{output} is finished; --overwrite answers it again")
            return
        from fastoss.inference.open_model import open_model

        say(f"loading {model} …")
        engine = open_model(model)
        lengths = []
        for row, question in zip(asked, questions, strict=True):
            try:
                lengths.append(len(engine.prompt_ids(question)))
            except FastossError as problem:
                raise FastossError(problem.fact, place=row.place, hint=problem.hint) from None
        batches = _batches(lengths, how)
        if done:
            say(f"{sum(len(batches[number]) for number in done):,} of {len(questions) * how.samples:,} answers are there already")
        _answer(engine, questions, asked, batches, how, files, done, say)
        files.finish(done)


def _answer(
    engine: Any, questions: Sequence[Question], asked: Sequence[Asked], batches: list[list[tuple[int, int]]], how: Batching,
    files: _Files, done: dict[int, list[dict[str, Any]]], say: Say,
) -> None:  # fmt: skip
    begun = spoke = time.monotonic()
    count = tokens = 0
    for number, batch in enumerate(batches):
        if number in done:
            continue
        # A batch's random numbers depend on its number only, so that they are the same whenever the run is started again.
        sampling = replace(how.sampling, seed=((how.sampling.seed or 0) * 1_000_003 + number) % 2**63)
        answers = engine.answers([questions[row] for row, _ in batch], sampling, tuned=how.tuned)
        rows = [_row(asked[row], questions[row], row, sample, answer) for (row, sample), answer in zip(batch, answers, strict=True)]
        files.keep(number, rows)
        done[number] = rows
        count += len(rows)
        tokens += sum(answer.tokens for answer in answers)
        now = time.monotonic()
        if now - spoke > _PROGRESS_S:
            spoke = now
            say(f"{sum(map(len, done.values())):,} of {sum(map(len, batches)):,} answered, {tokens / (now - begun):,.0f} tokens a second")
    rows = [row for batch in done.values() for row in batch]
    cut = sum(row["finish_reason"] == "length" for row in rows)
    malformed = sum(bool(row["problems"]) for row in rows)
    speed = f", {tokens / (time.monotonic() - begun):,.0f} tokens a second" if count else ""
    say(f"{len(rows):,} answers: {cut:,} cut off by the token limit, {malformed:,} malformed{speed}")


def _batches(lengths: Sequence[int], how: Batching) -> list[list[tuple[int, int]]]:
    """(row, sample) of each batch. Prompts of like length together, since they are padded; the longest first, where memory would end."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    units = [(row, sample) for row in order for sample in range(how.samples)]
    return [units[start : start + how.batch_size] for start in range(0, len(units), how.batch_size)]


def _row(asked: Asked, question: Question, index: int, sample: int, answer: Answer) -> dict[str, Any]:
    said = answer.completion
    row: dict[str, Any] = {
        "index": index, "sample": sample, "place": asked.place, "messages": [plain_message(message) for message in question.said()],
        "channels": {"analysis": said.thinking, "final": said.content},
    }  # fmt: skip
    if said.tool_call:
        row["tool_call"] = asdict(said.tool_call)
    if asked.reference is not None:
        row["reference"] = {"analysis": asked.reference.thinking, "final": asked.reference.content}
    return row | {
        "tokens": answer.tokens, "prompt_tokens": answer.prompt_tokens, "seconds": round(answer.seconds, 3),
        "finish_reason": answer.finish_reason, "problems": said.problems,
    }  # fmt: skip


def plain_message(message: Message) -> dict[str, Any]:
    """A message as JSON values, in the words of docs/data.md."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        plain["thinking"] = message.thinking
    if message.name:
        plain["name"] = message.name
    if message.tool_call:
        plain["tool_calls"] = [{"type": "function", "function": asdict(message.tool_call)}]
    return plain


def _settings(model: str, source: Path, asked: Sequence[Asked], how: Batching) -> dict[str, Any]:
    """Everything that an answer depends on, to tell whether an existing file is the same work."""
    digest = hashlib.sha256()
    for row in asked:
        digest.update(json.dumps([plain_message(m) for m in row.conversation.messages], ensure_ascii=False).encode() + b"\0")
    weights = None
    if not is_endpoint(model):
        folder = Path(model).expanduser()
        found = sorted(path for pattern in ("*.safetensors", "adapter/*.safetensors", "*.gguf") for path in folder.glob(pattern))
        found = [folder] if folder.is_file() else found
        # An adapter is hashed; of whole models, gigabytes, size and time tell that they were changed.
        weights = [
            file_digest(p) if p.name.startswith("adapter") else f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in found
        ]  # fmt: skip
    return {"model": model, "weights": weights, "input": str(source), "rows": len(asked), "rows_sha256": digest.hexdigest(), **asdict(how)}


def _check_place(output: Path) -> None:
    if output.is_dir():
        raise FastossError("this is a folder", place=f"--output {output}", hint="name a file, such as answers.jsonl")
    if not output.parent.is_dir():
        raise FastossError(f"there is no folder {output.parent}", place=f"--output {output}", hint="create it first, or name another place")


@contextlib.contextmanager
def _held(output: Path) -> Iterator[None]:
    lock = output.with_name(f".{output.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(lock, wait=False))
        except BlockingIOError:
            raise FastossError("another process is writing this file", place=str(output), hint="wait for it, or choose another --output") from None
        except OSError as problem:
            raise FastossError(f"cannot be written: {problem.strerror}", place=str(output)) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # nobody waits for it: who finds it held ends at once


class _Files:
    """The output, what it was made with (`NAME.meta.json`), and the batches that are finished so far (`.NAME.partial`, one a line)."""

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.output, self.settings = output, json.loads(json.dumps(settings))
        self.meta = output.with_name(output.name + ".meta.json")
        self.partial = output.with_name(f".{output.name}.partial")

    def remove(self) -> None:
        for path in (self.partial, self.meta, self.output):
            path.unlink(missing_ok=True)

    def found(self) -> dict[int, list[dict[str, Any]]] | None:
        """The finished batches by number; None when all is finished. `FastossError` when what lies there is another's work."""
        if self.partial.is_file():
            return self._partial()
        if not self.output.exists():
            return {}
        try:
            known = json.loads(self.meta.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None
        if known == self.settings:
            return None
        raise FastossError("the file is there already" + _difference(known, self.settings), place=str(self.output), hint=_LATER)

    def _partial(self) -> dict[int, list[dict[str, Any]]]:
        lines = self.partial.read_bytes().split(b"\n")
        try:
            known = json.loads(lines[0])
        except ValueError:
            known = {}  # killed within its first line
            if len(lines) == 1:
                self.partial.unlink()
                return {}
        if known != self.settings:
            fact = "an unfinished run with other settings is there" + _difference(known, self.settings)
            raise FastossError(fact, place=str(self.partial), hint=_LATER)
        done = {}
        for line in lines[1:-1]:  # a line that a kill has torn has no end
            entry = json.loads(line)
            done[entry["batch"]] = entry["rows"]
        with open(self.partial, "r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[:-1]))
        return done

    def keep(self, number: int, rows: list[dict[str, Any]]) -> None:
        """Add a finished batch; it survives whatever comes after."""

        try:
            new = not self.partial.exists()
            with open(self.partial, "ab") as file:
                if new:
                    file.write(json.dumps(self.settings, ensure_ascii=False).encode() + b"\n")
                file.write(json.dumps({"batch": number, "rows": rows}, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as problem:
            raise RunFailed(f"cannot be written: {problem.strerror}", place=str(self.partial), hint="run the same command again to resume") from None

    def finish(self, done: dict[int, list[dict[str, Any]]]) -> None:
        rows = sorted((row for batch in done.values() for row in batch), key=lambda row: (row["index"], row["sample"]))
        write_whole(self.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_json(self.meta, self.settings)
        self.partial.unlink(missing_ok=True)


def _difference(known: Any, now: dict[str, Any]) -> str:
    """Which settings differ, for the message."""
    if not isinstance(known, dict):
        return ""
    names = [name for name in now if known.get(name) != now[name]]
    return f" (its {', '.join(names)} {'is' if len(names) == 1 else 'are'} another)" if names else ""
