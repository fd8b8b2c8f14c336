"""The contest: fastoss beside stock Unsloth and stock TRL, on the same random checkpoint, rows and LoRA, each at its best setting.

First every contestant looks for its best setting (`best-…`), on the first rows. Then they take turns, three times, in turned order
(`contest-…-1` to `-3`), two epochs each: in the first everything is compiled, the second is counted.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from gpu_clock import Clock
from gpu_common import Phase, Place, Record, Skip, checkpoint, need_memory, run_recipe
from gpu_peers import Peer, Setting, rows_a_step, tokenised, tokenised_pairs
from gpu_rows import chat_lengths, longest_row, write_pairs, write_rows

REPEATS = 3


def warm_up(place: Place) -> int:
    """Steps of a trial that are not counted: something is compiled in them."""
    return 0 if place.dry else 1


def precision(place: Place, record: Record) -> str:
    """bf16 where all contestants can have it; on smaller cards MXFP4, which plain transformers cannot train."""
    if place.dry:
        return "float32"
    return "bf16" if record.values["gpu_free_gb"] >= 70 else "mxfp4"


def _rows(place: Place, *, trial: bool, pairs: bool = False) -> tuple[Any, list[int]]:
    """The rows' file and their lengths. A trial has fewer of the same kind."""
    steps = 1 if place.dry else 3 if trial else 8 if pairs else 16
    count = steps * rows_a_step(place)
    path = place.work / f"{'pairs' if pairs else 'chats'}-{count}.jsonl"
    return path, (write_pairs if pairs else write_rows)(path, chat_lengths(place, count))


# --- the best setting of each -----------------------------------------------------------------------------------------

RECOMPUTE, KEEP = True, False


def ladders(name: str, place: Place, *, pairs: bool) -> list[list[Setting]]:
    """What is tried, in order: each ladder climbs until memory ends, or until it has passed its best by a tenth."""
    sizes = (2,) if place.dry else (1, 2, 4, 8) if pairs else (1, 2, 4, 8, 16)
    if name == "unsloth":
        budgets = () if place.dry else (8192, 16384, 32768)
        return [
            [Setting(rows, RECOMPUTE) for rows in sizes], [Setting(rows, KEEP) for rows in sizes],
            [Setting(rows_a_step(place), RECOMPUTE, token_budget=budget) for budget in budgets],
        ]  # fmt: skip
    kinds = ("eager",) if place.dry else ("flex_attention", "eager")  # what gpt-oss can train with: FlashAttention has no gradient for its sinks
    ways = (RECOMPUTE,) if place.dry and pairs else (RECOMPUTE, KEEP)
    return [[Setting(rows, recompute, kind) for rows in sizes] for kind in kinds for recompute in ways]


def climb(ladders: list[list[Any]], trial: Callable[[Any], dict[str, Any]], record: Record) -> None:
    """Try every setting; what was found is noted after each. The fastest is noted as `best`."""
    from fastoss.training.memory import free_memory, is_out_of_memory

    tried: list[dict[str, Any]] = []
    for ladder in ladders:
        fastest = 0.0
        for setting in ladder:
            try:
                found = trial(setting)
            except Exception as problem:
                # Of stock trainers anything may come: a setting that does not run is no contestant, and says why.
                tried.append({"setting": asdict(setting), "failed": f"{type(problem).__name__}: {problem}"[:300]})
                full = is_out_of_memory(problem)
            else:
                tried.append({"setting": asdict(setting)} | found)
                full = False
            record.note(tried=tried)
            if full:
                free_memory()
                break
            speed = tried[-1].get("tokens_per_second", 0.0)
            if speed < 0.9 * fastest:
                break
            fastest = max(fastest, speed)
    ran = [entry for entry in tried if "tokens_per_second" in entry]
    if not ran:
        raise Skip(f"no setting ran; the first said: {tried[0]['failed']}")
    record.note(best=max(ran, key=lambda entry: entry["tokens_per_second"]))


