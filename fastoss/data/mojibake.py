"""Mojibake: UTF-8 that was read as Latin-1 or Windows-1252 on its way to us (`ä½\\xa0å¥½` for 你好). Found and repaired, never guessed.

ftfy decides and repairs, line by line. Of 249,299 translated messages of Debian's programs, in 160 languages, 62 are
flagged, and all of them are damaged indeed; of 37,662 damaged on purpose it repairs 99.5 % (read as Latin-1) and 98.1 %
(read as Windows-1252) to the letter (ftfy 6.3.1, 2026-11-21).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from fastoss.data.conversation import Conversation
from fastoss.data.formats.text import check_text
from fastoss.data.reading.rows import BadRow

# What the continuation bytes 80 to BF of UTF-8 look like when they are read as Latin-1 or Windows-1252.
_NEXT = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
# One class first: alternatives at the beginning would make the search six times slower.
_SUSPECT = re.compile(f"[\xc2-\xf4][{_NEXT}](?:(?<=[\xc2-\xdf].)|[{_NEXT}])")
# Not suspect: areas in Ångström (120 Å²), and capitals with a tilde before punctuation (“AMANHÔ).
_ORDINARY = re.compile(r"Å[²³]|(?<=[A-ZÀ-Þ])Ã[”’»®™…](?!\w)")
_CODES = {letter: 0x80 + code for code, letter in enumerate(bytes(range(0x80, 0xA0)).decode("cp1252", "replace")) if letter != "\ufffd"}
# Three bytes of a Chinese, Japanese or Korean character, one of them A0: a no-break space, which became a plain one.
_EAST_ASIAN = re.compile(f"[\xe3-\xef](?:[{_NEXT}][{_NEXT}]|[{_NEXT}] | [{_NEXT}])")
_USUAL = re.compile("[\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffef]")
_EXCERPT = 40


def repaired_text(text: str) -> str | None:
    """The text as it was meant, or None where nothing is wrong with it."""
    if text.isascii() or not _SUSPECT.search(text):
        return None
    if _ORDINARY.search(text) and not _SUSPECT.search(_ORDINARY.sub(" ", text)):
        return None
    mended = "\n".join(map(_repaired_line, text.split("\n")))
    try:
        check_text(mended, "")
    except BadRow:  # a repair that makes a NUL or half a character is none
        return None
    return None if mended == text else mended


def repaired(conversation: Conversation) -> Conversation | None:
    """The conversation with its texts repaired, or None where nothing is wrong with them."""
    if first_mojibake(conversation) is None:
        return None

    def mended(text: str) -> str:
        return repaired_text(text) or text

    messages = []
    for m in conversation.messages:
        call = m.tool_call and replace(m.tool_call, arguments=mended(m.tool_call.arguments))
        messages.append(replace(m, content=mended(m.content), thinking=m.thinking and mended(m.thinking), tool_call=call))
    tools = tuple(replace(tool, description=mended(tool.description)) for tool in conversation.tools)
    return replace(conversation, messages=tuple(messages), tools=tools)


def first_mojibake(conversation: Conversation) -> tuple[str, str] | None:
    """Where a conversation is damaged first: an excerpt as it stands there, and as it was meant."""
    for text in _texts(conversation):
        mended = repaired_text(text)
        if mended is not None:
            pairs = enumerate(zip(text, mended, strict=False))
            start = max(next((index for index, (a, b) in pairs if a != b), 0) - _EXCERPT // 4, 0)
            return _printable(text[start:]), _printable(mended[start:])
    return None


def _texts(conversation: Conversation) -> Iterator[str]:
    for message in conversation.messages:
        yield message.content
        if message.thinking:
            yield message.thinking
        if message.tool_call:
            yield message.tool_call.arguments
    for tool in conversation.tools:
        yield tool.description


def _repaired_line(line: str) -> str:
    if line.isascii():
        return line
    from ftfy import TextFixerConfig, fix_encoding, is_bad  # 30 ms that only damaged files pay

    if not is_bad(line):
        return line
    # Lone C1 characters and sequences that lost a byte are not ours to guess.
    return fix_encoding(_with_lost_spaces(line), TextFixerConfig(replace_lossy_sequences=False, fix_c1_controls=False, explain=False))


def _with_lost_spaces(line: str) -> str:
    """Chinese, Japanese or Korean repaired whose no-break spaces (the A0 of 你, E4 BD A0) may have become plain ones.

    ftfy does not look for those. Done where nothing else stands in the line, or two whole characters show what it is.
    """
    parts = _EAST_ASIAN.findall(line)
    found = [part for part in parts if _decoded(part)]
    if len(found) < 2 or (sum(" " not in part for part in found) < 2 and not _EAST_ASIAN.sub("", line).isascii()):
        return line
    return _EAST_ASIAN.sub(lambda part: _decoded(part[0]) or part[0], line)


def _decoded(letters: str) -> str | None:
    """The character whose UTF-8 bytes were read as these letters."""
    codes = [_CODES.get(letter, ord(letter)) for letter in letters.replace(" ", "\xa0")]
    try:
        letter = bytes(codes).decode("utf-8")
    except UnicodeDecodeError:
        return None
    return letter if _USUAL.fullmatch(letter) else None


def _printable(text: str) -> str:
    shown = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text[:_EXCERPT])
    return shown[:_EXCERPT]
