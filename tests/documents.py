"""What the documents tell their readers to type and to write."""

from __future__ import annotations

import re

from .commands import ROOT


def commands_of(name: str) -> list[str]:
    """Lines of the document's `sh` blocks."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = [re.sub(r"\\\n\s*", "", block) for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
    return [line.split("   #")[0].strip() for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


def files_of(name: str) -> dict[str, str]:
    """Files that a document tells its reader to write: blocks whose first line names one (```toml shop.toml)."""
    return dict(re.findall(r"^```\w+ (\S+\.\w+)\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
