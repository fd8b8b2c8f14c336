"""A journey's own folder, and a browser that all of them share."""

from __future__ import annotations

import pytest

from ..browser import open_browser
from .steps import Journey


@pytest.fixture
def journey(tmp_path) -> Journey:
    return Journey(tmp_path)


@pytest.fixture(scope="session")
def browser():
    with open_browser() as opened:
        yield opened
