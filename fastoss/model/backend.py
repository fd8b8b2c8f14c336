"""Base model + LoRA, from Unsloth or from plain transformers: the same two functions, the same pair out of them.

The only file that names Unsloth. Its environment variables are set in `_prepare_unsloth`, before its import reads them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastoss.config import DistributedSettings, LoraSettings, ModelConfig
from fastoss.data.tokenizer import PAD, RETURN, SPECIAL, START_OF_TEXT
from fastoss.errors import FastossError
from fastoss.model.checkpoint_source import check_folder, checkpoint_form, checkpoint_source, read_config
from fastoss.model.lora import EXPERT_PARAMETERS, TrainableCounts, check_targets, chosen_expert_layers, load_adapter_weights, peft_targets
from fastoss.run import cache_folder

NEEDS_GPU = ("4bit", "mxfp4", "bf16")


@dataclass(frozen=True)
class ModelPlan:
    """What will be loaded, decided before anything is: for people, and for `load_model`.

    `source` is a folder or a hub id (None for the tiny model, which is built when it is needed). `notes` say where the
    recipe's words could not be taken literally.
    """

    backend: str
    source: str | None
    precision: str
    device: str
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        return f"{self.source or 'the embedded tiny gpt-oss'} in {self.precision} on the {self.device.upper()}, through {self.backend}"


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def plan_model(config: ModelConfig, *, gpu: bool, installed: bool = True) -> ModelPlan:
    """Choose backend, checkpoint and precision for a machine with or without a GPU. Loads nothing.

    `installed=False` plans for another machine and does not look at what this one has. Raises `FastossError` when the
    machine or what is installed cannot do what the recipe says.
    """
    backend = config.backend if config.backend != "auto" else ("unsloth" if gpu else "transformers")
    if backend == "unsloth" and installed and importlib.util.find_spec("unsloth") is None:
        hint = "pip install 'fastoss[unsloth]', or choose model.backend = \"transformers\""
        raise FastossError("Unsloth is not installed", place="model.backend", hint=hint)
    precision, notes = config.precision, []
    if not gpu and config.name == "tiny" and precision != "float32":
        notes.append(f"the tiny model runs in float32 without a GPU, whatever model.precision says ({precision})")
        precision = "float32"
    elif not gpu and precision in NEEDS_GPU and not (precision == "4bit" and config.backend == "transformers"):
        hint = "train on a GPU machine, or try the recipe here with --set model.name=tiny"
        raise FastossError(f'"{precision}" needs a GPU, and this machine has none', place="model.precision", hint=hint)
    elif gpu and config.name == "tiny" and precision in ("4bit", "mxfp4"):
        notes.append(f"the tiny model runs in bf16 (the recipe says {precision}, which needs a checkpoint made for it)")
        precision = "bf16"
    if precision == "4bit" and backend == "transformers":
        notes.append("transformers puts attention into 4 bits; gpt-oss's fused experts stay as large as they are (Unsloth packs them too)")
    source = None if config.name == "tiny" else checkpoint_source(config.name, precision, backend)
    if source and Path(source).is_dir():
        checkpoint_form(read_config(source), source, precision, backend)
        check_folder(Path(source))
    return ModelPlan(backend, source, precision, "gpu" if gpu else "cpu", tuple(notes))


def prepare_process(plan: ModelPlan) -> None:
    """Process-wide settings, before the libraries read them: quiet, and one thread where there is no GPU."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked loader workers would warn
    warnings.filterwarnings("ignore", module=r"(trl|transformers|peft|torch|accelerate|bitsandbytes)\b")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it regrets that it has no CPU kernels
    if plan.backend == "unsloth":
        _prepare_unsloth()
        with contextlib.redirect_stdout(sys.stderr):  # its banner; stdout is for answers
            import unsloth  # noqa: F401  before transformers, which it patches
    import torch
    from transformers.utils import logging as transformers_logging

    if plan.device == "gpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # kernels run on the current device, not on the weights'

    transformers_logging.set_verbosity_error()
    if plan.source is None or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if plan.device == "cpu":
        torch.set_num_threads(1)  # bit-reproducible, and on a busy machine two threads are slower by far


