"""What is said while something runs: redrawn in a real pseudo terminal, whole lines in a file, an object a line with --log-json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .commands import ROOT
from .conftest import _commands, fastoss

SAYING = """
import sys
from fastoss import terminal
terminal.say("reading")
for number in range(1, 4):
    terminal.live(f"step {number} of 3 " + "很长" * 60, keep=number == 3, kind="step", step=number)
terminal.say("note: done")
terminal.live("gone soon")
terminal.say("after")
counting = terminal.Counting()
for number in range(1, 101):
    counting.at(f"merged {number} of 100", last=number == 100)
"""


def in_terminal(code: str, columns: int = 60, **environment: str) -> str:
    """What Python code writes to stderr when that is a terminal."""
    master, slave = os.openpty()
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "TERM": "xterm"} | environment
    child = subprocess.Popen([sys.executable, "-c", code], stderr=slave, env=env)
    os.close(slave)
    written = read_all(master)
    assert child.wait(60) == 0
    return written


def read_all(master: int) -> str:
    found = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # Linux: the other side is closed
            piece = b""
        if not piece:
            os.close(master)
            return found.decode()
        found += piece


def screen(written: str) -> list[str]:
    """The lines that a terminal shows at the end: \\r goes to the start of the line, \\033[K clears it from there."""
    lines = [""]
    for part in written.replace("\r\n", "\n").split("\n"):
        line = ""
        for number, piece in enumerate(part.split("\r")):
            over = "" if piece.startswith("\033[K") or not number else line[len(piece) :]
            line = piece.removeprefix("\033[K") + over
        lines.append(line)
    return lines[1:]


def test_one_live_line_in_a_terminal() -> None:
    written = in_terminal(SAYING)
    shown = screen(written)
    assert shown[0] == "reading"
    assert shown[1].startswith("step 3 of 3 很长")  # the last one stays, those before it are gone
    assert shown[1].endswith("…")
    assert len(shown[1].encode("gb18030")) <= 60 - 1 + 3  # two columns a letter; the ellipsis has four bytes there
    assert shown[2:] == ["note: done", "after", "merged 100 of 100", ""]
    assert written.count("\r\033[K") >= 4


def test_whole_lines_in_a_file() -> None:
    plain = subprocess.run([sys.executable, "-c", SAYING], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}).stderr
    assert plain.splitlines() == ["reading", "step 3 of 3 " + "很长" * 60, "note: done", "after", "merged 100 of 100"]
    assert "\r" not in plain
    assert "\033" not in plain
    dumb = in_terminal(SAYING, TERM="dumb").replace("\r\n", "\n")
    assert dumb == plain


def test_an_object_a_line() -> None:
    written = in_terminal(SAYING, FASTOSS_LOG_JSON="1").replace("\r\n", "\n")
    told = [json.loads(line) for line in written.splitlines()]
    assert [line["kind"] for line in told] == ["message", "step", "note", "message", "message"]
    assert told[1]["step"] == 3
    assert told[0]["text"] == "reading"
    assert all(line["time"][:2] == "20" for line in told)


def test_something_that_counts_nothing_shows_that_it_lives() -> None:
    code = "import time\nfrom fastoss import terminal\nwith terminal.working('loading'):\n    time.sleep(1.6)\nterminal.say('loaded')"
    written = in_terminal(code)
    assert "loading … 1s" in written
    assert screen(written) == ["loaded", ""]


def test_training_in_a_terminal(folder) -> None:
    """The very command, its stderr a pseudo terminal: steps are redrawn, and log.txt has whole lines."""
    master, slave = os.openpty()
    onto = f"import os\nos.dup2(os.open({os.ttyname(slave)!r}, os.O_RDWR | os.O_NOCTTY), 2)"
    run = folder.root / "run"
    started = _commands().start(
        "train", folder.recipe, "--output", run, "--set", "log.every=2", cwd=folder.root, prelude=onto, TERM="xterm", COLUMNS="120"
    )
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_all, master)
        try:
            ended = started.wait(timeout=300)
        finally:
            os.close(slave)  # ours was open until the command had opened its own; now the reader comes to the end
        written = reading.result()
    assert ended.code == 0, written
    drawn = [piece for piece in written.split("\r\033[K") if piece.startswith("step ")]
    assert [piece.split()[1] for piece in drawn] == ["1/4", "2/4", "3/4", "4/4"]
    shown = screen(written)
    assert [line.split()[1] for line in shown if line.startswith("step ")] == ["4/4"]
    assert shown[-2].startswith("report: ")
    log = (run / "log.txt").read_text()
    assert log.endswith("\n")
    assert "\r" not in log
    assert "\033" not in log
    assert {"1/4", "2/4", "4/4"} <= {line.split()[3] for line in log.splitlines() if "  step " in line}  # a slow machine says more


def test_bad_input_as_json(tmp_path: Path) -> None:
    done = fastoss("train", "nowhere.toml", "--log-json", cwd=tmp_path)
    assert done.code == 2
    (line,) = [json.loads(line) for line in done.err.splitlines()]
    assert (line["kind"], line["place"]) == ("error", "nowhere.toml")
