"""Trackers with their real libraries, offline: a run that is killed and goes on leaves one record in each, with every figure once."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastoss.config import DataSource, EvalSettings, LogSettings, ModelConfig, Recipe
from fastoss.training.trackers.records import log_records
from fastoss.training.trackers.trackers import _public, usable_trackers

from .conftest import ROWS, TINY_RECIPE, _commands, metrics

NAMES = ("tensorboard", "wandb", "swanlab", "trackio", "mlflow")
STEPS = 6
# The figures of step 5 are handed on, then the process is gone; checkpoint-4 is what there is to go on from.
KILLED = """
import os, signal, time
from pathlib import Path
from transformers import Trainer
step = Trainer.training_step
def dies(self, *a, **k):
    if self.state.global_step == 5:
        while not Path("run/checkpoints/checkpoint-4").exists():
            time.sleep(0.01)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *a, **k)
Trainer.training_step = dies
"""


@pytest.fixture(scope="module")
def recorded(cache: Path, tmp_path_factory: pytest.TempPathFactory):
    """The run, what each library's reader finds in its record, and what was asked of the network."""
    root = tmp_path_factory.mktemp("trackers")
    (root / "data.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    (root / "recipe.toml").write_text(TINY_RECIPE, encoding="utf-8")
    asked: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            asked.append(connection.recv(200))
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
    environment = {
        "WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "TRACKIO_DIR": str(root / "trackio"),
        "HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "http_proxy": proxy, "https_proxy": proxy, "NO_PROXY": "", "no_proxy": "",
    }  # fmt: skip
    changes = (f"train.max_steps={STEPS}", "checkpoint.every=2", "eval.fraction=0.25", "eval.every=2", f"log.trackers={json.dumps(NAMES)}")
    command = ("train", "recipe.toml", "--output", "run", *(part for change in changes for part in ("--set", change)))
    try:
        killed = _commands().run(*command, cwd=root, prelude=KILLED, timeout=900, **environment)
        assert killed.code == -9, killed.err
        result = _commands().run(*command, cwd=root, timeout=900, **environment)
    finally:
        server.close()
    assert result.code == 0, result.err
    assert "resuming from checkpoint-4" in result.err
    return SimpleNamespace(root=root, run=root / "run", err=killed.err + result.err, out=result.out, asked=asked)


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.jsonl by tracker's name of each figure: (step, value), in order."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()):
        for key, value in entry.items():
            if key != "step" and isinstance(value, int | float):
                name = key.replace("eval_", "eval/", 1) if key.startswith("eval_") else f"train/{key}"
                found.setdefault(name, []).append((entry["step"], float(value)))
    return found


CLOCK = ("train/seconds", "train/tokens_per_second", "train/memory")  # step 5 took another time when it was computed again


def check(run: Path, record: dict[str, list[tuple[int, float]]], tolerance: float = 0.0) -> None:
    """Every figure of metrics.jsonl is in the record, once a step, with its value."""
    truth = expected(run)
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"} <= truth.keys()
    assert len(truth["train/loss"]) == STEPS
    for name, values in truth.items():
        assert [step for step, _ in sorted(record[name])] == [step for step, _ in values], name
        if not name.startswith(CLOCK):
            assert [value for _, value in sorted(record[name])] == pytest.approx([value for _, value in values], rel=tolerance, abs=0), name


def read_log(folder: Path, pattern: str) -> list[bytes]:
    paths = [path for path in sorted(folder.glob(pattern)) if not path.parent.is_symlink()]
    assert len(paths) == 2, "each start has a folder of its own"
    return [data for path in paths for data, _ in log_records(path)]


def test_tensorboard(recorded):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(recorded.run / "tensorboard")).Reload()
    check(recorded.run, {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, 1e-6)


def test_wandb(recorded):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[tuple[int, float]]] = {}
    runs = []
    for data in read_log(recorded.run / "wandb", "offline-run-*/run-*.wandb"):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            runs.append((record.run.run_id, record.run.project, record.run.display_name))
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if "/" in name:
                found.setdefault(name, []).append((row[f"{name.partition('/')[0]}/step"], value))
    check(recorded.run, found)
    run_id = json.loads((recorded.run / "manifest.json").read_text())["run_id"]
    assert set(runs) == {(run_id, "fastoss", "test")}, "one run, whichever start"


