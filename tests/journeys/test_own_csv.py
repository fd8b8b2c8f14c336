"""A table from a spreadsheet becomes a tuned model in the demo: docs/first-fine-tune.md, with the mistakes that people make on the way."""

from __future__ import annotations

from ..conftest import ROOT
from ..demo_page import ask_and_wait, page
from ..documents import files_of
from .steps import opened_report, screen

# As a spreadsheet saves it where the comma is the decimal mark: semicolons, a byte order mark, Windows' line ends, a line break in a cell.
TABLE = (
    "Frage;Antwort;Gedanke\r\n"
    "When do you open?;At eight, except on Mondays.;Opening hours.\r\n"
    'Do you repair zips?;"Yes; while you wait.";\r\n'
    'Can you shorten a coat?;"Gladly.\r\nBring your shoes.";Ask for the shoes.\r\n'
    "什么时候关门?;六点整。;问时间。\r\n"
)
COLUMNS = 'columns = { instruction = "Frage", output = "Antwort", thinking = "Gedanke" }'


def test_from_a_table_to_the_demo(journey, browser):
    journey.write("shop.csv", TABLE, encoding="utf-8-sig")
    journey.write("shop.toml", files_of("docs/first-fine-tune.md")["shop.toml"])

    # The guide's recipe knows other columns: said with what there is, before anything loads.
    wrong = journey.run("fastoss check shop.toml", code=2)
    assert all(name in wrong.err for name in ("question", "Frage", "Antwort")), wrong.err
    line = next(line for line in journey.read("shop.toml").splitlines() if line.startswith("columns"))
    journey.replace("shop.toml", line, COLUMNS.replace("thinking", "thoughts"))
    unknown = journey.run("fastoss check shop.toml", code=2)
    assert "thoughts" in unknown.err
    assert "thinking" in unknown.err
    journey.replace("shop.toml", "thoughts", "thinking")

    checked = journey.run("fastoss check shop.toml")
    assert "4 rows → 4 training examples" in checked.out
    shown = journey.run("fastoss show shop.toml --rows 3").out
    assert "Opening hours." in shown
    assert "+ final" in shown
    journey.run("fastoss train shop.toml --set train.num_train_epochs=40")
    said = journey.run('fastoss chat runs/shop --prompt "When do you open?"')
    assert said.out.strip() == "At eight, except on Mondays."
    assert "Opening hours." in said.err

    with opened_report(browser, journey.directory("shop").root / "report.html") as report:
        assert "word for word" in report.inner_text("body")
        screen(report, "own-csv-report")
    with journey.demo("runs/shop") as url, page(browser, url, viewport={"width": 1280, "height": 900}) as opened:
        ask_and_wait(opened, "什么时候关门?")
        assert opened.inner_text(".answer").strip() == "六点整。"
        ask_and_wait(opened, "Can you shorten a coat?", new=True)
        assert opened.inner_text(".answer").split() == ["Gladly.", "Bring", "your", "shoes."]
        screen(opened, "own-csv-demo")

    # The same table for the real model: init writes a recipe for it, and check plans it for the card.
    journey.write("rows.csv", TABLE.replace("Frage;Antwort;Gedanke", "instruction;output;thinking"), encoding="utf-8-sig")
    journey.run("fastoss init --data rows.csv --method sft --card 24GB --name shop-20b")
    planned = journey.run("fastoss check shop-20b.toml --card 24GB")
    assert "shop-20b.toml is fine" in planned.out
    assert str(ROOT) not in journey.read("shop-20b.toml")
