"""Torch tensors as NumPy or CuPy arrays and back, sharing memory; bfloat16, which NumPy lacks, included."""

import warnings
from typing import Any

import numpy as np
import torch

from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array

__all__ = ["as_array", "as_device_array", "as_tensor", "dtype_name", "share_stream"]


def as_array(tensor: torch.Tensor) -> Array:
    """The memory of a CPU tensor as an array. Keeps shape and strides."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(bfloat16)
    array: Array = tensor.numpy()
    return array


def as_device_array(tensor: torch.Tensor) -> Array:
    """The memory of a contiguous CUDA tensor as a CuPy array, on the stream that is ``share_stream``'s."""
    import cupy

    share_stream(tensor.device)
    if tensor.dtype == torch.bfloat16:
        viewed: Array = cupy.from_dlpack(tensor.detach().view(torch.int16)).view(bfloat16)
        return viewed
    array: Array = cupy.from_dlpack(tensor.detach())
    return array


def share_stream(device: torch.device) -> None:
    """Make PyTorch's current stream CuPy's too, in this thread, so that each goes on where the other has left off.

    Raises:
        ConfigurationError: if PyTorch's current device is another, where its new tensors and streams would be.
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
        # CuPy 14 wants Stream.from_external in its place, whose result, as its source reads, destroys the stream in the
        # end. But it is PyTorch's.
        warnings.simplefilter("ignore", DeprecationWarning)
        cupy.cuda.ExternalStream(pointer, device.index).use()


def as_tensor(array: Array) -> torch.Tensor:
    """The memory of an array as a CPU tensor."""
    if array.dtype == bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def dtype_name(tensor: torch.Tensor) -> str:
    """``"float32"`` and the like, as NumPy spells it."""
    return str(tensor.dtype).removeprefix("torch.")


def to_plain(value: Any) -> Any:
    """Tensors within lists, tuples and dicts as arrays, for sending."""
    return _map(value, torch.Tensor, lambda tensor: as_array(tensor.cpu()))


def to_torch(value: Any) -> Any:
    """Arrays within lists, tuples and dicts as tensors."""
    return _map(value, np.ndarray, as_tensor)


def _map(value: Any, kind: type, convert: Any) -> Any:
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, dict):
        return {key: _map(item, kind, convert) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(item, kind, convert) for item in value)
    return value
