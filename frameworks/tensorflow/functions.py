"""Horovod's functions for TensorFlow tensors, under Horovod's names, for eager code and inside a ``tf.function``.

Unlike Horovod's, they are not differentiable: a ``GradientTape`` that reaches a tensor through one of the results
raises an error, because the gradient would silently be missing. Use ``tf.stop_gradient(tensor)`` if none is wanted.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from lentando.comm import operations
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.operations import Average, Op
from lentando.comm.shared_order import in_shared_order
from lentando.comm.transport import Array
from lentando.comm.world import transport
from lentando.optimizers.no_gradient import not_differentiable
from lentando.tensorflow.convert import to_plain, to_tensorflow
from lentando.tensorflow.python_calls import call_python, check_can_wait, unconverted

__all__ = [
    "DistributedGradientTape",
    "allgather",
    "allgather_object",
    "allreduce",
    "broadcast",
    "broadcast_object",
    "broadcast_variables",
]


@unconverted
def allreduce(
    tensor: Any,
    average: bool | None = None,
    *,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
) -> Any:
    """Reduce a tensor over all ranks. The result is bit-identical on every rank.

    Args:
        tensor: tensor of equal shape and dtype on all ranks; a Python number becomes a tensor. All rows of
            ``tf.IndexedSlices`` are reduced.
        average: Horovod's older form of ``op``: True for ``Average``, False for ``Sum``.
        op: ``Average`` (the default), ``Sum``, ``Min`` or ``Max``.
        prescale_factor: factor that the tensor is multiplied by before the reduction.
        postscale_factor: factor that the result is multiplied by.
        name: name of the operation, which is compared between ranks and shown in messages.

    Raises:
        MismatchError: on every rank, if another rank calls a different function or uses a different name.
    """
    if average is not None and op is not None:
        raise ConfigurationError("give op= or average=, not both")
    if op is None:
        op = Average if average is None or average else operations.Sum

    def combine(array: Array) -> Array:
        operations.allreduce(array, op, name)
        return array

    if isinstance(tensor, int) and not isinstance(tensor, bool) and op is Average:
        tensor = float(tensor)
    tensor = tf.convert_to_tensor(tensor)
    if prescale_factor != 1.0:
        tensor = tensor * tf.cast(prescale_factor, tensor.dtype)
    (result,) = _on_arrays(lambda array: [combine(array)], [tensor], [tensor.shape])
    return result if postscale_factor == 1.0 else result * tf.cast(postscale_factor, result.dtype)


@unconverted
def allgather(tensor: Any, name: str | None = None) -> Any:
    """Concatenate the tensors of all ranks along the first axis, in which their lengths may differ."""
    tensor = tf.convert_to_tensor(tensor)
    shape = [None, *tensor.shape[1:]] if tensor.shape.rank is not None else None
    (result,) = _on_arrays(lambda array: [operations.allgather(array, name)], [tensor], [shape])
    return result


@unconverted
def broadcast(tensor: Any, root_rank: int, name: str | None = None) -> Any:
    """Return the root rank's tensor on every rank."""

    def fill(array: Array) -> list[Array]:
        operations.broadcast(array, root_rank, name)
        return [array]

    tensor = tf.convert_to_tensor(tensor)
    (result,) = _on_arrays(fill, [tensor], [tensor.shape])
    return result


@unconverted
def broadcast_variables(variables: Iterable[Any] | Mapping[str, Any], root_rank: int) -> None:
    """Assign the root rank's values to the variables of the same name on every rank, in place.

    Args:
        variables: ``model.variables``, ``optimizer.variables``, or variables by name, in any order. Several variables
            with one name are matched by their order.
        root_rank: rank whose values all ranks receive.

    Raises:
        MismatchError: on every rank, if names, shapes or dtypes differ, with the difference.
    """
    pairs = variables.items() if isinstance(variables, Mapping) else [(_name(v), v) for v in variables]
    named: list[tuple[str, Any]] = list(pairs)
    described = [(name, f"{tf.as_dtype(v.dtype).name} {list(v.shape)}") for name, v in named]
    if tf.executing_eagerly():
        order = in_shared_order("broadcast_variables", described, root_rank)
    else:  # nothing is sent while a graph is traced; each broadcast compares its name when it runs
        order = sorted(range(len(named)), key=lambda number: described[number][0])
    for number in order:
        name, variable = named[number]
        variable.assign(broadcast(variable, root_rank, name))


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """Return the root rank's object on every rank. It is sent without pickle.

    Args:
        obj: None, numbers, strings, bytes, paths, tensors and arrays of any dtype, in lists, tuples, sets and dicts
            (``OrderedDict``, ``Counter``, ``defaultdict`` of a built-in type), whose types are preserved.
        root_rank: rank whose object all ranks receive.
        name: name of the operation, which is compared between ranks and shown in messages.

    Raises:
        ConfigurationError: on every rank, if the object contains anything else, with its location.
    """
    return to_tensorflow(operations.broadcast_object(obj, root_rank, name, to_plain))


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """Return the objects of all ranks, in a list by rank."""
    gathered: list[Any] = to_tensorflow(operations.allgather_object(obj, name, to_plain))
    return gathered


