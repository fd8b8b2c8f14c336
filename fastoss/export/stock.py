"""Stock PEFT and transformers as an independent check: do they load an adapter, and what does the model then answer?"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastoss.export.adapter_layouts import WEIGHTS
from fastoss.export.base import Base
from fastoss.export.behaviour import Question
from fastoss.export.tensors import read_header

_SMALL = 100_000_000  # values


def _config(base: Base) -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(**{key: value for key, value in base.config.items() if key != "quantization_config"})


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|bitsandbytes)\b")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def check_peft_places(folder: Path, base: Base) -> list[str]:
    """Build stock PEFT's model from the adapter's config, without memory for it, and hold its tensors against the file's."""
    _quiet()
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import GptOssForCausalLM

    with torch.device("meta"):
        model = get_peft_model(GptOssForCausalLM(_config(base)), LoraConfig.from_pretrained(str(folder)))
    places = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    have = {name: entry.shape for name, entry in read_header(folder / WEIGHTS).items()}
    problems = [f"stock PEFT has no place for `{name}`" for name in sorted(set(have) - set(places))]
    problems += [f"stock PEFT finds no `{name}`" for name in sorted(set(places) - set(have))]
    problems += [f"`{n}` is {list(have[n])}, stock PEFT wants {list(places[n])}" for n in have if n in places and have[n] != places[n]]
    return problems[:8]


def is_small(base: Base) -> bool:
    """Whether stock PEFT may load the whole model in float32 to be asked (under 2 GB): larger ones are asked a matrix at a time."""
    return sum(math.prod(base.shape(name)) for name in base.names()) <= _SMALL


@torch.no_grad()
def stock_answers(base: Base, adapter: Path, questions: Sequence[Question]) -> list[torch.Tensor]:
    """Log-probabilities (places, vocabulary) of each question from `PeftModel` on `AutoModelForCausalLM`, in float32."""
    _quiet()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Mxfp4Config

    extra = {"quantization_config": Mxfp4Config(dequantize=True)} if base.is_mxfp4 else {}
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, **extra).float()
    model = PeftModel.from_pretrained(model, adapter).eval()
    found = []
    for question in questions:
        logits = model(input_ids=torch.tensor([question.text]), use_cache=False).logits[0]
        found.append(torch.log_softmax(logits[list(question.places)].float(), dim=-1))
    return found
