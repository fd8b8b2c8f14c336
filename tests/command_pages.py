"""docs/commands.md: the help of every command, word for word. `python -m tests.command_pages` writes it anew; test_cli.py compares."""

from __future__ import annotations

import re

from .commands import ROOT
from .conftest import fastoss

DOCUMENT = ROOT / "docs" / "commands.md"
_GROUPS = ("adapter",)  # commands with commands of their own


def pages() -> dict[str, str]:
    """Help by command, as a terminal of 100 columns shows it."""

    def page(*words: str) -> str:
        return fastoss(*words, "--help", COLUMNS="100", TERMINAL_WIDTH="100").out.strip()

    def below(text: str) -> list[str]:
        return re.findall(r"^  (\w+)  ", text.partition("Commands:")[2], re.MULTILINE)

    found = {"": page()}
    for command in below(found[""]):
        found[command] = page(command)
        for part in below(found[command]) if command in _GROUPS else []:
            found[f"{command} {part}"] = page(command, part)
    return found


def main() -> None:
    head = DOCUMENT.read_text(encoding="utf-8").partition("## fastoss\n")[0]
    parts = [f"## {f'fastoss {command}'.strip()}\n\n```text\n{text}\n```\n" for command, text in pages().items()]
    DOCUMENT.write_text(head + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
