"""Data sets from a hub: the real libraries against a stand-in server on this machine, then against no server at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import ClassVar

import pyarrow
import pyarrow.parquet
import pytest

from fastoss.config import DataSource
from fastoss.data.reading.sources import is_cached, read_rows
from fastoss.errors import FastossError

from .conftest import ROOT
from .stand_in import StandIn, running

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"
NOWHERE = "http://127.0.0.1:9"


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(*rows: dict) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


MESSAGES = [{"messages": [{"role": "user", "content": f"问 {i}"}, {"role": "assistant", "content": "喵", "thinking": "嗯"}]} for i in range(5)]
CARD = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train.jsonl
- config_name: zh
  data_files:
  - split: train
    path: zh/part-*.parquet
  - split: test
    path: zh/test.jsonl
---
# A card
"""
# name → commit → file → content
REPOS: dict[str, dict[str, dict[str, bytes]]] = {
    "someone/plain": {
        COMMIT: {
            "train.jsonl": lines({"output": "2024-05-01", "arguments": {"a": None}}, {"output": "2024-05-02"}),
            "test.jsonl": lines({"output": "t"}),
        },
        OLDER: {"train.jsonl": lines({"output": "old"})},
    },
    "someone/card": {
        COMMIT: {
            "README.md": CARD,
            "en/train.jsonl": lines({"output": "en"}),
            "zh/part-0.parquet": parquet(*MESSAGES[:3]),
            "zh/part-1.parquet": parquet(*MESSAGES[3:]),
            "zh/test.jsonl": lines({"output": "t"}),
        }
    },
    "someone/script": {COMMIT: {"script.py": b"import os", "README.md": b"# x"}},
    "someone/unclear": {COMMIT: {"README.md": b"---\nconfigs: [1, 2]\n---\n", "train.jsonl": lines({"a": 1})}},
    "someone/empty": {COMMIT: {"README.md": b"# x"}},
    "someone/texts": {COMMIT: {"train.txt": b"a\nb\n"}},
    "someone/bad": {COMMIT: {"train.jsonl": b'{"a": 1}\n{"a": \n'}},
    "someone/gated": {COMMIT: {"train.jsonl": lines({"a": 1})}},
    "someone/private": {COMMIT: {"train.jsonl": lines({"a": 1})}},
    "someone/busy": {COMMIT: {"train.jsonl": lines({"a": 1})}},
}


class Hub(StandIn):
    """As much of the hub's protocol as datasets take: what a repository is, its tree, its files with their etags."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(self.path.split("?")[0])
        if path != "/api/agent-harnesses":  # huggingface_hub asks it once a day, about its caller
            self.asked.append(path)
        name = next((name for name in REPOS if f"/{name}" in path), None)
        if name is None:
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if name == "someone/busy":
            return self.send(503, b"")
        if name == "someone/private":
            return self.send(403, b"")
        rest = path.split(f"/{name}", 1)[1].strip("/")
        commits = REPOS[name]
        kind, _, rest = rest.partition("/")
        revision, _, file = rest.partition("/")
        commit = {"": COMMIT, "main": COMMIT, "v1": OLDER}.get(revision, revision)
        if commit not in commits:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = commits[commit]
        if path.startswith("/api/"):
            return self.send(200, self._told(name, kind, commit, files, file))
        if name == "someone/gated":
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Repo-Commit": commit})
        if file not in files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = hashlib.sha256(files[file]).hexdigest()
        return self.send(200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _told(self, name: str, kind: str, commit: str, files: dict[str, bytes], below: str) -> object:
        if kind in ("", "revision"):
            return {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        folders = {str(parent) for file in files for parent in Path(file).parents} - {"."}
        entries = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
        entries += [{"type": "file", "path": file, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)} for file, data in files.items()]
        if kind == "paths-info":
            wanted = urllib.parse.parse_qs(self.body.decode()).get("paths", []) if self.body[:1] != b"{" else json.loads(self.body)["paths"]
            return [entry for entry in entries if entry["path"] in wanted]
        recursive = "recursive=true" in self.path.lower()
        return [
            e for e in entries if (not below or e["path"].startswith(below + "/")) and (recursive or str(Path(e["path"]).parent) == (below or "."))
        ]


@pytest.fixture(scope="module")
def hub():
    with running(Hub) as address:
        yield address


SCRIPT = """
import json, sys
from fastoss.config import DataSource
from fastoss.data.reading.sources import (BadRow, hub_revision, is_cached, read_rows, source_identity, source_notes, source_revisions)
from fastoss.errors import FastossError

