"""The watchdog's verdicts, from the lines that processes write; a frozen process under a real torchrun is in test_ranks.py."""

from __future__ import annotations

import json

import pytest

from fastoss.run import RunDirectory
from fastoss.training import watchdog
from fastoss.training.watchdog import Watchdog


@pytest.fixture
def dog(tmp_path, monkeypatch) -> Watchdog:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    made = Watchdog(RunDirectory(tmp_path), 10, print)
    made.folder.mkdir()
    return made


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(watchdog.time, "monotonic", lambda: Clock.now)
    return Clock


def line(dog: Watchdog, rank: int, beat: int, stage: int, text: str = "", strict: bool = True, session: str = "this") -> None:
    content = {"session": session, "beat": beat, "stage": stage, "text": text or f"in stage {stage}", "strict": strict}
    (dog.folder / f"rank-{rank}.json").write_text(json.dumps(content))


def test_all_move(dog, clock):
    for second in range(60):
        clock.now += 1
        for rank in range(3):
            line(dog, rank, second, second // 5)
        assert dog._verdict() is None


def test_a_process_that_gives_no_sign(dog, clock):
    for second in range(12):
        clock.now += 1
        for rank in range(3):
            line(dog, rank, 0 if rank == 2 else second, 3, strict=False)
        verdict = dog._verdict()
        assert (verdict is None) == (second < 11), (second, verdict)
    assert verdict == "process 2 is frozen or gone: no sign of life for 11s, last seen in stage 3"


def test_a_process_that_keeps_the_others_waiting(dog, clock):
    verdict = None
    for second in range(12):
        clock.now += 1
        for rank in range(3):
            line(dog, rank, second, 4 if rank == 1 else 5)
        verdict = dog._verdict()
    assert verdict == "process 1 has been in stage 4 for 11s; process 0 waits in stage 5; process 2 waits in stage 5"


def test_loading_may_take_its_time(dog, clock):
    for second in range(100):
        clock.now += 1
        for rank in range(3):
            line(dog, rank, second, 1, strict=rank != 1)
        assert dog._verdict() is None


def test_an_earlier_starts_lines_and_torn_ones_mean_nothing(dog, clock):
    line(dog, 1, 5, 5, session="earlier")
    (dog.folder / "rank-2.json").write_text('{"session": "th')
    for second in range(30):
        clock.now += 1
        line(dog, 0, second, second)
        assert dog._verdict() is None


def test_one_process_needs_none(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    made = Watchdog(RunDirectory(tmp_path / "run"), 10, print)
    made.start()
    assert not (tmp_path / "run").exists()
