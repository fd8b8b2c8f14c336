"""A conversation → HTML that is inert: model and visitor are quoted, Markdown makes paragraphs and lists, and never a tag, link or picture of theirs.

markdown-it writes the HTML with raw HTML, links and images off, so that nothing in a text becomes an element of its own. Gradio's Markdown
component, which shows it, takes HTML blocks as they are, passes them through DOMPurify, and the page's policy forbids what is left.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastoss.demo.talk import Spoken, Talk, Turn
from fastoss.inference.sampling import ReasoningLanguage

_RECENT = 10
_NAMES = {language.value: language.english_name for language in ReasoningLanguage}


def history_html(talk: Talk, *, reasoning: bool, live: bool) -> str:
    """The turns that are over; `live`: without the last, which is drawn by itself while it comes. `reasoning` False keeps it on the server."""
    turns = talk.turns[:-1] if live else talk.turns
    return _block("".join(turn_html(turn, number, reasoning=reasoning) for number, turn in enumerate(turns)))


def live_html(talk: Talk, *, reasoning: bool) -> str:
    """The turn under way."""
    return _block(turn_html(talk.turns[-1], len(talk.turns) - 1, reasoning=reasoning)) if talk.turns else ""


def turn_html(turn: Turn, number: int, *, reasoning: bool) -> str:
    sides = "".join(
        _reply(turn, reply, f"{number}-{place}", reasoning, preferred=turn.preferred == place) for place, reply in enumerate(turn.replies)
    )  # fmt: skip
    wide = " pair" if len(turn.replies) > 1 else ""
    asked = f'<div class="asked" dir="auto">{_plain(turn.text)}</div>'
    return f'<section class="turn">{asked}<div class="replies{wide}">{sides}</div></section>'


def _reply(turn: Turn, reply: Spoken, key: str, reasoning: bool, *, preferred: bool) -> str:
    head = f'<div class="who"><span class="name {reply.label}">{reply.label}</span>{_badges(turn, reply, preferred)}</div>'
    body = _thought(reply, key, reasoning)
    if reply.state == "waiting":
        others = f" · {reply.waiting} waiting" if reply.waiting > 1 else ""
        body += f'<div class="pending">waiting for the model{others}</div>'
    if reply.content:
        body += f'<div class="answer" dir="auto">{markdown(reply.content)}</div>'
    if reply.call:
        body += f'<pre class="call"><code>{_plain(reply.call)}</code></pre>'
    if reply.ended and not reply.content and not reply.call and not reply.fault:
        body += '<div class="fault">No answer came.</div>'
    if reply.fault:
        body += f'<div class="fault">{_plain(reply.fault)}</div>'
    return f'<article class="reply {reply.state}{" preferred" if preferred else ""}">{head}{body}{_foot(reply, key)}</article>'


def _thought(reply: Spoken, key: str, reasoning: bool) -> str:
    """The reasoning: open while it comes, folded afterwards; or only how long it took."""
    if not reply.thinking and reply.state != "thinking":
        return ""
    pending = reply.state == "thinking"
    seconds = reply.seconds if reply.thinking_seconds is None else reply.thinking_seconds
    title = f"Thinking… {seconds:.0f} s" if pending else f"Thought for {seconds:.1f} s"
    css = "thought pending" if pending else "thought"
    if not reasoning:
        return f'<div class="{css} closed">{title}</div>'
    shown = f'<div class="reasoning" dir="auto">{_plain(reply.thinking)}</div>'
    return f'<details id="thought-{key}" class="{css}"{" open" if pending else ""}><summary>{title}</summary>{shown}</details>'


def _badges(turn: Turn, reply: Spoken, preferred: bool) -> str:
    badges = []
    if preferred:
        badges.append(("good", "preferred"))
    if reply.vote:
        badges.append(("good", "liked") if reply.vote == "up" else ("plain", "not liked"))
    if reply.ended and turn.language is not None and reply.thinking:
        wanted = turn.language
        if reply.reasoned_in == wanted.value:
            badges.append(("good", f"reasoned in {wanted.english_name} ✓"))
        elif reply.reasoned_in is None:
            badges.append(("plain", f"too little reasoning to tell its language (asked: {wanted.english_name})"))
        else:
            badges.append(("bad", f"reasoned in {_NAMES[reply.reasoned_in]}, not {wanted.english_name} ✗"))
    elif reply.ended and reply.reasoned_in:
        badges.append(("plain", f"reasoned in {_NAMES[reply.reasoned_in]}"))
    if reply.ended and reply.problems:
        badges.append(("bad", f"malformed: {reply.problems[0]}"))
    if reply.state == "stopped":
        badges.append(("plain", "stopped"))
    return "".join(f'<span class="badge {kind}">{_plain(text)}</span>' for kind, text in badges)


def _foot(reply: Spoken, key: str) -> str:
    if not reply.ended or not reply.tokens:
        return ""
    facts = [f"{reply.tokens:,} tokens in {reply.seconds:.1f} s"]
    if reply.tokens_a_second:
        facts.append(f"{reply.tokens_a_second:.0f} tokens/s")
    if reply.first_token_seconds is not None:
        facts.append(f"first after {reply.first_token_seconds:.2f} s")
    copy = f'<button type="button" class="copy" title="Copy the answer">Copy</button><span class="raw">{_plain(reply.content)}</span>'
    return f'<div class="foot"><span>{" · ".join(facts)}</span>{copy if reply.content else ""}</div>'


def preferences_html(rows: Sequence[dict[str, Any]], liked: int, path: Path, recipe: Path | None) -> str:
    """What visitors preferred so far, and how it is trained on."""
    pairs_in, liked_in = _count(len(rows), "preference"), _count(liked, "liked answer")
    count = f"<p>{pairs_in} in <code>{_plain(str(path))}</code>, {liked_in} beside it.</p>"
    if not rows:
        how = "<p class='muted'>Ask with two answers (“base | tuned” or “tuned | tuned”) and say which you prefer.</p>"
        return _block(f'<div class="votes">{count}{how}</div>')
    told = f"<p>Train on them: <code>fastoss train {_plain(str(recipe))}</code></p>" if recipe is not None else ""
    pairs = "".join(
        f'<div class="vote"><div class="asked" dir="auto">{_plain(row["prompt"][-1]["content"])}</div><div class="replies pair">'
        f'<article class="reply preferred" dir="auto">{_plain(row["chosen"][0]["content"])}</article>'
        f'<article class="reply" dir="auto">{_plain(row["rejected"][0]["content"])}</article></div></div>'
        for row in reversed(rows[-_RECENT:])
    )
    return _block(f'<div class="votes">{count}{told}<h2>The latest: preferred left, the other right</h2>{pairs}</div>')


def _count(number: int, name: str) -> str:
    return f"<b>{number:,}</b> {name}{'' if number == 1 else 's'}"


def markdown(text: str) -> str:
    """Paragraphs, lists, tables, emphasis and code of a text as HTML; tags, links and images in it stay text."""
    return str(_markdown().render(text)).replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")


@functools.cache
def _markdown() -> Any:
    from markdown_it import MarkdownIt

    made = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    return made.disable(["link", "image", "autolink", "reference", "html_inline", "html_block"])


def _plain(text: str) -> str:
    return html.escape(text)


def _block(inner: str) -> str:
    """One HTML block, as Markdown understands it: a line break would end it where the next line is empty, so none is left outside of entities."""
    return f'<div class="talk">{inner}</div>'.replace("\r", "").replace("\n", "&#10;") if inner else ""