def best_of_peer(place: Place, record: Record, *, name: str, pairs: bool = False) -> None:
    if name == "trl":
        need_memory(place, record, 50)
    folder, kind = checkpoint(place, record, "mxfp4"), precision(place, record)
    data, _ = _rows(place, trial=True, pairs=pairs)
    rows = (tokenised_pairs if pairs else tokenised)(place, data, longest_row(place))
    peer = Peer(name, place, folder, kind)
    climb(
        ladders(name, place, pairs=pairs),
        lambda setting: peer.train(rows, setting, steps=len(rows) // rows_a_step(place), preferences=pairs).summary(warm_up(place)),
        record,
    )


def best_of_fastoss(place: Place, record: Record, *, recompute: str) -> None:
    """One recomputation at several sizes of micro-batches: what `train.recompute = "auto"` should mean on this card is read off here."""
    folder, kind = checkpoint(place, record, "mxfp4"), precision(place, record)
    data, lengths = _rows(place, trial=True)
    tried: list[dict[str, Any]] = []
    for tokens in (512,) if place.dry else (8192, 16384, 32768):
        if tokens < max(lengths):
            continue
        steps = max(1 + warm_up(place), sum(lengths) // tokens)
        train = {"recompute": recompute, "tokens_per_batch": tokens, "max_steps": steps}
        try:
            with Clock() as clock:
                _fastoss(place, record, folder, kind, data, train)
            tried.append({"setting": train} | clock.summary(warm_up(place)))
        except Exception as problem:
            from fastoss.training.memory import free_memory

            tried.append({"setting": train, "failed": f"{type(problem).__name__}: {problem}"[:300]})
            record.note(tried=tried)
            free_memory()
            break  # the next is larger
        record.note(tried=tried)
    ran = [entry for entry in tried if "tokens_per_second" in entry]
    if not ran:
        raise Skip(f"no size ran; the first said: {tried[0]['failed']}")
    record.note(best=max(ran, key=lambda entry: entry["tokens_per_second"]))


def _fastoss(place: Place, record: Record, folder: Any, kind: str, data: Any, train: dict[str, Any], **top: Any) -> None:
    model = {"name": str(folder), "precision": kind, "max_length": longest_row(place), "backend": "unsloth"}
    steady = {"learning_rate": 1e-9, "lr_scheduler_type": "constant", "warmup_steps": 0}
    run = run_recipe(place, record.values["phase"], {"model": model, "[data]": {"source": str(data), "cache": False}, "train": steady | train}, **top)
    shutil.rmtree(run.checkpoints)


# --- the contest ------------------------------------------------------------------------------------------------------


def fastoss_setting(place: Place) -> dict[str, Any]:
    """The faster of the two recomputations, with the size of its micro-batches."""
    found = [place.found(f"best-fastoss-{recompute}") for recompute in ("full", "none")]
    best = [record["best"] for record in found if record.get("best")]
    if not best:
        raise Skip("best-fastoss-full and -none have no result here")
    setting: dict[str, Any] = max(best, key=lambda entry: entry["tokens_per_second"])["setting"]
    return {name: setting[name] for name in ("recompute", "tokens_per_batch")}


def peer_setting(place: Place, phase: str) -> Setting:
    best = place.found(phase).get("best")
    if not best:
        raise Skip(f"{phase} has no result here")
    return Setting(**best["setting"])


def sft_of_peer(place: Place, record: Record, *, name: str) -> None:
    setting = peer_setting(place, f"best-{name}")
    folder, kind = checkpoint(place, record, "mxfp4"), precision(place, record)
    data, _ = _rows(place, trial=False)
    rows = tokenised(place, data, longest_row(place))
    clock = Peer(name, place, folder, kind).train(rows, setting, epochs=2)
    record.note(setting=asdict(setting), precision=kind, **clock.summary(clock.second_half()))


def sft_of_fastoss(place: Place, record: Record) -> None:
    setting = fastoss_setting(place)
    folder, kind = checkpoint(place, record, "mxfp4"), precision(place, record)
    data, _ = _rows(place, trial=False)
    with Clock() as clock:
        _fastoss(place, record, folder, kind, data, setting | {"num_train_epochs": 2})
    record.note(setting=setting, precision=kind, **clock.summary(clock.second_half()))


def dpo_of_trl(place: Place, record: Record) -> None:
    setting = peer_setting(place, "best-trl-dpo")
    folder, kind = checkpoint(place, record, "mxfp4"), precision(place, record)
    data, _ = _rows(place, trial=False, pairs=True)
    rows = tokenised_pairs(place, data, longest_row(place))
    clock = Peer("trl", place, folder, kind).train(rows, setting, epochs=2, preferences=True)
    record.note(setting=asdict(setting), precision=kind, **_in_pairs(clock.summary(clock.second_half()), len(rows)))


def dpo_of_fastoss(place: Place, record: Record) -> None:
    """The reference is asked once, before the first step; its seconds are added to those of the epoch that is counted."""
    from fastoss.training import reference

    setting = fastoss_setting(place)
    folder, kind = checkpoint(place, record, "mxfp4"), precision(place, record)
    data, lengths = _rows(place, trial=False, pairs=True)
    ask, asked = reference.reference_logps, []

    def timed(model: Any, recipe: Any, plan: Any, dataset: Any, **named: Any) -> Any:
        """Once to compile, and once by the clock, without the answers that the first time has kept."""
        ask(model, recipe, plan, dataset, **named)
        for kept in dataset.store.folder.glob("reference-*.npy"):
            kept.unlink()
        begun = time.perf_counter()
        result = ask(model, recipe, plan, dataset, **named)
        asked.append(time.perf_counter() - begun)
        return result

    reference.reference_logps = timed
    try:
        with Clock() as clock:
            _fastoss(place, record, folder, kind, data, setting | {"num_train_epochs": 2}, method="dpo")
    finally:
        reference.reference_logps = ask
    summary = clock.summary(clock.second_half(), extra_seconds=sum(asked))
    record.note(setting=setting, precision=kind, reference_seconds=sum(asked), **_in_pairs(summary, len(lengths)))


def _in_pairs(summary: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Tokens are not the same thing for both (a prompt counted once or twice): pairs are."""
    return summary | {"pairs": pairs, "pairs_per_second": pairs / summary["seconds"]}


def phases() -> list[Phase]:
    found = [
        Phase("best-unsloth", partial(best_of_peer, name="unsloth"), 9, "unsloth"),
        Phase("best-trl", partial(best_of_peer, name="trl"), 9, "trl"),
        *(Phase(f"best-fastoss-{kind}", partial(best_of_fastoss, recompute=kind), 9, "unsloth") for kind in ("full", "none")),
    ]
    sft = [
        ("unsloth", partial(sft_of_peer, name="unsloth"), "unsloth"),
        ("trl", partial(sft_of_peer, name="trl"), "trl"),
        ("fastoss", sft_of_fastoss, "unsloth"),
    ]
    found += _in_turn("contest", sft)
    found.append(Phase("best-trl-dpo", partial(best_of_peer, name="trl", pairs=True), 9, "trl"))
    return found + _in_turn("dpo", [("trl", dpo_of_trl, "trl"), ("fastoss", dpo_of_fastoss, "unsloth")])


def _in_turn(kind: str, contestants: list[tuple[str, Callable[[Place, Record], None], str]]) -> list[Phase]:
    """Every other time in turned order: what heats up, or fills a cache, does so for each of them."""
    return [
        Phase(f"{kind}-{name}-{repeat}", check, 9, imports, repeat)
        for repeat in range(1, REPEATS + 1)
        for name, check, imports in (contestants if repeat % 2 else contestants[::-1])
    ]
