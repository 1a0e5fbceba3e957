"""TensorFlow tensors as NumPy arrays and back: one copy at most, bfloat16 included."""

from typing import Any

import numpy as np
import tensorflow as tf

from lentando.comm.containers import mapped, shortened
from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array

__all__ = ["as_array", "as_tensor", "to_plain", "to_tensorflow"]

ALIGNMENT_BYTES = 64
"""TensorFlow's kernels end the process when the memory of a tensor does not begin at a multiple of this."""


def as_array(tensor: Any) -> Array:
    """The memory of an eager tensor as an array to read from. A tensor on a GPU is copied."""
    if "GPU" in tensor.device:
        copied: Array = tensor.numpy()
        return copied
    if tensor.dtype == tf.bfloat16:  # which DLPack has, and NumPy's reader of it has not
        return as_array(tf.bitcast(tensor, tf.uint16)).view(bfloat16)
    array: Array = np.from_dlpack(tensor)
    return array


def as_tensor(array: Array, shape: Any = None) -> Any:
    """A copy of an array as a tensor, of another shape if one is given.

    A variable that is assigned a tensor keeps its memory and changes it in place later, and so do the tensors that a
    user reads from the variable. So the memory is new, and nobody else's.
    """
    memory = np.empty(array.nbytes + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    own = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(own, array)
    if shape is not None:
        own = own.reshape(shape)
    if array.dtype == bfloat16:
        return tf.bitcast(tf.experimental.dlpack.from_dlpack(own.view(np.uint16).__dlpack__()), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(own.__dlpack__())


def to_plain(value: Any, where: str = "the object") -> Any:
    """Tensors and variables within containers as arrays, for sending and saving.

    Raises:
        ConfigurationError: where containers have no end; says where that is.
    """

    def leaf(value: Any, where: str) -> Any:
        if not hasattr(value, "numpy"):
            return value
        try:
            return value.numpy()
        except (AttributeError, NotImplementedError) as error:  # of a graph, or without values
            raise ConfigurationError(f"{shortened(where)} has no value that could be sent or saved: {error}") from error

    return mapped(value, leaf, where)


def to_tensorflow(value: Any) -> Any:
    """Arrays within containers as tensors."""
    return mapped(value, lambda value, _: tf.convert_to_tensor(value) if isinstance(value, np.ndarray) else value)
