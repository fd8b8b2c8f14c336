"""What a run does otherwise whose base is shared out over its processes (`distributed.strategy = "fsdp"`, model/sharding.py).

Each forward pass is one of all processes: none may ask the model alone, or once more than the others. train.py and the trainers ask
here. The LoRA is whole in each process, and its gradients are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from fastoss.config import Recipe
from fastoss.model.backend import ModelPlan, model_source, prepare_process
from fastoss.training.progress import rank, world_size


def is_shared_out(recipe: Recipe) -> bool:
    """Whether this run's processes share one base between them; one process alone has nobody to share with."""
    return recipe.distributed.strategy == "fsdp" and world_size() > 1


def join_processes(recipe: Recipe, plan: ModelPlan) -> None:
    """Let the processes meet before the model is loaded: by shares it can only be loaded by all of them. transformers finds them met."""
    import torch

    prepare_process(plan)  # which card is this process's
    model_source(plan)  # builds the tiny model: once they have met, transformers saves in process 0 alone, whoever came first to do it
    patience = timedelta(seconds=2 * recipe.distributed.ddp_timeout)  # as in common_arguments
    torch.distributed.init_process_group("nccl" if plan.device == "gpu" else "gloo", timeout=patience)


def agreed(said: Any) -> Any:
    """What process 0 says, in all processes."""
    import torch

    told = [said]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def of_each(said: Any) -> list[Any]:
    """What every process says, by rank."""
    import torch

    told: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(told, said)
    return told


def dealt(batches: Sequence[list[int]]) -> list[tuple[list[int], bool]]:
    """This process's share of `batches`, as many as each other's: the last may be another's once more, which does not count (False)."""
    ranks = world_size()
    mine = [(members, True) for members in batches[rank() :: ranks]]
    return mine + [(batches[0], False)] * (-(-len(batches) // ranks) - len(mine))


def same_start(model: Any) -> None:
    """Give every process the trained weights of process 0, as DDP does when it is set up."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.distributed.broadcast(parameter.data, src=0)


def average_gradients(model: Any) -> None:
    """Sum the trained weights' gradients over all processes and divide them by their number, after the last backward pass of a step."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world_size()
