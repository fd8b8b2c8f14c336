"""`fastoss show --html`: what will be trained as one HTML page. The data path hands it numbers and texts; a browser needs nothing else.

The data lies in the page as JSON and reaches the screen through text nodes only. The page's policy allows the one script
that it carries, by hash, and no load from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

# `<`, `>` and `&` could end the script element or begin a comment in it; a lone surrogate (half a character) has no UTF-8 form.
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"


def page_html(data: Mapping[str, Any]) -> str:
    """The page for `data`, to be written as UTF-8.

    title, recipe, version: str · max_length: int (tokens) · train_on: {channel: loss weight} · summary: lines of text
    totals: {rows, train_examples, eval_examples, tokens, trained_tokens}
    channels: [{name, tokens, trained}] in the order in which they are to be drawn
    histogram: {edges: n + 1 ints, kept: n, dropped: n}; bin i holds the examples with edges[i] < tokens <= edges[i + 1]
    examples: [{place, split: "train" | "eval", tokens, trained, spans: [{name, trained, weight, tokens, text}]}]
    shown_of: how many examples there are in all
    dropped: [{place, unit, reason, excerpt}] · dropped_total: how many were dropped in all
    """
    template = resources.files("fastoss.assets").joinpath("show.html").read_text(encoding="utf-8")
    script = template[template.rindex("<script>") + len("<script>") : template.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {
        "TITLE": html.escape(f"{data['title']} · fastoss show").encode("utf-8", "replace").decode(),
        "POLICY": f"{_POLICY}; script-src 'sha256-{digest}'",
        "DATA": _json(_packed(data)),
    }
    return re.sub("@@([A-Z]+)@@", lambda mark: values[mark[1]], template)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _packed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Each text once (the system message stands in every example), and a span as five numbers.

    examples: [[place, split, tokens, trained, [name, trained, weight, tokens, text, name, …]]], where name and text are
    places in `names` and `texts`. On chats of 200 tokens this halves the page.
    """
    names: dict[str, int] = {channel["name"]: number for number, channel in enumerate(data["channels"])}
    texts: dict[str, int] = {}
    examples = []
    for example in data["examples"]:
        spans: list[float] = []
        for span in example["spans"]:
            name = names.setdefault(span["name"], len(names))
            text = texts.setdefault(span["text"], len(texts))
            spans += (name, int(span["trained"]), span["weight"], span["tokens"], text)
        examples.append([example["place"], example["split"], example["tokens"], example["trained"], spans])
    return {**data, "examples": examples, "names": list(names), "texts": list(texts)}
