"""A journey's own folder, and a browser."""

from __future__ import annotations

import pytest

from ..browser import open_browser
from .steps import Journey


@pytest.fixture
def journey(tmp_path) -> Journey:
    return Journey(tmp_path)


@pytest.fixture(scope="module")  # playwright takes one at a time in a process: closed before another module opens its own
def browser():
    with open_browser() as opened:
        yield opened
