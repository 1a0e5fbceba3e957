"""Parameters and optimizer state, sent from one rank to all others."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lentando.comm.shared_order import in_shared_order
from lentando.comm.world import rank
from lentando.torch.convert import dtype_name
from lentando.torch.functions.broadcasting import broadcast_
from lentando.torch.functions.objects import broadcast_object
from lentando.torch.inner_optimizers import held_states, load_with_inner
from lentando.torch.local_tensors import set_gradient

__all__ = ["broadcast_optimizer_state", "broadcast_parameters"]


def broadcast_parameters(
    params: Mapping[str, Any] | Iterable[tuple[str, torch.Tensor | None] | torch.Tensor], root_rank: int
) -> None:
    """Fill tensors on every rank with the tensors of the same name of rank ``root_rank``, in place.

    Args:
        params: ``model.state_dict()`` or ``model.named_parameters()``, in any order; entries that are not tensors are
            skipped. Or ``model.parameters()``, in the same order on all ranks.
        root_rank: rank whose values are sent.

    Raises:
        MismatchError: on every rank, if names, shapes or dtypes differ. The message names them.
    """
    listed = enumerate(params) if not isinstance(params, Mapping) else params.items()
    named = [value if isinstance(value, tuple) else (name, value) for name, value in listed]
    tensors = [(str(name), value) for name, value in named if isinstance(value, torch.Tensor)]
    described = [(name, f"{dtype_name(value)} {list(value.shape)}") for name, value in tensors]
    with torch.no_grad():
        for number in in_shared_order("broadcast_parameters", described, root_rank):
            name, value = tensors[number]
            broadcast_(value, root_rank, name)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, model: torch.nn.Module | None = None
) -> None:
    """Load the optimizer state of rank ``root_rank`` on every rank: momenta, step counts, learning rates.

    Meant for an optimizer that only that rank has restored from a checkpoint. For a ``DistributedOptimizer``, the state
    of the base optimizer is sent, and the counts of steps if replicas have nothing else; otherwise each rank saves and
    loads the state of its replica itself.

    Trainable parameters of an optimizer that has taken no step get a gradient of zeros, as in Horovod, which takes a
    step with them.

    Args:
        optimizer: the optimizer.
        root_rank: rank whose state is sent.
        model: argument of Horovod, which needs it for sparse parameters. It has no effect.

    Raises:
        MismatchError: on every rank, if the optimizers have parameters of different names (where they keep names),
            shapes or dtypes, or in a different order.
    """
    from lentando.torch.optimizer import DistributedOptimizer

    wrapper = optimizer if isinstance(optimizer, DistributedOptimizer) else None
    if wrapper is not None:
        optimizer = wrapper.base_optimizer
    described = [
        (f"parameter {number}{name and f' ({name})'} of group {place}", f"{dtype_name(value)} {list(value.shape)}")
        for place, group in enumerate(optimizer.param_groups)
        for number, (value, name) in enumerate(zip(group["params"], _names_in(group), strict=True))
    ]
    in_shared_order("broadcast_optimizer_state", described, root_rank)
    if not optimizer.state:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and parameter.grad is None:
                    set_gradient(parameter, torch.zeros_like(parameter))
    counts = None if wrapper is None or wrapper.state_is_of_one_rank else wrapper.snapshot()
    sent = (optimizer.state_dict(), held_states(optimizer), counts)
    state, held, counts = broadcast_object(sent, root_rank, "optimizer state")
    load_with_inner(optimizer, state, held)
    if wrapper is not None and counts is not None and rank() != root_rank:
        wrapper.roll_back(counts)


def _names_in(group: Mapping[str, Any]) -> Iterable[str]:
    """The names of the parameters of a group, as torch keeps them if they were given, otherwise empty names."""
    names: Iterable[str] = group.get("param_names") or [""] * len(group["params"])
    return names