def read(source):
    told = {"cached_before": is_cached(source)}
    try:
        told["identity"] = source_identity(source)
        rows = list(read_rows(source))
        told |= {"rows": [str(row) if isinstance(row, BadRow) else row.columns for row in rows], "places": [row.place for row in rows]}
        told |= {"notes": source_notes(source), "revisions": source_revisions([source]), "revision": hub_revision(source)}
    except FastossError as problem:
        told |= {"error": str(problem), "kind": type(problem).__name__}
    return told | {"cached": is_cached(source)}

json.dump([read(DataSource(**source)) for source in json.loads(sys.argv[1])], open(sys.argv[2], "w"))
"""


def read_all(hub: str, folder: Path, sources: list[dict], environment: dict[str, str]) -> list[dict]:
    """Read sources in a process of their own, since the hub's libraries read their environment when they are imported."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "HF_ENDPOINT": hub}
    env |= {"HF_HOME": str(folder / "hf"), "FASTOSS_CACHE": str(folder / "cache"), "HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_TOKEN": "hf_secret"} | environment
    command = [sys.executable, "-c", SCRIPT, json.dumps(sources), str(folder / "told.json")]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    told = json.loads((folder / "told.json").read_text())
    assert "hf_secret" not in json.dumps(told) + done.stderr
    return [one | {"stderr": done.stderr} for one in told]


@pytest.fixture
def read(hub, tmp_path):
    """Read a source; what was read before in the same test is in the cache."""

    def run(environment: dict[str, str] | None = None, **source: object) -> dict:
        (told,) = read_all(hub, tmp_path, [source], environment or {})
        return told

    return run


def test_a_data_set_from_a_hub_and_again_without_it(read):
    told = read(source="hf:someone/plain")
    # What `datasets` would make of these rows: {"output": datetime(2024, 5, 1), "arguments": None} in the second.
    assert told["rows"] == [{"output": "2024-05-01", "arguments": {"a": None}}, {"output": "2024-05-02"}]
    assert told["places"] == ["hf:someone/plain@0123456/train.jsonl:1", "hf:someone/plain@0123456/train.jsonl:2"]
    assert told["identity"] == f"hf:someone/plain@{COMMIT}/default/train"
    assert told["revisions"] == {"hf:someone/plain": COMMIT}
    assert (told["revision"], told["notes"], told["cached_before"], told["cached"]) == (COMMIT, [], False, True)
    assert told["stderr"] == ""
    Hub.asked.clear()
    again = read(source="hf:someone/plain")
    assert again["rows"] == told["rows"]
    assert not [path for path in Hub.asked if "tree" in path or "jsonl" in path]
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_DATASETS_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}):
        offline = read(environment, source="hf:someone/plain")
        assert {**offline, "notes": []} == {**again, "notes": []}
        assert offline["notes"][0].startswith("hf:someone/plain is read at commit 0123456, as it was last seen: ")
    assert "offline (HF_HUB_OFFLINE)" in read({"HF_HUB_OFFLINE": "1"}, source="hf:someone/plain")["notes"][0]
    assert "ConnectError" in read({"HF_ENDPOINT": NOWHERE}, source="hf:someone/plain")["notes"][0]
    unseen = read({"HF_HUB_OFFLINE": "1"}, source="hf:someone/plain", split="test")
    assert unseen["kind"] == "NotCached"
    assert "in the cache, the dataset has no split `test`" in unseen["error"]


def test_a_pinned_commit_and_a_tag(read):
    pinned = read(source="hf:someone/plain", revision=OLDER)
    assert (pinned["rows"], pinned["revision"]) == ([{"output": "old"}], OLDER)
    Hub.asked.clear()
    assert read(source="hf:someone/plain", revision=OLDER)["rows"] == pinned["rows"]
    assert Hub.asked == []  # a commit never changes: nothing is asked
    assert read({"HF_ENDPOINT": NOWHERE}, source="hf:someone/plain", revision=OLDER)["notes"] == []
    tagged = read(source="hf:someone/plain", revision="v1")
    assert (tagged["rows"], tagged["identity"]) == ([{"output": "old"}], f"hf:someone/plain@{OLDER}/default/train")
    assert read({"HF_HUB_OFFLINE": "1"}, source="hf:someone/plain", revision="v1")["rows"] == pinned["rows"]
    # The main branch was never seen: the newest commit in the cache stands in, and that is said.
    newest = read({"HF_HUB_OFFLINE": "1"}, source="hf:someone/plain")
    assert newest["revision"] == OLDER
    assert "the newest in the cache" in newest["notes"][0]


