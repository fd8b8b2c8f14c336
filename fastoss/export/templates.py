"""The chat template that travels with an export: the official one, asking the model as its training rows asked it.

OpenAI's template stamps today's date, and medium effort unless told otherwise; training pinned both. It also writes tool calls, their
results and definitions in ways of its own (docs/harmony.md). Each place is exchanged exactly once, so a template that is not the known
one is noticed.
"""

from __future__ import annotations

import re
from importlib import resources

from fastoss.config import FormatSettings
from fastoss.data.tokenizer import chat_template

_DATE = '{{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}'
_EFFORT = '{%- set reasoning_effort = "medium" %}'
_MACROS = re.compile(r"\{#- Tool Definition Rendering .*?(?=\{%- macro render_builtin_tools)", re.DOTALL)
_BEFORE_CALL = re.compile(
    r"\{%- if message\.content and message\.thinking %\}.*?\{%- endif %\}\n(?=\s*\{\{- \"<\|start\|>assistant to=\")", re.DOTALL
)
_OUR_BEFORE_CALL = """\
{%- if message.thinking and not future_final_message.found %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {%- endif %}
            {%- if message.content %}
                {{- "<|start|>assistant<|channel|>commentary<|message|>" + message.content + "<|end|>" }}
            {%- endif %}
"""
_FINAL = """{%- if future_message.role == 'assistant' and "tool_calls" not in future_message %}"""
_EXCHANGES = (
    # The answer that is to be learned still sees the reasoning of its chain, as its prompt does.
    (_FINAL, _FINAL.replace(" %}", " and (add_generation_prompt or not loop.last) %}")),
    ('if tool_call.content_type is defined else "json")', 'if tool_call.content_type is defined else "<|constrain|>json")'),
    ("{{- tool_call.arguments|tojson }}", "{{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments|tojson }}"),
    (
        '" to=assistant<|channel|>commentary<|message|>" + message.content|tojson + "<|end|>"',
        '" to=assistant<|channel|>commentary<|message|>" + (message.content if message.content is string else message.content|tojson) + "<|end|>"',
    ),
)


def export_template(format: FormatSettings) -> str:
    """The Jinja template for these format settings. `current_date` and `reasoning_effort` given by a caller still win."""
    date = f'{{{{- "Current date: " + (current_date if current_date is defined else "{format.current_date}") + "\\n\\n" }}}}'
    text = _exchange(chat_template(), _DATE, date)
    text = _exchange(text, _EFFORT, f'{{%- set reasoning_effort = "{format.reasoning_effort}" %}}')
    for old, new in _EXCHANGES:
        text = _exchange(text, old, new)
    macros = resources.files("fastoss.assets").joinpath("tool_macros.jinja").read_text(encoding="utf-8")
    text, count = _MACROS.subn(lambda _: macros, text)
    assert count == 1, "the official template's macros were not found"
    text, count = _BEFORE_CALL.subn(lambda _: _OUR_BEFORE_CALL, text)
    assert count == 1, "the official template's words before a tool call were not found"
    return text


def _exchange(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{text.count(old)} places in the official template read {old}"
    return text.replace(old, new)
