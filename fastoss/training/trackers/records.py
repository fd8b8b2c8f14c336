"""One record a library: SwanLab, Weights & Biases, TensorBoard, Trackio, MLflow. Handed figures by trackers.py, never asked for a decision.

A record says what it holds (`held`: the last step of each metric), takes figures (`log`) and is closed. A resumed run opens the
same record: by the run's own id where a library lets us choose, else by the library's, which the manifest keeps.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Story:
    """What a record is told of its run. `ids` are the libraries' own, by tracker; a record adds its own."""

    root: Path
    project: str
    name: str
    run_id: str
    ids: dict[str, str]
    config: dict[str, Any]


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
    """Stdout is for data and ctrl-C is ours: what a library prints is dropped, what it hears for is put back."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        signal.signal(signal.SIGINT, handler)


class TensorBoard:
    """Event files in the run directory, or in one of its own under TENSORBOARD_LOGGING_DIR."""

    def __init__(self, story: Story):
        from torch.utils.tensorboard import SummaryWriter

        base = os.environ.get("TENSORBOARD_LOGGING_DIR")
        self.folder = Path(base) / f"{story.name}-{story.run_id}" if base else story.root / "tensorboard"
        self.before = self._last_steps()
        self.writer = SummaryWriter(str(self.folder))
        if not self.before:
            self.writer.add_text("recipe", f"```json\n{json.dumps(story.config, indent=1, ensure_ascii=False)}\n```")

    def _last_steps(self) -> dict[str, int]:
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return {}
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder), size_guidance={"scalars": 1}).Reload()
        return {tag: events.Scalars(tag)[-1].step for tag in events.Tags()["scalars"]}

    def held(self) -> dict[str, int]:
        return self.before

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, finished: bool) -> None:
        self.writer.close()


class Wandb:
    """A W&B run under the run's own id; offline, each start has a folder with that id, for `wandb sync`."""

    def __init__(self, story: Story):
        import wandb

        self.folder = Path(os.environ.get("WANDB_DIR") or story.root) / "wandb"
        self.run_id = story.run_id
        self.before = self._last_steps()
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True
        )  # no terminal lines, code or host name
        self.run = wandb.init(
            id=story.run_id, resume="allow", project=story.project, name=story.name, config=story.config,
            dir=str(self.folder.parent), settings=settings,
        )  # fmt: skip
        story.ids["wandb"] = story.run_id
        for kind in ("train", "eval"):
            self.run.define_metric(f"{kind}/step")
            self.run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")

    def _last_steps(self) -> dict[str, int]:
        if not self.folder.is_dir():
            return {}
        from wandb.proto.wandb_internal_pb2 import Record

        last: dict[str, int] = {}
        for path in sorted(self.folder.glob(f"*/run-{self.run_id}.wandb")):
            for data, _ in log_records(path):
                record = Record()
                record.ParseFromString(data)
                row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
                _note_row(last, row)
        return last

    def held(self) -> dict[str, int]:
        """What the records on this disk hold, and online what the server does: its summary has the last of each figure."""
        last = dict(self.before)
        summary = {key: self.run.summary.get(key) for key in self.run.summary.keys()}  # noqa: SIM118
        _note_row(last, {key: value for key, value in summary.items() if isinstance(value, int | float)})
        return last

    def log(self, step: int, values: dict[str, float]) -> None:
        kind = next(iter(values)).partition("/")[0]
        self.run.log({**values, f"{kind}/step": step})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


def _note_row(last: dict[str, int], row: dict[str, Any]) -> None:
    for name in row:
        step = row.get(f"{name.partition('/')[0]}/step")
        if step is not None:
            last[name] = max(last.get(name, 0), int(step))


