"""A small form of the CPU benchmark against the committed record: half of the ratio is a fault.

Ratios are of processor time, and the best pair counts: the machine may be busy.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .conftest import ROOT

sys.path.insert(0, str(ROOT))
RECORD = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())["results"]


def test_tokenising_is_as_much_faster_as_it_was(one_thread):
    from benchmarks.cpu import tokenising

    result = tokenising(count=150, repeats=3)
    assert result["times_faster"]["max"] > RECORD["tokenising"]["times_faster"]["median"] / 2
    assert result["whole_way"]["times_faster"]["max"] > RECORD["tokenising"]["whole_way"]["times_faster"]["median"] / 2


def test_head_is_as_much_faster_as_it_was():
    """In a process of its own: where something was trained before, TRL's function has been replaced by ours."""
    code = "import json, torch; torch.set_num_threads(1); from benchmarks.cpu import head; print(json.dumps(head(repeats=3)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["times_faster"]["max"] > RECORD["head"]["times_faster"]["median"] / 2


@pytest.mark.parametrize(("name", "key", "limit"), [("million_rows", "peak_memory_gb", 1.5), ("packing", "seconds", 10), ("packing", "fill", None)])
def test_the_record_meets_its_targets(name, key, limit):
    assert RECORD[name][key] <= limit if limit else RECORD[name][key] >= 0.98
    assert RECORD["tokenising"]["times_faster"]["median"] >= 5