def test_subsets_splits_and_parquet(read):
    told = read(source="hf:someone/card", subset="zh", max_rows=4)
    assert told["rows"] == MESSAGES[:4]
    assert told["places"][2:] == ["hf:someone/card@0123456/zh/part-0.parquet[2]", "hf:someone/card@0123456/zh/part-1.parquet[0]"]
    assert told["identity"].endswith("/zh/train")
    assert read(source="hf:someone/card", subset="zh", split="test")["rows"] == [{"output": "t"}]
    assert read({"HF_HUB_OFFLINE": "1"}, source="hf:someone/card", subset="zh")["rows"] == MESSAGES


def test_files_are_fetched_as_they_are_read(read):
    Hub.asked.clear()
    assert len(read(source="hf:someone/card", subset="zh", max_rows=2)["rows"]) == 2
    assert any("part-0" in path for path in Hub.asked)
    assert not any("part-1" in path or "en/train" in path for path in Hub.asked if "resolve" in path)


def test_what_another_tool_fetched_is_read_offline(read, hub, tmp_path):
    fetch = "import huggingface_hub; huggingface_hub.snapshot_download('someone/card', repo_type='dataset')"
    env = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", fetch], env=env, check=True, capture_output=True, timeout=60)
    told = read({"HF_HUB_OFFLINE": "1"}, source="hf:someone/card", subset="zh")
    assert told["rows"] == MESSAGES
    assert told["cached_before"]
    assert "split `train` is taken to be the 2 of its files that the cache holds" in told["notes"][0]


REFUSED: list[tuple[dict, list[str]]] = [
    ({"source": "hf:someone/none"}, ["hf:someone/none: the hub has no dataset someone/none", "hint: check the name; for a private"]),
    ({"source": "hf:no/such/name"}, ["the hub has no dataset no/such/name"]),
    ({"source": "hf:"}, ["hf:: the hub has no dataset"]),
    ({"source": "hf:someone/plain", "revision": "v9"}, ["hf:someone/plain: the dataset has no revision `v9`"]),
    ({"source": "hf:someone/plain", "split": "dev"}, ["the dataset has no split `dev`", "hint: it has train, test"]),
    ({"source": "hf:someone/plain", "split": "train[:10]"}, ["no split `train[:10]`", "max_rows takes the first rows"]),
    ({"source": "hf:someone/plain", "subset": "fr"}, ["the dataset has no subset `fr`", "one of: default"]),
    ({"source": "hf:someone/card"}, ["the dataset has several subsets, and none is the default", "one of: en, zh"]),
    ({"source": "hf:someone/card", "subset": "fr"}, ["the dataset has no subset `fr`", "one of: en, zh"]),
    ({"source": "hf:someone/script"}, ["the dataset is a script, not files", "hint: fastoss runs no code from a hub"]),
    ({"source": "hf:someone/empty"}, ["hf:someone/empty: the dataset holds no data files"]),
    ({"source": "hf:someone/unclear"}, ["the dataset's card cannot be understood"]),
    ({"source": "hf:someone/texts"}, ["train.txt cannot be read as data", "hint: fastoss reads a .jsonl"]),
    ({"source": "hf:someone/gated"}, ["hf:someone/gated: the dataset is gated", "HF_TOKEN"]),
    ({"source": "hf:someone/private"}, ["the hub does not let us read it (403)", "HF_TOKEN"]),
    ({"source": "hf:someone/busy"}, ["the hub cannot be reached (it answers 503)"]),
]


@pytest.fixture(scope="module")
def refusals(hub, tmp_path_factory):
    return read_all(hub, tmp_path_factory.mktemp("refusals"), [source for source, _ in REFUSED], {})


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[" ".join(source.values()) for source, _ in REFUSED])
def test_what_a_hub_refuses(refusals, number):
    told, (_, expected) = refusals[number], REFUSED[number]
    assert all(part in told["error"] for part in expected), told["error"]
    assert "cached" in told


def test_a_bad_row_of_a_hub_has_its_place(read):
    told = read(source="hf:someone/bad")
    assert told["places"] == ["hf:someone/bad@0123456/train.jsonl:1", "hf:someone/bad@0123456/train.jsonl:2:7"]


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": NOWHERE}, {"HF_HUB_OFFLINE": "1"}])
def test_neither_network_nor_cache(read, environment):
    for revision in (None, OLDER, "v1"):
        told = read(environment, source="hf:someone/plain", revision=revision)
        assert told["kind"] == "NotCached"
        assert "the dataset is not in the cache, and the hub cannot be reached" in told["error"]
        assert "HF_ENDPOINT names another hub" in told["error"]
        assert not told["cached"]


def test_a_folder_of_the_same_name_is_not_the_hub(read, tmp_path):
    (tmp_path / "someone" / "plain").mkdir(parents=True)
    (tmp_path / "someone" / "plain" / "train.jsonl").write_bytes(lines({"output": "local"}))
    assert read(source="hf:someone/plain")["rows"][0]["output"] == "2024-05-01"


