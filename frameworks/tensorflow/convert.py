"""Conversion of TensorFlow tensors to NumPy arrays and back, bfloat16 included, with at most one copy."""

from typing import Any

import numpy as np
import tensorflow as tf

from lentando.comm.containers import mapped, plain
from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array

__all__ = ["as_array", "as_tensor", "copy_for_graph", "to_plain", "to_tensorflow"]

ALIGNMENT_BYTES = 64
"""Alignment of the memory of tensors: TensorFlow's kernels crash the process on memory that is aligned less."""
SMALL_BYTES = 64 * 1024
"""Bytes of an array from which on a copy takes longer than aligning the memory."""


def as_array(tensor: Any) -> Array:
    """A read-only array over the memory of an eager tensor. A tensor on a GPU is copied."""
    if "GPU" in tensor.device:
        copied: Array = tensor.numpy()
        return copied
    if tensor.dtype == tf.bfloat16:  # supported by DLPack, but not by NumPy's reader of it
        return as_array(tf.bitcast(tensor, tf.uint16)).view(bfloat16)
    array: Array = np.from_dlpack(tensor)
    return array


def as_tensor(array: Array, shape: Any = None) -> Any:
    """A copy of an array as a tensor, reshaped if a shape is given.

    The memory is always new: a variable that is assigned a tensor adopts the tensor's memory and later changes it in
    place.
    """
    copied = _aligned_copy(array, shape)
    if array.dtype == bfloat16:
        return tf.bitcast(tf.experimental.dlpack.from_dlpack(copied.view(np.uint16).__dlpack__()), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(copied.__dlpack__())


def _aligned_copy(array: Array, shape: Any = None) -> Array:
    """A contiguous copy of an array, reshaped if a shape is given, in memory that a tensor can adopt."""
    memory = np.empty(array.nbytes + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    aligned = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(aligned, array)
    return aligned if shape is None else aligned.reshape(shape)


def copy_for_graph(array: Array, shape: Any) -> Array:
    """A copy of an array with another shape, which a function of arrays can return to a graph (``call_python``).

    The graph copies memory that is not aligned once more, which takes less time than to align a small array here.
    """
    return array.copy().reshape(shape) if array.nbytes < SMALL_BYTES else _aligned_copy(array, shape)


def to_plain(value: Any, where: str = "the object") -> Any:
    """A nested structure with tensors and variables converted to arrays, to be sent or saved.

    Args:
        value: containers of any depth.
        where: name of the value in error messages.

    Raises:
        ConfigurationError: for a tensor without a value, and if a container contains itself, with its location.
    """
    return plain(value, _plain_leaf, where)


def _plain_leaf(value: Any) -> Any:
    if not hasattr(value, "numpy"):
        return value
    try:
        return value.numpy()
    except (AttributeError, NotImplementedError) as error:  # a tensor of a graph, or a variable without a value
        raise ConfigurationError(f"it has no value that can be sent or saved: {error}") from error


def to_tensorflow(value: Any) -> Any:
    """A nested structure with arrays converted to tensors."""
    return mapped(value, lambda value, _: tf.convert_to_tensor(value) if isinstance(value, np.ndarray) else value)
