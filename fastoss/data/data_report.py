"""What was read and what became of it: the verdict that `check`, `train` and the manifest give. The dataset fills it in."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from fastoss.data.formats.columns import near_column

_SHOWN = 5  # places that are listed for each reason


@dataclass
class Tally:
    """How many rows (or examples, one a trained turn), and where the first ones stood."""

    unit: str = "rows"
    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < _SHOWN:
            self.places.append(place)

    def listed(self) -> str:
        return ", ".join(self.places) + (", …" if self.count > len(self.places) else "")


@dataclass
class DataReport:
    """Counts are of rows, or of examples (one a trained turn) where so named. `fingerprint` is of every token and its weight."""

    pairs: bool = False  # two examples a row: a chosen answer and a rejected one
    rows: int = 0
    examples: int = 0
    train_rows: int = 0
    eval_rows: int = 0
    train_examples: int = 0
    eval_examples: int = 0
    train_tokens: int = 0
    trained_tokens: int = 0
    trained_by_channel: dict[str, int] = field(default_factory=dict)
    longest: int = 0
    sources: dict[str, str] = field(default_factory=dict)  # what was read: of a hub dataset its commit
    drops: dict[str, Tally] = field(default_factory=dict)  # by reason
    kept: dict[str, Tally] = field(default_factory=dict)  # what was noticed and kept or repaired
    unread: Counter[str] = field(default_factory=Counter)  # columns that no format knows, and in how many rows
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""

    def drop(self, reason: str, place: str, unit: str = "rows") -> None:
        self.drops.setdefault(reason, Tally(unit)).add(place)

    def keep(self, what: str, place: str, unit: str = "rows") -> None:
        self.kept.setdefault(what, Tally(unit)).add(place)

    def lines(self) -> list[str]:
        """The report as people read it."""
        share = ", ".join(f"{channel} {count:,}" for channel, count in self.trained_by_channel.items())
        made = counted(self.train_examples // 2, "training pair") if self.pairs else counted(self.train_examples, "training example")
        lines = [
            f"{counted(self.rows, 'row')} → {made}, {self.eval_examples // (1 + self.pairs):,} held out ({counted(self.eval_rows, 'row')})",
            f"{self.train_tokens:,} tokens, of which {self.trained_tokens:,} are trained ({share}); longest example {self.longest:,}",
        ]
        for reason, tally in self.drops.items():
            lines.append(f"dropped {tally.count:,} of {self._all(tally):,} {tally.unit}: {reason} ({tally.listed()})")
        for what, tally in self.kept.items():
            lines.append(f"{tally.count:,} of {self._all(tally):,} {tally.unit}: {what} ({tally.listed()})")
        for name, count in self.unread.most_common():
            close = near_column(name)
            lines.append(f"the column `{name}` of {counted(count, 'row')} is not read" + (f": did you mean `{close}`?" if close else ""))
        return lines + self.notes

    def _all(self, tally: Tally) -> int:
        return self.rows if tally.unit == "rows" else self.examples


def report_to_plain(report: DataReport) -> dict[str, Any]:
    """The report as JSON values."""
    return asdict(report) | {"unread": dict(report.unread)}


def report_from_plain(plain: dict[str, Any]) -> DataReport:
    tallies = {key: {name: Tally(**tally) for name, tally in plain[key].items()} for key in ("drops", "kept")}
    return DataReport(**(plain | tallies | {"unread": Counter(plain["unread"])}))


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
