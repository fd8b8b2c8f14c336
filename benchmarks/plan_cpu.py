"""The plan's memory beside what a run takes, on the CPU: the tiny model, one ten times and one forty times as large.

Each run is `fastoss train` in a process of its own; what it planned and measured stands in its plan.json. `python benchmarks/plan_cpu.py tiny`
runs one of them; results of the others stay in benchmarks/results/plan_cpu.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script too

from fastoss.model.adapter import library_versions
from fastoss.model.shape import shape_of
from fastoss.run import cache_folder, whole_folder, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plan_cpu.json"
TARGET = 0.15
SHAPES: dict[str, dict[str, int] | None] = {
    "tiny": None,
    "10x": {
        "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 8, "num_local_experts": 8, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 32,
    },
    "40x": {
        "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 6, "num_local_experts": 32, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64,
    },
}  # fmt: skip
# (shape, tokens of a micro-batch, changes of the recipe)
RUNS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "tiny": ("tiny", 1024, ()),
    "tiny recomputed": ("tiny", 1024, ("train.recompute=full",)),
    "10x": ("10x", 512, ()),
    "10x recomputed": ("10x", 512, ("train.recompute=full",)),
    "10x attention": ("10x", 512, ('lora.targets=["attention"]',)),
    "40x": ("40x", 128, ()),
}


def model_folder(name: str) -> Path:
    """A random float32 model of that shape, kept in the cache: 1 and 4 GB."""
    from transformers import GptOssConfig, GptOssForCausalLM

    from fastoss.model import tiny

    folder = cache_folder() / "plan-cpu" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        model = GptOssForCausalLM(GptOssConfig(**(tiny.SETTINGS | (SHAPES[name] or {}))))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.uniform_(-0.03, 0.03)
        with whole_folder(folder) as beside:
            model.save_pretrained(beside)
            tiny.write_tokenizer(beside)
    return folder


def measure(name: str) -> dict[str, Any]:
    """Two steps of a run; planned and measured bytes."""
    shape, tokens, changes = RUNS[name]
    model = "tiny"
    if shape != "tiny":
        # In a process that ends: this one stays small.
        code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from benchmarks.plan_cpu import model_folder; print(model_folder({shape!r}))"
        model = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"instruction": f"Question {i}? " + "word " * (i % 7), "output": "An answer. " * (3 + i % 5)} for i in range(64)]
        Path(folder, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        recipe = [
            'name = "plan"', "[model]", f"name = {json.dumps(model)}", 'precision = "float32"', "max_length = 128", "[[data]]",
            'source = "rows.jsonl"', "[eval]", "fraction = 0.0", "[train]", "max_steps = 2", f"tokens_per_batch = {tokens}",
        ]  # fmt: skip
        Path(folder, "recipe.toml").write_text("\n".join(recipe) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "fastoss", "train", "recipe.toml", *(part for change in changes for part in ("--set", change))]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        plan = json.loads(Path(folder, "runs", "plan", "plan.json").read_text(encoding="utf-8"))
    total = shape_of(model).total
    planned, measured = plan["peak_bytes"], plan["measured"]["peak_bytes"]
    return {
        "parameters": total, "micro_batch_tokens": plan["micro_batch_tokens"], "changes": list(changes), "planned_bytes": planned,
        "measured_bytes": measured, "off_by": round(planned / measured - 1, 4), "target": TARGET, "components": plan["components"],
        "command": f"python benchmarks/plan_cpu.py '{name}'",
    }  # fmt: skip


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["results"] if RESULTS.is_file() else {}
    for name in sys.argv[1:] or RUNS:
        results[name] = measure(name)
        print(f"{name}: {results[name]['off_by']:+.1%} of {results[name]['measured_bytes'] / 2**20:,.0f} MiB", flush=True)
        facts = {"command": "make bench", "machine": platform.machine(), "python": sys.version.split()[0], "threads": 1}
        write_json(RESULTS, facts | {"versions": library_versions(), "results": results})
    if any(abs(result["off_by"]) > TARGET for result in results.values()):
        sys.exit("the plan is off by more than its target")


if __name__ == "__main__":
    main()