def load_model(config: ModelConfig, plan: ModelPlan | None = None, *, shared_out: DistributedSettings | None = None) -> Any:
    """Load the base model, ready for `attach_lora`: router loss off, no network for a folder.

    With `shared_out` this process's share alone (sharding.py): all processes of the group must call. Raises `FastossError` when
    the checkpoint cannot be reached or read.
    """
    plan = plan or plan_model(config, gpu=has_gpu())
    prepare_process(plan)
    from safetensors import SafetensorError

    source = model_source(plan)
    form = checkpoint_form(read_config(source), source, plan.precision, plan.backend)
    try:
        if shared_out is not None:
            model = _load_shared_out(source, plan, shared_out)
        else:
            model = _load_with_unsloth(source, config, plan) if plan.backend == "unsloth" else _load_with_transformers(source, plan, form)
    except (OSError, SafetensorError) as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise FastossError(f"the weights cannot be read: {first}", place=f"model.name = {config.name}") from problem
    if plan.precision == "float32" and shared_out is None:
        model = model.float()  # dequantised MXFP4 experts come back in bf16, whatever dtype was asked for
    # The checkpoint says 0.9, and TRL would add that loss to every step.
    model.config.router_aux_loss_coef = 0.0
    model.config.output_router_logits = False
    model.config.use_cache = False
    return model


