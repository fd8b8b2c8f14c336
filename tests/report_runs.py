"""Run directories written by hand for the report: everything that a run can leave behind, with texts that try to become markup."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fastoss.run import RunDirectory

HOSTILE = (
    "</title></style></script></details><script>document.title='owned'</script><img src=http://example.org/x.png onerror=\"document.title='owned'\">"
    "<svg onload=document.title='owned'><a href=\"javascript:document.title='owned'\">x</a><!--\u2028\x00\x1b[31m\ud800&lt;&#60; ' onmouseover='x"
)


def steps(count: int, **more: Any) -> list[dict]:
    return [
        {
            "step": n,
            "loss": 0.4 + 3 * math.exp(-n / 12) + 0.05 * math.sin(n),
            "loss_analysis": 0.6 + 3 * math.exp(-n / 12),
            "loss_final": 0.3 + 2 * math.exp(-n / 9),
            "learning_rate": 1e-4 * (1 - n / count),
            "grad_norm": 30 / n,
            "mean_token_accuracy": 1 - 1 / n,
            "num_tokens": 1000 * n,
            "fill": 0.98,
            "epoch": n / 20,
            "seconds": 2.0 * (n - (24 if n > 24 else 12 if n > 12 else 0)),
            "tokens_per_second": 510.0 + n,
            "memory": 2**30 + n * 2**22,
            "memory_peak": 2**31,
            **more,
        }
        for n in range(1, count + 1)
    ]


def evaluations(count: int, every: int, **more: Any) -> list[dict]:
    return [{"step": n, "eval_loss": 0.7 + 2.5 * math.exp(-n / 12), **more} for n in range(every, count + 1, every)]


def written_run(
    folder: Path, *, text: str = HOSTILE, method: str = "sft", count: int = 40, recipe: dict | None = None, **manifest: Any
) -> RunDirectory:
    """A finished run that was killed once, stopped once, and said warnings; every text that a row or a reply can hold is `text`."""
    folder.mkdir(parents=True)
    run = RunDirectory(folder)
    plain = json.dumps  # half a character goes through JSON as an escape
    data = {
        "pairs": method == "dpo",
        "rows": 120,
        "examples": 150,
        "train_rows": 110,
        "eval_rows": 8,
        "train_examples": 140,
        "eval_examples": 10,
        "train_tokens": 40_000,
        "trained_tokens": 12_000,
        "trained_by_channel": {"analysis": 7_000, "final": 5_000},
        "longest": 900,
        "sources": {text: "abc"},
        "drops": {text: {"unit": "rows", "count": 2, "places": [text, "b:2"]}},
        "kept": {},
        "unread": {},
        "notes": [],
        "fingerprint": "0123456789abcdef",
    }
    run.manifest.write_text(
        plain(
            {
                "versions": {"torch": "2.13.0", "trl": "1.14.2"},
                "python": "3.11.2",
                "platform": text,
                "commit": "abc",
                "gpu": None,
                "backend": "transformers",
                "precision": "float32",
                "layout": "packed",
                "world_size": 1,
                "seed": 42,
                "data": data,
                "run_id": "1f",
                "command": f"fastoss train {text}",
                "started": ["2026-01-01T10:00:00+0000", "2026-01-01T11:00:00+0000", "2026-01-01T12:00:00+0000"],
                "resumed_after_step": [12, 24],
                "changed": [],
                "ends": [
                    {"start": 2, "how": "stopped", "at": "2026-01-01T11:30:00+0000", "said": text},
                    {"start": 3, "how": "finished", "at": "x", "said": None},
                ],
                **manifest,
            }
        )
    )
    model = {"name": "tiny", "precision": "float32", "adapter": "runs/before" if method == "dpo" else None}
    run.resolved_recipe.write_text(
        plain({"name": "x", "method": method, "model": model, "lora": {"r": 8}, "data": [{"source": text}], **(recipe or {})})
    )
    run.recipe.write_text("# " + text.encode("utf-8", "replace").decode())
    more = {"rewards/margins": 0.5, "rewards/accuracies": 0.8, "rewards/chosen": 0.2, "rewards/rejected": -0.3} if method == "dpo" else {}
    entries = [*steps(count, **more), *evaluations(count, 5, **{f"eval_{key}": value for key, value in more.items()})]
    run.metrics.write_text("".join(plain(entry) + "\n" for entry in sorted(entries, key=lambda entry: entry["step"])))
    reply = {"thinking": text, "content": text, "problems": []}
    sample = {
        "messages": [{"role": "user", "content": text}],
        "expected": {"thinking": text, "content": text},
        "before": reply | {"problems": [text]},
        "after": reply,
    }
    other = sample | {
        "messages": [{"role": text, "content": text}, {"role": "assistant", "content": text}, {"role": "user", "content": text}],
        "after": None,
    }
    run.samples.write_text("".join(plain(entry) + "\n" for entry in [sample, other, sample | {"expected": None}]))
    run.log.write_text(f"2026-01-01 10:00:00  note: {text.encode('utf-8', 'replace').decode()}\n2026-01-01 10:00:01  note: said twice\n" * 2)
    spans = [
        ("system", False, text),
        ("user", False, text),
        ("analysis", True, text),
        ("final", True, f"<|channel|>final<|message|>{text}<|return|>"),
    ]
    example = {
        "place": text,
        "split": "train",
        "label": "",
        "tokens": 90,
        "trained": 30,
        "spans": [{"name": name, "trained": trained, "weight": 0.5, "tokens": 9, "text": said, "cut": 3} for name, trained, said in spans],
    }
    profile = {
        "max_length": 512,
        "train_on": {"final": 1.0},
        "lengths": {"shortest": 3, "median": 80, "95 %": 300, "longest": 900},
        "packing": None,
        "channels": [{"name": "user", "tokens": 28_000, "trained": 0}, {"name": "final", "tokens": 12_000, "trained": 12_000}],
        "histogram": {"edges": list(range(0, 1024, 64)), "kept": [9, 30, 40, 30, 20, 9, 5, 2, 0, 0, 0, 0, 0, 0, 0], "dropped": [0] * 13 + [1, 1]},
        "scripts": {"Latin": 700, "Han": 300},
        "dropped": [{"place": text, "unit": "rows", "reason": text, "excerpt": text}],
        "dropped_total": 2,
        "examples": [example],
    }
    run.profile.write_text(plain(profile))
    (folder / "plan.json").write_text(
        plain(
            {
                "card": None,
                "components": {"weights": 100 * 2**20, "optimizer": 30 * 2**20, text: 5 * 2**20},
                "peak_bytes": 200 * 2**20,
                "disk_bytes": 2**20,
                "seconds": 90.0,
                "tokens": 40_000,
                "steps": 40,
                "measured": {"peak_bytes": 210 * 2**20, "disk_bytes": 2**20, "seconds": 80.0},
            }
        )
    )
    value = {"mean": 0.5, "low": 0.2, "high": 0.8, "n": 8}
    measure = {"label": text, "unit": "share", "better": "up", "base": value, "tuned": value, "difference": value, "verdict": text}
    run.evaluation.write_text(plain({"rows": 8, "of": 8, "source": text, "compared": True, "before": text, "measures": {"well_formed": measure}}))
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"")
    return run
