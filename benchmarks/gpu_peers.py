"""How the other contestants train: stock Unsloth and stock TRL over transformers, each as its own documentation has it.

They get our token ids and labels, so that all train the very same tokens, and our LoRA on the same matrices. What is theirs:
loading, attention, head and loss, batches (padded, rows of like length together) and the trainer.
"""

from __future__ import annotations

import functools
import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_clock import Clock
from gpu_common import LORA, Place, Skip, write_recipe

from fastoss.config import LoraSettings, load_recipe
from fastoss.model.backend import ModelPlan, attach_lora


@dataclass(frozen=True)
class Setting:
    """One way to run a peer. `token_budget` is Unsloth's own: a step's rows sorted out into passes of so many tokens, padding counted."""

    rows: int
    recompute: bool
    attention: str = ""
    token_budget: int = 0


def rows_a_step(place: Place) -> int:
    """Documents, or pairs, of one optimizer step: the global batch of every contestant."""
    return 2 if place.dry else 16


class Peer:
    """A loaded model with LoRA, which can be trained under one setting after another."""

    def __init__(self, name: str, place: Place, folder: Path, precision: str):
        self.name, self.place = name, place
        if name == "unsloth":
            self.plan = ModelPlan("unsloth", str(folder), precision, "cpu" if place.dry else "gpu")
            self.model = _stock_unsloth(place, folder, precision)
        else:
            self.plan = ModelPlan("transformers", str(folder), precision, "cpu" if place.dry else "gpu")
            self.model = _stock_transformers(place, folder)
        self.model.config.router_aux_loss_coef = 0.0  # the checkpoint says 0.9; ours leaves that loss out as well
        self.model.config.output_router_logits = False
        self.model, _, _ = attach_lora(self.model, LoraSettings(**LORA), self.plan, recompute=True)

    def train(self, rows: Any, setting: Setting, *, steps: int = 0, epochs: int = 1, preferences: bool = False) -> Clock:
        """Train on pre-tokenised `rows`; the adapter hardly moves (its learning rate is nearly nothing), so that runs can be repeated."""
        import torch
        from datasets import Dataset

        length = {"max_steps": steps or -1, "num_train_epochs": epochs}
        with Clock() as clock:
            trainer = (self._dpo if preferences else self._sft)(Dataset.from_list(rows), setting, length)
            try:
                trainer.train()
            finally:
                del trainer
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return clock

    def _arguments(self, setting: Setting, length: dict[str, int]) -> dict[str, Any]:
        return {
            "output_dir": str(self.place.work / "runs" / "peer"), "per_device_train_batch_size": setting.rows,
            "gradient_accumulation_steps": rows_a_step(self.place) // setting.rows, "learning_rate": 1e-9, "lr_scheduler_type": "constant",
            "optim": "adamw_torch" if self.place.dry else "adamw_torch_fused", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "use_cpu": self.place.dry, "bf16": not self.place.dry, "gradient_checkpointing": setting.recompute,
            "gradient_checkpointing_kwargs": {"use_reentrant": False} if setting.recompute and self.name == "trl" else None,
            "router_aux_loss_coef": 0.0,
            "max_length": None, "disable_tqdm": True, "seed": 1, "train_sampling_strategy": "group_by_length", **length,
        }  # fmt: skip

    def _prepare(self, setting: Setting) -> None:
        os.environ["UNSLOTH_TOKEN_BUDGET"] = str(setting.token_budget) if setting.token_budget else ""
        if self.name == "unsloth":
            from unsloth import FastLanguageModel

            FastLanguageModel.for_training(self.model, use_gradient_checkpointing="unsloth" if setting.recompute else False)
        else:
            self.model.get_base_model().set_attn_implementation(setting.attention)
            if not setting.recompute:
                self.model.get_base_model().gradient_checkpointing_disable()

    def _sft(self, rows: Any, setting: Setting, length: dict[str, int]) -> Any:
        from trl import SFTConfig, SFTTrainer

        self._prepare(setting)
        arguments = self._arguments(setting, length) | {"packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        if self.name == "trl":
            arguments["loss_type"] = "chunked_nll"
            if setting.attention == "flex_attention":
                arguments["pad_to_multiple_of"] = 512  # transformers compiles it anew for every length
        return SFTTrainer(self.model, args=SFTConfig(**arguments), train_dataset=rows, processing_class=self._tokenizer)

    def _dpo(self, rows: Any, setting: Setting, length: dict[str, int]) -> Any:
        from trl import DPOConfig, DPOTrainer

        class Tokenised(DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
                return dataset  # token ids already: the same as ours

        self._prepare(setting)
        config = DPOConfig(**self._arguments(setting, length), beta=0.1, remove_unused_columns=False)
        return Tokenised(self.model, args=config, train_dataset=rows, processing_class=self._tokenizer)

    @functools.cached_property
    def _tokenizer(self) -> Any:  # loading it takes seconds
        from transformers import PreTrainedTokenizerFast

        from fastoss.model.backend import model_source

        return PreTrainedTokenizerFast.from_pretrained(model_source(self.plan))


def _stock_unsloth(place: Place, folder: Path, precision: str) -> Any:
    """As its notebooks load it, its own attention with FlexAttention on. fastoss switches that off, and is not asked here."""
    os.environ["UNSLOTH_ENABLE_FLEX_ATTENTION"] = "1"
    for name, value in (("AUTO_INSTALL", "0"), ("DISABLE_STATISTICS", "1"), ("COMPILE_LOCATION", str(place.work / "unsloth_stock_cache"))):
        os.environ[f"UNSLOTH_{name}"] = value
    if precision == "bf16":
        os.environ["UNSLOTH_MXFP4_KEEP_PACKED"] = "0"
    try:
        from unsloth import FastLanguageModel
    except ImportError as problem:
        raise Skip(f"Unsloth cannot be imported: {problem}") from None
    import torch

    form = {} if place.dry or precision == "mxfp4" else {"load_in_16bit": True}
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder), max_seq_length=4096, dtype=torch.float32 if place.dry else torch.bfloat16, load_in_4bit=False,
        use_gradient_checkpointing="unsloth", **form,
    )  # fmt: skip
    return model.float() if place.dry else model


