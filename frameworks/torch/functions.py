"""Collectives for torch tensors, with the names and the order of arguments of Horovod's.

Unlike Horovod's they are not differentiable: a tensor that requires a gradient is refused while gradients are enabled,
because the result would silently have no gradient.
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
    """Combine the tensors of all ranks into a new tensor, which is bit-identical on every rank.

    Args:
        tensor: dense tensor, of the same shape and dtype on all ranks. Or a Python float, int or bool, for which the
            result is a Python number, too (a float for ``Average``).
        average: older argument of Horovod in place of ``op``: True for ``Average``, False for ``Sum``.
        name: name of the call, which is compared between ranks and shown in messages.
        op: ``Average`` (the default), ``Sum``, ``Min`` or ``Max``.
        prescale_factor: factor by which the tensor is multiplied before it is combined.
        postscale_factor: factor by which the result is multiplied.

    Raises:
        MismatchError: on every rank, if another rank makes another call, or uses another name.
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
    """Combine the tensors of all ranks as ``allreduce`` does, but in place, and return the tensor."""
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
    """Concatenate the tensors of all ranks along the first axis, in which they may differ in length.

    Raises:
        ConfigurationError: for a tensor that requires a gradient, outside ``torch.no_grad()``.
    """
    _check_tensor(tensor, "allgather")
    return new_tensor(operations.allgather(as_array(_on_host(tensor)), name)).to(tensor.device)


def broadcast(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """Return the tensor of rank ``root_rank`` as a new tensor.

    Raises:
        ConfigurationError: for a tensor that requires a gradient, outside ``torch.no_grad()``.
    """
    _check_tensor(tensor, "broadcast")
    return broadcast_(tensor.detach().clone(), root_rank, name)


def broadcast_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """Fill the tensor with that of rank ``root_rank``, in place, and return it."""
    _check_tensor(tensor, "broadcast_")
    host = _on_host(tensor)
    operations.broadcast(as_array(host), root_rank, name)
    with torch.no_grad():
        tensor.copy_(host)
    return tensor


def broadcast_parameters(params: Mapping[str, Any] | Iterable[tuple[str, torch.Tensor | None]], root_rank: int) -> None:
    """Fill tensors on every rank with the tensors of the same name of rank ``root_rank``, in place.

    Args:
        params: ``model.state_dict()`` or ``model.named_parameters()``, in any order; entries that are not tensors are
            skipped.
        root_rank: rank whose values are sent.

    Raises:
        MismatchError: on every rank, if names, shapes or dtypes differ. The message names them.
    """
    named = [(name, value) for name, value in (params.items() if isinstance(params, Mapping) else params)]
    tensors = [(str(name), value) for name, value in named if isinstance(value, torch.Tensor)]
    described = [(name, f"{dtype_name(value)} {list(value.shape)}") for name, value in tensors]
    with torch.no_grad():
        for number in in_shared_order("broadcast_parameters", described, root_rank):
            name, value = tensors[number]
            broadcast_(value, root_rank, name)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int) -> None:
    """Load the optimizer state of rank ``root_rank`` on every rank: momenta, step counts, learning rates.

    Meant for an optimizer that only that rank has restored from a checkpoint. For a ``DistributedOptimizer`` only the
    state of the base optimizer is sent; each rank saves and loads the state of its replica itself.

    Raises:
        MismatchError: on every rank, if the optimizers have parameters of different names (where they keep names),
            shapes or dtypes, or in a different order.
    """
    from lentando.torch.optimizer import DistributedOptimizer

    if isinstance(optimizer, DistributedOptimizer):
        optimizer = optimizer.base_optimizer
    described = [
        (f"parameter {number}{name and f' ({name})'} of group {place}", f"{dtype_name(value)} {list(value.shape)}")
        for place, group in enumerate(optimizer.param_groups)
        for number, (value, name) in enumerate(zip(group["params"], _names_in(group), strict=True))
    ]
    in_shared_order("broadcast_optimizer_state", described, root_rank)
    state = broadcast_object(optimizer.state_dict(), root_rank, "optimizer state")
    optimizer.load_state_dict(state)


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """Return the object of rank ``root_rank`` on every rank. It is sent without pickle.

    Args:
        obj: None, numbers, strings, bytes, paths, tensors and arrays of any dtype, in lists, tuples, sets and dicts
            (``OrderedDict``, ``Counter``, ``defaultdict`` of a built-in type), whose types are kept.
        root_rank: rank whose object is sent.
        name: name of the call, which is compared between ranks and shown in messages.

    Raises:
        ConfigurationError: on every rank, if the object contains anything else. The message says where.
    """
    return to_torch(operations.broadcast_object(obj, root_rank, name, to_plain))


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """Return the objects of all ranks, in the order of ranks. They are sent without pickle."""
    gathered: list[Any] = to_torch(operations.allgather_object(obj, name, to_plain))
    return gathered


def _names_in(group: Mapping[str, Any]) -> Iterable[str]:
    """The names of the parameters of a group, as torch keeps them if they were given, otherwise empty names."""
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
    """Check that a tensor can be sent, and that its gradient would not be lost silently.

    Raises:
        ConfigurationError: for anything else.
    """
    if not isinstance(tensor, torch.Tensor):
        numbers = ", or a Python float, int or bool" if function == "allreduce" else ""
        raise ConfigurationError(f"{function} expects a torch.Tensor{numbers}, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        kind = "on the meta device" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout)
        raise ConfigurationError(f"{function} expects a dense tensor that holds values, got one that is {kind}")
    if tensor.requires_grad and torch.is_grad_enabled():
        transport()  # raises NotInitializedError outside of a job, which is the more useful error
        raise not_differentiable(
            f"{function} was given a tensor of shape {list(tensor.shape)} that requires a gradient",
            "Pass tensor.detach(), or call it inside torch.no_grad(),",
        )


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor, contiguous in host memory: in the tensor's own memory where possible."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
