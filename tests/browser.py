"""A real browser for the tests of HTML pages: finds a Chromium, and drives it with playwright.

Looked for in this order: $FASTOSS_CHROMIUM, Chromium or Chrome on PATH, what fetch_chromium.py put into .venv. With
FASTOSS_BROWSER=required a missing browser fails the tests; otherwise it skips them, with the reason.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FETCHED = Path(__file__).parent.parent / ".venv" / "chromium"
# Root cannot use Chromium's sandbox; the pages under test are our own. The rest keeps it from talking to anyone.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--font-render-hinting=none",
]


def find_chromium() -> Path | None:
    if os.environ.get("FASTOSS_CHROMIUM"):
        return Path(os.environ["FASTOSS_CHROMIUM"])
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        found = shutil.which(name)
        if found:
            return Path(found)
    fetched = FETCHED / "chromium"
    return fetched if fetched.exists() else None


def chromium_environment(path: Path) -> dict[str, str]:
    """The fetched Chromium brings libraries that a bare machine lacks, and fonts for Chinese and emoji."""
    if path.parent != FETCHED:
        return dict(os.environ)
    libraries = os.pathsep.join(filter(None, [str(FETCHED / "lib"), os.environ.get("LD_LIBRARY_PATH")]))
    return {**os.environ, "LD_LIBRARY_PATH": libraries, "FONTCONFIG_FILE": str(FETCHED / "fonts.conf")}


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless browser with a fresh profile; skips the test where there is none."""
    missing = pytest.fail if os.environ.get("FASTOSS_BROWSER") == "required" else pytest.skip
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("no playwright: pip install -e '.[test]'")
    path = find_chromium()
    if path is None:
        missing("no Chromium: set FASTOSS_CHROMIUM, install one, or run `python -m tests.fetch_chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS, env=chromium_environment(path))
        try:
            yield browser
        finally:
            browser.close()
