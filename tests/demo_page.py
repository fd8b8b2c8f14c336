"""The demo's page in a real browser, handled as a visitor does."""

from __future__ import annotations

import time
from contextlib import contextmanager

WAIT = 120_000  # milliseconds: the tests must not hang on a quiet machine


@contextmanager
def page(browser, url: str, **options):
    """A page whose every error counts, and every request to somewhere else."""
    context = browser.new_context(**options)
    opened = context.new_page()
    opened.set_default_timeout(WAIT)
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    opened.on("request", lambda asked: None if asked.url.startswith((url, "blob:", "data:")) else faults.append(f"asked for {asked.url}"))
    opened.on("dialog", lambda dialog: (faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
    opened.goto(url)
    opened.wait_for_selector("#question textarea")
    yield opened
    context.close()
    assert faults == []


def ask(opened, text: str) -> None:
    opened.fill("#question textarea", text)
    opened.press("#question textarea", "Enter")


def choose(opened, element: str, name: str) -> None:
    opened.locator(f"#{element} label", has_text=name).filter(has=opened.locator(f'input[value="{name}"]')).click()


def language(opened, name: str) -> None:
    opened.click("#language input")
    opened.click(f'#language [role=option][aria-label="{name}"]')


def set_tokens(opened, tokens: int) -> None:
    number, slider = "#longest input[type=number]", "#longest input[type=range]"
    if not opened.locator(number).is_visible():
        opened.click("#more button")
    until = time.monotonic() + WAIT / 1000
    while opened.input_value(slider) != str(tokens):  # a page that is still being drawn may put the old value back
        assert time.monotonic() < until
        opened.fill(number, str(tokens))
        opened.press(number, "Tab")
        opened.wait_for_timeout(300)


def done(opened, number: int = 1) -> None:
    opened.wait_for_function(
        "n => document.querySelectorAll('.turn').length == n && !document.querySelector('.reply.waiting, .reply.thinking, .reply.answering')",
        arg=number,
    )
    opened.wait_for_selector("#send:visible")


def ask_and_wait(opened, text: str, *, new: bool = False) -> None:
    if new:
        opened.click("#new")
        opened.wait_for_selector("#examples:visible")
    turns = opened.locator(".turn").count()
    ask(opened, text)
    done(opened, turns + 1)