def trainer_tokenizer(plan: ModelPlan) -> Any:
    """The tokenizer that TRL asks for: of ids that are there already it takes only how to begin, end and pad.

    So it knows gpt-oss's control tokens alone, at their ids; the whole one takes two seconds and 360 MiB. Unsloth, whose
    trainers look at more of it, gets the model's own.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    if plan.backend == "unsloth":
        return PreTrainedTokenizerFast.from_pretrained(model_source(plan))
    control = {name: token_id for token_id, name in SPECIAL.items()}
    words = Tokenizer(models.WordLevel(control, unk_token=SPECIAL[PAD]))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=SPECIAL[START_OF_TEXT], eos_token=SPECIAL[RETURN], pad_token=SPECIAL[PAD])


def attach_lora(
    model: Any, settings: LoraSettings, plan: ModelPlan, *, adapter: Path | None = None, recompute: bool = False, seed: int = 42
) -> tuple[Any, TrainableCounts, list[str]]:
    """Put LoRA on the groups that the settings name, and prove that it is there.

    `adapter` fills it with saved weights. Returns (PEFT model, trainable counts, notes). Raises `FastossError` when a
    target matches nothing, or a layer does not exist.
    """
    import torch

    layers, note = chosen_expert_layers(settings, model.config.num_hidden_layers, tiny=plan.source is None)
    torch.manual_seed(seed)  # lora_A is random: the same on every rank and in every run
    if plan.backend == "unsloth":
        peft_model = _attach_with_unsloth(model, settings, layers, recompute, seed)
    else:
        peft_model = _attach_with_peft(model, settings, layers)
    counts = check_targets(peft_model, settings, layers)
    if adapter is not None:
        load_adapter_weights(peft_model, adapter, settings)
    return peft_model, counts, [note] if note else []


def _attach_with_peft(model: Any, settings: LoraSettings, layers: list[int]) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = peft_targets(settings, layers)
    lora = LoraConfig(r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout, bias="none", task_type="CAUSAL_LM", **targets)
    peft_model = get_peft_model(model, lora)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:  # PEFT puts it where its base lies, which may be the host (sharding.py)
            parameter.data = parameter.data.to(model.device)
    return peft_model


def _load_with_transformers(source: str, plan: ModelPlan, form: str) -> Any:
    import torch
    from transformers import GptOssForCausalLM, Mxfp4Config

    from fastoss.model.attention import register_packed_attention

    dtype = torch.float32 if plan.precision == "float32" else torch.bfloat16
    arguments: dict[str, Any] = {"dtype": dtype, "attn_implementation": register_packed_attention()}
    if form == "mxfp4":
        arguments["quantization_config"] = Mxfp4Config(dequantize=True)
    elif plan.precision == "4bit" and form == "float":
        arguments["quantization_config"] = _four_bits(dtype=torch.bfloat16)
    if plan.device == "gpu":
        arguments["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    model = GptOssForCausalLM.from_pretrained(source, **arguments)
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights for AVX-512 in the first evaluation, and training on them then fails.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _load_shared_out(source: str, plan: ModelPlan, settings: DistributedSettings) -> Any:
    import torch

    from fastoss.model.attention import register_packed_attention
    from fastoss.model.sharding import load_shared_out

    dtype = torch.float32 if plan.precision == "float32" else torch.bfloat16
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if plan.device == "gpu" else torch.device("cpu")
    return load_shared_out(source, register_packed_attention(), dtype, device, host_layers=settings.host_layers)


def _prepare_unsloth() -> None:
    """Environment that Unsloth reads at import and load: no installs, no statistics, its compiled files in our cache."""
    os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")  # it would pip-install and apt-get on its own
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # a download that hangs up to 120 s with no network
    os.environ["UNSLOTH_ENABLE_FLEX_ATTENTION"] = "0"  # its own attention for gpt-oss has no mask: packed documents would see each other
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth_compiled_cache"))  # else in the current folder


def _load_with_unsloth(source: str, config: ModelConfig, plan: ModelPlan) -> Any:
    import torch
    from unsloth import FastLanguageModel

    from fastoss.model.attention import attend_packed

    forms = {"4bit": {"load_in_4bit": True}, "mxfp4": {"load_in_4bit": False}}
    form = forms.get(plan.precision, {"load_in_4bit": False, "load_in_16bit": True})
    if plan.device == "cpu":
        form.pop("load_in_16bit", None)
    if plan.precision == "bf16":
        os.environ["UNSLOTH_MXFP4_KEEP_PACKED"] = "0"  # read at load: without it a MXFP4 checkpoint stays packed
    arguments: dict[str, Any] = {
        "model_name": source,
        "use_exact_model_name": True,  # its own mapping would load another repository than the one we name and checked
        "max_seq_length": config.max_length,
        "dtype": torch.float32 if plan.precision == "float32" else torch.bfloat16,
        "use_gradient_checkpointing": False,  # attach_lora decides
        **form,
    }
    if plan.device == "gpu":
        arguments["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    with contextlib.redirect_stdout(sys.stderr):
        model, _ = FastLanguageModel.from_pretrained(**arguments)
    return attend_packed(model)


def _attach_with_unsloth(model: Any, settings: LoraSettings, layers: list[int], recompute: bool, seed: int) -> Any:
    from unsloth import FastLanguageModel

    targets = peft_targets(settings, layers)
    extra: dict[str, Any] = {}
    if "experts" in settings.targets and _has_split_experts(model):
        # The 4-bit checkpoint holds every expert as Linear layers of its own: they are named one by one.
        # finetune_vision_layers keeps Unsloth from turning the list into a pattern of its own, which loses them.
        experts = model.config.num_local_experts
        names = [f"layers.{layer}.mlp.experts.{name}s.{e}" for layer in layers for name in EXPERT_PARAMETERS for e in range(experts)]
        targets = {"target_modules": targets["target_modules"] + names}
        extra = {"finetune_vision_layers": True}
    if targets.get("target_parameters"):
        targets["target_parameters"] = [f"layers.{name}" for name in targets["target_parameters"]]
    with contextlib.redirect_stdout(sys.stderr):
        return FastLanguageModel.get_peft_model(
            model,
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            bias="none",
            use_gradient_checkpointing="unsloth" if recompute else False,
            random_state=seed,
            **targets,
            **extra,
        )


def _has_split_experts(model: Any) -> bool:
    return any(name.endswith("gate_up_projs") for name, _ in model.named_modules())


def _four_bits(dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    # The router's choice and the head's logits are too sensitive for 4 bits; fused experts are no Linear and stay as they are.
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head", "router"]
    )  # fmt: skip


def model_source(plan: ModelPlan) -> str:
    """The folder or hub id of the plan's base; the tiny model is built here if it is not there yet."""
    from fastoss.model.tiny import tiny_model_folder

    return plan.source or str(tiny_model_folder())


def ready_for_inference(model: Any, plan: ModelPlan) -> Any:
    """Switch a model to answering (Unsloth has kernels of its own for it)."""
    if plan.backend == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    model.eval()
    return model


def ready_for_training(model: Any, plan: ModelPlan) -> Any:
    """Switch a model back to training."""
    if plan.backend == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(model)
    model.train()
    return model
