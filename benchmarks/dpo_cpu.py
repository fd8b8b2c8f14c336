"""DPO beside stock TRL on the same pairs, on the CPU (for `make bench`): time and memory as ratios, each side in a process of its own.

Both train the same pairs in the same order on the same small gpt-oss with the same LoRA, through their own trainers. TRL has its
best legal settings: reference log-probabilities precomputed, batches of pairs of like lengths (the least padding), no gradient
checkpointing, no auxiliary loss, eager attention (the only one that transformers has for gpt-oss on a CPU). `cpu` is the
processor time of the process, on which other work on the machine has less influence than on `wall`; memory is the process's
peak above what it held when the model was loaded. Losses must agree to 1e-4, or nothing is written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "dpo_cpu.json"
sys.path.insert(0, str(ROOT))

# Lengths in tokens: answers lognormal as the chats of benchmarks/training_packed.py are, a prompt three times as long as the chosen answer.
MEDIAN_ANSWER, SIGMA, LONGEST_ANSWER, PROMPT_FACTOR = 20, 0.6, 96, 3
PAIRS_A_STEP, STEPS, WARM_UP, REPEATS = 8, 10, 2, 3
LEARNING_RATE, BETA = 1e-3, 0.1

Pair = tuple[list[int], list[int], list[int]]  # ids of the prompt, the chosen and the rejected answer


def pairs(count: int, seed: int = 0) -> list[Pair]:
    """Random tokens. Pairs of like lengths come together, a step's worth at a time."""
    from benchmarks.training_packed import VOCABULARY

    rng = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(length)]

    def length() -> int:
        return min(LONGEST_ANSWER, max(4, round(rng.lognormvariate(math.log(MEDIAN_ANSWER), SIGMA))))

    made = []
    for _ in range(count):
        chosen = length()
        made.append((tokens(PROMPT_FACTOR * chosen), tokens(chosen), tokens(length())))
    made.sort(key=lambda pair: len(pair[0]) + max(len(pair[1]), len(pair[2])))
    steps = [made[start : start + PAIRS_A_STEP] for start in range(0, count, PAIRS_A_STEP)]
    rng.shuffle(steps)
    return [pair for step in steps for pair in step]


# --- one side, in its process -----------------------------------------------------------------------------------------


class Meter:
    """Seconds and memory of the steps, from the trainer's own callbacks on both sides."""

    def __init__(self) -> None:
        import transformers

        meter = self
        self.marks: list[tuple[float, float]] = []
        self.logs: list[dict[str, float]] = []  # of each step

        class Callback(transformers.TrainerCallback):
            def on_step_begin(self, *arguments: Any, **others: Any) -> None:
                meter.marks.append((time.perf_counter(), time.process_time()))

            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **others: Any) -> None:
                if logs and "loss" in logs:
                    meter.logs.append({name: float(value) for name, value in logs.items()})

            def on_train_end(self, *arguments: Any, **others: Any) -> None:
                meter.marks.append((time.perf_counter(), time.process_time()))

        self.callback = Callback()

    def told(self) -> dict[str, Any]:
        """Steps after the warm-up: from the beginning of each to that of the next."""
        first, last = self.marks[min(WARM_UP, len(self.marks) - 2)], self.marks[-1]
        return {"wall": last[0] - first[0], "cpu": last[1] - first[1], "logs": self.logs}


class Peak:
    """The highest resident memory of this process within a block, in MB, above what it held at the beginning."""

    def __enter__(self) -> Peak:
        import gc

        gc.collect()
        self._done = threading.Event()
        self.start = self.peak = _resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.above = (max(self.peak, _resident()) - self.start) / 1e6


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def ours(rows: list[Pair], folder: Path, **dpo: Any) -> dict[str, Any]:
    """Our trainer over packed trees; the reference asked first, as a run does. `dpo` are further settings of `[dpo]`."""
    import torch

    from benchmarks.training_packed import small_model
    from fastoss.config import recipe_from_resolved
    from fastoss.data.conversation import Conversation
    from fastoss.data.harmony import Example, Span
    from fastoss.data.packing import Schedule
    from fastoss.data.trees import build_tree
    from fastoss.model.backend import ModelPlan
    from fastoss.run import RunDirectory
    from fastoss.training.checkpoint import CheckpointWriter
    from fastoss.training.dpo import HarmonyDPOTrainer, answer_logps, collate_pairs, dpo_config
    from fastoss.training.progress import Console, MetricsFile
    from fastoss.training.scheduled import Training
    from fastoss.training.signals import StopRequest
    from fastoss.training.watchdog import Watchdog

    settings = {
        "name": "dpo", "method": "dpo", "model": {"name": "tiny", "precision": "float32"}, "data": [{"source": "none"}],
        "train": {
            "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0, "max_grad_norm": 0,
            "tokens_per_batch": 1 << 20,
        },
        "dpo": {"beta": BETA, **dpo}, "log": {"trackers": []},
    }  # fmt: skip
    recipe = recipe_from_resolved(settings, "benchmarks/dpo_cpu.py")

    class Made(list):  # stands for Units: pairs and their lengths
        @property
        def lengths(self) -> list[int]:
            return [len(build_tree(pair)) for pair in self]

    def example(prompt: list[int], answer: list[int]) -> Example:
        ids = prompt + answer
        return Example(ids, (Span("assistant", "final", len(prompt), len(ids), 1.0),), Conversation((), "made:1"), len(prompt))

    units = Made([example(prompt, chosen), example(prompt, rejected)] for prompt, chosen, rejected in rows)
    batches = [list(range(start, start + PAIRS_A_STEP)) for start in range(0, len(rows), PAIRS_A_STEP)]
    run, console, plan = RunDirectory(folder), Console(quiet=True), ModelPlan("transformers", None, "float32", "cpu")
    training = Training(
        recipe=recipe, run=run, console=console, metrics=MetricsFile(run.metrics, 0), train=units, eval=Made(), eval_batches=[],  # type: ignore[arg-type]
        schedule=Schedule(batches, [len(batches)], len(batches)), layout="packed", stop=StopRequest(), watchdog=Watchdog(run, 60, console.say),
        writer=CheckpointWriter(run, 1, console.say), total_steps=len(batches),
    )  # fmt: skip
    model, meter = small_model(), Meter()
    arguments = dpo_config(recipe, run, plan, recompute=False)
    trainer = HarmonyDPOTrainer(training, model=model, args=arguments, processing_class=_tokenizer())
    trainer.add_callback(meter.callback)
    _without_saving(trainer)
    with Peak() as memory:
        begun = time.process_time()
        found = []
        model.eval()
        with torch.no_grad():  # the adapter as it begins, as TRL takes it
            for members in batches:
                logps, _ = answer_logps(model, collate_pairs([units[i] for i in members], "packed"))
                found.append(logps.double().sum(1).view(2, -1).T)
        trainer.collator.reference = torch.cat(found).numpy()
        reference = time.process_time() - begun
        model.train()
        trainer.train()
    return meter.told() | {"reference_cpu": reference, "peak_mb": memory.above, "tokens": sum(units.lengths)}


