"""The templates that leave with an export ask the model as training did: Jinja for transformers and llama.cpp, Go's for Ollama."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fastoss.config import FormatSettings, load_recipe
from fastoss.data.conversation import Conversation, Message
from fastoss.data.dataset import build_dataset
from fastoss.data.harmony import HarmonyRenderer
from fastoss.data.other_renderers import encode_control
from fastoss.errors import FastossError
from fastoss.export.format_check import Row, builtin_rows, check_rows, jinja_renderer
from fastoss.export.go_template import GoTemplate
from fastoss.export.ollama import can_render, modelfile, modelfile_render, ollama_template, ollama_values, read_modelfile
from fastoss.export.templates import export_template

from .conftest import ROOT
from .export_helpers import shared  # noqa: F401

FORMAT = FormatSettings(reasoning_effort="low", current_date="2025-03-04")
GOLDEN = ROOT / "tests" / "golden" / "ollama_go.json"


@pytest.fixture(scope="module")
def all_rows(cache) -> list[Row]:
    """The built-in chats, and all shipped rows (some with instructions, some of several turns, Chinese and English)."""
    renderer = HarmonyRenderer(FORMAT)
    made = builtin_rows(FORMAT)
    for name in ("catgirl", "translation"):
        for example in build_dataset(load_recipe(ROOT / "recipes" / f"{name}.toml")).train:
            again = renderer.render_last(example.conversation)
            made.append(Row(example.conversation, list(again.input_ids), again.prompt_length))
    assert len({tuple(row.ids) for row in made}) > 300
    return made


@pytest.fixture
def rows(all_rows: list[Row]) -> list[Row]:
    """The built-in chats and every fourth of the others: more than 100."""
    return all_rows[:24] + all_rows[24::4]


def asked(row: Row) -> Conversation:
    chat = row.conversation
    return Conversation(chat.messages[:-1], chat.place, chat.reasoning_effort, chat.current_date, chat.tools)


def test_the_jinja_template_writes_the_training_tokens(rows):
    """Prompts and whole examples, tools and their calls too, with nothing told but what a row says itself."""
    result = check_rows("chat_template.jinja", jinja_renderer(export_template(FORMAT)), rows, ("prompt", "example"))
    assert (result.rows, result.problems) == (2 * len(rows), [])
    assert len(rows) > 100
    with_tools = sum(bool(row.conversation.tools) for row in rows)
    assert with_tools >= 8


def test_the_official_template_would_not(rows):
    """Why exports carry their own: the official one stamps today, medium effort, and writes tools otherwise."""
    from fastoss.data.tokenizer import chat_template

    result = check_rows("official", jinja_renderer(chat_template()), rows, ("prompt",))
    assert result.differing == len(rows)


def test_llama_cpp_renders_the_jinja_template_and_cuts_the_text_alike(rows, shared):  # noqa: F811
    """llama.cpp's own Jinja and tokenizer, on the vocabulary and template that a GGUF carries."""
    from fastoss.data.other_renderers import as_chat_message
    from fastoss.inference.llama_cpp import running

    (file,) = (shared.exports("experts") / "gguf").glob("*.gguf")
    renderer = HarmonyRenderer(FormatSettings())  # as that run was trained
    plain = [asked(row) for row in rows if not row.conversation.tools]
    with running(file, 4096, 1) as server:
        for chat in plain:
            settings = {"reasoning_effort": chat.reasoning_effort, "current_date": chat.current_date}
            given = {
                "messages": [as_chat_message(message, parsed=False) for message in chat.messages],
                "chat_template_kwargs": {key: value for key, value in settings.items() if value is not None},
            }
            wanted = renderer.render_prompt(chat.messages, chat.reasoning_effort, current_date=chat.current_date)
            assert server.tokenize(server.post("/apply-template", given)["prompt"]) == wanted, chat.place
    assert len(plain) >= 40


def test_the_ollama_template_writes_the_training_tokens(rows, tmp_path):
    (tmp_path / "Modelfile").write_text(modelfile("m.gguf", FORMAT, 8192), encoding="utf-8")
    assert read_modelfile(tmp_path / "Modelfile") == ollama_template(FORMAT)
    plain = [row for row in rows if can_render(row.conversation)]
    result = check_rows("Modelfile", modelfile_render(tmp_path / "Modelfile"), plain, ("prompt",))
    assert result.problems == []
    assert result.rows > 90


def as_given(chat: Conversation) -> dict:
    messages = [{"Role": m.role, "Content": m.content, "Thinking": m.thinking or ""} for m in chat.messages]
    return {"Messages": messages, "ThinkLevel": chat.reasoning_effort or ""}


def find_go() -> str | None:
    return os.environ.get("FASTOSS_GO") or shutil.which("go")


