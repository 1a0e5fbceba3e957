"""Conversion of torch tensors to NumPy or CuPy arrays and back without a copy, of bfloat16 and float8, too."""

import warnings
from functools import cache
from typing import Any

import numpy as np
import torch

from lentando.comm.containers import mapped, plain
from lentando.comm.dtypes import bfloat16, numpy_dtype
from lentando.comm.errors import ConfigurationError
from lentando.comm.foreign_memory import array_at
from lentando.comm.transport import Array
from lentando.torch.local_tensors import address

__all__ = [
    "as_array",
    "as_device_array",
    "as_tensor",
    "dtype_name",
    "is_plain",
    "new_tensor",
    "share_stream",
]


class _ArrayInterface:
    """The array interface of a CPU tensor, through which NumPy reads its memory and keeps it alive.

    ``Tensor.numpy()`` is not used because it permanently forbids to resize the storage, for all tensors that share it.
    A tensor that is only sent or saved must not change in this way.

    Args:
        tensor: CPU tensor, kept alive by this object.
        dtype: dtype that is built into NumPy, with the element size of the tensor.
    """

    def __init__(self, tensor: torch.Tensor, dtype: np.dtype[Any]) -> None:
        self._tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "data": (address(tensor), False),  # False: it may be written to
            "typestr": dtype.str,
            "shape": tuple(tensor.shape),
            "strides": tuple(step * dtype.itemsize for step in tensor.stride()),
        }


@cache
def _array_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    """The dtype of the array that views a tensor; None if there is none."""
    try:
        return numpy_dtype(str(dtype).removeprefix("torch."))
    except TypeError:
        return None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are contiguous in host memory, as they are."""
    return (
        tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
    )


def _plain_array(tensor: torch.Tensor) -> Array | None:
    """View a plain tensor as ``as_array`` does, in a fraction of the time; None if it has no memory of its own."""
    start, dtype = address(tensor), _array_dtype(tensor.dtype)
    if not start or dtype is None:
        return None
    owner = tensor.detach()  # keeps the storage that it has now
    return array_at(start, tensor.nbytes, dtype, owner).reshape(tensor.shape)


def as_array(tensor: torch.Tensor) -> Array:
    """View the memory of a CPU tensor as an array of the same shape, strides and dtype.

    bfloat16 and float8 are the dtypes of ml_dtypes. The tensor is not changed, and is still resizable if it was before,
    but must not be resized while the array is in use. A tensor whose conjugate or negative has not been computed yet
    (``Tensor.is_conj()``, ``Tensor.is_neg()``) is copied.

    Raises:
        ConfigurationError: for a tensor without memory of its own (sparse, quantized, on the meta device, a wrapper
            such as ``DTensor``), or of a dtype that neither NumPy nor ml_dtypes has.
    """
    if is_plain(tensor) and (array := _plain_array(tensor)) is not None:
        return array
    tensor = tensor.detach().resolve_conj().resolve_neg()
    name = dtype_name(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout}, on device {tensor.device}"
        raise ConfigurationError(f"expected a dense tensor in host memory, found one of {name} that is {kind}")
    dtype = _array_dtype(tensor.dtype)
    if dtype is None:
        raise ConfigurationError(f"tensors of {name} can be neither sent nor saved: convert them first")
    if tensor.numel() == 0:
        return np.zeros(tuple(tensor.shape), dtype)
    if not address(tensor):
        raise ConfigurationError(f"expected a tensor with memory of its own, found {type(tensor).__name__} without")
    built_in = dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")
    return np.asarray(_ArrayInterface(tensor, built_in)).view(dtype)


def as_device_array(tensor: torch.Tensor) -> Array:
    """View the memory of a contiguous CUDA tensor as a CuPy array, used on the stream that ``share_stream`` sets."""
    import cupy

    share_stream(tensor.device)
    if tensor.dtype == torch.bfloat16:
        viewed: Array = cupy.from_dlpack(tensor.detach().view(torch.int16)).view(bfloat16)
        return viewed
    array: Array = cupy.from_dlpack(tensor.detach())
    return array


def share_stream(device: torch.device) -> None:
    """Make PyTorch's current stream that of CuPy in this thread, so that the work of both runs in order.

    Raises:
        ConfigurationError: if another device is PyTorch's current one, which new tensors and streams would use.
    """
    import cupy

    current = torch.cuda.current_device()
    if current != device.index:
        raise ConfigurationError(
            f"the model is on {device}, but PyTorch's current device is cuda:{current}: call "
            "torch.cuda.set_device(lt.local_rank()) before the model is made"
        )
    cupy.cuda.Device(device.index).use()
    pointer = torch.cuda.current_stream(device).cuda_stream
    if cupy.cuda.get_current_stream().ptr == pointer:
        return
    if pointer == 0:
        cupy.cuda.Stream.null.use()
        return
    with warnings.catch_warnings():
        # CuPy 14 recommends Stream.from_external instead. According to its source, the object that this returns
        # destroys the stream in the end, which belongs to PyTorch.
        warnings.simplefilter("ignore", DeprecationWarning)
        cupy.cuda.ExternalStream(pointer, device.index).use()


def as_tensor(array: Array) -> torch.Tensor:
    """View the memory of an array as a CPU tensor, which cannot be resized."""
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    dtype: torch.dtype = getattr(torch, array.dtype.name)
    return torch.from_numpy(array.view(f"u{array.dtype.itemsize}")).view(dtype)


def new_tensor(array: Array) -> torch.Tensor:
    """Copy an array into a new CPU tensor, which can be resized like any tensor that PyTorch makes."""
    return as_tensor(array).clone()


def dtype_name(tensor: torch.Tensor) -> str:
    """The name of a tensor's dtype in NumPy's spelling, such as ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")


def to_plain(value: Any, where: str = "the object") -> Any:
    """Replace tensors within containers by arrays, for sending and saving.

    Args:
        value: tensor, or containers of tensors and other values.
        where: description of the value for messages.

    Raises:
        ConfigurationError: for a tensor that can be neither sent nor saved, and for containers that contain themselves.
            The message says where it is.
    """
    return plain(value, _plain_leaf, where)


def _plain_leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return as_array(value.detach().cpu())
    return tuple(value) if type(value) is torch.Size else value


def to_torch(value: Any) -> Any:
    """Replace arrays within containers by new tensors, the inverse of ``to_plain``."""
    return mapped(value, lambda value, _: new_tensor(value) if isinstance(value, np.ndarray) else value)