def _stock_transformers(place: Place, folder: Path) -> Any:
    import torch
    from transformers import GptOssForCausalLM, Mxfp4Config

    dtype = torch.float32 if place.dry else torch.bfloat16
    where = {} if place.dry else {"device_map": {"": 0}}
    packed = Mxfp4Config(dequantize=True)
    model = GptOssForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=packed, attn_implementation="eager", **where)
    model.config.use_cache = False
    return model.float() if place.dry else model


def tokenised(place: Place, data: Path, longest: int) -> list[dict[str, list[int]]]:
    """Every row's token ids and labels, made by fastoss."""
    return [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in _examples(place, data, longest, "sft")]


def tokenised_pairs(place: Place, data: Path, longest: int) -> list[dict[str, Any]]:
    """Prompt, chosen and rejected answer of every pair as token ids, made by fastoss."""
    examples = _examples(place, data, longest, "dpo")
    return [
        {
            "prompt_ids": list(chosen.input_ids[: chosen.prompt_length]), "chosen_ids": list(chosen.input_ids[chosen.prompt_length :]),
            "rejected_ids": list(rejected.input_ids[rejected.prompt_length :]), "prompt": "", "chosen": "", "rejected": "",
            "length": max(len(chosen), len(rejected)),
        }
        for chosen, rejected in zip(examples[::2], examples[1::2], strict=True)
    ]  # fmt: skip


def _examples(place: Place, data: Path, longest: int, method: str) -> list[Any]:
    from fastoss.data.dataset import build_dataset

    tables = {"model": {"name": "tiny", "max_length": longest}, "[data]": {"source": str(data)}, "eval": {"fraction": 0.0}}
    return list(build_dataset(load_recipe(write_recipe(data.with_suffix(".toml"), tables, method=method))).train)
