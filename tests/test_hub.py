"""Models from a hub: the real loading code against a stand-in server on this machine, and against no server at all."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from .conftest import fastoss, losses
from .stand_in import StandIn, running

REPO = "someone/gpt-oss-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(StandIn):
    """As much of the hub's protocol as loading a model takes: a repository's listing, and its files with their etags."""

    files: ClassVar[dict[str, Path]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            listing = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            self.send(200, listing)
            return
        for name, file in self.files.items():
            if path in (f"/{REPO}/resolve/main/{name}", f"/{REPO}/resolve/{COMMIT}/{name}"):
                content = file.read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
                return
        code = "EntryNotFound" if f"/{REPO}/" in path else "RepoNotFound"
        self.send(404, b"", {"X-Error-Code": code})


@pytest.fixture(scope="module")
def hub():
    from fastoss.model.tiny import tiny_model_folder

    Hub.files = {path.name: path for path in tiny_model_folder().iterdir()}
    with running(Hub) as address:
        yield address


MODEL = ("--set", f"model.name={REPO}", "--set", "model.backend=transformers", "--set", "train.max_steps=2")


def test_a_model_from_a_hub_trains_and_chats(hub, folder, tmp_path):
    home = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    result = fastoss("train", folder.recipe, "--output", tmp_path / "run", *MODEL, **home)
    assert result.code == 0, result.err
    local = fastoss("train", folder.recipe, "--output", tmp_path / "local", "--set", "train.max_steps=2")
    assert local.code == 0, local.err
    assert losses(tmp_path / "run") == losses(tmp_path / "local")
    assert f"/{REPO}/resolve/main/config.json" in Hub.asked
    # From here on the cache is enough.
    answer = fastoss("chat", tmp_path / "run", "--prompt", "hi", "--max-new-tokens", 3, **home, HF_HUB_OFFLINE="1")
    assert answer.code == 0, answer.err


def test_a_model_that_the_hub_does_not_have(hub, folder, tmp_path):
    home = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf")}
    result = fastoss("train", folder.recipe, *MODEL, "--set", "model.name=someone/gpt-oss-none", cwd=tmp_path, **home)
    assert result.code == 2
    assert "error: model.name = someone/gpt-oss-none: the hub has no model someone/gpt-oss-none" in result.err


@pytest.mark.parametrize("offline", ["0", "1"])
def test_no_network(folder, tmp_path, offline):
    home = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": offline}
    result = fastoss("train", folder.recipe, *MODEL, cwd=tmp_path, **home)
    assert result.code == 2
    assert f"error: model.name = {REPO}: {REPO} is not in the hub's cache, and the hub cannot be reached" in result.err
    assert "hint: check the network" in result.err
    assert "Traceback" not in result.err


class Uploads(StandIn):
    """As much of the hub's protocol as an upload takes: who it is, a repository, and one commit with its files. The first commit fails."""

    stored: ClassVar[dict[str, bytes]] = {}
    made: ClassVar[list[dict]] = []
    refused: ClassVar[int] = 0

    def do_GET(self) -> None:
        answer = {"name": "tester", "type": "user"} if self.path.startswith("/api/whoami") else {"id": "tester/test", "sha": COMMIT, "siblings": []}
        self.send(200, answer)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == "Bearer hf_secret"
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.send(200, {"url": f"http://{self.headers['Host']}/tester/mine", "name": "tester/mine"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.send(200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path and not Uploads.refused:
            Uploads.refused = 1
            self.send(403, {"error": "this hub is read-only today"})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.stored[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.send(
                200,
                {"success": True, "commitOid": COMMIT, "commitUrl": f"http://{self.headers['Host']}/tester/mine/commit/{COMMIT}", "hookOutput": ""},
            )
        else:
            self.send(200, {"errors": [], "warnings": []})  # the card's head is checked by the hub


@pytest.fixture
def uploads():
    with running(Uploads) as address:
        yield address


def test_an_adapter_is_pushed_after_training_and_a_failed_push_costs_nothing(folder, uploads, tmp_path):
    home = {"HF_ENDPOINT": uploads, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    command = ("train", folder.recipe, "--output", "run", "--set", "hub.push=true", "--set", "hub.repo={HF_USER}/mine", "--set", "train.max_steps=2")
    result = fastoss(*command, cwd=tmp_path, **home)
    assert result.code == 0, "the run is what it was"
    assert "note: the adapter was not pushed: the push failed: " in result.err, result.err
    assert "this pushes it: fastoss push run" in result.err
    assert Uploads.stored == {}
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert adapter.is_file()
    again = fastoss("push", "run", cwd=tmp_path, **home)
    assert again.code == 0, again.err
    assert again.out.strip().endswith("/tester/mine")
    assert Uploads.made[-1] | {"name": "mine", "organization": "tester", "visibility": "private"} == Uploads.made[-1]
    assert {"adapter_model.safetensors", "adapter_config.json", "fastoss.json", "verification.json"} <= Uploads.stored.keys()
    assert b"# test (LoRA adapter)" in Uploads.stored["README.md"]
    assert b"hf_secret" not in b"".join(Uploads.stored.values())
    assert "hf_secret" not in (tmp_path / "run" / "log.txt").read_text()


def test_without_a_token_nothing_is_pushed_and_the_run_says_so(folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    from fastoss.config import load_recipe
    from fastoss.run import RunDirectory
    from fastoss.training.push import push_adapter, say_before

    said: list[str] = []
    recipe = load_recipe(folder.recipe, ["hub.push=true"])
    console = SimpleNamespace(say=said.append)
    say_before(recipe, console)
    push_adapter(recipe, RunDirectory(folder.root), console)
    assert "there is no token for the hub (HF_TOKEN)" in said[0]
    assert said[1].endswith(f"this pushes it: fastoss export {folder.root} --format adapter --push '{{HF_USER}}/test'")
