"""``allgather``, ``broadcast`` and ``alltoall`` of TensorFlow tensors, with gradients."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from lentando.comm.operations import (
    Average,
    allgather_call,
    allreduce_call,
    alltoall_call,
    broadcast_call,
    grouped_allgather_call,
)
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.comm.transport import Array
from lentando.comm.world import rank
from lentando.tensorflow.python_calls import unconverted
from lentando.tensorflow.running import Caller, name_of_gradient, on_arrays, with_gradient

__all__ = ["allgather", "alltoall", "broadcast", "grouped_allgather"]


@unconverted
def allgather(
    tensor: Any, name: str | None = None, ignore_name_scope: bool = False, process_set: ProcessSet = global_process_set
) -> Any:
    """Concatenate the tensors of all ranks along the first axis, in which their lengths may differ.

    Differentiable: the gradient is the mean over ranks of the gradients of this rank's rows, as in Horovod.

    Args:
        tensor: tensor whose dtype and axes but the first are equal on all ranks.
        name: name of the operation, which is compared between ranks and shown in messages.
        ignore_name_scope: no effect, since names do not contain scopes.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, if dtypes, names or the other axes differ. It is also a
            ``tf.errors.FailedPreconditionError``.

    Example:
        >>> import lentando.tensorflow as lt
        >>> lt.init()
        >>> lt.allgather(tf.constant([[1, 2]])).numpy().tolist()
        [[1, 2]]
        >>> lt.shutdown()
    """
    (result,) = _gather([tensor], name, process_set, is_single=True)
    return result


@unconverted
def grouped_allgather(
    tensors: Iterable[Any],
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> list[Any]:
    """Concatenate several tensors with those of all ranks, each along the first axis.

    Args:
        tensors: tensors, in the same order on all ranks.
        name: as for ``allgather``, like all arguments that follow.
        ignore_name_scope: no effect.
        process_set: the participating ranks.

    Raises:
        MismatchError: as for ``allgather``.
    """
    return _gather(list(tensors), name, process_set)


def _gather(tensors: Sequence[Any], name: str | None, process_set: ProcessSet, *, is_single: bool = False) -> list[Any]:
    if not tensors:
        return []
    tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]

    def gather(arrays: list[Array], call: Caller) -> list[Array]:
        return [call(allgather_call, arrays[0])] if is_single else call(grouped_allgather_call, arrays)

    def gradient(*upstream: Any) -> list[Any]:
        lengths = [tf.shape(tensor)[0] if tensor.shape.rank else 1 for tensor in tensors]

        def own_rows(arrays: list[Array], call: Caller) -> list[Array]:
            own, *gradients = arrays
            before = call(allgather_call, own[np.newaxis])[: process_set.rank()].sum(axis=0)
            for array in gradients:
                call(allreduce_call, array, Average)
            return [a[n : n + length] for a, n, length in zip(gradients, before, own, strict=True)]

        shapes = [tensor.shape if tensor.shape.rank else [1] for tensor in tensors]
        dtypes = [g.dtype for g in upstream]
        rows = on_arrays(
            own_rows,
            "allgather_gradient",
            [tf.stack(lengths), *upstream],
            shapes,
            name_of_gradient(name),
            process_set,
            dtypes,
        )
        return [tf.reshape(r, tf.shape(tensor)) for r, tensor in zip(rows, tensors, strict=True)]

    shapes = [None if t.shape.rank is None else [None, *t.shape[1:]] for t in tensors]
    operation = "allgather" if is_single else "grouped_allgather"
    return with_gradient(tensors, on_arrays(gather, operation, tensors, shapes, name, process_set), gradient)


@unconverted
def broadcast(
    tensor: Any,
    root_rank: int,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return the root rank's tensor on every rank.

    Differentiable: on the root rank, the gradient is the mean of the gradients of all ranks, as in Horovod; on others,
    zero.

    Args:
        tensor: tensor of equal shape and dtype on all ranks.
        root_rank: rank whose tensor all ranks receive, by its number in the whole job.
        name: name of the operation, which is compared between ranks and shown in messages.
        ignore_name_scope: no effect, since names do not contain scopes.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, if shape, dtype, root or name differ. It is also a
            ``tf.errors.FailedPreconditionError``.

    Example:
        >>> import lentando.tensorflow as lt
        >>> lt.init()
        >>> lt.broadcast(tf.constant([1.0, 2.0]), root_rank=0).numpy().tolist()
        [1.0, 2.0]
        >>> lt.shutdown()
    """
    tensor = tf.convert_to_tensor(tensor)

    def fill(arrays: list[Array], call: Caller) -> list[Array]:
        call(broadcast_call, arrays[0], root_rank)
        return arrays

    def gradient(upstream: Any) -> list[Any]:
        def of_root(arrays: list[Array], call: Caller) -> list[Array]:
            call(allreduce_call, arrays[0], Average)
            return arrays if rank() == root_rank else [np.zeros_like(arrays[0])]

        return on_arrays(
            of_root, "broadcast_gradient", [upstream], [upstream.shape], name_of_gradient(name), process_set
        )

    (result,) = with_gradient(
        [tensor], on_arrays(fill, "broadcast", [tensor], [tensor.shape], name, process_set), gradient
    )
    return result


@unconverted
def alltoall(
    tensor: Any,
    splits: Any = None,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send some rows of a tensor to each rank, and return the rows that all ranks send to this one.

    Differentiable: gradients are sent back to where the rows came from.

    Args:
        tensor: tensor whose dtype and axes but the first are equal on all ranks.
        splits: number of rows for each rank, in the order of the ranks; equal numbers by default.
        name: name of the operation, which is compared between ranks and shown in messages.
        ignore_name_scope: no effect, since names do not contain scopes.
        process_set: the participating ranks.

    Returns:
        The received rows, in the order of the ranks that sent them; with ``splits``, also the number of rows from each
        rank, as a tensor of int32.

    Raises:
        MismatchError: on every rank, if dtypes, names or the other axes differ. It is also a
            ``tf.errors.FailedPreconditionError``.
        ConfigurationError: if ``splits`` do not fit. It is also a ``tf.errors.InvalidArgumentError``.

    Example:
        >>> import lentando.tensorflow as lt
        >>> lt.init()
        >>> lt.alltoall(tf.constant([1.0, 2.0])).numpy().tolist()
        [1.0, 2.0]
        >>> lt.shutdown()
    """
    tensor = tf.convert_to_tensor(tensor)
    inputs = [tensor] if splits is None else [tensor, tf.cast(splits, tf.int32)]

    def exchange(arrays: list[Array], call: Caller) -> list[Array]:
        received, received_splits = call(alltoall_call, arrays[0], arrays[1] if len(arrays) > 1 else None)
        return [received, np.asarray(received_splits, np.int32)]

    shapes = [None if not tensor.shape.rank else [None, *tensor.shape[1:]], [None]]
    results = on_arrays(exchange, "alltoall", inputs, shapes, name, process_set, [tensor.dtype, tf.int32])
    received_splits = results[1]

    def gradient(upstream: Any) -> list[Any]:
        back, _ = alltoall(upstream, received_splits, name_of_gradient(name), process_set=process_set)
        return [back]

    (received,) = with_gradient([tensor], results[:1], gradient)
    return received if splits is None else (received, received_splits)
