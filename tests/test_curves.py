"""The picture of a run's metrics: what is in the file is in the picture, and the picture is readable, alone and in the dark."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from fastoss.report.curves import heading, panels_of, read_metrics, resumed_after, speeds, write_curves
from fastoss.report.drawing import BLUE, BROWN, DARK, GREEN, INK, ORANGE, PAPER, PINK, Panel, Series, drawn, to_png, to_svg
from fastoss.run import RunDirectory

from .browser import open_browser

EXTENT = """() => {
    const boxes = [...document.querySelectorAll('text')].map(text => text.getBoundingClientRect());
    const width = document.documentElement.getBoundingClientRect().right;
    return [Math.min(...boxes.map(box => box.left)), Math.max(...boxes.map(box => box.right)), width];
}"""
SVG = "{http://www.w3.org/2000/svg}"


def step(number: int, **values: float) -> dict:
    usual = {"loss": 2 / number, "learning_rate": 1e-4, "grad_norm": 0.5, "mean_token_accuracy": 0.5, "num_tokens": 1000 * number}
    return {"step": number, **usual, "epoch": 0.1 * number, "seconds": 2.0 * number, **values}


def run_with(folder: Path, entries: list[dict], **manifest: object) -> RunDirectory:
    folder.mkdir(exist_ok=True)
    run = RunDirectory(folder)
    run.metrics.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    run.manifest.write_text(json.dumps({"started": ["once"], **manifest}))
    return run


def texts(picture: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_sft_curves(tmp_path):
    entries = [step(n, loss_analysis=3 / n, loss_final=1 / n) for n in range(1, 9)]
    entries.insert(4, {"step": 4, "eval_loss": 0.7, "eval_loss_analysis": 1.0, "eval_loss_final": 0.4})
    run = run_with(tmp_path / "run", entries)
    path = write_curves(run)
    assert path == tmp_path / "run" / "curves.svg"
    said = texts(path.read_text())
    for title in ("loss", "loss by channel", "token accuracy", "learning rate", "gradient norm", "tokens a second", "run · 8 steps"):
        assert title in said, title
    assert {"train", "held-out", "analysis", "analysis, held-out", "final"} <= set(said)
    panels = {panel.title: {line.label: line.points for line in panel.series} for panel in panels_of(entries)}
    assert panels["loss"] == {"train": [(n, 2 / n) for n in range(1, 9)], "held-out": [(4, 0.7)]}
    assert panels["loss by channel"]["final"][1] == (2, 0.5)
    assert panels["tokens a second"]["train"] == [(n, 500.0) for n in range(2, 9)]
    assert "commentary" not in panels["loss by channel"]


def test_one_channel_is_the_loss_itself():
    assert "loss by channel" not in [panel.title for panel in panels_of([step(n, loss_final=2 / n) for n in (1, 2)])]


def test_dpo_curves():
    def pair(n: int) -> dict:
        rewards = {"rewards/chosen": 0.1 * n, "rewards/rejected": -0.2 * n, "rewards/margins": 0.3 * n, "rewards/accuracies": 1.0}
        return step(n, **rewards, **{"logps/chosen": -20 + n, "logps/rejected": -20 - n, "kl_proxy": -0.5 * n, "sft": 1.5})

    entries = [pair(1), pair(2), {"step": 2, "eval_loss": 0.5, "eval_rewards/margins": 0.2, "eval_rewards/accuracies": 0.5}]
    panels = {panel.title.split(":")[0]: panel for panel in panels_of(entries)}
    shown = ["loss", "rewards (nats × beta)", "margin", "accuracy", "log-probability of an answer (nats)", "KL proxy", "SFT term (nats a token)"]
    assert list(panels) == [*shown, "learning rate", "gradient norm", "tokens a second"]
    assert [line.points for line in panels["margin"].series] == [[(1, 0.3), (2, 0.6)], [(2, 0.2)]]
    assert [line.label for line in panels["rewards (nats × beta)"].series] == ["chosen", "rejected"]
    assert panels["accuracy"].limits[0] < 0 < 1 < panels["accuracy"].limits[1]


def test_starts_and_failures_are_seen(tmp_path):
    entries = [step(n, seconds=float(n if n <= 4 else n - 3.5)) for n in range(1, 9)]
    run = run_with(tmp_path / "run", [*entries, {"step": 9, "failed": "the loss is nan"}], started=["a", "b", "c"], resumed_after_step=[4])
    with open(run.metrics, "a") as file:
        file.write('{"step": 9, "lo')  # what a kill tore
    entries = read_metrics(run)
    assert heading(run, entries) == "run · 8 steps · started 3 times (dashed: after step 4) · failed at step 9: the loss is nan"
    assert 5 not in dict(speeds(entries, resumed_after(run, entries)))  # no time lies between steps of two processes
    picture = write_curves(run).read_text()
    dashed = re.findall(r'stroke-dasharray: [^"]*stroke: (#\w+)|stroke: (#\w+)[^"]*stroke-dasharray|stroke-dasharray[^"]*stroke: (#\w+)', picture)
    colours = [next(filter(None, found)) for found in dashed]
    panels = len(panels_of(entries))
    assert colours.count(INK) == panels
    assert colours.count(ORANGE) == panels
    plain = write_curves(run_with(tmp_path / "plain", entries[:-1])).read_text()
    assert "stroke-dasharray" not in plain


def test_steps_made_again_are_no_resumption(tmp_path):
    entries = [step(n) for n in range(1, 9)]
    run = run_with(tmp_path / "run", entries, resumed_after_step=[6, 4, 4])
    assert resumed_after(run, entries) == [4]
    assert resumed_after(run_with(tmp_path / "end", entries, resumed_after_step=[8]), entries) == []


def test_a_run_without_steps_has_a_picture(tmp_path):
    assert texts(write_curves(run_with(tmp_path / "run", [])).read_text()) == ["run · no step yet"]
    assert "one · 1 step" in texts(write_curves(run_with(tmp_path / "one", [step(1)])).read_text())


def test_a_name_is_a_name(tmp_path, recwarn):
    """Chinese, mathematics and markup in a folder's name stay what they are."""
    run = run_with(tmp_path / "训练 a$b$c <i>&", [step(1), step(2)])
    picture = write_curves(run).read_text()
    assert "训练 a$b$c <i>& · 2 steps" in texts(picture)
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]