# --- ModelScope ------------------------------------------------------------------------------------------------------


class ModelScope(StandIn):
    """The two requests of ModelScope's protocol that its package makes for a dataset: the tree, and a file."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        file = query.get("FilePath", [""])[0]
        if url.path == "/api/v1/datasets/someone/secret/repo/tree":
            return self.send(403, {"Code": 403, "Success": False, "Message": "access denied"})
        if query.get("Revision", ["master"]) == ["master"] and url.path == "/api/v1/datasets/someone/plain/repo/tree":
            entries = [
                {"Path": path, "Name": path, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
                for path, data in self.files.items()
            ]
            return self.send(200, {"Code": 200, "Success": True, "Data": {"Files": entries}})
        if url.path == "/api/v1/datasets/someone/plain/repo" and file in self.files:
            self.asked.append(file)
            return self.send(200, self.files[file])
        return self.send(404, {"Code": 10010205001, "Success": False, "Message": "not found"})


@pytest.fixture
def modelscope(read, tmp_path):
    """Read a source from a stand-in for ModelScope; `fastoss[test]` does not bring its package, `fastoss[modelscope]` does."""
    pytest.importorskip("modelscope_hub", reason="pip install 'fastoss[modelscope]': ModelScope's package is not installed")
    ModelScope.files = {"README.md": b"# x", "train.jsonl": lines({"output": "1"}, {"output": "2"}), "test.jsonl": lines({"output": "t"})}
    ModelScope.asked.clear()
    home = {"MODELSCOPE_CACHE": str(tmp_path / "ms"), "MODELSCOPE_HOME": str(tmp_path / "home"), "MODELSCOPE_API_TOKEN": "hf_secret"}
    with running(ModelScope) as endpoint:
        yield lambda environment=None, **source: read({**home, "MODELSCOPE_ENDPOINT": endpoint, **(environment or {})}, **source)


def test_a_data_set_from_modelscope_and_again_without_it(modelscope):
    told = modelscope(source="modelscope:someone/plain")
    assert told["rows"] == [{"output": "1"}, {"output": "2"}]
    assert told["places"][0] == f"modelscope:someone/plain@{told['revision'][:7]}/train.jsonl:1"
    assert told["identity"] == f"modelscope:someone/plain@{told['revision']}/default/train"
    assert (told["cached_before"], told["cached"], told["notes"], told["stderr"]) == (False, True, [], "")
    assert "test.jsonl" not in ModelScope.asked
    ModelScope.asked.clear()
    again = modelscope(source="modelscope:someone/plain")
    assert (again["rows"], ModelScope.asked) == (told["rows"], [])
    offline = modelscope({"MODELSCOPE_ENDPOINT": NOWHERE}, source="modelscope:someone/plain")
    assert (offline["rows"], offline["identity"]) == (told["rows"], told["identity"])
    assert offline["notes"] == ["modelscope:someone/plain is read from the cache: NetworkError"]
    # The branch moves on: other files, another hash.
    ModelScope.files["train.jsonl"] = lines({"output": "3"})
    moved = modelscope(source="modelscope:someone/plain")
    assert moved["rows"] == [{"output": "3"}]
    assert moved["revision"] != told["revision"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"source": "modelscope:someone/none"}, ["the hub has no dataset someone/none", "MODELSCOPE_API_TOKEN"]),
        ({"source": "modelscope:someone/plain", "revision": "v9"}, ["the hub has no revision `v9` of someone/plain"]),
        ({"source": "modelscope:someone/plain", "split": "dev"}, ["the dataset has no split `dev`", "hint: it has train, test"]),
        ({"source": "modelscope:someone/secret"}, ["the hub does not let us read it", "MODELSCOPE_API_TOKEN"]),
    ],
)
def test_what_modelscope_refuses(modelscope, source, expected):
    told = modelscope(**source)
    assert all(part in told["error"] for part in expected), told["error"]


def test_modelscope_without_network_or_cache(modelscope):
    told = modelscope({"MODELSCOPE_ENDPOINT": NOWHERE}, source="modelscope:someone/plain")
    assert (told["kind"], told["cached"]) == ("NotCached", False)
    assert "MODELSCOPE_ENDPOINT names another hub" in told["error"]


def test_modelscope_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    source = DataSource(source="modelscope:someone/plain")
    assert not is_cached(source)
    with pytest.raises(FastossError, match=r"ModelScope's package is not installed\nhint: pip install 'fastoss\[modelscope\]'"):
        next(read_rows(source))
