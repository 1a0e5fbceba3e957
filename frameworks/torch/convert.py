"""Torch tensors as NumPy arrays and back, sharing memory; bfloat16, which NumPy lacks, included."""

from typing import Any

import numpy as np
import torch

from lentando.comm.dtypes import bfloat16
from lentando.comm.transport import Array

__all__ = ["as_array", "as_tensor", "dtype_name"]


def as_array(tensor: torch.Tensor) -> Array:
    """The memory of a CPU tensor as an array. Keeps shape and strides."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(bfloat16)
    array: Array = tensor.numpy()
    return array


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
