"""Fits the plan's constants to the GPU results in benchmarks/results/, and writes them to fastoss/assets/plan.json.

`python benchmarks/calibrate.py` after `make gpu`. Taken are the runs of fastoss at a known shape whose peak and tokens a micro-batch were
noted (`gpu_training.py`). What is predicted is torch's allocated memory: results with the reserved one are preferred. With none, nothing is written.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastoss.config import LoraSettings
from fastoss.model.cards import card_called
from fastoss.model.plan import MicroBatch, Setting, plan_memory
from fastoss.model.plan_constants import Constants
from fastoss.model.shape import GPT_OSS_20B
from fastoss.model.speed import Work, as_computed, tokens_a_second
from fastoss.run import write_json

ROOT = Path(__file__).resolve().parent.parent
TARGET = 0.10


def usable(folder: Path) -> list[dict[str, Any]]:
    """Results of fastoss's own training at the 20B shape on a GPU."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        shape = (record.get("checkpoint") or {}).get("shape")
        if record.get("status") == "ok" and not record.get("dry_run") and shape == "gpt-oss-20b" and record.get("batch_tokens"):
            peak = record.get("reserved_peak_gb") or record.get("training_peak_gb")
            if peak:
                found.append(record | {"peak": peak * 1e9})
    return found


def setting_of(record: dict[str, Any]) -> Setting:
    model, recipe = record["model"], record["model"]["recipe"]
    lora = LoraSettings(r=recipe.get("r", 8), lora_alpha=recipe.get("lora_alpha", 32))
    return Setting(model["backend"], model["precision"], "gpu", lora, recipe.get("recompute", "auto") != "none")


def planned(record: dict[str, Any], constants: Constants) -> int:
    tokens = record["batch_tokens"]
    length = min(tokens, record["model"].get("max_length", tokens))
    return plan_memory(GPT_OSS_20B, setting_of(record), MicroBatch([length] * (tokens // length)), constants).peak


def fitted(record: dict[str, Any], name: str, constants: Constants) -> float:
    """The value of a constant with which this one result is met; memory is linear in it."""
    low, high = (planned(record, replace(constants, **{name: value})) for value in (0.0, 1.0))
    return max(0.0, (record["peak"] - low) / (high - low)) if high > low else getattr(constants, name)


def calibrate(records: list[dict[str, Any]]) -> Constants:
    """The medians: first the working set, over runs that compute activations anew; then what is kept, over the others; then speed."""
    constants = Constants()
    for name, recompute in (("working_set", True), ("kept", False)):
        values = [fitted(record, name, constants) for record in records if setting_of(record).recompute == recompute]
        if values:
            constants = replace(constants, **{name: statistics.median(values)})
    shares = []
    for record in records:
        card = card_called(record["card"], record["gpu_memory_gb"] * 1e9 / 2**20)
        if card.flops and record.get("tokens_per_second"):
            setting, length = setting_of(record), record["model"].get("max_length", 1024)
            work = Work([length], 1.0, record["batch_tokens"], setting.recompute, setting.lora.r, as_computed(setting.precision))
            shares.append(record["tokens_per_second"] / tokens_a_second(GPT_OSS_20B, work, card)["with_traffic"])
    if shares:
        constants = replace(constants, speed=statistics.median(shares))
    cards = sorted({record["card"] for record in records})
    return replace(constants, source=f"{len(records)} runs on {', '.join(cards)}")


def main() -> None:
    records = usable(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "benchmarks" / "results")
    if not records:
        print("no GPU result of a 20B run in benchmarks/results: the constants stay the estimates that they are")
        return
    constants = calibrate(records)
    errors = {record["phase"]: planned(record, constants) / record["peak"] - 1 for record in records}
    for phase, error in errors.items():
        print(f"{phase}: planned {error:+.1%} of the measured peak")
    names = ("working_set", "kept", "speed", "source")
    write_json(ROOT / "fastoss" / "assets" / "plan.json", {name: getattr(constants, name) for name in names} | {"off_by": errors})
    within = sum(abs(error) <= TARGET for error in errors.values())
    print(f"{within} of {len(errors)} results within {TARGET:.0%}; fastoss/assets/plan.json is written")


if __name__ == "__main__":
    main()
