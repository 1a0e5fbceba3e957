"""``allreduce`` of TensorFlow tensors, alone and in groups, with gradients."""

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from lentando.comm.operations import (
    Average,
    Op,
    allreduce_call,
    grouped_allreduce_call,
)
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.comm.transport import Array
from lentando.optimizers.horovod_arguments import op_of
from lentando.optimizers.no_gradient import check_has_gradient
from lentando.tensorflow.compression import Compression, Compressor
from lentando.tensorflow.python_calls import unconverted
from lentando.tensorflow.running import Caller, name_of_gradient, on_arrays, on_device, with_gradient
from lentando.tensorflow.sparse_tensors import check_sparse, gathered_slices

__all__ = ["allreduce", "grouped_allreduce"]


@unconverted
def allreduce(
    tensor: Any,
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: type[Compressor] = Compression.none,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
) -> Any:
    """Reduce a tensor over all ranks. The result is bit-identical on every rank.

    Differentiable for ``Average`` and ``Sum``: the gradient is the same reduction of the ranks' gradients.

    Args:
        tensor: tensor of equal shape and dtype on all ranks; a Python number becomes a tensor. Of ``tf.IndexedSlices``,
            the rows of all ranks are gathered, and divided by the number of ranks for an average.
        average: Horovod's older form of ``op``: True for ``Average``, False for ``Sum``.
        device_dense: device of the result of a tensor, such as ``"/cpu:0"``.
        device_sparse: device of the result of ``tf.IndexedSlices``.
        compression: how the tensor is rounded while it is sent.
        op: ``Average`` (the default), ``Sum``, ``Min``, ``Max``, ``Product`` or ``Adasum``.
        prescale_factor: factor that the tensor is multiplied by before the reduction.
        postscale_factor: factor that the result is multiplied by.
        name: name of the operation, which is compared between ranks and shown in messages.
        process_set: the participating ranks.
        ignore_name_scope: no effect, since names do not contain scopes.

    Raises:
        MismatchError: on every rank, if another rank calls a different function or uses another shape, dtype, op or
            name. It is also a ``tf.errors.FailedPreconditionError``.

    Example:
        >>> import lentando.tensorflow as lt
        >>> lt.init()
        >>> lt.allreduce(tf.constant([1.0, 2.0]), op=lt.Sum).numpy().tolist()
        [1.0, 2.0]
        >>> lt.shutdown()
    """
    op = op_of(op, average)
    if isinstance(tensor, tf.IndexedSlices):
        check_sparse(op, prescale_factor, postscale_factor)
        with on_device(device_sparse):
            return gathered_slices([tensor], op, name, process_set)[0]
    (result,) = _grouped(
        [tensor], device_dense, compression, op, prescale_factor, postscale_factor, name, process_set, is_single=True
    )
    return result


@unconverted
def grouped_allreduce(
    tensors: Iterable[Any],
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: type[Compressor] = Compression.none,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
    name: str | None = None,
) -> list[Any]:
    """Reduce several tensors over all ranks in one message per dtype.

    Args:
        tensors: tensors and ``tf.IndexedSlices``, in the same order on all ranks.
        average: as for ``allreduce``, like all arguments that follow.
        device_dense: device of the results of tensors.
        device_sparse: device of the results of ``tf.IndexedSlices``.
        compression: how tensors are rounded while they are sent.
        op: the way in which values are combined.
        prescale_factor: factor before the reduction.
        postscale_factor: factor after the reduction.
        process_set: the participating ranks.
        ignore_name_scope: no effect.
        name: name of the operation.

    Raises:
        MismatchError: as for ``allreduce``.
    """
    op = op_of(op, average)
    tensors = list(tensors)
    slices = {number: t for number, t in enumerate(tensors) if isinstance(t, tf.IndexedSlices)}
    dense = {number: t for number, t in enumerate(tensors) if number not in slices}
    results: dict[int, Any] = {}
    if slices:
        check_sparse(op, prescale_factor, postscale_factor)
        with on_device(device_sparse):
            results |= zip(slices, gathered_slices(list(slices.values()), op, name, process_set), strict=True)
    if dense:
        reduced = _grouped(
            list(dense.values()), device_dense, compression, op, prescale_factor, postscale_factor, name, process_set
        )
        results |= zip(dense, reduced, strict=True)
    return [results[number] for number in range(len(tensors))]


def _grouped(
    tensors: Sequence[Any],
    device: str,
    compression: type[Compressor],
    op: Op,
    prescale_factor: float,
    postscale_factor: float,
    name: str | None,
    process_set: ProcessSet,
    *,
    is_single: bool = False,
) -> list[Any]:
    """The dense tensors, compressed, reduced, and decompressed."""
    if op is Average:  # the average of integers is one of floating point unless they have a dtype already
        tensors = [float(t) if isinstance(t, int) and not isinstance(t, bool) else t for t in tensors]

    def reduce(arrays: list[Array], call: Caller) -> list[Array]:
        options = {"prescale_factor": prescale_factor, "postscale_factor": postscale_factor}
        call(allreduce_call if is_single else grouped_allreduce_call, arrays[0] if is_single else arrays, op, **options)
        return arrays

    def gradient(*upstream: Any) -> list[Any]:
        check_has_gradient("allreduce", op)
        return _grouped(
            upstream,
            device,
            Compression.none,
            op,
            prescale_factor,
            postscale_factor,
            name_of_gradient(name),
            process_set,
            is_single=is_single,
        )

    with on_device(device):
        tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
        sent, contexts = zip(*(compression.compress(tensor) for tensor in tensors), strict=True)
        operation = "allreduce" if is_single else "grouped_allreduce"
        results = on_arrays(reduce, operation, sent, [tensor.shape for tensor in sent], name, process_set)
        results = with_gradient(sent, results, gradient)
        return [compression.decompress(result, ctx) for result, ctx in zip(results, contexts, strict=True)]
