"""Run → replies: a model that answers, parsed at token level with the renderer and parser that training used.

Training asks it for its before-and-after samples; chat, generate, evaluate and serve ask it for everything else. Several threads may
ask one engine: they are answered one after the other, in the order in which they came.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastoss.config import FormatSettings, LoraSettings, ModelConfig
from fastoss.data.harmony import HarmonyRenderer, parse_completion
from fastoss.data.tokenizer import PAD, STOP_IDS
from fastoss.errors import FastossError
from fastoss.inference.answering import Answering
from fastoss.inference.prefix_cache import PrefixCaches
from fastoss.inference.reply import Answer, Reply, finish_reason
from fastoss.inference.sampling import Question, prompt_ids
from fastoss.inference.sampling import Sampling as Sampling
from fastoss.inference.streaming import Tell, streamed
from fastoss.inference.turns import Turns
from fastoss.model.adapter import STAMP, check_adapter, read_stamp
from fastoss.model.backend import has_gpu, load_model, model_source, plan_model, ready_for_inference
from fastoss.model.checkpoint_source import checkpoint_source, native_precision
from fastoss.model.lora import adapter_folder, load_adapter_weights


class Engine(Answering):
    """A loaded model and the format settings that its prompts are rendered with.

    `prefix_cache`: keep the keys and values of earlier turns for `stream`. `waiting` is how many may wait for their turn
    (None: any number; `Busy` beyond).
    """

    def __init__(self, model: Any, format: FormatSettings, *, prefix_cache: bool = False, waiting: int | None = None):
        self.model = model
        self.renderer = HarmonyRenderer(format)
        self.turns = Turns(waiting)
        self._caches = PrefixCaches() if prefix_cache else None
        self._beside: dict[str, torch.Tensor] | None = None

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
        # Unsloth answers through kernels and caches of its own.
        return cls(ready_for_inference(model, plan), format, prefix_cache=plan.backend == "transformers")

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter, so that the base can be asked as well (`tuned=False`)."""
        return hasattr(self.model, "peft_config")

    @property
    def context_length(self) -> int:
        """Tokens of prompt and reply together that the model knows positions for."""
        return int(self.model.config.max_position_embeddings)

    def prompt_ids(self, question: Question) -> list[int]:
        """The tokens that ask a question. `FastossError` when it cannot be asked, or is longer than the model can read."""
        return prompt_ids(self.renderer, question, self.context_length)

    def ask(self, question: Question, sampling: Sampling, *, tuned: bool = True) -> Reply:
        self._check_base(tuned)
        prompt = self.prompt_ids(question)
        return Reply(
            lambda reply: streamed(reply, self.turns, lambda tell: self._generate(reply, prompt, sampling, tuned, tell)), len(prompt)
        )  # fmt: skip

    def answers(self, questions: Sequence[Question], sampling: Sampling | None = None, *, tuned: bool = True) -> list[Answer]:
        """Answer several chats in one batch, in order. Their `seconds` are the batch's."""
        if not questions:
            return []
        self._check_base(tuned)
        sampling = sampling or Sampling()
        prompts = [self.prompt_ids(question) for question in questions]
        with self.turns.turn():
            begun = time.monotonic()
            replies = self._batch(prompts, sampling, tuned)
            seconds = time.monotonic() - begun
        answers = []
        for prompt, ids in zip(prompts, replies, strict=True):
            completion = parse_completion(ids)
            answers.append(Answer(completion, len(ids), len(prompt), seconds, finish_reason(completion.stop)))
        return answers

    def put_beside(self, adapter: Path, settings: LoraSettings) -> None:
        """From now on `tuned=False` asks with this adapter, the one that a run started from, and no longer the base.

        Raises `FastossError` where it is none of these `settings`.
        """
        own = {name: weight.detach().clone() for name, weight in self._adapter_weights().items()}
        load_adapter_weights(self.model, adapter, settings)
        self._beside = {name: weight.detach().clone() for name, weight in self._adapter_weights().items()}
        for name, weight in self._adapter_weights().items():
            weight.data.copy_(own[name])
        if self._caches is not None:
            self._caches.clear()

    @contextlib.contextmanager
    def switched(self, tuned: bool) -> Iterator[None]:
        """Within it the model is the tuned one, or the base (or what was put beside). Only for whoever has the turn."""
        if tuned or not self.has_adapter:
            yield
        elif self._beside is None:
            with self.model.disable_adapter():
                yield
        else:
            self._swap(self._beside)
            try:
                yield
            finally:
                self._swap(self._beside)

    def _swap(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in self._adapter_weights().items():
            weight.data, weights[name] = weights[name], weight.data

    def _adapter_weights(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if ".lora_" in name}

    def _check_base(self, tuned: bool) -> None:
        if not tuned and not self.has_adapter:
            raise FastossError("there is no adapter to switch off: this is the base itself, or tuned weights merged into it", place="tuned=False")

    def _batch(self, prompts: list[list[int]], sampling: Sampling, tuned: bool) -> list[list[int]]:
        """Sampled ids up to the stop token. Prompts are padded on the left."""
        width = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.model.device)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        with torch.no_grad(), self.switched(tuned):
            output = self.model.generate(input_ids=ids, attention_mask=mask, **sampling.generate_arguments())
        return [_until_stop(row) for row in output[:, width:].tolist()]

    def _generate(self, reply: Reply, prompt: list[int], sampling: Sampling, tuned: bool, tell: Tell) -> None:
        ids = torch.tensor([prompt], device=self.model.device)
        sampled: list[int] = []

        class Streamer:
            """transformers hands the prompt first, then each new token."""

            prompt_seen = False

            def put(self, value: torch.Tensor) -> None:
                if self.prompt_seen:
                    sampled.append(int(value.flatten()[0]))
                    tell(sampled[-1:], 1)
                self.prompt_seen = True

            def end(self) -> None:
                pass

        def cancel(*_: Any) -> torch.Tensor:
            return torch.full((1,), reply.cancelled.is_set(), dtype=torch.bool, device=ids.device)

        arguments = sampling.generate_arguments()
        cache = None
        if self._caches is not None:
            cache, reply.reused_tokens = self._caches.take(prompt, tuned)
            arguments["past_key_values"] = cache
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        with torch.no_grad(), self.switched(tuned):
            self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=Streamer(), stopping_criteria=[cancel], **arguments)
        if self._caches is not None:
            self._caches.keep([*prompt, *sampled], cache, tuned)


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