def run_go(go: str, template: str, chats: list[dict], cache: Path) -> list[str]:
    environment = os.environ | {"GO111MODULE": "off", "GOCACHE": str(cache / "go"), "GOFLAGS": ""}
    given = json.dumps({"Template": template, "Chats": chats})
    command = [go, "run", str(ROOT / "tests" / "go_template" / "main.go")]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def test_go_itself_renders_the_same(all_rows, cache):
    """What Go 1.19's text/template wrote for these chats is recorded by its hash; where there is a Go, it writes them anew.

    Record with FASTOSS_GO=/path/to/go FASTOSS_RECORD=1.
    """
    chats = [asked(row) for row in all_rows if can_render(row.conversation)]
    template = ollama_template(FORMAT)
    ours = [GoTemplate(template).render(ollama_values(chat)) for chat in chats]
    assert [encode_control(text) for text in ours] == [HarmonyRenderer(FORMAT).render_prompt(c.messages, c.reasoning_effort) for c in chats]
    go = find_go()
    if go is not None:
        theirs = run_go(go, template, [as_given(chat) for chat in chats], cache)
        assert theirs == ours
        if os.environ.get("FASTOSS_RECORD"):
            version = subprocess.run([go, "version"], capture_output=True, text=True).stdout.strip()
            record = {"go": version, "template": digest(template), "chats": len(chats), "texts": [digest(text) for text in theirs]}
            GOLDEN.write_text(json.dumps(record) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden["template"] == digest(template), "the template has changed: record it with Go again"
    assert golden["chats"] >= 100
    recorded = set(golden["texts"])
    assert [text[-200:] for text in ours if digest(text) not in recorded] == []


def test_go_writes_a_tool_loop_as_training_did(cache):
    """Definitions with their properties in order of their names, calls and results: Ollama's way, held against ours."""
    from fastoss.data.conversation import Tool, ToolCall

    go = find_go()
    if go is None:
        pytest.skip("no Go: install one, or set FASTOSS_GO")
    tool = Tool(
        "get_weather",
        "Gets the weather.",
        {"type": "object", "properties": {"city": {"type": "string", "description": "The city"}, "days": {"type": "integer"}}, "required": ["city"]},
    )
    chat = (
        Message("user", "Oslo?"),
        Message("assistant", "", "I need the weather.", ToolCall("get_weather", '{"city":"Oslo"}')),
        Message("tool", '{"sky": "clear"}', name="get_weather"),
    )
    call = {"Function": {"Name": "get_weather", "Arguments": {"city": "Oslo"}}}
    given = {
        "Messages": [
            {"Role": "user", "Content": "Oslo?"},
            {"Role": "assistant", "Thinking": "I need the weather.", "ToolCalls": [call]},
            {"Role": "tool", "Content": '{"sky": "clear"}', "ToolName": "get_weather"},
        ],
        "Tools": [{"Function": {"Name": tool.name, "Description": tool.description, "Parameters": tool.parameters}}],
    }
    (text,) = run_go(go, ollama_template(FORMAT), [given], cache)
    assert encode_control(text) == HarmonyRenderer(FORMAT).render_prompt(chat, tools=(tool,))


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        ("a {{- .X -}} \n b", {"X": 1}, "a1b"),
        ("{{ if .A }}yes{{ else if .B }}maybe{{ else }}no{{ end }}", {"A": "", "B": [1]}, "maybe"),
        ("{{ range $i, $x := .L }}{{ $i }}={{ $x.N }};{{ else }}none{{ end }}", {"L": [{"N": "a"}, {"N": "b"}]}, "0=a;1=b;"),
        ("{{ range .L }}x{{ else }}none{{ end }}", {"L": []}, "none"),
        ('{{ $n := 0 }}{{ range .L }}{{ if eq . "b" }}{{ $n = 2 }}{{ end }}{{ end }}{{ $n }}', {"L": ["a", "b"]}, "2"),
        ('{{ if and (not .A) (or (eq .B "x" "y") (gt 2 1)) }}{{ len .B }}{{ end }}', {"A": 0, "B": "y"}, "1"),
        ('{{ "}}" }}{{ "a\\"b" }}', {}, '}}a"b'),
    ],
)
def test_the_go_subset(template, values, text, cache):
    assert GoTemplate(template).render(values) == text


@pytest.mark.parametrize("template", ["{{ printf .X }}", "{{ if .X }}", "{{ end }}", "{{ .X | json }}", "{{ $y }}", '{{ template "x" }}', "a {{ b"])
def test_what_the_go_subset_does_not_know_is_an_error(template):
    with pytest.raises(FastossError, match="not understood"):
        GoTemplate(template).render({"X": 1})
