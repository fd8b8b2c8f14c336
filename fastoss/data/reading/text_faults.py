"""What a file is when it is not what its name says: another encoding, another format, a page in place of data.

The readers ask here when the first bytes look wrong or when text is not UTF-8. Nothing is read on a guess: the guess
becomes the fact and the hint of an error.
"""

from __future__ import annotations

import codecs

from fastoss.errors import FastossError

_SAMPLE = 1 << 16
_FORMATS = (
    (b"\x1f\x8b", "compressed with gzip", "give it its extension: name it {name}.gz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "give it its extension: name it {name}.zst"),
    (b"BZh", "compressed with bzip2", "decompress it: bzip2 -d (gzip and zstd are read as they are)"),
    (b"\xfd7zXZ\0", "compressed with xz", "decompress it: xz -d (gzip and zstd are read as they are)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "extract it"),
    (b"%PDF", "a PDF", "rows are read from JSONL, JSON, CSV or Parquet"),
    (b"PAR1", "Parquet", "name it .parquet"),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file", "save it as CSV (UTF-8)"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV or JSONL"),
    (b"\x89HDF", "an HDF5 file", "write it as Parquet or JSONL"),
    (b"\x93NUMPY", "a NumPy array", "write it as Parquet or JSONL"),
    (b"version https://git-lfs", "a git-lfs pointer, not the data itself", "fetch the data: git lfs pull"),
)  # fmt: skip
_NOT_IN_TEXT = bytes(code for code in range(1, 32) if code not in b"\t\n\v\f\r\x1b")  # zeros aside: they are told in other ways
_UNICODE = (  # the longer marks first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip


def refuse_disguise(head: bytes, place: str, *, but: bytes | None = None) -> None:
    """Raise when a file's first bytes show that it is something else than its name says. `but`: the mark that is right here."""
    if but and head.startswith(but):
        return
    name = place.rpartition("/")[2].removesuffix(".gz").removesuffix(".zst")
    for mark, fact, hint in _FORMATS:
        if head.startswith(mark):
            raise FastossError(f"the file is {fact}", place=place, hint=hint.format(name=name))
    if head.startswith(b"PK\x03\x04"):
        office = b"[Content_Types].xml" in head
        fact, hint = ("an Excel or Word file", "save it as CSV (UTF-8)") if office else ("a ZIP archive", "extract it, and give the files in it")
        raise FastossError(f"the file is {fact}", place=place, hint=hint)
    if head[257:262] == b"ustar":
        raise FastossError("the file is a tar archive", place=place, hint="extract it, and give the files in it")
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise FastossError("the file is a Python pickle", place=place, hint="write it as JSONL: a pickle runs code when it is read")
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:20].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        kind = "XML" if start.startswith(b"<?xml") else "an HTML page"
        raise FastossError(f"the file is {kind}, not data", place=place, hint="a download may have saved a login or error page: look into it")
    encoding = _wide_encoding(head)
    if encoding:
        raise _foreign(encoding, place)
    if but is None and len(head) - len(head.translate(None, _NOT_IN_TEXT)) > max(3, len(head) // 50):
        raise FastossError("the file is binary, not text", place=place, hint="rows are read from JSONL, JSON, CSV or Parquet")


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by its mark or, without one, by the zeros that its ASCII letters leave."""
    for mark, encoding in _UNICODE:
        if head.startswith(mark):
            return encoding
    head = head[:200]
    zeros = head.count(0)
    if len(head) < 4 or not 0.3 * len(head) <= zeros < len(head) * 0.8 or head[:4] == bytes(4):
        return None
    encoding = ("UTF-32" if zeros > 0.6 * len(head) else "UTF-16") + ("BE" if head[0] == 0 else "LE")
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)  # it may end in the middle of a character
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else encoding  # zeros side by side: other data, or a file that a crash tore


def _foreign(encoding: str, place: str) -> FastossError:
    name = place.rpartition("/")[2].rpartition(":")[0] or place.rpartition("/")[2]
    stem, dot, ending = name.partition(".")
    hint = f"convert it: iconv -f {encoding} -t UTF-8 {name} > {stem}.utf8{dot}{ending}"
    return FastossError(f"the file is {encoding}, not UTF-8", place=place, hint=hint)


def not_utf8(problem: UnicodeDecodeError, bad: bytes, sample: bytes, place: str) -> tuple[FastossError, bool]:
    """What to say of text that is not UTF-8, and whether that is true of the whole file.

    `bad` is the text that cannot be decoded, `sample` the beginning of the file. A file of which (nearly) every line
    beyond ASCII is not UTF-8 is in another encoding as a whole; otherwise some lines were damaged or added by another tool.
    """
    if problem.reason == "unexpected end of data" and not bad.endswith(b"\n"):
        fact = f"not UTF-8 text (byte {problem.start + 1}): it ends in the middle of a character"
        return FastossError(fact, place=place, hint="the file may be cut short: fetch or write it again"), False
    lines = [line for line in sample[: sample.rfind(b"\n") + 1].split(b"\n") if not line.isascii()]
    good = sum(map(_is_utf8, lines))
    text = b"\n".join([*lines, bad])
    encoding = guess_encoding(text)
    if encoding and good * 10 <= len(lines) - good + 1:
        return _foreign(encoding, place), True
    guess = guess_encoding(bad)
    also = f"; it reads as {guess}" if guess else ""
    return FastossError(f"not UTF-8 text (byte {problem.start + 1}){also}", place=place, hint="save the file as UTF-8"), False


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


# The most frequent characters of each language: text decoded in the wrong way hits them rarely.
_CHINESE = set(
    "的一是不了在人有我他中大上到和你地出道也年得就那要下以生自之去家可心多天而能好都然日起成事只作想看文手十用主行方又如前所本公同三已老知"
)
_CHINESE |= set("，。！？、：；（）《》“”")
_SIMPLIFIED = _CHINESE | set("从里这来个国说们为子时着过学对她后小么没于还发当无开见经头面两长动吗请给谁问题谢现实语")
_TRADITIONAL = _CHINESE | set("從裡這來個國說們為子時著過學對她後小麼沒於還發當無開見經頭面兩長動嗎請給誰問題謝現實語「」")
_KANA = {chr(code) for code in range(0x3041, 0x30FF)} | set("、。「」ー")
_HANGUL = set("이다는을를에의가은하고지로도한기사서어대자시리인나라그해아니스게여전것들보구있없만수정주일과부안녕세요")
_LATIN = set("éèêëàâáäãåæçùûúüîïíìôöóòõøœñßÉÈÀÇÄÖÜÅØ€°«»¿¡–—‘’“”…£§®©·")
_CYRILLIC = {chr(code) for code in range(0x430, 0x450)}
_ENCODINGS = (
    ("GB18030", _SIMPLIFIED, 0.2), ("BIG5", _TRADITIONAL, 0.2), ("SHIFT_JIS", _KANA, 0.4), ("EUC-JP", _KANA, 0.4),
    ("EUC-KR", _HANGUL, 0.3), ("WINDOWS-1251", _CYRILLIC, 0.7), ("WINDOWS-1252", _LATIN, 0.8),
)  # fmt: skip


def guess_encoding(text: bytes) -> str | None:
    """The encoding in which bytes that are not UTF-8 read as a language, by iconv's name; None when none does clearly."""
    text = text[:_SAMPLE]  # it may end in the middle of a character
    best: tuple[float, str] | None = None
    for encoding, common, least in _ENCODINGS:
        try:
            letters = [letter for letter in codecs.getincrementaldecoder(encoding)().decode(text) if ord(letter) > 127]
        except UnicodeDecodeError:
            continue
        share = sum(letter in common for letter in letters) / max(len(letters), 1)
        # Latin letters beyond ASCII stand alone; the bytes of other scripts stand side by side.
        if encoding.startswith("WINDOWS") and (_paired(text) > 0.5) != (encoding == "WINDOWS-1251"):
            continue
        if share >= least and (best is None or share > best[0]):
            best = share, encoding
    return best[1] if best else None


def _paired(text: bytes) -> float:
    """The share of bytes beyond ASCII that have such a byte beside them."""
    high = [byte > 127 for byte in text]
    beside = sum(here and (before or after) for before, here, after in zip([False, *high], high, [*high[1:], False], strict=False))
    return beside / max(sum(high), 1)
