"""The HTML page of `fastoss show`, opened in a real browser with the network off."""

from __future__ import annotations

import html
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fastoss.data.data_page import page_html
from tests.browser import open_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

COUNT = 10_000
MAX_LENGTH = 512
QUESTIONS = [
    "Do you sell maps of the harbour?",
    "你是谁? 你住在哪里? 请用一句话告诉我。",
    "What is 2 + 2?\nAnd twice that?",
    "هل لديك خريطة للميناء؟ أريد أن أعرف الطريق.",
    "מה השעה עכשיו בירושלים?",
    "Sing me a song 😀👩‍👩‍👧‍👦 🇯🇵 please",
    "港の地図はありますか。",
]
THOUGHTS = ["The user asks simply; answer in one line, in character.", "先报名字,再说住处。语气要轻。", "Twice four is eight.  Two spaces stay two."]
ANSWERS = [
    "Only of places I've dreamed about, nya.\n\n    drawer three\n\tbehind the tea",
    "我是米卡喵,住在窗边的暖架子上。🐈",
    "Four, and then eight!",
    "نعم، في الدرج الثالث، بجانب الشاي.",
    "La la la, purr 🎶",
    '<b>bold?</b> & "quoted" </script><img src=x onerror="document.title=\'owned\'">',
]
SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: 2026-01-01\n\n"
    "Reasoning: low\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
)
# Three examples that the tests look for; everything else is drawn.
MARKED = {17: "zebra-crossing", 4242: "zebra-crossing", 9999: "ZEBRA-crossing"}
HOSTILE = "</script><script>document.title='owned'</script><img src=http://example.org/x.png onerror=\"document.title='owned'\"><!--\u2028\u2029&lt;"


def span(name: str, text: str, trained: bool = False, weight: float = 1.0) -> dict[str, Any]:
    tokens = 4 + len(text.encode()) // 5
    return {"name": name, "trained": trained, "weight": weight if trained else 0.0, "tokens": tokens, "text": text}


def drawn_example(number: int, draw: random.Random) -> dict[str, Any]:
    spans = [span("system", SYSTEM)]
    if draw.random() < 0.3:
        spans.append(span("developer", "<|start|>developer<|message|># Instructions\n\nYou are Mika, a cat who keeps a shop.\n\n<|end|>"))
    for _ in range(draw.choice([0, 0, 0, 1, 2])):
        spans.append(span("user", f"<|start|>user<|message|>{draw.choice(QUESTIONS)}<|end|>"))
        spans.append(span("final", f"<|start|>assistant<|channel|>final<|message|>{draw.choice(ANSWERS)}<|end|>"))
    question = draw.choice(QUESTIONS) + (f" {MARKED[number]}" if number in MARKED else "") + (HOSTILE if number == 17 else "")
    spans.append(span("user", f"<|start|>user<|message|>{question}<|end|>"))
    if draw.random() < 0.1:
        call = '<|start|>assistant<|channel|>commentary to=functions.find_map <|constrain|>json<|message|>{"place": "harbour"}<|call|>'
        spans.append(span("commentary", call))
        answer = '<|start|>functions.find_map to=assistant<|channel|>commentary<|message|>{"found": true}<|end|>'
        spans.append(span("tool", answer))
    spans.append({**span("assistant", "<|start|>assistant"), "tokens": 2})
    opening = ""
    if draw.random() < 0.6:
        thought = " ".join(draw.choices(THOUGHTS, k=draw.randint(1, 6)))
        spans.append(span("analysis", f"<|channel|>analysis<|message|>{thought}<|end|>", True, 0.5))
        opening = "<|start|>assistant"
    text = " ".join(draw.choices(ANSWERS, k=1 + int(draw.expovariate(0.7))))
    spans.append(span("final", f"{opening}<|channel|>final<|message|>{text}<|return|>", True))
    return {
        "place": f"data/catgirl.jsonl:{number + 1}",
        "split": "eval" if draw.random() < 0.05 else "train",
        "tokens": sum(one["tokens"] for one in spans),
        "trained": sum(one["tokens"] for one in spans if one["trained"]),
        "spans": spans,
    }


