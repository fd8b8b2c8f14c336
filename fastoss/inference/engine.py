"""Run → replies: a model that answers, parsed at token level with the renderer and parser that training used.

Training asks it for its before-and-after samples; the chat streams from it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from fastoss.config import FormatSettings, ModelConfig
from fastoss.data.conversation import Message
from fastoss.data.harmony import Completion, CompletionParser, Delta, HarmonyRenderer, parse_completion
from fastoss.data.tokenizer import PAD, STOP_IDS
from fastoss.errors import FastossError, RunFailed
from fastoss.model.adapter import STAMP, check_adapter, read_stamp
from fastoss.model.backend import has_gpu, load_model, model_source, plan_model, ready_for_inference
from fastoss.model.checkpoint_source import checkpoint_source, native_precision
from fastoss.model.lora import adapter_folder


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 always takes the likeliest."""

    temperature: float = 0.0
    max_new_tokens: int = 1024
    seed: int | None = None

    def generate_arguments(self) -> dict[str, Any]:
        chosen: dict[str, Any] = {"do_sample": False} if self.temperature == 0 else {"do_sample": True, "temperature": self.temperature}
        return chosen | {"max_new_tokens": self.max_new_tokens, "eos_token_id": list(STOP_IDS), "pad_token_id": PAD, "use_cache": True}


class Engine:
    """A loaded model and the format settings that its prompts are rendered with."""

    def __init__(self, model: Any, format: FormatSettings):
        self.model = model
        self.renderer = HarmonyRenderer(format)

    @classmethod
    def load(cls, name: str) -> Engine:
        """Load a run, an adapter's folder, or a model by name. `FastossError` when it is none of these."""
        if name == "tiny" or _is_model(name):
            config = ModelConfig(name=name, precision=_default_precision(name))
            # A merged export says how its prompts are to be rendered; a published model does not.
            format = read_stamp(Path(name)).format if (Path(name) / STAMP).is_file() else FormatSettings()
            return cls._base(config, format, None)
        folder = adapter_folder(name)
        stamp = read_stamp(folder)
        return cls._base(stamp.model, stamp.format, folder)

    @classmethod
    def _base(cls, config: ModelConfig, format: FormatSettings, adapter: Path | None) -> Engine:
        plan = plan_model(config, gpu=has_gpu())
        if adapter is not None:
            check_adapter(adapter, model_source(plan))
        model = load_model(config, plan)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        return cls(ready_for_inference(model, plan), format)

    def stream(self, messages: Sequence[Message], sampling: Sampling | None = None, reasoning_effort: str | None = None) -> Iterator[Delta]:
        """Answer a chat, piece by piece as it is sampled. Stops sampling when the caller stops listening."""
        sampling = sampling or Sampling()
        prompt = self.renderer.render_prompt(messages, reasoning_effort)
        parser = CompletionParser()
        self.problems = parser.problems
        for token in self._sample(prompt, sampling):
            delta = parser.feed(token)
            if delta is not None:
                yield delta
        if parser.stop is None:
            delta = parser.close()
            if delta is not None:
                yield delta

    def complete(
        self, chats: Sequence[Sequence[Message]], sampling: Sampling | None = None, efforts: Sequence[str | None] | None = None
    ) -> list[Completion]:
        """Answer several chats at once, in order, each with its own effort; prompts are padded on the left."""
        if not chats:
            return []
        sampling = sampling or Sampling()
        prompts = [self.renderer.render_prompt(chat, effort) for chat, effort in zip(chats, efforts or [None] * len(chats), strict=True)]
        width = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.model.device)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        with torch.no_grad():
            output = self.model.generate(input_ids=ids, attention_mask=mask, **sampling.generate_arguments())
        return [parse_completion(_until_stop(row)) for row in output[:, width:].tolist()]

    def _sample(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        """Token ids as `generate` chooses them, in a thread of its own; the generator's end ends the thread."""
        queue: Queue[int | BaseException | None] = Queue()
        cancelled = threading.Event()
        ids = torch.tensor([prompt], device=self.model.device)

        class Streamer:
            """transformers hands the prompt first, then each new token."""

            prompt_seen = False

            def put(self, value: torch.Tensor) -> None:
                if self.prompt_seen:
                    queue.put(int(value.flatten()[0]))
                self.prompt_seen = True

            def end(self) -> None:
                pass

        def cancel(*_: Any) -> torch.Tensor:
            return torch.full((1,), cancelled.is_set(), dtype=torch.bool, device=ids.device)

        def run() -> None:
            try:
                if sampling.seed is not None:
                    torch.manual_seed(sampling.seed)
                with torch.no_grad():
                    arguments = sampling.generate_arguments()
                    self.model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), streamer=Streamer(), stopping_criteria=[cancel], **arguments
                    )
                queue.put(None)
            except BaseException as problem:  # handed to the caller's thread, which raises it
                queue.put(problem)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise RunFailed(f"generation failed: {item}") from item
                yield item
        finally:
            cancelled.set()
            thread.join()


def _until_stop(ids: list[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in STOP_IDS:
            return ids[: place + 1]
    return ids


def _is_model(name: str) -> bool:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    return name.count("/") == 1 and "gpt-oss" in name.lower() and not name.startswith((".", "/"))


def _default_precision(name: str) -> Any:
    """For a model that no recipe describes: as its checkpoint is, float32 without a GPU."""
    if has_gpu():
        return "bf16" if name == "tiny" else native_precision(checkpoint_source(name, "4bit", "unsloth"))
    if name != "tiny" and not Path(name).is_dir():
        raise FastossError(f"{name} needs a GPU, and this machine has none", place="MODEL", hint='"tiny" runs anywhere')
    return "float32"
