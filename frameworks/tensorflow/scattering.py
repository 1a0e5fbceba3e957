"""``reducescatter`` of TensorFlow tensors, alone and in groups, with gradients."""

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from lentando.comm.operations import Average, Op, Sum, grouped_reducescatter_call, reducescatter_call
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.comm.transport import Array
from lentando.optimizers.no_gradient import check_has_gradient
from lentando.tensorflow.compression import Compression, Compressor
from lentando.tensorflow.exchanges import allgather, grouped_allgather
from lentando.tensorflow.python_calls import unconverted
from lentando.tensorflow.running import Caller, name_of_gradient, on_arrays, on_device, with_gradient

__all__ = ["grouped_reducescatter", "reducescatter"]


@unconverted
def reducescatter(
    tensor: Any,
    device_dense: str = "",
    compression: type[Compressor] = Compression.none,
    op: Op = Average,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    """Reduce a tensor over all ranks, and return this rank's share of the rows of the result.

    Rows are divided evenly; if they cannot be, the first ranks have one more. Differentiable for ``Average`` and
    ``Sum``.

    Args:
        tensor: tensor of at least one axis, of equal shape and dtype on all ranks.
        device_dense: device of the result.
        compression: how the tensor is rounded while it is sent.
        op: ``Average`` (the default) or ``Sum``.
        name: name of the operation.
        process_set: the participating ranks.
        ignore_name_scope: no effect.
        prescale_factor: factor before the reduction.
        postscale_factor: factor after the reduction.

    Raises:
        MismatchError: as for ``allreduce``.
        ConfigurationError: for a tensor without axes, or another op.

    Example:
        >>> import lentando.tensorflow as lt
        >>> lt.init()
        >>> lt.reducescatter(tf.constant([1.0, 2.0]), op=lt.Sum).numpy().tolist()
        [1.0, 2.0]
        >>> lt.shutdown()
    """
    (result,) = _grouped_scatter(
        [tensor], device_dense, compression, op, prescale_factor, postscale_factor, name, process_set, is_single=True
    )
    return result


@unconverted
def grouped_reducescatter(
    tensors: Iterable[Any],
    device_dense: str = "",
    compression: type[Compressor] = Compression.none,
    op: Op = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    *,
    name: str | None = None,
) -> list[Any]:
    """Reduce several tensors over all ranks, and return this rank's share of the rows of each.

    Args:
        tensors: tensors of at least one axis, in the same order on all ranks.
        device_dense: as for ``reducescatter``, like all arguments that follow.
        compression: how tensors are rounded while they are sent.
        op: the way in which values are combined.
        process_set: the participating ranks.
        prescale_factor: factor before the reduction.
        postscale_factor: factor after the reduction.
        name: name of the operation.

    Raises:
        MismatchError: as for ``allreduce``.
        ConfigurationError: for a tensor without axes.
    """
    return _grouped_scatter(
        list(tensors), device_dense, compression, op, prescale_factor, postscale_factor, name, process_set
    )


def _grouped_scatter(
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
    """Shares of the reduced tensors."""
    if not tensors:
        return []

    def reduce(arrays: list[Array], call: Caller) -> list[Array]:
        options = {"prescale_factor": prescale_factor, "postscale_factor": postscale_factor}
        if is_single:
            return [call(reducescatter_call, arrays[0], op, **options)]
        return call(grouped_reducescatter_call, arrays, op, **options)

    def gradient(*upstream: Any) -> list[Any]:
        check_has_gradient("reducescatter", op)
        factor = prescale_factor * postscale_factor * (len(process_set.ranks) if op is Sum else 1)
        scaled = [g * tf.cast(factor, g.dtype) for g in upstream]
        if is_single:
            return [allgather(scaled[0], name_of_gradient(name), process_set=process_set)]
        return grouped_allgather(scaled, name_of_gradient(name), process_set=process_set)

    with on_device(device):
        tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
        sent, contexts = zip(*(compression.compress(tensor) for tensor in tensors), strict=True)
        shapes = [None if not tensor.shape.rank else [None, *tensor.shape[1:]] for tensor in sent]
        operation = "reducescatter" if is_single else "grouped_reducescatter"
        results = with_gradient(sent, on_arrays(reduce, operation, sent, shapes, name, process_set), gradient)
        return [compression.decompress(result, ctx) for result, ctx in zip(results, contexts, strict=True)]