def page_data(count: int = COUNT) -> dict[str, Any]:
    draw = random.Random(3)
    examples = [drawn_example(number, draw) for number in range(count)]
    lengths = [example["tokens"] for example in examples]
    spans = [one for example in examples for one in example["spans"]]
    channels = []
    for name in ("system", "developer", "user", "tool", "analysis", "commentary", "final"):
        mine = [one for one in spans if one["name"] == name]
        channels.append({"name": name, "tokens": sum(one["tokens"] for one in mine), "trained": sum(one["tokens"] for one in mine if one["trained"])})
    edges = list(range(0, 641, 16))
    reasons = ["the answer is empty", "longer than model.max_length ({} tokens)", "control token in the text", "the same row as line {}"]
    dropped = [
        {
            "place": f"data/catgirl.jsonl:{20_000 + number}",
            "unit": "examples" if number % 4 == 1 else "rows",
            "reason": reasons[number % 4 if number < 500 else 0].format(draw.randint(513, 4096)),
            "excerpt": HOSTILE if number == 0 else draw.choice(QUESTIONS),
        }
        for number in range(620)
    ]
    totals = {
        "rows": count + 620,
        "train_examples": sum(example["split"] == "train" for example in examples),
        "eval_examples": sum(example["split"] == "eval" for example in examples),
        "tokens": sum(lengths),
        "trained_tokens": sum(example["trained"] for example in examples),
    }
    return {
        "title": "catgirl",
        "recipe": "recipes/catgirl.toml",
        "version": "0.3.0",
        "max_length": MAX_LENGTH,
        "train_on": {"analysis": 0.5, "commentary": 1.0, "final": 1.0},
        "summary": [
            f"{count + 620:,} rows → {totals['train_examples']:,} training examples, {totals['eval_examples']:,} held out",
            f"lengths: median {sorted(lengths)[count // 2]} tokens, longest {max(lengths)}",
            "dropped 1,234: empty answers, over max_length, control tokens, copies",
        ],
        "totals": totals,
        "channels": channels,
        "histogram": {
            "edges": edges,
            "kept": [sum(low < length <= high for length in lengths) if high <= MAX_LENGTH else 0 for low, high in itertools.pairwise(edges)],
            "dropped": [max(1, (high - MAX_LENGTH) * count // 30_000) if high > MAX_LENGTH else 0 for high in edges[1:]],
        },
        "examples": examples,
        "shown_of": 30 * count,
        "dropped": dropped,
        "dropped_total": 1_234,
    }


def with_text(data: dict[str, Any], text: str) -> int:
    """How many examples say `text` in a span or in their place, in any case."""
    return sum(
        any(text.lower() in one.lower() for one in (example["place"], *(span["text"] for span in example["spans"]))) for example in data["examples"]
    )


class Opened:
    """A page of `data` in the browser, with the network off; what it asked for and complained about."""

    def __init__(self, browser: Browser, path: Path, **context: Any):
        self.context = browser.new_context(offline=True, **{"viewport": {"width": 1280, "height": 900}, **context})
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#count:not(:empty)")

    def count(self) -> str:
        return self.page.inner_text("#count")

    def column(self, selector: str, number: int = 5) -> list[str]:
        return [re.sub(r"[+\s]", "", text) for text in self.page.locator(f".row {selector}").all_inner_texts()[:number]]


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return page_data()


@pytest.fixture(scope="module")
def path(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "show.html"
    file.write_text(page_html(data), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture
def shown(browser: Browser, path: Path) -> Iterator[Opened]:
    opened = Opened(browser, path)
    yield opened
    opened.context.close()
    assert opened.complaints == []
    assert opened.requests == [path.as_uri()]


def test_data_is_inert_in_the_file_and_comes_back_whole() -> None:
    data = page_data(20)
    data["title"] = "</title><b>@@DATA@@"
    data["dropped"][0]["excerpt"] = "half a character: \ud83d"
    text = page_html(data)
    text.encode()
    assert text.count("<script") == 2
    assert text.count("</script") == 2
    assert "</title><b>" not in text
    inside = text.split('id="data">')[1].split("</script>")[0]
    assert not re.search("[<>&\u2028\u2029]", inside)
    back = json.loads(inside)
    spans = back["examples"][17][4]
    texts = [back["texts"][number] for number in spans[4::5]]
    assert texts == [one["text"] for one in data["examples"][17]["spans"]]
    assert [back["names"][number] for number in spans[::5]] == [one["name"] for one in data["examples"][17]["spans"]]
    assert back["dropped"] == data["dropped"]
    assert back["title"] == data["title"]
    with pytest.raises(ValueError, match="Out of range float"):
        page_html({**data, "max_length": float("nan")})


def test_policy_allows_the_one_script(browser: Browser, path: Path) -> None:
    policy = re.search('Content-Security-Policy" content="([^"]*)"', path.read_text(encoding="utf-8"))
    assert policy is not None
    assert html.unescape(policy[1]).startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert re.search("script-src 'sha256-[A-Za-z0-9+/]{43}='$", policy[1])
    opened = Opened(browser, path)
    refused: list[tuple[str, str | None]] = []
    opened.page.on("requestfailed", lambda request: refused.append((request.url, request.failure)))
    tried = """() => {
        const done = [];
        document.addEventListener("securitypolicyviolation", (event) => done.push(event.effectiveDirective));
        const image = document.createElement("img");
        image.src = "http://example.org/x.png";
        document.body.append(image);
        try { document.body.insertAdjacentHTML("beforeend", "<b>x</b>"); } catch (error) { done.push(error.name); }
        return new Promise((resolve) => setTimeout(() => resolve(done), 200));
    }"""
    assert sorted(opened.page.evaluate(tried)) == ["TypeError", "img-src", "require-trusted-types-for"]
    assert refused == [("http://example.org/x.png", "csp")]
    opened.context.close()


def test_head_says_the_numbers(shown: Opened, data: dict[str, Any]) -> None:
    tiles = {tile.get_attribute("data-tile"): tile.locator("b").inner_text() for tile in shown.page.locator(".tile").all()}
    totals = data["totals"]
    expected = {"rows": totals["rows"], "train": totals["train_examples"], "eval": totals["eval_examples"], "tokens": totals["tokens"]}
    expected |= {"trained": totals["trained_tokens"], "dropped": 1_234}
    assert tiles == {name: f"{number:,}" for name, number in expected.items()}
    assert shown.page.inner_text("h1") == "catgirl"
    assert "analysis ×0.5" in shown.page.inner_text("header")
    assert shown.page.locator(".summary li").all_inner_texts() == data["summary"]
    assert "the first 10,000 of 300,000 are listed" in shown.page.inner_text("section[aria-labelledby=examples-title]")


def test_charts(shown: Opened, data: dict[str, Any]) -> None:
    page = shown.page
    cut = float(page.get_attribute(".histogram line.cut", "x1") or "nan")
    edge = lambda one: float(one.get_attribute("x") or "nan")  # noqa: E731
    kept, dropped = page.locator(".histogram rect.kept").all(), page.locator(".histogram rect.dropped").all()
    assert len(kept) == sum(number > 0 for number in data["histogram"]["kept"])
    assert len(dropped) == 8
    assert max(map(edge, kept)) < cut < min(map(edge, dropped))
    assert page.locator("text.cut-label").text_content() == "max_length 512"
    page.locator(".histogram .column").nth(10).hover()
    assert page.inner_text(".tip") == f"161 – 176 tokens: {data['histogram']['kept'][10]:,} kept"
    page.focus(".histogram")
    page.keyboard.press("End")
    assert page.inner_text(".tip").endswith(f"0 kept, {data['histogram']['dropped'][-1]} dropped")
    rows = {row.locator("td").first.inner_text(): row.locator("td").all_inner_texts() for row in page.locator("table.channels tbody tr").all()}
    analysis = next(channel for channel in data["channels"] if channel["name"] == "analysis")
    assert rows["analysis"][1] == f"{analysis['tokens']:,}"
    assert rows["analysis"][3:] == [f"+ {analysis['trained']:,}", "×0.5"]
    assert rows["system"][3] == "·"
    widths = page.locator(".bar").first.locator("div").evaluate_all("(all) => all.map((one) => one.getBoundingClientRect().width)")
    assert abs(widths[0] / sum(widths) - data["channels"][0]["tokens"] / sum(channel["tokens"] for channel in data["channels"])) < 0.01


def test_table_holds_only_rows_in_sight_and_filters(shown: Opened, data: dict[str, Any]) -> None:
    page, examples = shown.page, data["examples"]
    assert shown.count() == "10,000 of 10,000 examples"
    assert page.get_attribute("#grid", "aria-rowcount") == "10001"
    assert page.locator(".row").count() < 60
    page.evaluate("document.querySelector('.scroll').scrollTop = 1e9")
    page.wait_for_selector("#row-9999")
    assert page.locator(".row").count() < 60

    took = "(text) => { const box = document.getElementById('search'); box.value = text; const begun = performance.now();"
    took += " box.dispatchEvent(new Event('input')); return performance.now() - begun; }"
    for text in ("zebra", "你住在哪里", "jsonl:42", "Reasoning: low", ".*(", "<img src=x"):
        milliseconds = page.evaluate(took, text)
        assert milliseconds < 200, (text, milliseconds)
        assert shown.count() == f"{with_text(data, text):,} of 10,000 examples", text
    assert page.locator(".row mark").count() > 0
    page.fill("#search", "no such words")
    assert page.inner_text(".none") == "No example passes these filters."
    page.click("#clear")

    names = [{one["name"] for one in example["spans"]} for example in examples]
    page.click("[data-channel=tool]")
    assert shown.count().startswith(f"{sum('tool' in name for name in names):,} of")
    page.click("[data-channel=analysis]")
    assert shown.count().startswith(f"{sum({'tool', 'analysis'} <= name for name in names):,} of")
    assert page.get_attribute("[data-channel=analysis]", "aria-pressed") == "true"
    page.click("#clear")
    page.select_option("#split", "eval")
    assert shown.count().startswith(f"{data['totals']['eval_examples']:,} of")
    page.fill("#tokens-min", "150")
    page.fill("#tokens-max", "200")
    page.fill("#trained-min", "60")
    fit = [example for example in examples if example["split"] == "eval" and 150 <= example["tokens"] <= 200 and example["trained"] >= 60]
    assert shown.count().startswith(f"{len(fit):,} of")
    assert shown.column(".place") == [example["place"] for example in fit[:5]]
    page.click("#clear")

    page.click("[data-sort=tokens]")
    longest = sorted((example["tokens"] for example in examples), reverse=True)[:5]
    assert shown.column(".number")[:1] == [str(longest[0])]
    assert shown.column(".number:not(.trained-count)") == [str(number) for number in longest]
    page.click("[data-sort=trained]")
    page.click("[data-sort=trained]")
    assert shown.column(".trained-count") == [str(number) for number in sorted(example["trained"] for example in examples)[:5]]
    assert page.locator("[aria-sort=ascending]").inner_text() == "Trained"
    page.click("[data-sort=place]")
    page.click("[data-sort=place]")
    assert shown.column(".place", 2) == ["data/catgirl.jsonl:10000", "data/catgirl.jsonl:9999"]


def test_example_is_its_exact_spans(shown: Opened, data: dict[str, Any]) -> None:
    page = shown.page
    page.fill("#search", "zebra")
    assert shown.column(".place") == [f"data/catgirl.jsonl:{number + 1}" for number in MARKED]
    page.click("#row-0")
    for position, number in enumerate(MARKED):
        if position:
            page.click("#on")
        assert page.inner_text("#example-title") == f"data/catgirl.jsonl:{number + 1}"
        for expected, found in zip(data["examples"][number]["spans"], page.locator("dialog .span").all(), strict=True):
            assert found.locator(".words").text_content() == expected["text"]
            assert found.get_attribute("data-name") == expected["name"]
            trained = "trained" in (found.get_attribute("class") or "").split()
            assert trained == expected["trained"]
            assert found.locator(".sign").text_content() == ("+" if trained else "·")
            weight = found.locator(".weight").all_inner_texts()
            assert weight == (["×0.5"] if expected["name"] == "analysis" and trained else [])
            assert found.locator(".token").all_text_contents() == re.findall(r"<\|\w+\|>", expected["text"])
    assert page.locator("dialog mark").all_inner_texts() == ["ZEBRA"]
    assert page.locator("#on").is_disabled()
    assert page.title() == "catgirl · fastoss show"
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert "owned" in page.locator("#dropped").inner_text()


def test_keys_alone_are_enough(shown: Opened) -> None:
    page = shown.page
    page.focus("#search")
    page.keyboard.press("ArrowDown")
    for key in ("ArrowDown", "ArrowDown", "PageDown", "ArrowUp"):
        page.keyboard.press(key)
    active = page.get_attribute("#grid", "aria-activedescendant") or ""
    assert int(active.removeprefix("row-")) > 10
    assert page.get_attribute(f"#{active}", "aria-selected") == "true"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert page.inner_text("#example-title") == "data/catgirl.jsonl:10000"
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#example-title") == "data/catgirl.jsonl:9999"
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert page.evaluate("document.activeElement.id") == "grid"
    assert page.get_attribute("#grid", "aria-activedescendant") == "row-9998"
    assert page.locator("#row-9998").is_visible()


def test_dropped_rows_and_why(shown: Opened) -> None:
    page = shown.page
    rows = page.locator("#dropped tbody tr")
    assert "the first 620 of 1,234 rows and examples" in page.inner_text("#dropped .heading")
    assert rows.count() == 20
    page.click("#dropped .more")
    assert rows.count() == 120
    page.click("[data-reason='longer than model.max_length (… tokens)']")
    assert rows.count() == 20
    assert all(re.match(r"longer than model.max_length \(\d+ tokens\)", text) for text in page.locator("#dropped td:nth-child(2)").all_inner_texts())
    assert page.inner_text("#dropped .more") == "Show 100 more of 105"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_looks(browser: Browser, path: Path, tmp_path: Path, scheme: Any, width: int) -> None:
    opened = Opened(browser, path, color_scheme=scheme, viewport={"width": width, "height": 844})
    page = opened.page
    red, green, blue = (int(part) for part in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert (red + green + blue < 128) == (scheme == "dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / f"{scheme}-{width}.png")
    page.click("#row-2")
    box = page.locator("dialog").bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= width
    assert page.evaluate("(() => { const all = document.querySelector('.spans'); return all.scrollWidth - all.clientWidth })()") == 0
    page.screenshot(path=tmp_path / f"{scheme}-{width}-example.png")
    opened.context.close()
    assert opened.complaints == []
    assert (tmp_path / f"{scheme}-{width}.png").stat().st_size > 20_000


def test_right_to_left_and_long_words(browser: Browser, tmp_path: Path) -> None:
    data = page_data(3)
    data["examples"][0]["spans"][-1]["text"] = "<|channel|>final<|message|>" + "x" * 5_000 + "\nשלום עולם\n  two  spaces<|return|>"
    file = tmp_path / "show.html"
    file.write_text(page_html(data), encoding="utf-8")
    opened = Opened(browser, file)
    opened.page.click("#row-0")
    assert opened.page.evaluate("(() => { const all = document.querySelector('.spans'); return all.scrollWidth - all.clientWidth })()") == 0
    sides = """() => {
        const body = document.querySelector('.span:last-child .body'), text = body.firstChild;
        const side = (word) => { const range = document.createRange(); const at = text.data.indexOf(word); range.setStart(text, at);
            range.setEnd(text, at + word.length); return range.getBoundingClientRect(); };
        const box = body.getBoundingClientRect();
        return [box.right - side('שלום').right, side('two').left - box.left, side('two').left];
    }"""
    from_right, from_left, _ = opened.page.evaluate(sides)
    assert from_right < 16  # Hebrew begins at the right
    assert 10 < from_left < 24  # two spaces before `two` are there
    opened.context.close()
    assert opened.complaints == []


def test_nothing_to_show(browser: Browser, tmp_path: Path) -> None:
    data = page_data(1)
    data |= {"examples": [], "shown_of": 0, "dropped": [], "dropped_total": 0, "channels": [], "summary": []}
    data["histogram"] = {"edges": [0], "kept": [], "dropped": []}
    data["totals"] = dict.fromkeys(data["totals"], 0)
    file = tmp_path / "show.html"
    file.write_text(page_html(data), encoding="utf-8")
    opened = Opened(browser, file)
    assert opened.count() == "0 of 0 examples"
    assert "There are no examples." in opened.page.inner_text("#grid")
    assert "Nothing was dropped." in opened.page.inner_text("#dropped")
    opened.context.close()
    assert opened.complaints == []
