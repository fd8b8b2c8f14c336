"""The last phase: what the contestants did, beside each other and beside the limit, as JSON and as a table to read."""

from __future__ import annotations

import statistics
from typing import Any

from gpu_common import Place, Record, Skip
from gpu_contest import REPEATS, chat_lengths
from gpu_peers import rows_a_step
from limit import Card, Work, tokens_a_second

from fastoss.run import write_whole

SAME_LOSS = {True: 1e-4, False: 1e-2}  # relative, by dry run: float32, or bf16 at the 20B shape
COLUMNS = ("tokens_per_second", "trained_tokens_per_second", "step_p50", "step_p95", "training_peak_gb", "reserved_peak_gb", "fill", "mean_loss")


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(place: Place, record: Record) -> None:
    sft = _contestants(place, "contest", ("unsloth", "trl", "fastoss"))
    dpo = _contestants(place, "dpo", ("trl", "fastoss"))
    if not any(sft.values()) and not any(dpo.values()):
        raise Skip("no contestant has a result here")
    single = {name: place.found(f"contest-{name}") for name in ("swift", "axolotl")}
    rows = {name: _row(runs) for name, runs in sft.items() if runs}
    rows |= {name: _row([found]) for name, found in single.items() if found.get("status") == "ok"}
    pairs = {
        name: _row(runs) | {"pairs_per_second": spread([run["pairs_per_second"] for run in runs.values()])} for name, runs in dpo.items() if runs
    }
    record.note(
        sft=rows, dpo=pairs, not_run=_reasons(place, [*(f"contest-{name}" for name in single)]), limit=_limit(place, sft),
        times_faster={
            **{f"sft beside {name}": _ratio(sft["fastoss"], sft[name], "tokens_per_second") for name in ("unsloth", "trl")},
            "dpo beside trl": _ratio(dpo["fastoss"], dpo["trl"], "pairs_per_second"),
        },
        recompute=_recompute(place), loss=_loss(place, rows),
    )  # fmt: skip
    record.note(targets=_targets(record.values))
    write_whole(record.path.with_suffix(".md"), _markdown(record.values))


def _contestants(place: Place, kind: str, names: tuple[str, ...]) -> dict[str, dict[int, dict[str, Any]]]:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in names:
        runs = {repeat: place.found(f"{kind}-{name}-{repeat}") for repeat in range(1, REPEATS + 1)}
        found[name] = {repeat: run for repeat, run in runs.items() if run.get("status") == "ok"}
    return found


def _row(runs: Any) -> dict[str, Any]:
    runs = list(runs.values()) if isinstance(runs, dict) else runs
    columns = {name: spread([run[name] for run in runs]) for name in COLUMNS if all(run.get(name) is not None for run in runs)}
    return {"repeats": len(runs), "setting": runs[0].get("setting"), "precision": runs[0].get("precision")} | columns


def _reasons(place: Place, phases: list[str]) -> dict[str, str]:
    return {phase: place.found(phase).get("reason") or "did not run" for phase in phases if place.found(phase).get("status") != "ok"}


def _ratio(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], speed: str) -> dict[str, float] | None:
    """Of runs that had the same turn."""
    ratios = [ours[turn][speed] / theirs[turn][speed] for turn in sorted(set(ours) & set(theirs))]
    return spread(ratios) if ratios else None


def _limit(place: Place, sft: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any] | None:
    """For the rows of the contest on this card, with and without recomputation."""
    measured, runs = place.found("card"), list(sft["fastoss"].values())
    if measured.get("status") != "ok" or not runs:
        return None
    here = Card(measured["flops"], measured["bandwidth"])
    run = runs[0]
    lengths = chat_lengths(place, (1 if place.dry else 16) * rows_a_step(place))
    share, size, kind = run["trained_tokens"] / run["tokens"], run["setting"]["tokens_per_batch"], run["precision"]
    limits = {
        name: tokens_a_second(place.shape, Work(lengths, share, size, recompute=name == "full", precision=kind), here) for name in ("full", "none")
    }
    reached = statistics.median(run["tokens_per_second"] for run in runs) / limits[run["setting"]["recompute"]]["with_traffic"]
    return {"flops": here.flops, "bandwidth": here.bandwidth, **limits, "reached_by_fastoss": reached}


