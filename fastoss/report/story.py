"""Facts of a run → sentences: what was trained on what, how it ended, and with what result, for a reader with one minute."""

from __future__ import annotations

from typing import Any

from fastoss.data.data_report import counted
from fastoss.report.facts import Facts
from fastoss.terminal import duration

_METHODS = {"sft": "supervised fine-tuning", "dpo": "preference tuning (DPO)"}


def sentences(facts: Facts) -> list[str]:
    """The headline: what was done, how it ended, what the figures say."""
    return [line for line in (_what(facts), how_it_ended(facts), _losses(facts), _preferences(facts), _word_for_word(facts)) if line]


def model_name(facts: Facts) -> str:
    model = facts.recipe.get("model", {})
    name = str(model.get("name", "the model"))
    return "the embedded tiny gpt-oss" if name == "tiny" else name.rstrip("/").rpartition("/")[2]


def _what(facts: Facts) -> str:
    data = facts.manifest.get("data", {})
    name = model_name(facts)
    rows = data.get("train_rows")
    kind = "preference pair" if facts.method == "dpo" else "conversation"
    on = f" on {counted(rows, kind)}" if isinstance(rows, int) else ""
    came = f", starting from {facts.recipe['model']['adapter']}" if facts.recipe.get("model", {}).get("adapter") else ""
    if not facts.steps:
        return f"{name[0].upper()}{name[1:]} was to learn{on} by {_METHODS[facts.method]} with LoRA{came}; no step was completed."
    last = facts.steps[-1]
    epochs = f", {last['epoch']:.3g} epoch{'' if round(last['epoch'], 2) == 1 else 's'} of the data," if last.get("epoch") else ""
    return (
        f"{name[0].upper()}{name[1:]} was trained{on} by {_METHODS[facts.method]} with LoRA{came}: "
        f"{counted(last['step'], 'step')}{epochs} in {duration(facts.seconds)}."
    )


def interruptions(facts: Facts) -> list[tuple[str, int | None]]:
    """Why each start but the last ended, and the step from which the next one resumed."""
    starts = len(facts.starts)
    resumed = facts.manifest.get("resumed_after_step", [])
    found = []
    for number in range(1, starts):
        end = facts.ends.get(number)
        how = {"stopped": "stopped by a signal", "failed": "ended by an error"}.get(end["how"], "ended") if end else "killed"
        if end is None and "ends" not in facts.manifest:
            how = "interrupted"
        found.append((how, resumed[number - 1] if len(resumed) == starts - 1 else None))
    return found


def how_it_ended(facts: Facts) -> str:
    stops = interruptions(facts)
    told = ", then ".join(how + (f" (and resumed after step {step:,})" if step is not None else " (and resumed)") for how, step in stops)
    last = facts.ends.get(len(facts.starts), {})
    said = str(last.get("said") or "").splitlines()
    reason = f": {said[0]}" if said else ""
    endings = {
        "finished": "It ran to its end" + (" without an interruption." if not stops else "."),
        "stopped": f"It was stopped by a signal{reason}.",
        "failed": f"It failed{reason}.",
        "training": "It is still training.",
        "killed": "It was killed; run the same command again to resume from the last checkpoint.",
        "unfinished": "It has not finished; run the same command again to resume from the last checkpoint.",
    }
    ending = endings[facts.state]
    if not stops:
        return ending
    times = "once" if len(stops) == 1 else "twice" if len(stops) == 2 else f"{len(stops)} times"
    return f"On the way it was interrupted {times}: {told}. {ending}"


def _losses(facts: Facts) -> str:
    if facts.first_loss is None or facts.last_loss is None:
        return ""
    mean = f" (mean of the last {facts.loss_window} steps)" if facts.loss_window > 1 else ""
    found = f"The training loss went from {facts.first_loss:.3g} to {facts.last_loss:.3g}{mean}"
    best = facts.best_evaluation
    if best is None:
        return found + "; no rows were held out to compare with."
    first, last = facts.evaluations[0], facts.evaluations[-1]
    if first is last:
        return f"{found}; on rows held out from training it is {last['eval_loss']:.3g}."
    found += f"; on rows held out from training from {first['eval_loss']:.3g} (step {first['step']:,}) to {last['eval_loss']:.3g}"
    if best is not last and last["eval_loss"] > 1.02 * best["eval_loss"]:
        return f"{found}, after a low of {best['eval_loss']:.3g} at step {best['step']:,}: what came later was learned by heart."
    return found + "."


def _preferences(facts: Facts) -> str:
    last = next((entry for entry in reversed(facts.evaluations) if "eval_rewards/accuracies" in entry), None)
    if facts.method != "dpo" or last is None:
        return ""
    share, margin = last["eval_rewards/accuracies"], last.get("eval_rewards/margins", 0.0)
    return f"It now prefers the chosen answer in {100 * share:.0f} % of the held-out pairs (mean margin {margin:.3g})."


def _word_for_word(facts: Facts) -> str:
    known = [entry for entry in facts.samples if entry.get("expected") and entry.get("after") and not entry.get("held_out")]
    if not known:
        return ""
    before, after = (sum(is_expected(entry, entry[side]) for entry in known) for side in ("before", "after"))
    return f"Of {counted(len(known), 'training question')} asked back, {before} got the word-for-word answer before training, {after} after it."


def is_expected(entry: dict[str, Any], reply: dict[str, Any] | None) -> bool:
    """Whether a sample's reply is the answer that training shows, in every channel."""
    expected = entry.get("expected")
    if not expected or not reply or reply.get("problems"):
        return False
    return bool((expected["thinking"], expected["content"]) == (reply["thinking"], reply["content"]))
