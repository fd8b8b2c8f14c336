"""Markup that cannot be forgotten to be escaped: a `str` is a text, `Html` alone is markup, and `tag` is where one becomes the other."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable
from importlib import resources

# A page's text may hold anything a model or a row says: control characters are drawn as their pictures, half characters as U+FFFD.
_CONTROL = {number: 0x2400 + number for number in range(32) if chr(number) not in "\t\n"} | {0x7F: 0x2421}
_CONTROL |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF), 0xFFFD)
_EMPTY = ("rect", "line", "path")  # of SVG: elements without children


class Html(str):
    """Markup; any other `str` is text, and is escaped where it enters."""


Part = str | Html | None | Iterable["Part"]


def text(value: str) -> Html:
    return Html(html.escape(value.translate(_CONTROL)))


def join(*parts: Part) -> Html:
    """Parts one after another; `None` is nothing."""
    found: list[str] = []
    for part in parts:
        if part is None:
            continue
        if isinstance(part, Html):
            found.append(part)
        elif isinstance(part, str):
            found.append(text(part))
        else:
            found.append(join(*part))
    return Html("".join(found))


def tag(name: str, *children: Part, **attributes: str | float | bool | None) -> Html:
    """An element. `class_` is the attribute `class`, `stroke_width` is `stroke-width`; True stands alone, None and False are left out."""
    told = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
        if value is True:
            told.append(f" {key}")
        elif value is not None and value is not False:
            shown = f"{value:.6g}" if isinstance(value, float) else text(str(value))
            told.append(f' {key}="{shown}"')
    opening = f"<{name}{''.join(told)}"
    return Html(f"{opening}/>" if name in _EMPTY and not children else f"{opening}>{join(*children)}</{name}>")


def page(title: str, body: Html) -> str:
    """The whole file: it loads nothing, runs nothing, and its style is the one it carries, by hash."""
    template = resources.files("fastoss.assets").joinpath("report.html").read_text(encoding="utf-8")
    style = template[template.index("<style>") + len("<style>") : template.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    values = {"TITLE": text(title), "POLICY": policy, "BODY": body}
    return re.sub("@@([A-Z]+)@@", lambda mark: values[mark[1]], template)
