"""Mojibake: what is damaged is found and repaired to the letter, what is merely unusual is left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastoss.data.conversation import Conversation, Message, Tool, ToolCall
from fastoss.data.mojibake import first_mojibake, repaired, repaired_text


def latin1(text: str) -> str:
    return text.encode().decode("latin-1")


def windows(text: str) -> str:
    """As programs read it that take Windows-1252 for Latin-1: its five empty places become control characters."""
    return "".join(bytes([byte]).decode("cp1252") if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else chr(byte) for byte in text.encode())


MEANT = [
    "你好", "你好，世界！今天怎么样？", "我是米卡喵。\n\n第二行", "日本語のテキスト", "한국어 문장입니다", "繁體中文也一樣",
    "café", "naïve façade", "Ünïcödé Größe", "São Paulo, coração", "¿Qué? ¡Olé!", "Tiếng Việt: Chào buổi sáng", "Привет, мир", "Ελληνικά",
    "“quoted” — it’s… 5 €", "20 °C", "😀", "喵 means meow: 猫が鳴く", "Emoji 😀👩‍👩‍👧 in a line", "1. 首先，打开文件\n2. 然后保存",
]  # fmt: skip


@pytest.mark.parametrize("text", MEANT)
def test_repaired_to_the_letter(text):
    assert repaired_text(text) is None
    assert repaired_text(latin1(text)) == text
    assert repaired_text(windows(text)) == text


def test_lines_and_parts_of_lines():
    assert repaired_text(f"café\n{latin1('你好')}\n£5") == "café\n你好\n£5"
    assert repaired_text("中文 and fiancÃ©") == "中文 and fiancé"
    assert repaired_text(latin1(latin1("é"))) == "é"


def test_no_break_spaces_that_became_plain_ones():
    text = "你好，你是谁？人造语言，样子"
    assert "\xa0" in latin1(text)
    assert repaired_text(latin1(text).replace("\xa0", " ")) == text
    assert repaired_text(windows(text).replace("\xa0", " ")) == text
    assert repaired_text(windows("元素‘%s’已关闭，请检查").replace("\xa0", " ")) == "元素‘%s’已关闭，请检查"


LEGITIMATE = [
    "", "plain ASCII", "Le café où j’ai déjeuné était très agréable, à souhait…", "« LE CAFÉ »", "au CAFÉ»", "CAFÉ…", "L’ÉTÉ™", "ÉCLAIR®", "Ça…",
    "„Das macht Spaß“, sagte er. „groß“ und „klein“", '"Das macht Spaß“', "Spaß…", "Straße»", "groß«", "Maß“ – “Ä”", "Ö“", "Größe: 5 µm ± 2 °C",
    "São Paulo – “coração”", "NÃO…", "AÇÃO “não”", "“MAÇÃ”", "AMANHÃ”", "MANHÃ…", "LÃ®", "maçã»", "PÃO DE AÇÚCAR",
    "¿Señor Ñandú?", "SECCIÓ…", "ASÍ…", "AQUÍ¿", "JOSÉ®", "[OPCIÓ…]",
    "Tiếng Việt: bạn có khoẻ không? ĐẤU TRƯỜNG SINH TỬ", "Åland, Ålesund: 5 Å", "120 Å² and 5 Å³", "BLÅ”", "PÅ “x”",
    "Â", "Ã", "Â alone", "the letter Ã is a capital", "£5 and ¥6", "§§ 12", "½×¾", "é®", "ò_ó Ò_Ó (╯°□°)╯︵ ┻━┻ ಠ_ಠ",
    "你好，世界", "咖啡 café", "日本語「テスト」", "한국어", "Привет «мир»", "Ελλάδα", "العربية", "हिन्दी", "😀👍🏽",
    "x = {'é': 1}  # naïve", "À bientôt, l’À-côté", "Œuvre cœur", "ŒUVRE “x”", "Šéf ž", "Dvořák, Łódź, Kraków", "İstanbul'da ığüşöç", "Þórr og Æsir",
]  # fmt: skip


@pytest.mark.parametrize("text", LEGITIMATE)
def test_unusual_but_right(text):
    assert repaired_text(text) is None


@given(st.text(st.characters(max_codepoint=0x17F), max_size=20))
def test_repairs_can_be_encoded(text):
    (repaired_text(text) or "").encode()


def test_conversations():
    whole = Conversation((Message("user", "你好"), Message("assistant", "café", "ah")), "x:1")
    assert first_mojibake(whole) is None
    assert repaired(whole) is None
    call = ToolCall("f", latin1('{"city": "Köln"}'))
    messages = (Message("user", "hi"), Message("assistant", latin1("é"), latin1("“思”"), call, weight=0.5), Message("tool", latin1("ü"), name="f"))
    damaged = Conversation(messages, "x:1", "low", "2025-02-28", (Tool("f", latin1("für")),))
    mended = repaired(damaged)
    expected = (
        Message("user", "hi"),
        Message("assistant", "é", "“思”", ToolCall("f", '{"city": "Köln"}'), weight=0.5),
        Message("tool", "ü", name="f"),
    )
    assert mended == Conversation(expected, "x:1", "low", "2025-02-28", (Tool("f", "für"),))
    assert first_mojibake(mended) is None


def test_excerpts():
    text = "A long beginning that nobody needs to see, and then the cafÃ© and a long ending that nobody needs either"
    found = first_mojibake(Conversation((Message("user", "u"), Message("assistant", text))))
    assert found == ("en the cafÃ© and a long ending that nobo", "en the café and a long ending that nobod")
    found = first_mojibake(Conversation((Message("user", latin1("你好\n吗")),)))
    assert found == (r"ä½\xa0å¥½\x0aå\x90\x97", r"你好\x0a吗")  # shown without control characters
    assert all(len(part) <= 40 for part in found)
