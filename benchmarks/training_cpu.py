"""Benchmarks of training that need no GPU (`make bench`): ratios, each between two things that train the same tokens to the same loss.

A CPU's absolute times say little; ratios, with the command that made them, go to benchmarks/results/training_cpu.json. `wall` is
what a clock shows, `cpu` the processor time of this process, on which other work on the machine has less influence.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastoss.config import LoraSettings, Recipe, load_recipe
from fastoss.data.conversation import Conversation
from fastoss.data.harmony import Example, Span
from fastoss.data.packing import LOSS_MARKS, Layout, collate
from fastoss.model.adapter import library_versions
from fastoss.model.attention import register_packed_attention
from fastoss.model.backend import ModelPlan, attach_lora
from fastoss.model.head import TrainedTokenLoss, token_losses
from fastoss.run import RunDirectory, write_json

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
RESULTS = ROOT / "benchmarks" / "results" / "training_cpu.json"


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


# --- (a) packed against padded ----------------------------------------------------------------------------------------

# A gpt-oss with the 20B's proportions, for one core: head = 0.19 of the active body, lengths and window an eighth.
VOCABULARY = 1664
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "num_local_experts": 8,
    "num_experts_per_tok": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 16,
    "max_position_embeddings": 131072, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
MEDIAN_LENGTH, LONGEST = 75, 512  # lognormal, an eighth of shared/performance.md's chats: median 600, 99 % up to 4096
SIGMA = math.log(LONGEST / MEDIAN_LENGTH) / 2.326


def small_model() -> Any:
    """Random weights, LoRA on attention and experts; the adapter is not zero, so that its gradients are not either."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SHAPE, attn_implementation=register_packed_attention()))
    model.config.use_cache = False
    model, _, _ = attach_lora(model, LoraSettings(r=8), ModelPlan("transformers", None, "float32", "cpu"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.02)
    return model.train()


def chat_examples(count: int) -> list[Example]:
    """Random tokens of chat length; the last 30 % of each are trained."""
    rng = random.Random(0)
    made = []
    for _ in range(count):
        length = min(LONGEST, max(8, round(rng.lognormvariate(math.log(MEDIAN_LENGTH), SIGMA))))
        start = round(length * 0.7)
        ids = [rng.randrange(3, VOCABULARY) for _ in range(length)]
        made.append(Example(ids, (Span("assistant", "final", start, length, 1.0),), Conversation((), "made:1"), start))
    return made


def forward(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    base = model.get_base_model()
    hidden: torch.Tensor = base.model(**{key: value for key, value in batch.items() if key not in LOSS_MARKS}, use_cache=False).last_hidden_state
    return hidden


def loss_of(model: Any, batch: dict[str, torch.Tensor], loss: TrainedTokenLoss) -> torch.Tensor:
    """As the trainer computes it: the mean over trained tokens."""
    hidden = forward(model, batch)
    loss.mark(batch["loss_weights"], batch["channels"])
    mean: torch.Tensor = loss.chunked(hidden, model.get_base_model().lm_head.weight, labels=batch["labels"])[0]
    return mean


def document_losses(model: Any, batch: dict[str, torch.Tensor], layout: Layout) -> list[float]:
    """The mean loss of each document, in order."""
    with torch.no_grad():
        hidden = forward(model, batch)
    before, labels = hidden[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    places = (labels >= 0).nonzero().squeeze(1)
    losses, *_ = token_losses(before[places], model.get_base_model().lm_head.weight.detach(), labels[places])
    row = places // (batch["labels"].shape[1] - 1)
    numbers = (batch["position_ids"][0] == 0).cumsum(0)[1:][places] if layout == "packed" else row
    return [float(losses[numbers == number].mean()) for number in numbers.unique()]


def packed(rows: int = 8, batches: int = 5, repeats: int = 7) -> dict[str, Any]:
    """Forward, backward and optimizer over the same documents in the same batches, end to end or a row each and padded.

    The target: at least 0.8 / fill times as fast, fill being the share of the padded batches that is no padding.
    """
    model, loss = small_model(), TrainedTokenLoss(4)
    chats = chat_examples(rows * batches)
    units = [[[chat] for chat in chats[start : start + rows]] for start in range(0, len(chats), rows)]
    made = {layout: [collate(unit, layout) for unit in units] for layout in ("packed", "padded")}
    for batch in made["padded"]:
        batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"] == 1, 0)  # the published padding token is no token here
    mine, theirs = ([value for batch in made[layout] for value in document_losses(model, batch, layout)] for layout in ("packed", "padded"))
    assert len(mine) == len(theirs) == len(chats)
    trained = {layout: sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in made[layout]) for layout in made}
    assert trained["packed"] == trained["padded"], "the same trained tokens"
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0)  # the weights stay: every repeat computes the same
    gradients = {}

    def train(layout: str) -> None:
        for batch in made[layout]:
            loss_of(model, batch, loss).backward()
            gradients[layout] = torch.cat([p.grad.flatten() for p in weights])
            optimizer.step()
            optimizer.zero_grad()

    pairs = []
    for number in range(repeats + 1):  # the first to warm up
        order = ("packed", "padded") if number % 2 else ("padded", "packed")
        pairs.append({layout: seconds(lambda layout=layout: train(layout)) for layout in order})
    slots = sum(batch["input_ids"].numel() for batch in made["padded"])
    fill = sum(map(len, chats)) / slots
    times_faster = {clock: spread([pair["padded"][n] / pair["packed"][n] for pair in pairs[1:]]) for n, clock in enumerate(("wall", "cpu"))}
    return {
        "times_faster": times_faster,
        "fill": fill,
        "target": 0.8 / fill,
        "seconds_packed": statistics.median(pair["packed"][0] for pair in pairs[1:]),
        "document_loss_difference": max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True)),
        "gradient_difference": float((gradients["packed"] - gradients["padded"]).norm() / gradients["padded"].norm()),
        "documents": len(chats), "tokens": sum(map(len, chats)), "trained_tokens": trained["packed"], "rows": rows, "repeats": repeats,
    }  # fmt: skip


