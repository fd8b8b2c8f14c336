"""MODEL → whatever answers: a model is loaded, a GGUF file given to llama.cpp, a server asked. Commands open their MODEL here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastoss.inference.endpoint import EndpointEngine
    from fastoss.inference.engine import Engine
    from fastoss.inference.gguf import GgufEngine


def open_model(name: str) -> Engine | GgufEngine | EndpointEngine:
    """Load a run, an adapter's folder, a model or a GGUF file, or turn to an OpenAI-compatible server. `FastossError` when it is none of these."""
    from fastoss.inference.endpoint import EndpointEngine, is_endpoint

    return EndpointEngine(name) if is_endpoint(name) else open_engine(name)


def open_engine(name: str) -> Engine | GgufEngine:
    """As `open_model`, for those who need what answers in their own hands."""
    from fastoss.inference.gguf import GgufEngine, is_gguf

    if is_gguf(name):
        return GgufEngine.load(name)
    from fastoss.inference.engine import Engine

    return Engine.load(name)
