"""The command line's manners: quick help, light imports, one clear error, and the documents that describe it."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .command_pages import DOCUMENT, pages
from .conftest import ROOT, fastoss
from .documents import commands_of, files_of

HEAVY = ("torch", "transformers", "trl", "unsloth", "peft", "datasets")


def test_help_answers_at_once():
    """Within 0.3 s of processor time more than importing typer takes, in the best of five pairs: others may work on this machine."""

    def seconds(*arguments: str) -> float:
        begun = os.times()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT)
        ended = os.times()
        return ended.children_user + ended.children_system - begun.children_user - begun.children_system

    pairs = [(seconds("-m", "fastoss", "--help"), seconds("-c", "import typer")) for _ in range(5)]
    assert min(ours - typer for ours, typer in pairs) <= 0.3


@pytest.mark.parametrize(
    "code",
    [
        "import fastoss.config",
        "import fastoss.cli",
        "import pkgutil, importlib, fastoss.data as d\nfor m in pkgutil.walk_packages(d.__path__, 'fastoss.data.'): importlib.import_module(m.name)",
        "import sys; sys.argv = ['fastoss', 'check', 'recipes/quickstart.toml']\nfrom fastoss.cli import main\ntry: main()\nexcept SystemExit: pass",
        "import sys; sys.argv = ['fastoss', 'show', 'recipes/quickstart.toml']\nfrom fastoss.cli import main\ntry: main()\nexcept SystemExit: pass",
        "import sys; sys.argv = ['fastoss', 'schema']\nfrom fastoss.cli import main\ntry: main()\nexcept SystemExit: pass",
    ],
    ids=["config", "cli", "data", "check", "show", "schema"],
)
def test_light_parts_import_no_deep_learning_library(code):
    check = f"{code}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


def test_help_is_what_the_docs_show():
    """docs/commands.md holds the help of every command as it is printed (written anew by `python -m tests.command_pages`)."""
    found = pages()
    assert len(found) > 8
    document = DOCUMENT.read_text(encoding="utf-8")
    for page in found.values():
        assert page in document


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "nowhere.toml"], 2, "error: nowhere.toml: recipe not found"),
        (["check", "nowhere.toml"], 2, "error: nowhere.toml: recipe not found"),
        (["train"], 2, "Missing argument 'RECIPE'"),
        (["trian"], 2, "No such command 'trian'"),
        (["train", "recipes/quickstart.toml", "--overwrite", "--dry-run"], 2, "--overwrite works only with --no-resume"),
        (["train", "recipes/catgirl.toml"], 2, 'error: model.precision: "4bit" needs a GPU, and this machine has none'),
        (["train", "recipes/quickstart.toml", "--gpus", "0"], 2, "error: --gpus 0: "),
        (["train", "recipes/quickstart.toml", "--set", "data.0.source=none.jsonl"], 2, "recipes/none.jsonl: data file not found"),
        (["chat", "runs/nowhere"], 2, "error: runs/nowhere: there is no such run or adapter"),
        (["chat", "docs"], 2, "error: docs: no adapter in this folder"),
        (["chat", "openai/gpt-oss-20b"], 2, "error: MODEL: openai/gpt-oss-20b needs a GPU"),
    ],
)
def test_errors_are_one_message_with_no_traceback(arguments, code, message):
    result = fastoss(*arguments, cwd=ROOT)
    assert result.code == code
    assert message in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


def test_debug_shows_the_traceback():
    result = fastoss("--debug", "check", "nowhere.toml")
    assert result.code == 2
    assert "Traceback" in result.err


def test_dry_run_of_a_gpu_recipe_without_a_gpu(tmp_path):
    result = fastoss("train", ROOT / "recipes" / "catgirl.toml", "--dry-run", cwd=tmp_path)
    assert result.code == 0, result.err
    assert '"learning_rate": 0.0001' in result.out
    assert "would train unsloth/gpt-oss-20b-unsloth-bnb-4bit in 4bit on the GPU, through unsloth" in result.out
    assert "this machine has no GPU: train it on one that has, or here with --set model.name=tiny" in result.out
    assert "256 rows → " in result.out
    assert re.search(r"\d+ steps of 2 micro-batches, up to 8,192 tokens each", result.out)
    assert not list(tmp_path.iterdir())


def test_chat_keeps_stdout_for_the_answer(tmp_path):
    result = fastoss("chat", "tiny", "--prompt", "hi", "--max-new-tokens", 5, cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.out.strip()
    assert "note: the reply was malformed" in result.err
    assert not list(tmp_path.iterdir())


# --- the documents ---------------------------------------------------------------------------------------------------


ANSWERING = ("chat", "generate", "evaluate", "serve")
DOCUMENTS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


def test_make_targets_named_in_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {line.split()[1] for name in DOCUMENTS for line in commands_of(name) if line.startswith("make ")}
    assert {"quickstart", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def workplace(folder: Path, files: dict[str, str]) -> Path:
    """A folder that looks like the repository to a reader, and holds what the document had them write."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name == "recipes":  # copied: some commands write there
            shutil.copytree(path, folder / path.name)
        elif path.name not in ("runs", *files):
            (folder / path.name).symlink_to(path)
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def test_every_fastoss_command_in_the_documents_is_understood(tmp_path):
    """Training is dry-run, what needs no model is run; options and files must be real."""
    seen: set[str] = set()
    for number, name in enumerate(DOCUMENTS):
        place = workplace(tmp_path / str(number), files_of(name))
        for line in commands_of(name):
            words = shlex.split(line)
            if words[0] == "docker" and "fastoss" in words:  # what runs in the container
                words = words[words.index("fastoss") :]
            if words[0] != "fastoss" or shlex.join(words) in seen:
                continue
            seen.add(shlex.join(words))
            if words[1] in ANSWERING:  # a model would be loaded: its options are looked up
                known = fastoss(words[1], "--help").out
                assert all(word in known for word in words if word.startswith("--")), line
                continue
            if "--html" in words:  # not into the repository
                words[words.index("--html") + 1] = str(tmp_path / "page.html")
            # What needs a finished run, or a minute of looking at the machine, is parsed only: --help comes after the options were understood.
            parsed = words[1] in ("export", "verify", "push", "adapter", "report", "doctor")
            extra = {"train": ["--dry-run"]}.get(words[1], ["--help"] if parsed else [])
            result = fastoss(*words[1:], *extra, cwd=place)
            assert result.code == 0, (name, line, result.err)
    assert len(seen) >= 20