# --- (b) the trainer over the bare step --------------------------------------------------------------------------------

# Parts of a step that the bare one does without, by the method of transformers' Trainer that does them.
PARTS = ("get_batch_samples", "floating_point_ops", "_clip_grad_norm", "_maybe_log_save_evaluate")
BARE = ("forward", "backward", "optimizer", "zero_grad")


class _BareSteps:
    """Does the bare step of the same batch, with a copy of the model, after each of the trainer's; and times the trainer's parts."""

    def __init__(self, steps: int, max_grad_norm: float, adam_beta2: float):
        self.steps, self.max_grad_norm, self.adam_beta2 = steps, max_grad_norm, adam_beta2
        self.pairs: list[dict[str, float]] = []
        self.parts: list[Counter[str]] = []
        self.inside: Counter[str] = Counter()
        self.mark: tuple[float, float] | None = None
        self.paused = False
        self.spent = 0.0  # wall seconds in `step`, which some of the trainer's parts call
        self.loss = TrainedTokenLoss(4)

    def begin(self, model: Any, optimizer: Any, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        self.batches = [batch for batch, _ in zip(batches, range(self.steps), strict=False)]
        self.model = copy.deepcopy(model).train()
        self.weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.0, betas=(0.9, self.adam_beta2), weight_decay=0.0)
        for owner, name, label in (
            (model, "forward", "forward"), (model, "train", "model.train"), (model, "zero_grad", "zero_grad"), (optimizer, "step", "optimizer")
        ):  # fmt: skip
            self.watch(owner, name, label)

    def watch(self, owner: Any, name: str, label: str) -> Callable[[], None]:
        """Add the time of the trainer's calls to `inside`; returns what undoes it."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.paused:
                return function(*args, **kwargs)
            begun, spent = time.perf_counter(), self.spent
            try:
                return function(*args, **kwargs)
            finally:
                self.inside[label] += time.perf_counter() - begun - (self.spent - spent)

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, function)

    def step(self, logs: dict[str, float]) -> None:
        """Called at the end of each of the trainer's steps."""
        now = time.perf_counter(), time.process_time()
        self.paused = True
        for group in self.optimizer.param_groups:
            group["lr"] = logs["learning_rate"]
        mean: list[torch.Tensor] = []
        batch = self.batches[len(self.pairs)]

        def forward_and_backward() -> None:
            mean.append(loss_of(self.model, batch, self.loss))
            mean[0].backward()

        def update() -> None:
            self.optimizer.step()
            self.optimizer.zero_grad()

        first = seconds(forward_and_backward)
        torch.nn.utils.clip_grad_norm_(self.weights, self.max_grad_norm)  # so that both train the same; not counted
        bare = [a + b for a, b in zip(first, seconds(update), strict=True)]
        pair = {"difference": abs(mean[0].item() - logs["loss"]) / abs(logs["loss"])}
        if self.mark is not None:
            trainer = [end - start for end, start in zip(now, self.mark, strict=True)]
            accounted = sum(self.inside[name] for name in BARE)
            pair |= {"wall": trainer[0], "cpu": trainer[1], "bare_wall": bare[0], "bare_cpu": bare[1], "accounted": accounted}
            self.parts.append(self.inside.copy())
        self.pairs.append(pair)
        self.inside.clear()
        self.paused = False
        self.mark = time.perf_counter(), time.process_time()
        self.spent += self.mark[0] - now[0]


