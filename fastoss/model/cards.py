"""Cards: how much memory a GPU has, how fast it is, and which one is here. Known without torch."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from fastoss.errors import FastossError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU. `memory` in bytes; `flops` of dense bf16 products a second and `bandwidth` in bytes a second, as its maker states them.

    Those two are 0 where only the memory is known. `found`: it is in this machine.
    """

    name: str
    memory: int
    flops: float = 0.0
    bandwidth: float = 0.0
    found: bool = False

    def line(self) -> str:
        size = f"{self.memory / GIB:.0f} GiB"
        return f"{self.name} ({size})" if self.found or self.flops else f"a card of {self.name}"


def _card(name: str, gib: float, tera_flops: float, terabytes: float) -> Card:
    return Card(name, int(gib * GIB), tera_flops * 1e12, terabytes * 1e12)


# Memory as the driver shows it, dense bf16 TFLOP/s with float32 sums, and TB/s: NVIDIA's data sheets.
_LARGEST = 200.0  # GB of a card: a larger bare number is a name that was misspelt
CARDS: dict[str, Card] = {
    card.name.lower(): card
    for card in (
        _card("T4", 15.0, 65, 0.32),  # float16; it has no bf16
        _card("V100-32", 32.0, 125, 0.9),
        _card("L4", 22.5, 121, 0.3),
        _card("A10", 22.5, 125, 0.6),
        _card("A10G", 22.5, 70, 0.6),
        _card("A5000", 24.0, 111, 0.768),
        _card("A6000", 48.0, 155, 0.768),
        _card("L40", 45.0, 181, 0.864),
        _card("L40S", 45.0, 362, 0.864),
        _card("3090", 24.0, 71, 0.936),
        _card("4090", 24.0, 165, 1.008),
        _card("5090", 31.8, 209, 1.792),
        _card("RTX-6000-Ada", 48.0, 364, 0.96),
        _card("A100-40", 39.5, 312, 1.555),
        _card("A100-80", 79.3, 312, 2.0),
        _card("H100", 79.6, 989, 3.35),
        _card("H100-NVL", 93.6, 835, 3.9),
        _card("H200", 139.8, 989, 4.8),
        _card("B200", 178.4, 2250, 8.0),
    )
}
_OTHER_NAMES = {
    "rtx3090": "3090",
    "rtx4090": "4090",
    "rtx5090": "5090",
    "a100": "a100-80",
    "rtx6000ada": "rtx-6000-ada",
    "h10080": "h100",
    "a10080": "a100-80",
    "a10040": "a100-40",
    "v100": "v100-32",
}
DEFAULT = Card("24 GB", 24 * GIB)  # what the project promises to fit; its speed is nobody's


def parse_card(text: str) -> Card:
    """The card that a person means: `24GB`, `48`, `A100-80`, `rtx 4090`, `H200`. `FastossError` when there is no such card."""
    plain = text.strip().lower().replace("nvidia", "").replace("geforce", "").strip()
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib|g)?", plain)
    if size and not size[2] and float(size[1]) > _LARGEST and plain not in CARDS:
        close = difflib.get_close_matches(plain, CARDS, n=1, cutoff=0.5)
        hint = f"{plain}GB for that much memory" + (f", or did you mean {CARDS[close[0]].name}?" if close else "")
        raise FastossError("not a card that is known here", place=f"--card {text}", hint=hint)
    if size and (size[2] or plain not in CARDS):
        gigabytes = float(size[1])
        if not 1 <= gigabytes <= 2000:
            raise FastossError("no card has that much, or that little", place=f"--card {text}", hint="in GB, such as --card 24GB")
        # A card "of 24 GB" has 24 GiB, less what the driver keeps.
        return Card(f"{size[1]} GB", int(gigabytes * GIB))
    squeezed = re.sub(r"[\s_-]+", "-", plain).strip("-")
    squeezed = re.sub(r"-?gb$", "", squeezed)
    name = next((n for n in (squeezed, _OTHER_NAMES.get(squeezed.replace("-", ""), ""), squeezed.removeprefix("rtx-")) if n in CARDS), None)
    if name is None:
        known = ", ".join(card.name for card in CARDS.values())
        raise FastossError("not a card that is known here", place=f"--card {text}", hint=f"a size such as 24GB, or one of {known}")
    return CARDS[name]


def cards_found(timeout: float = 5.0) -> list[Card]:
    """The NVIDIA GPUs of this machine that this process may use, as nvidia-smi tells; none where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return []
    command = [program, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in told.splitlines() if line.count(",") == 3]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA stops at the first name that is no card, and takes them in the order given.
        chosen = [[row for row in rows if _names(name.strip(), row)] for name in visible.split(",")]
        rows = [found[0] for found in chosen[: next((i for i, found in enumerate(chosen) if not found), len(chosen))]]
    return [card_called(name, float(memory)) for _, _, name, memory in rows if re.fullmatch(r"\d+(\.\d+)?", memory)]


def _names(visible: str, row: list[str]) -> bool:
    """Whether an entry of CUDA_VISIBLE_DEVICES means this card: by its number, or by the beginning of its UUID, as CUDA has it."""
    return visible == row[0] or (visible.startswith("GPU-") and row[1].startswith(visible))


def card_called(name: str, mebibytes: float) -> Card:
    """A card with the memory that its driver tells, and the speed of the one it is called after."""
    plain = re.sub(r"[\s_-]+", "-", name.lower())
    # A key may end in what tells two of one kind apart: A100-40 and A100-80, H100 and H100-NVL.
    alike = [card for key, card in CARDS.items() if re.search(rf"(^|-){re.sub(r'-([0-9]+|nvl)$', '', key)}(-|$)", plain)]
    nearest = min(alike, key=lambda card: abs(card.memory - mebibytes * 2**20), default=None)
    return Card(name, int(mebibytes * 2**20), nearest.flops if nearest else 0.0, nearest.bandwidth if nearest else 0.0, found=True)


def card_for(text: str | None) -> Card:
    """The card that `--card` names; else the smallest of those found; else one of 24 GB."""
    if text is not None:
        return parse_card(text)
    return min(cards_found(), key=lambda card: card.memory, default=DEFAULT)
