"""What the tests share: one cache for the session, recipes made in a line, and the command line in a process of its own."""

from __future__ import annotations

import atexit
import functools
import gzip
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from .commands import ROOT, Commands, Result

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache, shared by the workers of one test run: tokenizer and tiny model are really built here."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "cache"
    os.environ["FASTOSS_CACHE"] = str(folder)
    os.environ["HF_HOME"] = str(folder / "huggingface")
    return folder


@pytest.fixture(scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


ROWS = [
    {"instruction": "你是谁?", "input": "", "output": "我是米卡喵。", "history": [], "thinking": "先报名字。"},
    {"instruction": "What is 2+2?", "input": "", "output": "Four, nya.", "history": []},
    {"instruction": "And doubled?", "input": "", "output": "Eight!", "history": [["What is 2+2?", "Four, nya."]], "thinking": "Twice four is eight."},
    {"instruction": "Translate to English", "input": "猫", "output": "Cat.", "history": []},
    {"instruction": "Sing 😀", "input": "", "output": "La la la, purr.", "history": []},
    {"instruction": "Where do you sleep?", "input": "", "output": "On the warm shelf by the window, of course.", "history": []},
    {"instruction": "晚安", "input": "", "output": "晚安喵，做个好梦。", "history": [], "thinking": "用户要睡了。"},
    {"instruction": "Any tea?", "input": "", "output": "Jasmine, always jasmine.", "history": [["Hi", "Hello, nya!"], ["I am cold", "Come in."]]},
]


@dataclass
class RecipeFolder:
    """A folder with data.jsonl and recipe.toml."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.toml"

    @property
    def data(self) -> Path:
        return self.root / "data.jsonl"

    def rows(self, rows: list) -> None:
        self.data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# Files with tests that take a minute or more. They begin the run: at its end no worker waits for another one's long test.
LONGEST = (
    "test_ranks.py",
    "test_training.py",
    "test_bench.py",
    "test_preferences.py",
    "test_gpu_checks.py",
    "test_own_csv.py",
    "test_shared_base.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return  # one process: in the order of the command line
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


TINY_RECIPE = """\
name = "test"
[model]
name = "tiny"
precision = "float32"
max_length = 256
[lora]
r = 4
lora_alpha = 8
[[data]]
source = "data.jsonl"
[eval]
fraction = 0.0
[train]
max_steps = 4
learning_rate = 5e-3
per_device_train_batch_size = 2
[checkpoint]
every = 100
"""


@pytest.fixture
def folder(tmp_path: Path) -> RecipeFolder:
    """A recipe for the tiny model, with eight rows."""
    made = RecipeFolder(tmp_path)
    made.rows(ROWS)
    made.recipe.write_text(TINY_RECIPE, encoding="utf-8")
    return made


@functools.cache
def _commands() -> Commands:
    made = Commands(Path(tempfile.mkdtemp()))
    atexit.register(made.server.kill)
    return made


# The processes of `--gpus N` are forked as well, by torchrun's own launcher: tests/faults/test_ranks.py starts them from scratch.
_FORKED_RANKS = """
import torch.distributed.launcher.api as api

class Launch(api.elastic_launch):
    def __init__(self, config, executable):
        config.start_method = "fork"
        super().__init__(config, rank)

    def __call__(self, module, name, *arguments):
        return super().__call__(*arguments)

def rank(*arguments):
    import signal, sys
    from fastoss.cli import main
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)  # not the launcher's
    sys.argv = ["fastoss", *arguments]
    main()

api.elastic_launch = Launch
"""
# What a library reads when it is imported, the server's children cannot change: such commands get a process from scratch.
_READ_LATER = ("COLUMNS", "TERMINAL_WIDTH", "NO_COLOR", "FASTOSS_")


def fastoss(*arguments: object, cwd: Path | None = None, timeout: float = 300, **environment: str) -> Result:
    """Run the command line as a user does: in a process of its own, away from the repository's root."""
    scratch = any("unsloth" in str(argument) or str(argument) == "bench" for argument in arguments)
    if not scratch and all(name.startswith(_READ_LATER) for name in environment):
        prelude = _FORKED_RANKS if "--gpus" in arguments else ""
        return _commands().run(*arguments, cwd=cwd or Path.cwd(), prelude=prelude, timeout=timeout, **environment)
    command = [sys.executable, "-m", "fastoss", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    return Result(done.returncode, done.stdout, done.stderr)


def gzipped(content: bytes) -> bytes:
    """gzip without the time: the names of parametrised tests hold it, and must be the same in each worker."""
    return gzip.compress(content, mtime=0)


MEASURED = ("seconds", "tokens_per_second", "memory", "memory_peak")  # by the clock and the machine


def metrics(run: Path) -> list[dict]:
    """A run's metrics without what clock and machine decide."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in entry.items() if key not in MEASURED} for entry in entries]


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(run) if "loss" in entry]
