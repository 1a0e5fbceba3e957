"""The memory of CPU tensors as flat NumPy arrays, which ``comm`` moves and reduces."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from lentando.comm.dtypes import numpy_dtype
from lentando.comm.foreign_memory import array_at
from lentando.comm.transport import Array

__all__ = ["check_tensors", "dtype_of", "has_plain_memory", "overlap", "readable", "writable"]

FOR_OTHER_DEVICES = 'group = new_group(backend="nccl"), and DistributedDataParallel(model, process_group=group)'


def check_tensors(tensors: Sequence[torch.Tensor], operation: str) -> None:
    """Check that all tensors are dense, and in host memory.

    Args:
        tensors: the tensors of one call.
        operation: name of the call, for messages.

    Raises:
        ValueError: for a sparse tensor.
        RuntimeError: for a tensor on another device.
    """
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise RuntimeError(
                f"{operation} of a tensor on {tensor.device}: backend lentando takes CPU tensors. Others need a "
                f"group of their own: {FOR_OTHER_DEVICES}"
            )
        if tensor.layout is not torch.strided:
            raise ValueError(f"{operation} of a tensor with layout {tensor.layout}: expected a dense tensor")


def has_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor are in its memory, in their order: then its arrays are views of that memory.

    Example:
        >>> values = torch.zeros(2, 3, dtype=torch.complex64)
        >>> [has_plain_memory(tensor) for tensor in (values, values.T, values.conj())]
        [True, False, False]
    """
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def readable(tensor: torch.Tensor) -> Array:
    """The values of a tensor in a one-dimensional array: a view of its memory, or a copy if it is not contiguous."""
    return _flat(tensor.detach().resolve_conj().resolve_neg().contiguous())


def writable(tensor: torch.Tensor, stack: ExitStack) -> Array:
    """The memory of a tensor as a one-dimensional array, to be filled.

    Args:
        tensor: tensor to be filled. If it is not contiguous, the array is a copy.
        stack: context at whose end a copy is written back.
    """
    tensor = tensor.detach()
    if has_plain_memory(tensor):
        return _flat(tensor)
    copied = tensor.resolve_conj().resolve_neg().contiguous()
    stack.callback(_copier(copied, tensor))
    return _flat(copied)


def _copier(source: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
    return lambda: target.copy_(source)


def dtype_of(tensor: torch.Tensor) -> np.dtype[Any]:
    """The dtype of a tensor's array. Those that NumPy lacks (float8) are unsigned integers: they can only be moved."""
    try:
        return numpy_dtype(str(tensor.dtype).removeprefix("torch."))
    except TypeError:
        return np.dtype(f"u{tensor.element_size()}")


def overlap(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether one of some tensors lies in the same memory as one of others, wholly or partly, or between its elements.

    Example:
        >>> values = torch.zeros(10)
        >>> overlap([values[:5]], [values[5:]]), overlap([values[:5]], [torch.zeros(1), values[4:]])
        (False, True)
    """
    extents = [_extent(other) for other in others]
    return any(begin < stop and start < end for begin, end in map(_extent, some) for start, stop in extents)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of the first byte of a tensor, and of the byte after its last one."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _flat(tensor: torch.Tensor) -> Array:
    """Not by ``Tensor.numpy()``, which permanently forbids to resize the storage: FSDP does that."""
    dtype = dtype_of(tensor)
    return array_at(tensor.data_ptr(), tensor.nbytes, dtype, tensor) if tensor.numel() else np.empty(0, dtype)
