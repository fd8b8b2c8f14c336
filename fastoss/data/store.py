"""Examples on disk: the dataset writes them once, training reads them as often as it likes; memory holds neither.

A store is a folder: `input_ids.bin` (uint32, end to end), `spans.bin` and `examples.bin` (the dtypes below), `rows.bin`
(conversations as JSON) with `row_ends.bin` and `tree_lengths.bin`, and `meta.json`. All but the last are mapped into memory when they are read.
"""

from __future__ import annotations

import array
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy

from fastoss.data.conversation import Conversation, Message, Tool, ToolCall
from fastoss.data.harmony import Example, Span
from fastoss.run import read_json, write_json

_SPAN = numpy.dtype([("kind", "u1"), ("start", "<u4"), ("end", "<u4"), ("weight", "<f4")])
_EXAMPLE = numpy.dtype(
    [
        ("source", "<u2"),  # of recipe.data
        ("row", "<u4"), ("turn", "<u4"), ("cut", "<u4"),  # which conversation, up to which message, without which early ones
        ("first_id", "<u8"), ("length", "<u4"), ("first_span", "<u8"), ("spans", "<u4"), ("prompt_length", "<u4"),
    ]
)  # fmt: skip
KINDS: tuple[tuple[str, str | None], ...] = (
    ("system", None), ("developer", None), ("user", None), ("tool", None),
    ("assistant", None), ("assistant", "analysis"), ("assistant", "commentary"), ("assistant", "final"),
)  # fmt: skip
_CODES = {kind: code for code, kind in enumerate(KINDS)}
_FLUSH = 4096  # records held back before they are written


class StoreWriter:
    """Writes a store piece by piece. Use it within `whole_folder`, so that it appears whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder
        names = ("input_ids", "spans", "examples", "rows", "row_ends", "tree_lengths")
        self._files = {name: open(folder / f"{name}.bin", "wb") for name in names}  # noqa: SIM115  open as long as the writer is
        self._spans: list[tuple[int, int, int, float]] = []
        self._examples: list[tuple[int, ...]] = []
        self._rows_end = 0
        self._row_ends = array.array("Q")
        self._tree_lengths = array.array("I")
        self._ids = self._span_count = 0
        self.rows = 0

    def add_row(self, conversation: Conversation, tree_length: int = 0) -> int:
        """Keep a conversation; returns its number. `tree_length` is that of its examples as one tree, 0 where there is none."""
        text = json.dumps(_plain(conversation), ensure_ascii=False, separators=(",", ":")).encode()
        self._files["rows"].write(text)
        self._rows_end += len(text)
        self._row_ends.append(self._rows_end)
        self._tree_lengths.append(tree_length)
        self.rows += 1
        return self.rows - 1

    def add_example(self, source: int, row: int, turn: int, cut: int, example: Example) -> None:
        """Keep an example of row `row`: its target is message `turn`, early messages up to `cut` were left out."""
        self._files["input_ids"].write(array.array("I", example.input_ids).tobytes())
        spans, length = example.spans, len(example.input_ids)
        self._spans += [(_CODES[role, channel], start, end, weight) for role, channel, start, end, weight in spans]
        self._examples.append((source, row, turn, cut, self._ids, length, self._span_count, len(spans), example.prompt_length))
        self._ids += length
        self._span_count += len(spans)
        if len(self._examples) >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        self._files["spans"].write(numpy.array(self._spans, _SPAN).tobytes())
        self._files["examples"].write(numpy.array(self._examples, _EXAMPLE).tobytes())
        self._files["row_ends"].write(self._row_ends.tobytes())
        self._files["tree_lengths"].write(self._tree_lengths.tobytes())
        self._spans, self._examples, self._row_ends, self._tree_lengths = [], [], array.array("Q"), array.array("I")

    def close(self) -> None:
        """Write what is held back. `complete` is called when all else is written."""
        self._flush()
        for file in self._files.values():
            file.close()

    def complete(self, meta: dict[str, Any]) -> None:
        write_json(self.folder / "meta.json", meta)


class TokenStore:
    """A store opened for reading. `examples` and `spans` are structured arrays, one entry an example or a span."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.input_ids = _mapped(folder / "input_ids.bin", numpy.dtype("<u4"))
        self.spans = _mapped(folder / "spans.bin", _SPAN)
        self.examples = _mapped(folder / "examples.bin", _EXAMPLE)
        self._rows = _mapped(folder / "rows.bin", numpy.dtype("u1"))
        self._row_ends = _mapped(folder / "row_ends.bin", numpy.dtype("<u8"))
        self.tree_lengths = _mapped(folder / "tree_lengths.bin", numpy.dtype("<u4"))

    @staticmethod
    def is_complete(folder: Path) -> bool:
        return (folder / "meta.json").is_file()

    @property
    def meta(self) -> Any:
        return read_json(self.folder / "meta.json")

    def conversation(self, row: int) -> Conversation:
        start = int(self._row_ends[row - 1]) if row else 0
        return _conversation(json.loads(self._rows[start : int(self._row_ends[row])].tobytes()))

    def example(self, number: int) -> Example:
        entry = self.examples[number]
        first, first_span = int(entry["first_id"]), int(entry["first_span"])
        ids = self.input_ids[first : first + int(entry["length"])].tolist()
        spans = self.spans[first_span : first_span + int(entry["spans"])].tolist()
        whole = self.conversation(int(entry["row"]))
        return Example(
            ids,
            tuple(Span(KINDS[kind][0], KINDS[kind][1], start, end, weight) for kind, start, end, weight in spans),
            part_of(whole, int(entry["turn"]), int(entry["cut"])),
            int(entry["prompt_length"]),
        )


