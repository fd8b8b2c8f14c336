"""`hub.push`: a finished run's adapter, exported, verified and uploaded with its model card. Whatever fails here does not affect the run."""

from __future__ import annotations

import shlex

from fastoss.config import Recipe
from fastoss.errors import FastossError
from fastoss.run import RunDirectory
from fastoss.training.progress import Console

_ADAPTER = "adapter"


def wanted_repo(recipe: Recipe) -> str:
    """The repository that a recipe names; without one the token's owner gets one of the recipe's name."""
    return recipe.hub.repo or f"{{HF_USER}}/{recipe.name}"


def say_before(recipe: Recipe, console: Console) -> None:
    """Said while it can still be fixed: without a token nothing will be pushed."""
    from huggingface_hub import get_token

    if recipe.hub.push and get_token() is None:
        console.say("note: hub.push is set, and there is no token for the hub (HF_TOKEN): the adapter will stay on this machine")


def push_adapter(recipe: Recipe, run: RunDirectory, console: Console) -> None:
    """Export the adapter into the run directory and push it. A fault is one line with the command that repeats what is missing."""
    from huggingface_hub import get_token

    from fastoss.export.export import export, push_run

    repo = wanted_repo(recipe)
    made = False
    try:
        if get_token() is None:
            raise FastossError("there is no token for the hub (HF_TOKEN)")
        export(str(run.root), [_ADAPTER], progress=console.say)
        made = True
        (address,) = push_run(str(run.root), [_ADAPTER], repo, progress=console.say)
        console.say(f"pushed: {address}")
    except Exception as problem:
        fact = problem.fact if isinstance(problem, FastossError) else f"{type(problem).__name__}: {problem}".splitlines()[0]
        named = ["--repo", repo] if recipe.hub.repo is None else []
        again = ["push", str(run.root), *named] if made else ["export", str(run.root), "--format", _ADAPTER, "--push", repo]
        console.say(f"note: the adapter was not pushed: {fact}; it is whole, and this pushes it: {shlex.join(['fastoss', *again])}")
