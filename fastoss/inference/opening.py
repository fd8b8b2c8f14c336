"""MODEL → whatever answers: a run, an adapter or a model is loaded, an address is asked. Commands open their MODEL here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastoss.inference.endpoint import EndpointEngine
    from fastoss.inference.engine import Engine


def open_model(name: str) -> Engine | EndpointEngine:
    """Load a run, an adapter's folder or a model by name, or turn to an OpenAI-compatible server. `FastossError` when it is none of these."""
    from fastoss.inference.endpoint import EndpointEngine, is_endpoint

    if is_endpoint(name):
        return EndpointEngine(name)
    from fastoss.inference.engine import Engine

    return Engine.load(name)