def test_long_runs_make_small_pictures(tmp_path):
    size = len(write_curves(run_with(tmp_path / "long", [step(n) for n in range(1, 20_001)])).read_text())
    assert size < 500_000


def test_equal_runs_give_equal_pictures(tmp_path):
    run = run_with(tmp_path / "run", [step(n) for n in range(1, 5)])
    first = write_curves(run).read_bytes()
    assert write_curves(run).read_bytes() == first


def test_pictures_fetch_nothing_and_run_nothing(tmp_path):
    picture = write_curves(run_with(tmp_path / "run", [step(1), step(2)])).read_text()
    assert "<script" not in picture
    assert "<!DOCTYPE" not in picture
    assert "@font-face" not in picture
    assert not re.findall(r'(?:href|src)="(?!#)[^"]*"|url\((?!#)[^)]*\)|@import', picture)
    root = ElementTree.fromstring(picture)
    assert (root.get("role"), root.findtext(f"{SVG}title")) == ("img", "Curves of the run run")


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_seen_on_both_papers():
    for colour in (BLUE, ORANGE, GREEN, PINK, BROWN):
        assert min(contrast(colour, PAPER), contrast(colour, DARK[PAPER])) >= 3, colour  # WCAG 1.4.11, graphics
    assert min(contrast(INK, PAPER), contrast(DARK[INK], DARK[PAPER])) >= 7


def test_light_and_dark_in_a_browser(tmp_path):
    path = write_curves(run_with(tmp_path / "run", [step(n) for n in range(1, 5)]))
    paper = "getComputedStyle(document.querySelector('#patch_1 path')).fill"
    ink = "getComputedStyle([...document.querySelectorAll('text')].at(-1)).fill"
    with open_browser() as browser:
        for scheme, colours in (("light", (PAPER, INK)), ("dark", (DARK[PAPER], DARK[INK]))):
            page = browser.new_page(color_scheme=scheme)
            asked: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(path.as_uri())
            rgb = ["rgb({}, {}, {})".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5))) for colour in colours]
            assert [page.evaluate(paper), page.evaluate(ink)] == rgb
            assert asked == [path.as_uri()]
            left, right, width = page.evaluate(EXTENT)
            assert left >= 0
            assert right <= width + 1


def test_png_beside(tmp_path):
    with drawn("a run", [Panel("loss", [Series("train", [(1, 2.0), (2, 1.0)], BLUE)])], columns=1) as figure:
        picture = to_png(figure)
        assert "a run" in texts(to_svg(figure, "a run"))
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000


def test_drawing_needs_no_torch():
    code = "import sys, fastoss.report.curves; raise SystemExit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("count", [1, 400, 401, 1000])
def test_blocks_of_long_series_keep_their_extremes(count):
    """A single bad step is seen, however long the run."""
    points = [(float(n), 1.0) for n in range(1, count + 1)]
    points[count // 2] = (points[count // 2][0], 50.0)
    with drawn("x", [Panel("loss", [Series("train", points, BLUE)])], columns=1) as figure:
        (axes,) = figure.axes
        assert axes.dataLim.y1 == 50.0
        assert len(axes.lines[-1].get_xdata()) <= 400
