"""`fastoss doctor` with no run: what this machine has for training, what is missing, and what will be slow.

Whatever is heavy or may crash is asked in processes of its own, all at once: a library that breaks when it is imported breaks a line
and not the doctor.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

from fastoss.errors import FastossError
from fastoss.model.cards import GIB, Card, cards_found
from fastoss.run import cache_folder

State = Literal["ok", "slow", "broken", "absent"]
_SECONDS = 120  # that a process of the doctor may take; on a quiet machine it takes ten, but for the first CUDA context of a day
_HUB_SECONDS = 3.0
_DISK = 50e9  # a merged export in bf16 and its run
_PROBES = Path(__file__).with_name("machine_probes.py")


@dataclass(frozen=True)
class Line:
    """One thing looked at, and what to do where it is not `ok`. `absent` is what this machine does without."""

    what: str
    state: State
    told: str
    fix: str | None = None

    def line(self) -> str:
        return f"{self.state:<7}{self.what}: {self.told}" + (f"\n       fix: {self.fix}" if self.fix else "")

    def to_plain(self) -> dict[str, str | None]:
        return asdict(self)


def examine_machine() -> list[Line]:
    """Look at everything that training needs. Changes nothing, needs no network."""
    cards = cards_found()
    with ThreadPoolExecutor(2) as pool:
        libraries, exchange = pool.submit(_probe, ["torch", "kernels", "libraries"], cards), pool.submit(_probe, ["exchange"], cards)
        lines = [*_python(), *_cards(cards)]
        around = [*_hub(), *_disk()]
    return [*lines, *libraries.result(), *exchange.result(), *around]


def _python() -> Iterator[Line]:
    version = ".".join(map(str, sys.version_info[:3]))
    fine = (3, 11) <= sys.version_info[:2] < (3, 14)
    yield Line("Python", "ok" if fine else "broken", version, None if fine else "use Python 3.11 to 3.13")


def _cards(cards: list[Card]) -> Iterator[Line]:
    if not cards:
        there = shutil.which("nvidia-smi") is not None
        told = "nvidia-smi finds none that this process may use" if there else "none: gpt-oss-20b cannot be trained here, the tiny model can"
        yield Line("GPU", "broken" if there and "CUDA_VISIBLE_DEVICES" not in os.environ else "absent", told)  # else hidden on purpose
        return
    for number, card in enumerate(cards):
        small = card.memory < 22 * GIB
        fix = "fastoss check RECIPE --fit says what would fit" if small else None
        yield Line("GPU", "slow" if small else "ok", f"{number}: {card.line()}", fix)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        version = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.split()[0]
        yield Line("driver", "ok", version)
    except (OSError, subprocess.SubprocessError, IndexError):
        yield Line("driver", "broken", "nvidia-smi tells no version", "reinstall NVIDIA's driver")


def _disk() -> Iterator[Line]:
    places = [("disk here", Path.cwd())]
    try:
        places = [("disk of the cache", cache_folder()), *places]
    except FastossError as problem:
        yield Line("disk of the cache", "broken", f"{problem.place}: {problem.fact}", problem.hint)
    for name, folder in places:
        there = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Line(name, "broken", f"{folder} cannot be written", "set FASTOSS_CACHE to another folder" if "cache" in name else None)
        else:
            little = free < _DISK
            fix = f"a run of gpt-oss-20b with its merged export takes {_DISK / 1e9:.0f} GB: make room before you export" if little else None
            yield Line(name, "slow" if little else "ok", f"{free / 1e9:.0f} GB free", fix)


def _hub() -> Iterator[Line]:
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    address, through = urlparse(endpoint), ""
    if (proxy := getproxies().get(address.scheme)) and not proxy_bypass(address.hostname or ""):
        address, through = urlparse(proxy if "://" in proxy else f"http://{proxy}"), " through the proxy that is set"
    if offline:
        yield Line("hub", "absent", "HF_HUB_OFFLINE is set: only what is in the cache can be loaded")
    else:
        begun = time.monotonic()
        try:
            with socket.create_connection((address.hostname or "", address.port or (80 if address.scheme == "http" else 443)), timeout=_HUB_SECONDS):
                pass
            yield Line("hub", "ok", f"{endpoint}{through} answers in {1000 * (time.monotonic() - begun):.0f} ms")
        except (OSError, ValueError, UnicodeError) as problem:
            fix = "HF_ENDPOINT names another hub, HTTPS_PROXY a proxy; or give a local folder as model.name"
            yield Line("hub", "absent", f"{endpoint} cannot be reached{through} ({type(problem).__name__})", fix)
    folder = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub")
    kept = sorted(path.name.removeprefix("models--").replace("--", "/") for path in folder.glob("models--*gpt-oss*")) if folder.is_dir() else []
    yield Line("hub's cache", "ok" if kept else "absent", ", ".join(kept) or "holds no gpt-oss: the first run downloads 12 to 42 GB")
    token = bool(os.environ.get("HF_TOKEN")) or (folder.parent / "token").is_file()
    yield Line("hub's token", "ok" if token else "absent", "there" if token else "none: needed to push, and for private models")


def _probe(parts: list[str], cards: list[Card]) -> list[Line]:
    """The lines of some parts of machine_probes.py, run in a process of their own. Where one kills it, the others get another."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found: list[Line] = []
    while parts:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            command = [sys.executable, str(_PROBES), ",".join(parts), str(answer), str(len(cards))]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment, start_new_session=True)
                why = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1][:300]
                late = False
            except subprocess.TimeoutExpired:
                why, late = f"no answer within {_SECONDS} s", True
            told: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {"lines": [], "done": []}
        found += [Line(**line) for line in told["lines"]]
        parts = parts[len(told["done"]) :]
        if parts and late:
            found += [Line(part, "slow", why, "the machine is busy, or a driver hangs: ask again") for part in parts]
            break
        if parts:
            found.append(Line(parts[0], "broken", why, "what came after the line above broke it: install fastoss again, in a fresh .venv"))
            parts = parts[1:]
    return found


def machine_is_broken(lines: list[Line]) -> bool:
    return any(line.state == "broken" for line in lines)


def report(*, as_json: bool) -> tuple[str, bool]:
    """What `fastoss doctor` prints, and whether something is broken."""
    lines = examine_machine()
    if as_json:
        found = {"verdict": verdict(lines), "findings": [line.to_plain() for line in lines]}
        return json.dumps(found, indent=2, ensure_ascii=False), machine_is_broken(lines)
    return "\n".join([*(line.line() for line in lines), "", verdict(lines)]), machine_is_broken(lines)


def verdict(lines: list[Line]) -> str:
    """All of them in one sentence: what can be trained here, and which lines to read."""
    broken, slow = ([line.what for line in lines if line.state == state] for state in ("broken", "slow"))
    if broken:
        told = f"not ready: mend {', '.join(broken)}"
    elif any(line.what == "GPU" and line.state in ("ok", "slow") for line in lines):
        told = "ready to train gpt-oss-20b"
    else:
        told = "ready for the tiny model; gpt-oss-20b needs a GPU"
    return told + (f" (slow or scarce: {', '.join(dict.fromkeys(slow))})" if slow else "")
