"""Reductions of ``tf.IndexedSlices``, the gradients of embeddings: the rows of all ranks are gathered."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from lentando.comm.operations import Average, Op, Sum
from lentando.comm.process_sets import ProcessSet
from lentando.tensorflow.exchanges import grouped_allgather

__all__ = ["as_dense", "check_sparse", "gathered_slices"]


def as_dense(gradient: Any) -> Any:
    """A gradient with all rows. Embeddings have ``tf.IndexedSlices``, whose rows differ between ranks."""
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def check_sparse(op: Op, prescale_factor: float, postscale_factor: float) -> None:
    """Check that a reduction is possible for ``tf.IndexedSlices``.

    Raises:
        NotImplementedError: if it is not, as in Horovod.
    """
    if op is not Average and op is not Sum:
        raise NotImplementedError(
            f"op={op.name} of tf.IndexedSlices is not possible, because their rows are gathered: use op=Average or "
            "op=Sum, or convert them by tf.convert_to_tensor (sparse_as_dense=True in an optimizer or tape)"
        )
    if prescale_factor != 1 or postscale_factor != 1:
        raise NotImplementedError(
            "prescale_factor and postscale_factor are not applied to tf.IndexedSlices: multiply their values, or "
            "convert them by tf.convert_to_tensor (sparse_as_dense=True in an optimizer or tape)"
        )


def gathered_slices(slices: Sequence[Any], op: Op, name: str | None, process_set: ProcessSet) -> list[Any]:
    """The rows of all ranks, as ``tf.IndexedSlices`` in which an index may occur several times.

    Args:
        slices: this rank's rows.
        op: ``Sum``, or ``Average``, for which values are divided by the number of ranks.
        name: name of the operation.
        process_set: the participating ranks.
    """
    parts = [part for s in slices for part in (s.values, s.indices)]
    gathered = grouped_allgather(parts, name, process_set=process_set)
    values, indices = gathered[::2], gathered[1::2]
    if op is Average:
        values = [v / tf.cast(process_set.size(), v.dtype) for v in values]
    return [tf.IndexedSlices(v, i, s.dense_shape) for v, i, s in zip(values, indices, slices, strict=True)]
