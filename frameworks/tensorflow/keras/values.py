"""Horovod's collectives of its Keras modules, which take values: numbers, lists, arrays and tensors."""

from typing import Any

import tensorflow as tf

from lentando.comm.operations import Average, Op
from lentando.tensorflow import functions
from lentando.tensorflow.compression import Compression, Compressor

__all__ = ["allgather", "allreduce", "broadcast", "reducescatter"]


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: Op | None = None,
    compression: type[Compressor] = Compression.none,
) -> Any:
    """Reduce a value over all ranks, and return a tensor, which is bit-identical on every rank.

    Args:
        value: what ``tf.convert_to_tensor`` takes, of equal shape and dtype on all ranks.
        name: name of the operation, which is compared between ranks and shown in messages.
        average: Horovod's older form of ``op``: True for ``Average``, False for ``Sum``.
        prescale_factor: factor that the value is multiplied by before the reduction.
        postscale_factor: factor that the result is multiplied by.
        op: ``Average`` (the default), ``Sum``, ``Min``, ``Max``, ``Product`` or ``Adasum``.
        compression: ``Compression.none``, ``fp16`` or ``bf16``.

    Example:
        >>> import lentando.tensorflow.keras as hvd
        >>> hvd.init()
        >>> hvd.allreduce([1.0, 2.0], op=hvd.Sum).numpy().tolist()
        [1.0, 2.0]
        >>> hvd.shutdown()
    """
    return functions.allreduce(
        tf.convert_to_tensor(value),
        average=average,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        op=op,
        compression=compression,
        name=name,
    )


def allgather(value: Any, name: str | None = None) -> Any:
    """Concatenate the values of all ranks along the first axis, in which their lengths may differ, to a tensor.

    Args:
        value: what ``tf.convert_to_tensor`` takes, of equal dtype on all ranks.
        name: name of the operation, which is compared between ranks and shown in messages.
    """
    return functions.allgather(tf.convert_to_tensor(value), name)


def broadcast(value: Any, root_rank: int, name: str | None = None) -> Any:
    """Return one rank's value on every rank, as a tensor.

    Args:
        value: what ``tf.convert_to_tensor`` takes, of equal shape and dtype on all ranks.
        root_rank: rank whose value all ranks receive.
        name: name of the operation, which is compared between ranks and shown in messages.
    """
    return functions.broadcast(tf.convert_to_tensor(value), root_rank, name)


def reducescatter(value: Any, name: str | None = None, op: Op = Average) -> Any:
    """Reduce a value over all ranks, and return this rank's part of the first axis, as a tensor.

    Args:
        value: what ``tf.convert_to_tensor`` takes, of equal shape and dtype on all ranks.
        name: name of the operation, which is compared between ranks and shown in messages.
        op: ``Average`` or ``Sum``.
    """
    return functions.reducescatter(tf.convert_to_tensor(value), op=op, name=name)