def _recompute(place: Place) -> dict[str, Any]:
    """What `train.recompute = "auto"` should be on this card: the faster one that fitted."""
    tried = {kind: place.found(f"best-fastoss-{kind}").get("tried", []) for kind in ("full", "none")}
    best = {kind: max((e["tokens_per_second"] for e in entries if "tokens_per_second" in e), default=0.0) for kind, entries in tried.items()}
    faster = max(best, key=lambda kind: best[kind]) if any(best.values()) else None
    return {"tried": tried, "tokens_per_second": best, "faster": faster}


def _loss(place: Place, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The mean over all trained tokens of an epoch, at a learning rate of nearly nothing: one number, whoever computes it."""
    means = {name: row["mean_loss"]["median"] for name, row in rows.items() if "mean_loss" in row}
    ours = means.get("fastoss")
    apart = {name: abs(mean - ours) / ours for name, mean in means.items()} if ours else {}
    tolerance = SAME_LOSS[place.dry]
    return {"mean": means, "apart": apart, "tolerance": tolerance, "same": bool(apart) and max(apart.values()) <= tolerance}


def _targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of docs/performance.md."""
    faster, best = found["times_faster"], found["recompute"]["tokens_per_second"]
    rows = [(name, faster[name], least) for name, least in (("sft beside unsloth", 2.5), ("sft beside trl", 3.0), ("dpo beside trl", 2.5))]
    rows += [(f"fastoss with recompute {kind}, tokens a second", best[kind] or None, least) for kind, least in (("full", 18000), ("none", 24000))]
    made = []
    for name, value, least in rows:
        reached = value["median"] if isinstance(value, dict) else value
        made.append({"target": name, "least": least, "reached": reached, "met": None if reached is None or found["dry_run"] else reached >= least})
    return made


def _markdown(found: dict[str, Any]) -> str:
    lines = [f"# {found['card']}, {'a dry run at the tiny shape' if found['dry_run'] else '20B shape'}", ""]
    lines += ["| | setting | tokens/s (spread) | trained tokens/s | step p50 / p95 | fill | peak | loss |", "|---|---|---|---|---|---|---|---|"]
    for kind in ("sft", "dpo"):
        for name, row in found[kind].items():
            cells = [f"{kind} {name}", _said(row["setting"]), _number(row, "tokens_per_second", ",.0f", wide=True)]
            cells += [_number(row, "trained_tokens_per_second", ",.0f"), f"{_number(row, 'step_p50', '.2f')} / {_number(row, 'step_p95', '.2f')} s"]
            cells += [_number(row, "fill", ".2f"), f"{_number(row, 'training_peak_gb', '.1f')} GB", _number(row, "mean_loss", ".4f")]
            lines.append("| " + " | ".join(cells) + " |")
    for kind in ("full", "none"):
        if found["limit"]:
            limit = found["limit"][kind]
            lines.append(f"| limit, recompute {kind} | | {limit['with_traffic']:,.0f} (arithmetic alone {limit['arithmetic']:,.0f}) | | | | | |")
    lines += ["", *(f"- {name}: {reason}" for name, reason in found["not_run"].items())]
    lines += ["", "| target | at least | reached | |", "|---|---|---|---|"]
    for row in found["targets"]:
        reached = "–" if row["reached"] is None else f"{row['reached']:,.2f}"
        met = {None: "tells nothing: a dry run" if found["dry_run"] else "not measured", True: "met", False: "not met"}[row["met"]]
        lines.append(f"| {row['target']} | {row['least']:,} | {reached} | {met} |")
    return "\n".join(lines) + "\n"


def _said(setting: dict[str, Any] | None) -> str:
    return (
        ", ".join(f"{name} {value}" for name, value in (setting or {}).items() if value != "" and (name, value) != ("token_budget", 0)) or "its own"
    )


def _number(row: dict[str, Any], name: str, form: str, *, wide: bool = False) -> str:
    if name not in row:
        return "–"
    value = row[name]
    return f"{value['median']:{form}}" + (f" ({value['min']:{form}} to {value['max']:{form}})" if wide else "")