class Examples(Sequence[Example]):
    """Some examples of a store, in order, read from disk as they are asked for."""

    def __init__(self, store: TokenStore, numbers: numpy.ndarray):
        self.store, self.numbers = store, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self.store, self.numbers[index])
        return self.store.example(int(self.numbers[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self.store.example(int(number)) for number in self.numbers)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        lengths: list[int] = self.store.examples["length"][self.numbers].tolist()
        return lengths


def part_of(conversation: Conversation, turn: int, cut: int = 0) -> Conversation:
    """The conversation up to message `turn`; of the messages before `cut` only a system message stays."""
    c = conversation
    kept = c.messages[cut : turn + 1]
    if cut and c.messages[0].role == "system":
        kept = (c.messages[0], *kept)
    return Conversation(kept, c.place, c.reasoning_effort, c.current_date, c.tools)


def _mapped(path: Path, dtype: numpy.dtype) -> numpy.ndarray:
    if path.stat().st_size == 0:
        return numpy.empty(0, dtype)  # an empty file cannot be mapped
    return numpy.memmap(path, dtype, "r")


def _plain(conversation: Conversation) -> dict[str, Any]:
    plain: dict[str, Any] = {"place": conversation.place, "messages": [_plain_message(m) for m in conversation.messages]}
    if conversation.reasoning_effort is not None:
        plain["reasoning_effort"] = conversation.reasoning_effort
    if conversation.current_date is not None:
        plain["current_date"] = conversation.current_date
    if conversation.tools:
        plain["tools"] = [[tool.name, tool.description, tool.parameters] for tool in conversation.tools]
    return plain


def _plain_message(message: Message) -> list[Any]:
    plain: list[Any] = [message.role, message.content]
    if message.thinking is None and message.tool_call is None and message.name is None and message.weight == 1.0:
        return plain
    call = message.tool_call
    return [*plain, message.thinking, [call.name, call.arguments] if call else None, message.name, message.weight]


def _conversation(plain: dict[str, Any]) -> Conversation:
    messages = tuple(_message(*parts) for parts in plain["messages"])
    tools = tuple(Tool(*parts) for parts in plain.get("tools", ()))
    return Conversation(messages, plain["place"], plain.get("reasoning_effort"), plain.get("current_date"), tools)


def _message(
    role: Any, content: str, thinking: str | None = None, call: list[str] | None = None, name: str | None = None, weight: float = 1.0
) -> Message:
    return Message(role, content, thinking, ToolCall(*call) if call else None, name, weight)
