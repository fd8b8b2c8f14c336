"""Models from a hub: the real loading code against a stand-in server on this machine, and against no server at all."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from .conftest import fastoss, losses

REPO = "someone/gpt-oss-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as loading a model takes: a repository's listing, and its files with their etags."""

    files: ClassVar[dict[str, Path]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            listing = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, body)
            return
        for name, file in self.files.items():
            if path in (f"/{REPO}/resolve/main/{name}", f"/{REPO}/resolve/{COMMIT}/{name}"):
                content = file.read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
                return
        code = "EntryNotFound" if f"/{REPO}/" in path else "RepoNotFound"
        self._send(404, b"", {"X-Error-Code": code}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub():
    from fastoss.model.tiny import tiny_model_folder

    Hub.files = {path.name: path for path in tiny_model_folder().iterdir()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


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
