"""The Modelfile for Ollama: its template, in Go's template language, writes chats as harmony, token by token as in training.

Ollama reads replies of gpt-oss with a harmony parser of its own when the template holds harmony's marks, and gives that parser the
`<|start|>assistant` with which this template ends.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastoss.config import FormatSettings
from fastoss.data.conversation import Conversation
from fastoss.data.other_renderers import Kind, encode_control
from fastoss.errors import FastossError
from fastoss.export.format_check import Render
from fastoss.export.go_template import GoTemplate

MODELFILE = "Modelfile"

# Ollama hands over System (all system messages), Messages, Tools and ThinkLevel ("low", "medium", "high", or nothing).
_TEMPLATE = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: @DATE@

Reasoning: {{ if .ThinkLevel }}{{ .ThinkLevel }}{{ else }}@EFFORT@{{ end }}

# Valid channels: analysis, commentary, final. Channel must be included for every message.
{{- if .Tools }}
Calls to these tools must go to the commentary channel: 'functions'.
{{- end }}<|end|>
{{- if or .System .Tools }}<|start|>developer<|message|>
{{- if .System }}# Instructions

{{ .System }}

{{ end }}
{{- if .Tools }}# Tools

## functions

namespace functions {
{{ range .Tools }}
{{- if .Function.Description }}
// {{ .Function.Description }}
{{- end }}
type {{ .Function.Name }} = {{ if .Function.Parameters.Properties }}(_: {
{{- $parameters := .Function.Parameters }}
{{- range $name, $schema := $parameters.Properties }}
{{- if $schema.Description }}
// {{ $schema.Description }}
{{- end }}
{{- $mark := "?" }}{{ range $parameters.Required }}{{ if eq . $name }}{{ $mark = "" }}{{ end }}{{ end }}
{{ $name }}{{ $mark }}: {{ $schema.ToTypeScriptType }},
{{- end }}
}){{ else }}(){{ end }} => any;
{{ end }}
} // namespace functions
{{- end }}<|end|>
{{- end }}
{{- /* Reasoning is seen again only in a chain of tool calls that no answer has ended yet. */ -}}
{{- $answered := -1 }}
{{- range $i, $message := .Messages }}
{{- if and (eq $message.Role "assistant") (not $message.ToolCalls) }}{{ $answered = $i }}{{ end }}
{{- end }}
{{- range $i, $message := .Messages }}
{{- if eq $message.Role "user" }}<|start|>user<|message|>{{ $message.Content }}<|end|>
{{- else if eq $message.Role "tool" }}<|start|>functions.{{ $message.ToolName }} to=assistant<|channel|>commentary<|message|>
{{- $message.Content }}<|end|>
{{- else if eq $message.Role "assistant" }}
{{- if $message.ToolCalls }}
{{- if and $message.Thinking (gt $i $answered) }}<|start|>assistant<|channel|>analysis<|message|>{{ $message.Thinking }}<|end|>
{{- end }}
{{- if $message.Content }}<|start|>assistant<|channel|>commentary<|message|>{{ $message.Content }}<|end|>
{{- end }}
{{- range $message.ToolCalls }}<|start|>assistant to=functions.{{ .Function.Name }}<|channel|>commentary <|constrain|>json<|message|>
{{- .Function.Arguments }}<|call|>
{{- end }}
{{- else }}<|start|>assistant<|channel|>final<|message|>{{ $message.Content }}<|end|>
{{- end }}
{{- end }}
{{- end }}<|start|>assistant"""

_QUOTED = re.compile(r'^TEMPLATE """(.*?)"""$', re.DOTALL | re.MULTILINE)


def ollama_template(format: FormatSettings) -> str:
    """The template for these format settings; think levels that a caller names still win."""
    return _TEMPLATE.replace("@DATE@", format.current_date).replace("@EFFORT@", format.reasoning_effort)


def modelfile(gguf: str, format: FormatSettings, context: int) -> str:
    """The text of the Modelfile beside a GGUF file. `context`: tokens that Ollama keeps (its own default is 4,096 or less)."""
    return (
        f"# ollama create NAME -f {MODELFILE}\n"
        f"FROM ./{gguf}\n"
        f'TEMPLATE """{ollama_template(format)}"""\n'
        f"PARAMETER num_ctx {context}\n"
        "PARAMETER temperature 1\n"
        "PARAMETER top_p 1\n"
    )


def read_modelfile(path: Path) -> str:
    """The template in a Modelfile. `FastossError` when it has none."""
    found = _QUOTED.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise FastossError("no TEMPLATE in it", place=str(path))
    return found[1]


def ollama_values(conversation: Conversation) -> dict[str, Any]:
    """What Ollama hands to the template for a chat without tools (`template.Execute`): messages of one role that follow each other are joined."""
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        if messages and messages[-1]["Role"] == message.role:
            messages[-1]["Content"] += "\n\n" + message.content
        else:
            messages.append({"Role": message.role, "Content": message.content, "Thinking": message.thinking or "", "ToolCalls": [], "ToolName": ""})
    system = "\n\n".join(message.content for message in conversation.messages if message.role == "system")
    return {"System": system, "Messages": messages, "Tools": [], "ThinkLevel": conversation.reasoning_effort or "", "Response": ""}


def can_render(conversation: Conversation) -> bool:
    """Ollama orders a tool's properties and writes arguments in its own way, and knows no date of a row's own."""
    plain = not conversation.tools and conversation.current_date is None
    return plain and not any(message.role == "tool" or message.tool_call for message in conversation.messages)


def modelfile_render(path: Path) -> Render:
    """Ids of prompts as the Modelfile's template writes them."""
    template = GoTemplate(read_modelfile(path))

    def render(conversation: Conversation, kind: Kind) -> list[int]:
        assert kind == "prompt", "Ollama renders prompts only"
        return encode_control(template.render(ollama_values(conversation)))

    return render
