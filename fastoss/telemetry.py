"""Usage reports of libraries are switched off, before the first of them is imported."""

from __future__ import annotations

import os


def no_telemetry() -> None:
    """Set the variables by which libraries are told not to report; each reads its own when it is imported.

    huggingface_hub reports for whatever uses it: TRL's trainers made two requests a run. A person's own setting stands.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports and usage figures of wandb and its wandb-core
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it counts starts, and looks for new versions