@contextlib.contextmanager
def beside_the_trainer(bare: _BareSteps) -> Iterator[None]:
    """Every trainer made in here calls `bare`."""
    import transformers.trainer

    class Callback(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"]
            bare.begin(kwargs["model"], getattr(optimizer, "optimizer", optimizer), iter(kwargs["train_dataloader"]))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                bare.step(logs)

    undo = [bare.watch(transformers.Trainer, name, name) for name in PARTS if hasattr(transformers.Trainer, name)]
    undo.append(bare.watch(torch.Tensor, "backward", "backward"))
    transformers.trainer.DEFAULT_CALLBACKS.append(Callback)
    try:
        yield
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(Callback)
        for restore in undo:
            restore()


def overhead(rows: int = 6, steps: int = 40) -> dict[str, Any]:
    """`train` of the quickstart's recipe: what a step takes beside forward, backward and optimizer. The target: at most 3 % more.

    `accounted` is the share of the trainer's own step that is none of the three. `wall` and `cpu` compare it with a bare loop over a
    copy of the model and the same batches, step by step in turn: noisier, but nothing can hide from it. Clipping the gradient is
    the recipe's, and not in the bare step.
    """
    from fastoss.training.train import train

    changes = ["samples.from_train=0", f"train.max_steps={steps}", f"train.per_device_train_batch_size={rows}", "checkpoint.every=100000"]
    recipe: Recipe = load_recipe(QUICKSTART, [*changes, "data.0.max_rows=200"])
    bare = _BareSteps(steps, recipe.train.max_grad_norm, recipe.train.adam_beta2)
    with tempfile.TemporaryDirectory() as folder, beside_the_trainer(bare):
        train(recipe, QUICKSTART, RunDirectory(Path(folder) / "run"))
    pairs = [pair for pair in bare.pairs if "wall" in pair]
    names = sorted({name for parts in bare.parts for name in parts})
    return {
        "overhead": {
            "accounted": spread([pair["wall"] / pair["accounted"] - 1 for pair in pairs]),
            **{clock: spread([pair[clock] / pair[f"bare_{clock}"] - 1 for pair in pairs]) for clock in ("wall", "cpu")},
        },
        "overhead_ms": 1000 * statistics.median(pair["wall"] - pair["accounted"] for pair in pairs),
        "bare_step_seconds": statistics.median(pair["bare_wall"] for pair in pairs),
        "parts_ms": {name: round(1000 * statistics.median(parts[name] for parts in bare.parts), 3) for name in names},
        "loss_difference": max(pair["difference"] for pair in bare.pairs),
        "rows": rows, "steps": len(pairs), "target": 0.03,
    }  # fmt: skip


def walks(repeats: int = 5) -> dict[str, Any]:
    """What transformers' Trainer does per micro-batch over the modules of the full 20B model, which no GPU makes faster. In ms.

    Without weights (on the meta device), with LoRA on attention and experts: fused, as transformers has them, and an expert a
    Linear, as Unsloth's 4-bit checkpoint has them.
    """
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import GptOssConfig, GptOssForCausalLM

    def split(model: Any) -> None:
        for layer in model.model.layers:
            experts = layer.mlp.experts = nn.Module()
            experts.gate_up_projs = nn.ModuleList([nn.Linear(2880, 5760) for _ in range(32)])
            experts.down_projs = nn.ModuleList([nn.Linear(2880, 2880) for _ in range(32)])

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    each = [f"{name}.{number}" for name in ("gate_up_projs", "down_projs") for number in range(32)]
    results: dict[str, Any] = {"repeats": repeats}
    for form, targets, parameters in (
        ("fused", attention, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]), ("split", [*attention, *each], None)
    ):  # fmt: skip
        with torch.device("meta"):
            model = GptOssForCausalLM(GptOssConfig())
            if form == "split":
                split(model)
            peft = get_peft_model(model, LoraConfig(r=8, target_modules=targets, target_parameters=parameters, task_type="CAUSAL_LM"))
        calls: dict[str, Callable[[], object]] = {
            "model.train": peft.train,
            "floating_point_ops": lambda model=peft: model.num_parameters(exclude_embeddings=True),  # all that it does
            "zero_grad": peft.zero_grad,
        }
        results[form] = {"modules": sum(1 for _ in peft.modules())}
        results[form] |= {name: spread([1000 * seconds(call)[0] for _ in range(repeats)]) for name, call in calls.items()}
    return results