class DistributedGradientTape:
    """A ``tf.GradientTape`` whose gradients are reduced over all ranks, for training loops with a plain optimizer.

    Args:
        gradtape: the tape, which has recorded already or is used as a context manager through this object.
        op: ``Average`` (the default) or ``Sum``.
    """

    def __init__(self, gradtape: tf.GradientTape, *, op: Op = Average) -> None:
        self._tape = gradtape
        self._op = op

    def __enter__(self) -> "DistributedGradientTape":
        self._tape.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._tape.__exit__(*exception)

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of the tape."""
        return getattr(self._tape, name)

    @unconverted
    def gradient(self, target: Any, sources: Any, output_gradients: Any = None, **options: Any) -> Any:
        """The tape's gradients, reduced over all ranks in one message per dtype.

        A source without a gradient must have none on any rank.
        """
        gradients = self._tape.gradient(target, sources, output_gradients, **options)
        present = [g for g in tf.nest.flatten(gradients) if g is not None]
        dense = [tf.convert_to_tensor(gradient) for gradient in present]
        combined = iter(_on_arrays(self._combine, dense, [gradient.shape for gradient in dense]))
        return tf.nest.map_structure(lambda g: None if g is None else next(combined), gradients)

    def _combine(self, *arrays: Array) -> list[Array]:
        entries = [Entry(str(n), a.shape, a.dtype.name, None) for n, a in enumerate(arrays)]
        combined = list(arrays)
        for layout in build_layouts(entries):
            flat = FlatBuffer(layout)
            numbers = [int(entry.name) for entry in layout.entries]
            for number, view in zip(numbers, flat.views, strict=True):
                np.copyto(view, arrays[number])
            operations.allreduce(flat.array, self._op, "gradients")
            for number, view in zip(numbers, flat.views, strict=True):
                combined[number] = view
        return combined


def _on_arrays(function: Callable[..., list[Array]], tensors: Sequence[Any], shapes: Sequence[Any]) -> list[Any]:
    """Call a function of arrays with copies of tensors, at once or when the graph runs; the results as tensors."""

    def on_tensors(*eager: Any) -> list[Any]:
        return [tf.constant(array) for array in function(*(np.asarray(tensor.numpy()) for tensor in eager))]

    check_can_wait(transport())
    if tf.executing_eagerly():
        return _without_gradient(tensors, on_tensors(*tensors))
    results = call_python(on_tensors, inputs=tensors, outputs=[tensor.dtype for tensor in tensors])
    for result, shape in zip(results, shapes, strict=True):
        result.set_shape(shape)
    return _without_gradient(tensors, results)


def _without_gradient(tensors: Sequence[Any], results: Sequence[Any]) -> list[Any]:
    """The results, with a gradient with respect to the tensors that raises an error in place of one that is missing."""
    if not any(tensor.dtype.is_floating or tensor.dtype.is_complex for tensor in tensors):
        return list(results)

    def of_tensors(*_: Any) -> Any:
        def gradient(*_: Any) -> Any:
            raise not_differentiable(
                "a gradient was requested through the result of a collective",
                "Call it outside of the GradientTape, or with tf.stop_gradient(tensor),",
            )

        return [tf.identity(result) for result in results], gradient

    return list(tf.custom_gradient(of_tensors)(*tensors))


def _name(variable: Any) -> str:
    return str(getattr(variable, "path", None) or variable.name)
