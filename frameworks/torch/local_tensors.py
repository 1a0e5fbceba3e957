"""Access to the memory of PyTorch's parameters, gradients and buffers on this rank.

Every other module reads and replaces memory through these functions. What they assume is checked in ``wrappable``: a
parameter has dense memory of its own, and computes from any other memory that ``use_memory`` moves it to. The latter
does not hold for the sharded parameters (``DTensor``) of ``torch.distributed.fsdp.fully_shard``, which are gathered
from memory that FSDP keeps for itself. Such tensors would have to be copied into the flat buffers and back, in ``load``
and ``store`` of the framework (``model.py``).
"""

from collections.abc import Iterable, Sequence

import torch

from lentando.comm.errors import ConfigurationError

__all__ = [
    "address",
    "addresses",
    "any_sparse",
    "as_complex",
    "as_real",
    "copy_into",
    "copy_together",
    "dense_gradient",
    "identity",
    "is_dense",
    "is_same_memory",
    "overlaps_itself",
    "place",
    "release_memory",
    "set_gradient",
    "set_gradients",
    "use_memory",
    "write",
]


def address(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's memory, or 0 if it has no memory of its own."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, ValueError):  # sparse tensors, wrappers, parameters of lazy modules
        return 0


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return the ``address`` of each tensor, faster."""
    try:
        return list(map(torch.Tensor.data_ptr, tensors))
    except (RuntimeError, ValueError):
        return list(map(address, tensors))


def place(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses where the memory of a dense tensor begins and ends."""
    return address(tensor), address(tensor) + tensor.nbytes


def is_same_memory(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of the same shape begin at the same place in memory."""
    return tensor.data_ptr() == other.data_ptr()


def identity(tensor: torch.Tensor) -> tuple[int, int]:
    """Identify a tensor by its memory, which detached copies share: address and number of elements."""
    return address(tensor) or (id(tensor) if tensor.numel() else 0), tensor.numel()


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements fill the memory from the first to the last one without gaps or overlaps."""
    expected = 1
    for step, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if step != expected:
                return False
            expected *= length
    return True


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Return whether several elements of a tensor share one place in memory, as in an expanded tensor."""
    extent = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > extent


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """View a complex tensor as a real one with a last axis of length 2; return any other tensor unchanged."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def as_complex(tensor: torch.Tensor) -> torch.Tensor:
    """View a real tensor with a last axis of length 2 as a complex one: the inverse of ``as_real``."""
    return torch.view_as_complex(tensor)


def use_memory(parameter: torch.Tensor, tensor: torch.Tensor) -> int:
    """Move a parameter into other memory. Its values do not change.

    Args:
        parameter: parameter of a model.
        tensor: tensor of the parameter's shape and dtype, whose memory the parameter has from then on.

    Returns:
        The address of the parameter's memory.
    """
    tensor.copy_(parameter.detach())
    parameter.data = tensor
    return tensor.data_ptr()


def release_memory(parameter: torch.Tensor) -> None:
    """Move a parameter into new memory of its own, so that its previous memory can be freed."""
    parameter.data = parameter.data.clone()


def dense_gradient(name: str, parameter: torch.Tensor) -> torch.Tensor | None:
    """Return the gradient of a parameter, or None if it has none.

    Raises:
        ConfigurationError: if the gradient is sparse.
    """
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise ConfigurationError(
            f"parameter {name!r} has a sparse gradient, which is not averaged during the backward pass: use "
            "sparse=False, or leave out overlap=True"
        )
    return parameter.grad


def set_gradient(parameter: torch.Tensor, memory: torch.Tensor | None) -> None:
    """Give a parameter a gradient over the given memory, or none.

    Args:
        parameter: parameter of a model.
        memory: tensor of the parameter's shape and dtype. The gradient is an alias, so that a change of its shape by
            the program does not change this tensor.
    """
    parameter.grad = None if memory is None else memory.data


def set_gradients(parameters: Iterable[torch.Tensor], memory: Iterable[torch.Tensor]) -> None:
    """Give each of many parameters a gradient, as ``set_gradient`` does, without a call for each.

    Args:
        parameters: parameters of a model.
        memory: a tensor for each of them, of its shape and dtype.
    """
    for parameter, tensor in zip(parameters, memory, strict=True):
        parameter.grad = tensor.data  # an alias like that of detach(), in two thirds of the time


def copy_into(memory: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values of the same shape into memory, unless they are its own."""
    if not is_same_memory(values, memory):
        with torch.no_grad():  # of gradients that have a graph, too (create_graph=True)
            memory.copy_(values)


def copy_together(memory: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copy many tensors by one operation, which takes a fraction of the time for small ones.

    Args:
        memory: a tensor for each of the values, of its shape, none of them the value itself.
        values: what is copied.
    """
    if memory:
        with torch.no_grad():  # of gradients that have a graph, too (create_graph=True)
            torch._foreach_copy_(memory, values)


def any_sparse(gradients: Iterable[torch.Tensor | None]) -> bool:
    """Return whether any of the gradients is sparse."""
    return any(gradient is not None and gradient.is_sparse for gradient in gradients)


def write(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values of the same shape into a tensor, which may be expanded (one element for all of an axis)."""
    if 0 in tensor.stride():
        for axis, step in enumerate(tensor.stride()):
            if step == 0 and tensor.shape[axis] > 1:
                tensor, values = tensor.narrow(axis, 0, 1), values.narrow(axis, 0, 1)
    tensor.copy_(values)