# --- (c) two processes ------------------------------------------------------------------------------------------------


_DDP_RECIPE = """\
name = "ddp"
[model]
name = "tiny"
precision = "float32"
max_length = 512
[[data]]
source = "{data}"
[eval]
fraction = 0.0
[train]
tokens_per_batch = 512
"""


def ddp(steps: int = 8, repeats: int = 3, warm_up: int = 2) -> dict[str, Any]:
    """The tiny model on one process, on two with gloo, and as two runs beside each other that know nothing of one another.

    The last is what two cores of this machine can do at all, so `of_ceiling` is what DDP leaves of it. The target, 0.95, is for cards.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.toml"
        recipe.write_text(_DDP_RECIPE.format(data=QUICKSTART.parent / "data" / "catgirl.jsonl"))

        def start(run: str, processes: int, accumulation: int) -> subprocess.Popen[bytes]:
            changes = ["--set", f"train.max_steps={steps}", "--set", f"train.gradient_accumulation_steps={accumulation}"]
            command = [sys.executable, "-m", "fastoss", "train", recipe, "--output", folder / run, *changes]
            return subprocess.Popen([*command, *(["--gpus", str(processes)] if processes > 1 else [])], cwd=ROOT, stderr=subprocess.DEVNULL)

        def rates(*running: tuple[str, subprocess.Popen[bytes]]) -> tuple[float, list[float]]:
            """Tokens a second, of all runs together, and the first's losses."""
            for _, process in running:
                assert process.wait() == 0, process.args
            entries = [[json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()] for run, _ in running]
            counted = [(steps[warm_up - 1], steps[-1]) for steps in entries]
            speed = sum((last["num_tokens"] - first["num_tokens"]) / (last["seconds"] - first["seconds"]) for first, last in counted)
            return speed, [entry["loss"] for entry in entries[0]]

        taken, apart = [], 0.0
        for repeat in range(repeats):
            result = {}
            for mode in ("one", "beside", "ddp") if repeat % 2 == 0 else ("ddp", "beside", "one"):
                names = [f"{mode}-{repeat}-{number}" for number in range(2 if mode == "beside" else 1)]
                result[mode] = rates(*[(run, start(run, *((2, 1) if mode == "ddp" else (1, 2)))) for run in names])
            apart = max(apart, *(abs(a - b) / abs(a) for a, b in zip(result["one"][1], result["ddp"][1], strict=True)))
            taken.append({mode: speed for mode, (speed, _) in result.items()})
    return {
        "efficiency": spread([speeds["ddp"] / (2 * speeds["one"]) for speeds in taken]),
        "ceiling": spread([speeds["beside"] / (2 * speeds["one"]) for speeds in taken]),
        "of_ceiling": spread([speeds["ddp"] / speeds["beside"] for speeds in taken]),
        "loss_difference": apart,
        "cores": os.cpu_count(), "load_average": os.getloadavg(), "steps": steps, "repeats": repeats, "target": 0.95,
    }  # fmt: skip