class SwanLab:
    """A SwanLab experiment under the run's own id; offline, each start has a folder with that id, for `swanlab sync`."""

    def __init__(self, story: Story):
        import swanlab

        self.swanlab = swanlab
        self.folder = story.root / "swanlab"
        self.run_id = story.run_id
        self.before = self._last_steps()
        settings = swanlab.Settings.model_validate(
            {"terminal": {"proxy_type": "none"}, "probe": {"runtime": False, "git": False, "monitor": False}, "interactive": False}
        )
        with _unnoticed():
            swanlab.init(
                id=story.run_id, resume="allow", project=story.project, name=story.name, config=story.config, log_dir=str(self.folder),
                mode=os.environ.get("SWANLAB_MODE", "online"), settings=settings,
            )  # fmt: skip
        story.ids["swanlab"] = story.run_id

    def _last_steps(self) -> dict[str, int]:
        if not self.folder.is_dir():
            return {}
        from swanlab.proto.swanlab.record.v1.record_pb2 import Record

        last: dict[str, int] = {}
        for path in sorted(self.folder.glob(f"run-*/run-{self.run_id}.swanlab")):
            whole = 7
            for data, whole in log_records(path):  # noqa: B007
                record = Record()
                record.ParseFromString(data)
                if record.HasField("scalar"):
                    last[record.scalar.key] = max(last.get(record.scalar.key, 0), record.scalar.step)
            if path.stat().st_size > whole:  # a kill tore its last record, at which SwanLab's own reader would give up
                os.truncate(path, whole)
        return last

    def held(self) -> dict[str, int]:
        return self.before

    def log(self, step: int, values: dict[str, float]) -> None:
        self.swanlab.log(values, step=step)

    def close(self, finished: bool) -> None:
        with _unnoticed():
            self.swanlab.finish(state="success" if finished else "crashed")


class Trackio:
    """A Trackio run, in its database on this machine or on a Space. It knows runs by name: a name taken by another gets our id added."""

    def __init__(self, story: Story):
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self.trackio, self.storage, self.project = trackio, SQLiteStorage, story.project
        if "trackio" not in story.ids:
            taken = {record["name"] for record in SQLiteStorage.get_run_records(story.project)}
            story.ids["trackio"] = f"{story.name}-{story.run_id}" if story.name in taken else story.name
        self.name = story.ids["trackio"]
        with _unnoticed():
            self.run = trackio.init(
                project=story.project, name=self.name, resume="allow", config=story.config, embed=False, auto_log_gpu=False, auto_log_cpu=False
            )

    def held(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for row in self.storage.get_logs(self.project, self.name):
            for key in row.keys() - {"step", "timestamp"}:
                last[key] = max(last.get(key, 0), row["step"])
        return last

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self, finished: bool) -> None:
        with _unnoticed():
            self.trackio.finish()  # not the run's own: the module would end it once more when the process does


class Mlflow:
    """An MLflow run, on MLFLOW_TRACKING_URI or else in a folder of the run directory. The server chooses its id."""

    def __init__(self, story: Story):
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self.metric = Metric
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # a folder needs no database and no minute of migrations; read when it is opened
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (story.root / "mlflow").resolve().as_uri())
        self.known = "mlflow" in story.ids
        if self.known:
            self.client.update_run(story.ids["mlflow"], status="RUNNING")
        else:
            experiment = self.client.get_experiment_by_name(story.project)
            number = experiment.experiment_id if experiment else self.client.create_experiment(story.project)
            story.ids["mlflow"] = self.client.create_run(number, run_name=story.name, tags={"fastoss.run_id": story.run_id}).info.run_id
            params = [Param(key, value) for key, value in _flat(story.config)]
            for start in range(0, len(params), 100):  # a server takes so many at once
                self.client.log_batch(story.ids["mlflow"], params=params[start : start + 100])
        self.id = story.ids["mlflow"]

    def held(self) -> dict[str, int]:
        if not self.known:
            return {}
        keys = self.client.get_run(self.id).data.metrics
        return {key: max(metric.step for metric in self.client.get_metric_history(self.id, key)) for key in keys}

    def log(self, step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[self.metric(name, value, now, step) for name, value in values.items()])

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")


RECORDS = {"swanlab": SwanLab, "wandb": Wandb, "tensorboard": TensorBoard, "trackio": Trackio, "mlflow": Mlflow}


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """`{"train": {"seed": 1}}` → `train.seed`, "1", each at most 500 characters long, as MLflow's servers want them."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, (values if isinstance(values, str) else json.dumps(values, ensure_ascii=False))[:500]


def log_records(path: Path) -> Iterator[tuple[bytes, int]]:
    """The records of a `.wandb` or `.swanlab` file and where each ends, up to where a kill tore it.

    Both are LevelDB's log format after seven bytes of their own: blocks of 32,768 bytes, in them pieces of a record, each after
    checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last). github.com/google/leveldb, doc/log_format.md.
    """
    data = path.read_bytes()
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for a head: filled with zeros
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if kind not in (1, 2, 3, 4) or at + 7 + length > len(data):
            return
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record, at
            record = b""