def test_messages_in_troubleshooting_are_still_said():
    """Each heading of the guide is a message: it has to occur in the source, with something in the place of each `…`."""
    texts: set[str] = set()
    for path in (ROOT / "fastoss").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    said = "\0".join(texts)
    headings = re.findall(r"^### (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    messages = [message for heading in headings for message in heading.split(" · ")]
    assert len(messages) >= 20
    for message in messages:
        assert re.search("[^\0]*".join(map(re.escape, message.split("…"))), said), message


def test_the_table_for_24_gb_is_what_check_plans():
    """docs/24gb.md holds planned figures: each row is planned again, as `check` does it."""
    from fastoss.config import load_recipe
    from fastoss.data.dataset import build_dataset
    from fastoss.training.planning.outlook import judge
    from fastoss.training.planning.run_plan import gib

    row = re.compile(r"^\| (as shipped|`[\w.]+ = .*?`|) *\| ([\d,]+) \| ([\d.]+ GiB) \| ([\d.]+ GiB) \| (.*?) \|$", re.MULTILINE)
    rows = row.findall((ROOT / "docs" / "24gb.md").read_text(encoding="utf-8"))
    assert len(rows) == 10
    recipe = ROOT / "recipes" / "catgirl.toml"
    dataset = build_dataset(load_recipe(recipe))
    for setting, tokens, peak, least, fits in rows:
        changes = [setting.strip("`").replace(" = ", "=")] if setting.startswith("`") else []
        changes.append(f"train.tokens_per_batch={tokens.replace(',', '')}")
        plan = judge(load_recipe(recipe, changes), dataset, card="24GB").plan
        assert (gib(plan.memory.card_bytes), gib(plan.least)) == (peak, least), changes
        assert plan.fits == (fits in ("yes", "barely")), changes


def test_links_in_the_documents_lead_somewhere():
    for name in DOCUMENTS:
        path = ROOT / name
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), (name, target)
