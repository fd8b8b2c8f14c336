"""The model card of an export: what it is, what it learned from, how it was measured and verified."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastoss.export.subject import Subject
from fastoss.export.verify import Verification
from fastoss.run import RunDirectory, read_json_lines

_USE = {
    "adapter": ("peft", "AutoPeftModelForCausalLM"),
    "merged": ("transformers", "AutoModelForCausalLM"),
    "mxfp4": ("transformers", "AutoModelForCausalLM"),
}
_TITLES = {"adapter": "LoRA adapter", "merged": "merged weights", "mxfp4": "merged weights in MXFP4", "gguf": "GGUF"}


def card(subject: Subject, result: Verification) -> str:
    """The README.md of an export's folder."""
    name = subject.recipe.name if subject.recipe else subject.adapter.folder.name
    published = subject.source if "/" in subject.source and not subject.source.startswith((".", "/")) else None
    head = [
        "---",
        "license: apache-2.0",
        f"library_name: {'peft' if result.format == 'adapter' else 'gguf' if result.format == 'gguf' else 'transformers'}",
    ]
    head += [f"base_model: {published}"] if published else []
    head += ["pipeline_tag: text-generation", "tags:", "- gpt-oss", "- fastoss", *(["- lora"] if result.format == "adapter" else []), "---", ""]
    base = published or (
        "the embedded tiny gpt-oss of fastoss (random weights, for trying things out)" if subject.source == "tiny" else "a local model"
    )
    body = [f"# {name} ({_TITLES[result.format]})", "", f"A fine-tune of {base} with LoRA, made and verified with fastoss.", ""]
    sections = (
        _use(result, name),
        _data(subject),
        _format(subject),
        _recipe(subject),
        _metrics(subject),
        _samples(subject),
        _verification(result),
        _limits(result),
    )
    return "\n".join([*head, *body, *(line for section in sections for line in section)]) + "\n"


def _use(result: Verification, name: str) -> Iterator[str]:
    yield "## How to use it"
    yield ""
    if result.format == "gguf":
        yield from (f"```sh\nllama-cli --jinja -m model-*.gguf          # llama.cpp\nollama create {name} -f Modelfile && ollama run {name}\n```", "")
    else:
        library, loader = _USE[result.format]
        call = f'{loader}.from_pretrained("THIS_FOLDER", dtype="auto", device_map="auto")'
        yield from ("```python", f"from {library} import {loader}", f"model = {call}", "```", "")


def _data(subject: Subject) -> Iterator[str]:
    data: dict[str, Any] = subject.manifest.get("data") or {}
    yield "## Data"
    yield ""
    if not data or subject.recipe is None:
        yield from ("Not recorded.", "")
        return
    sources = ", ".join(f"`{_public(source.source)}`" for source in subject.recipe.data)
    yield f"{data['train_rows']:,} rows, {data['train_examples']:,} examples, {data['trained_tokens']:,} tokens with loss, from {sources}."
    yield f"Fingerprint of every token and its weight: `{data['fingerprint']}`."
    yield ""


def _public(source: str) -> str:
    """A source's name without the folders of the machine that it lay on."""
    return source if source.startswith(("hf:", "modelscope:")) else source.rsplit("/", 1)[-1]


def _format(subject: Subject) -> Iterator[str]:
    settings = subject.stamp.format
    weights = ", ".join(f"{channel} {weight:g}" for channel, weight in settings.train_on.items())
    yield "## Format and mask"
    yield ""
    pinned = f"Reasoning effort `{settings.reasoning_effort}`, current date pinned to `{settings.current_date}`"
    yield f"OpenAI's harmony format. {pinned}; the chat template here says both."
    turns = "every assistant turn is an example of its own" if settings.turns == "all" else "the last assistant turn of each row is the example"
    yield f"Loss by channel: {weights}; {turns}, its history without earlier reasoning, and the prompt carries no loss."
    if settings.identity:
        yield f"Name and author in the rows: {settings.identity.name}, {settings.identity.author}."
    yield ""


def _recipe(subject: Subject) -> Iterator[str]:
    if subject.recipe is None:
        return
    plain = subject.recipe.model_dump(mode="json")
    for source in plain["data"]:
        source["source"] = _public(source["source"])
    shown = {key: plain[key] for key in ("name", "method", "model", "lora", "train", "dpo", "hygiene") if plain.get(key)}
    shown["model"]["name"] = subject.source if not subject.source.startswith(("/", ".")) else "a local folder"
    shown["model"].pop("adapter", None)
    yield from ("## Recipe", "", "```json", json.dumps(shown, indent=1, ensure_ascii=False), "```", "")


def _metrics(subject: Subject) -> Iterator[str]:
    run: RunDirectory | None = subject.run
    if run is None or not run.metrics.is_file():
        return
    entries = read_json_lines(run.metrics)
    losses = [entry for entry in entries if "loss" in entry]
    if not losses:
        return
    yield from ("## Metrics", "", "| | first | last |", "|---|---|---|")
    yield f"| step | {losses[0]['step']} | {losses[-1]['step']} |"
    yield f"| loss | {losses[0]['loss']:.4f} | {losses[-1]['loss']:.4f} |"
    held_out = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    if held_out:
        yield f"| loss on held-out rows | {held_out[0]:.4f} | {held_out[-1]:.4f} |"
    yield ""


def _samples(subject: Subject) -> Iterator[str]:
    answered = [entry for entry in subject.samples if entry.get("after")]
    if not answered:
        return
    yield from ("## Samples", "", "| asked | before | after |", "|---|---|---|")
    for entry in answered[:6]:
        yield f"| {_cell(entry['messages'][-1]['content'])} | {_reply(entry['before'])} | {_reply(entry['after'])} |"
    yield ""


def _reply(reply: dict[str, Any]) -> str:
    thinking = f"*({_cell(reply['thinking'])})* " if reply.get("thinking") else ""
    return thinking + _cell(reply["content"]) + (" *(malformed)*" if reply.get("problems") else "")


def _cell(text: str) -> str:
    plain = " ".join(text.split())
    plain = plain if len(plain) <= 200 else plain[:199] + "…"
    return plain.replace("|", "\\|").replace("<", "&lt;")


def _verification(result: Verification) -> Iterator[str]:
    yield from ("## Verification", "", "| check | result |", "|---|---|")
    for line in result.lines():
        what, _, told = line.partition(": ")
        yield f"| {_cell(what)} | {_cell(told)} |"
    yield from ("", "Details are in `verification.json`.", "")


def _limits(result: Verification) -> Iterator[str]:
    yield from ("## Licence and limits", "")
    yield "gpt-oss is OpenAI's, under Apache-2.0; what the training data allows is for whoever gave it to say."
    yield "The model has the base's faults, and may have taken on those of its data."
    yield "Replies were compared on a few prompts, not judged for quality or safety."
    if result.format == "gguf":
        yield "llama.cpp rounds the range of YaRN's correction, which transformers does not: log-probabilities differ by a few thousandths."
    yield "Programs that render chats themselves (vLLM for gpt-oss, for one) stamp today's date where this model knew a pinned one."
    yield ""