# --- (d) start-up -----------------------------------------------------------------------------------------------------


def startup(repeats: int = 3) -> dict[str, Any]:
    """Seconds that a person waits: for help, for `check` of the shipped recipe with an empty and a filled cache, for the first step.

    Beside each stands what Python needs for the libraries alone.
    """

    def wait(*arguments: str, **environment: str) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT, env=os.environ | environment)
        return time.perf_counter() - begun

    def first_step(cache: str) -> float:
        """From the command to its first line in metrics.jsonl."""
        with tempfile.TemporaryDirectory() as folder:
            run = RunDirectory(Path(folder) / "run")
            changes = ["--set", "train.max_steps=1", "--set", "samples.from_train=0"]
            command = [sys.executable, "-m", "fastoss", "train", str(QUICKSTART), "--output", str(run.root), *changes]
            begun = time.perf_counter()
            with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"FASTOSS_CACHE": cache}, stderr=subprocess.DEVNULL) as process:
                while not (run.metrics.is_file() and run.metrics.stat().st_size) and process.poll() is None:
                    time.sleep(0.01)
                took = time.perf_counter() - begun
            assert process.returncode == 0, "the quickstart's first step"
        return took

    check = ("-m", "fastoss", "check", "recipes/catgirl.toml")
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            taken["help"].append(wait("-m", "fastoss", "--help"))
            taken["import_typer"].append(wait("-c", "import typer"))
            taken["check_cold"].append(wait(*check, FASTOSS_CACHE=cache))
            taken["check_warm"].append(wait(*check, FASTOSS_CACHE=cache))
            taken["first_step_cold"].append(first_step(cache))
            taken["first_step_warm"].append(first_step(cache))
            taken["import_trl_and_peft"].append(wait("-c", "import torch, transformers, peft; from trl import SFTTrainer"))
    return {"seconds": {name: spread(values) for name, values in taken.items()}, "repeats": repeats, "target_help": 0.3, "target_check": 10}


def main() -> None:
    """All of them, or those that are named: `python benchmarks/training_cpu.py packed`. Results of the others stay in the file."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    results = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else {}
    rows: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("packed", packed), ("overhead", overhead), ("overhead_one_row", lambda: overhead(rows=1, steps=80)), ("walks", walks), ("ddp", ddp),
        ("startup", startup),
    ]  # fmt: skip
    for name, function in rows:
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        results[name] = function() | {"command": f"python benchmarks/training_cpu.py {name}"}
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        facts = {"command": "make bench", "machine": platform.machine(), "python": sys.version.split()[0], "threads": 1}
        write_json(RESULTS, facts | {"versions": library_versions(), "results": results})


if __name__ == "__main__":
    main()