def trl(rows: list[Pair], folder: Path, **dpo: Any) -> dict[str, Any]:
    """Stock TRL, its reference precomputed. `dpo` are further arguments of its configuration."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from benchmarks.training_packed import small_model

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

    columns = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "prompt": "", "chosen": "", "rejected": ""} for p, c, r in rows]
    arguments = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=PAIRS_A_STEP, num_train_epochs=1, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", max_grad_norm=0, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", optim="adamw_torch",
        max_length=None, router_aux_loss_coef=0.0, disable_tqdm=True, gradient_checkpointing=False, bf16=False, remove_unused_columns=False,
        train_sampling_strategy="sequential", precompute_ref_log_probs=True, **{"beta": BETA, **dpo},
    )  # fmt: skip
    model, meter = small_model(), Meter()
    model.get_base_model().set_attn_implementation("eager")
    dataset = Dataset.from_list(columns)
    with Peak() as memory:
        begun = time.process_time()
        trainer = Tokenised(model, args=arguments, train_dataset=dataset, processing_class=_tokenizer())
        reference = time.process_time() - begun  # with a hash of the whole model, by which TRL knows its cache
        trainer.add_callback(meter.callback)
        trainer.train()
    padded = sum(
        2 * PAIRS_A_STEP * max(len(p) + max(len(c), len(r)) for p, c, r in rows[i : i + PAIRS_A_STEP]) for i in range(0, len(rows), PAIRS_A_STEP)
    )
    return meter.told() | {"reference_cpu": reference, "peak_mb": memory.above, "tokens": padded}


def _tokenizer() -> Any:
    """A tokenizer for TRL to ask for its padding; every token of the pairs is given."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def _without_saving(trainer: Any) -> None:
    trainer._save_checkpoint = lambda *arguments, **others: None  # the other side saves nothing either


# --- both, beside each other ------------------------------------------------------------------------------------------


def measured(side: str, steps: int) -> dict[str, Any]:
    """One side in a fresh process, one thread."""
    command = [sys.executable, __file__, "--side", side, "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{side}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(steps: int = STEPS, repeats: int = REPEATS) -> dict[str, Any]:
    """Ratios of TRL's figures to ours, both sides in turn."""
    taken = []
    for repeat in range(repeats):
        order = ("ours", "trl") if repeat % 2 == 0 else ("trl", "ours")
        taken.append({side: measured(side, steps) for side in order})
    first = taken[0]
    losses = {side: [entry["loss"] for entry in first[side]["logs"]] for side in ("ours", "trl")}
    apart = max(abs(a - b) for a, b in zip(losses["ours"], losses["trl"], strict=True))
    if apart > 1e-4:
        raise SystemExit(f"the losses are {apart} apart: {losses}")

    def times(key: str) -> dict[str, float]:
        ratios = [both["trl"][key] / both["ours"][key] for both in taken]
        return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}

    return {
        "times_faster": {clock: times(clock) for clock in ("wall", "cpu")},
        "reference_times_faster": {"cpu": times("reference_cpu")},
        "times_less_memory": times("peak_mb"),
        "times_fewer_tokens": times("tokens"),
        "peak_mb": {side: statistics.median(both[side]["peak_mb"] for both in taken) for side in ("ours", "trl")},
        "step_cpu_seconds": {side: statistics.median(both[side]["cpu"] for both in taken) / (steps - WARM_UP) for side in ("ours", "trl")},
        "loss_difference": apart,
        "losses": losses["ours"],
        "pairs_a_step": PAIRS_A_STEP, "steps": steps, "warm_up": WARM_UP, "repeats": repeats, "prompt_over_answer": PROMPT_FACTOR, "target": 2.5,
        "command": "python benchmarks/dpo_cpu.py",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=["ours", "trl"], help="one side alone, as the comparison calls it")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.side:
        import torch

        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            result = {"ours": ours, "trl": trl}[arguments.side](pairs(PAIRS_A_STEP * arguments.steps), Path(folder))
        print(json.dumps(result))
        return
    from fastoss.model.adapter import library_versions
    from fastoss.run import write_json

    results = compare(arguments.steps)
    facts = {"command": "make bench", "machine": platform.machine(), "python": sys.version.split()[0], "threads": 1, "versions": library_versions()}
    write_json(RESULTS, facts | {"results": {"dpo": results}})
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
