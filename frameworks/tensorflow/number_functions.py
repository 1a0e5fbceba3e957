"""Numbers of the job as tensors, which a graph reads when it runs and not when it is traced."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from lentando.comm import world
from lentando.comm.process_sets import process_set_with

__all__ = ["local_rank_op", "local_size_op", "process_set_included_op", "rank_op", "size_op"]


def rank_op(name: str | None = None) -> Any:
    """Return this rank's number as a scalar tensor of int32.

    Args:
        name: name of the operation in a graph.

    Example:
        >>> import lentando.tensorflow as lt
        >>> lt.init()
        >>> int(lt.rank_op()), int(lt.size_op())
        (0, 1)
        >>> lt.shutdown()
    """
    return _number(world.rank, name)


def size_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """Return the number of ranks of a process set as a scalar tensor of int32.

    Args:
        process_set_id: number of the set; 0 is the set of all ranks.
        name: name of the operation in a graph.
    """
    return _number(lambda: process_set_with(process_set_id).size(), name)


def local_rank_op(name: str | None = None) -> Any:
    """Return this rank's number on its node as a scalar tensor of int32.

    Args:
        name: name of the operation in a graph.
    """
    return _number(world.local_rank, name)


def local_size_op(name: str | None = None) -> Any:
    """Return the number of ranks on this rank's node as a scalar tensor of int32.

    Args:
        name: name of the operation in a graph.
    """
    return _number(world.local_size, name)


def process_set_included_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """Return whether this rank is a member of a process set, 1 or 0, as a scalar tensor of int32.

    Args:
        process_set_id: number of the set; 0 is the set of all ranks.
        name: name of the operation in a graph.
    """
    return _number(lambda: process_set_with(process_set_id).included(), name)


def _number(function: Callable[[], Any], name: str | None) -> Any:
    if tf.executing_eagerly():
        return tf.constant(int(function()), tf.int32)
    number = tf.numpy_function(lambda: np.int32(function()), [], tf.int32, name=name)
    return tf.ensure_shape(number, [])
