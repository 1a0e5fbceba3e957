"""Horovod's functions for torch tensors, under Horovod's names and argument order.

They are not differentiable, which Horovod's are: a tensor that requires a gradient is refused while gradients are
enabled, because its result would silently have none.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch

from lentando.comm import operations
from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Average, Op
from lentando.comm.shared_order import in_shared_order
from lentando.comm.world import transport
from lentando.optimizers.no_gradient import not_differentiable
from lentando.torch.convert import as_array, dtype_name, new_tensor, to_plain, to_torch

T = TypeVar("T", torch.Tensor, float)

__all__ = [
    "allgather",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
]


def allreduce(
    tensor: T,
    average: bool | None = None,
    name: str | None = None,
    *,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> T:
    """The tensors of all ranks combined, as a new tensor; bit-identical on every rank.

    Args:
        tensor: equal shape and dtype on all ranks. Or a Python float, int or bool, of which the result is one, too
            (``Average`` of integers is a float).
        average: Horovod's older way to choose: True for ``Average``, False for ``Sum``.
        name: compared between ranks, and shown in messages.
        op: ``Average`` (the default), ``Sum``, ``Min`` or ``Max``.
        prescale_factor: multiplied in before.
        postscale_factor: multiplied in after.

    Raises:
        MismatchError: on every rank, if another calls something else, or by another name.
        ConfigurationError: for a tensor that requires a gradient, outside ``torch.no_grad()``.
    """
    if isinstance(tensor, bool | int | float):
        op = _op(op, average)
        number = operations.allreduce_number(_scaled(tensor, prescale_factor), op, name)
        return _scaled(number, postscale_factor)
    _check_tensor(tensor, "allreduce")
    return allreduce_(
        tensor.detach().clone(),
        average,
        name,
        op=op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    *,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """``allreduce`` in place; returns the tensor."""
    _check_tensor(tensor, "allreduce_")
    op = _op(op, average)
    if not (tensor.is_floating_point() or tensor.is_complex()) and (prescale_factor, postscale_factor) != (1.0, 1.0):
        raise ConfigurationError(
            f"prescale_factor and postscale_factor need floating-point numbers, got a tensor of {dtype_name(tensor)}"
        )
    with torch.no_grad():
        if prescale_factor != 1.0:
            tensor.mul_(prescale_factor)
        host = _on_host(tensor)
        operations.allreduce(as_array(host), op, name)
        tensor.copy_(host)
        if postscale_factor != 1.0:
            tensor.mul_(postscale_factor)
    return tensor


def allgather(tensor: torch.Tensor, name: str | None = None) -> torch.Tensor:
    """The tensors of all ranks joined along the first axis, in which they may differ in length.

    Raises:
        ConfigurationError: for a tensor that requires a gradient, outside ``torch.no_grad()``.
    """
    _check_tensor(tensor, "allgather")
    return new_tensor(operations.allgather(as_array(_on_host(tensor)), name)).to(tensor.device)


def broadcast(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """The root's tensor, as a new tensor.

    Raises:
        ConfigurationError: for a tensor that requires a gradient, outside ``torch.no_grad()``.
    """
    _check_tensor(tensor, "broadcast")
    return broadcast_(tensor.detach().clone(), root_rank, name)


def broadcast_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """``broadcast`` in place; returns the tensor."""
    _check_tensor(tensor, "broadcast_")
    host = _on_host(tensor)
    operations.broadcast(as_array(host), root_rank, name)
    with torch.no_grad():
        tensor.copy_(host)
    return tensor


def broadcast_parameters(params: Mapping[str, Any] | Iterable[tuple[str, torch.Tensor | None]], root_rank: int) -> None:
    """Fill tensors on every rank with the root's of the same name, in place.

    Args:
        params: ``model.state_dict()`` or ``model.named_parameters()``, in any order; entries that are not tensors are
            skipped.
        root_rank: the rank whose values all take over.

    Raises:
        MismatchError: on every rank, if names, shapes or dtypes differ; says which.
    """
    named = [(name, value) for name, value in (params.items() if isinstance(params, Mapping) else params)]
    tensors = [(str(name), value) for name, value in named if isinstance(value, torch.Tensor)]
    described = [(name, f"{dtype_name(value)} {list(value.shape)}") for name, value in tensors]
    with torch.no_grad():
        for number in in_shared_order("broadcast_parameters", described, root_rank):
            name, value = tensors[number]
            broadcast_(value, root_rank, name)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int) -> None:
    """Give every rank the root's optimizer state: momenta, step counts, learning rates.

    Meant for an optimizer that only the root has restored from a checkpoint. For a ``DistributedOptimizer`` that is the
    base optimizer's part; its own part is saved and loaded by each rank.

    Raises:
        MismatchError: on every rank, if the optimizers list parameters of other names (where they know names), shapes
            or dtypes, or in another order.
    """
    from lentando.torch.optimizer import DistributedOptimizer

    if isinstance(optimizer, DistributedOptimizer):
        optimizer = optimizer.base_optimizer
    described = [
        (f"parameter {number}{name and f' ({name})'} of group {of}", f"{dtype_name(own)} {list(own.shape)}")
        for of, group in enumerate(optimizer.param_groups)
        for number, (own, name) in enumerate(zip(group["params"], _names_in(group), strict=True))
    ]
    in_shared_order("broadcast_optimizer_state", described, root_rank)
    state = broadcast_object(optimizer.state_dict(), root_rank, "optimizer state")
    optimizer.load_state_dict(state)


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """The root's object on every rank, sent without pickle.

    Args:
        obj: None, numbers, strings, bytes, paths, tensors and arrays of any dtype, in lists, tuples, sets and dicts
            (``OrderedDict``, ``Counter``, ``defaultdict`` of a built-in type), which keep their kind.
        root_rank: the rank whose object all get.
        name: compared between ranks, and shown in messages.

    Raises:
        ConfigurationError: on every rank, if the object holds anything else; says where.
    """
    return to_torch(operations.broadcast_object(obj, root_rank, name, to_plain))


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """Every rank's object, by rank."""
    gathered: list[Any] = to_torch(operations.allgather_object(obj, name, to_plain))
    return gathered


def _names_in(group: Mapping[str, Any]) -> Iterable[str]:
    """Names of a parameter group's parameters, as torch keeps them where they were given; else empty ones."""
    names: Iterable[str] = group.get("param_names") or [""] * len(group["params"])
    return names


def _op(op: Op | None, average: bool | None) -> Op:
    if average is not None and op is not None:
        raise ConfigurationError("give op= or average=, not both")
    if op is None:
        return Average if average is None or average else operations.Sum
    return op


def _scaled(number: float, factor: float) -> float:
    return number if factor == 1.0 else number * factor


def _check_tensor(tensor: Any, function: str) -> None:
    """Refuse what cannot be sent, and what would lose its gradient without a word.

    Raises:
        ConfigurationError: says what was expected, or how to go on without a gradient.
    """
    if not isinstance(tensor, torch.Tensor):
        numbers = ", or a Python float, int or bool" if function == "allreduce" else ""
        raise ConfigurationError(f"{function} expects a torch.Tensor{numbers}, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        kind = "on the meta device" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout)
        raise ConfigurationError(f"{function} expects a dense tensor that holds values, got one that is {kind}")
    if tensor.requires_grad and torch.is_grad_enabled():
        transport()  # outside of a job, that is the error
        raise not_differentiable(
            f"{function} was given a tensor of shape {list(tensor.shape)} that requires a gradient",
            "Pass tensor.detach(), or call it inside torch.no_grad(),",
        )


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor, contiguous in host memory: its own memory if that can be."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
