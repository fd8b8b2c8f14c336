"""A recipe's text → the same text with one key changed, comments and layout kept."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from fastoss.errors import FastossError


def set_value(text: str, key: str, value: Any, *, place: str) -> str:
    """`text` with `section.name` set to `value`: replaced where it stands, else added to its section, else at the end.

    What comes out is read again, and says that and nothing else; where that cannot be had (a section written in one line) it is a `FastossError`.
    """
    section, name = key.split(".")
    written = json.dumps(value, ensure_ascii=False)  # a string, number or list of numbers looks alike in TOML
    wanted = tomllib.loads(text)
    wanted.setdefault(section, {})
    if isinstance(wanted[section], dict):
        wanted[section][name] = value
    for attempt in (_replaced(text, section, name, written), _added(text, section, name, written)):
        try:
            if attempt is not None and tomllib.loads(attempt) == wanted:
                return attempt
        except tomllib.TOMLDecodeError:
            continue
    raise FastossError(f"`{key}` cannot be changed in this file as it is written", place=place, hint=f"set it by hand: {key} = {written}")


def _replaced(text: str, section: str, name: str, written: str) -> str | None:
    """The line of a key with another value; its comment stays."""
    lines, here = text.splitlines(keepends=True), ""
    for number, line in enumerate(lines):
        header = re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line)
        if header:
            here = header[1].strip()
        key = name if here == section else rf"{section}\s*\.\s*{name}" if here == "" else None
        found = key and re.match(rf"""(\s*{key}\s*=\s*)((?:"[^"\n]*"|'[^'\n]*'|\[[^\]\n]*\]|[^#\n"'\[]*?))(\s*(?:#.*)?\r?\n?)$""", line)
        if found:
            lines[number] = f"{found[1]}{written}{found[3]}"
            return "".join(lines)
    return None


def _added(text: str, section: str, name: str, written: str) -> str:
    """A line of its own under the section's header, or the section at the end."""
    header = re.search(rf"^\s*\[\s*{section}\s*\].*$", text, re.MULTILINE)
    if header:
        return f"{text[: header.end()]}\n{name} = {written}{text[header.end() :]}"
    return f"{text.rstrip()}\n\n[{section}]\n{name} = {written}\n"