def test_swanlab(recorded):
    pytest.importorskip("swanlab", reason="swanlab is not installed")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found: dict[str, list[tuple[int, float]]] = {}
    ids = set()
    ours = read_log(recorded.run / "swanlab", "run-*/run-*.swanlab")
    theirs = []
    for path in sorted((recorded.run / "swanlab").glob("run-*/run-*.swanlab")):
        reader = DataStoreReader()
        reader.open(path)
        while (data := reader.scan()) is not None:
            theirs.append(data)
    assert ours == theirs, "our reader finds what the library's own does"
    for data in theirs:
        record = Record()
        record.ParseFromString(data)
        if record.HasField("scalar"):
            found.setdefault(record.scalar.key, []).append((record.scalar.step, record.scalar.value.number))
        if record.HasField("start"):
            ids.add(record.start.id)
    check(recorded.run, found)
    assert ids <= {json.loads((recorded.run / "manifest.json").read_text())["run_id"]}


def test_trackio(recorded, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(recorded.root / "trackio"))
    import trackio.utils
    from trackio import sqlite_storage

    for module in (trackio.utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", recorded.root / "trackio")  # read when it was imported
    assert [record["name"] for record in sqlite_storage.SQLiteStorage.get_run_records("fastoss")] == ["test"]
    found: dict[str, list[tuple[int, float]]] = {}
    for row in sqlite_storage.SQLiteStorage.get_logs("fastoss", "test"):
        for name in row.keys() - {"step", "timestamp"}:
            found.setdefault(name, []).append((row["step"], row[name]))
    check(recorded.run, found)


def test_mlflow(recorded, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient((recorded.run / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("fastoss").experiment_id])
    assert (run.info.run_name, run.info.status) == ("test", "FINISHED")
    assert run.info.run_id == json.loads((recorded.run / "manifest.json").read_text())["trackers"]["mlflow"]
    assert run.data.params["recipe.train.learning_rate"] == "0.005"
    history = {name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
    check(recorded.run, history)


def test_nothing_is_asked_of_the_network_and_nothing_failed(recorded):
    assert recorded.asked == []
    assert "failed (" not in recorded.err
    assert recorded.out == "", "stdout is for data"
    assert [entry["step"] for entry in metrics(recorded.run) if "loss" in entry] == list(range(1, STEPS + 1))


def test_no_folder_of_this_machine_is_told(tmp_path):
    source = DataSource(source=str(tmp_path / "rows.jsonl"), sample=str(tmp_path / "few.jsonl"))
    model = ModelConfig(name=str(tmp_path), adapter=str(tmp_path / "before"))
    told = json.dumps(_public(Recipe(name="x", data=(source,), eval=EvalSettings(data=(source,)), model=model)))
    assert str(tmp_path.parent) not in told
    assert all(f'"{name}"' in told for name in ("rows.jsonl", "few.jsonl", "before", tmp_path.name))


def test_which_trackers_can_record(monkeypatch):
    said: list[str] = []
    console = SimpleNamespace(say=said.append)
    installed = {"tensorboard", "wandb", "swanlab"}
    monkeypatch.setattr("fastoss.training.trackers.trackers.importlib.util.find_spec", lambda name: name if name in installed else None)
    everything = LogSettings(trackers=NAMES)
    assert usable_trackers(everything, console, {"SWANLAB_MODE": "offline"}) == ["tensorboard", "swanlab"]
    assert said == [
        "wandb is skipped: WANDB_API_KEY is not set (WANDB_MODE=offline records without it)",
        "trackio is skipped: it is not installed (pip install 'fastoss[trackio]')",
        "mlflow is skipped: it is not installed (pip install 'fastoss[mlflow]')",
    ]
    automatic = LogSettings(trackers="auto")
    assert usable_trackers(automatic, console, {"WANDB_API_KEY": "k", "MLFLOW_TRACKING_URI": "http://x"}) == ["wandb"]
    assert said[-2:] == ["trackers: wandb, mlflow", "mlflow is skipped: it is not installed (pip install 'fastoss[mlflow]')"]
    assert usable_trackers(automatic, console, {}) == []
    assert said[-1] == "trackers: none has its key set; metrics.jsonl has every step"
