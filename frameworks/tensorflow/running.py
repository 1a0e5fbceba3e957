"""Collectives on tensors: at once, in the graph of a ``tf.function``, or in a session of TensorFlow 1."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import tensorflow as tf

from lentando.comm.operations import Collective
from lentando.comm.process_sets import ProcessSet, transport_of
from lentando.comm.transport import Array
from lentando.tensorflow.python_calls import call_python, check_can_wait
from lentando.tensorflow.session_graphs import call_in_session, is_session_graph
from lentando.tensorflow.status_errors import with_status_codes

__all__ = ["Caller", "OnArrays", "name_of_gradient", "on_arrays", "on_device", "with_gradient"]

R = TypeVar("R")


@dataclass(frozen=True)
class Caller:
    """Runs the collectives of one call by the user.

    Args:
        name: name of the call.
        process_set: the participating ranks.
        in_background: whether the call is matched with those of other ranks by its name and not by its order.
    """

    name: str | None
    process_set: ProcessSet
    in_background: bool = False

    def __call__(self, constructor: Callable[..., Collective[R]], *arguments: Any, **options: Any) -> R:
        """Run a collective and return its result.

        Args:
            constructor: function of ``lentando.comm.operations`` that makes the collective.
            *arguments: its arguments.
            **options: its keyword arguments without name and process set.
        """
        collective = constructor(*arguments, name=self.name, process_set=self.process_set, **options)
        return collective.start().wait() if self.in_background else collective.run()


OnArrays: TypeAlias = Callable[[list[Array], Caller], Sequence[Array]]
"""A function of copies of the tensors, as contiguous arrays that it may change, and of a ``Caller``."""


def on_arrays(
    function: OnArrays,
    operation: str,
    tensors: Sequence[Any],
    shapes: Sequence[Any],
    name: str | None,
    process_set: ProcessSet,
    dtypes: Sequence[Any] | None = None,
) -> list[Any]:
    """Call a function of arrays with copies of tensors, now or when the graph runs.

    Args:
        function: the function.
        operation: name of the operation, of which the calls of a session's graph make their names.
        tensors: the tensors.
        shapes: shape of each result, as far as it is known while a graph is traced; None if it is not known at all.
        name: name of the call, given by the user.
        process_set: the participating ranks.
        dtypes: dtypes of the results; those of the tensors by default.

    Returns:
        The results as tensors.

    Raises:
        MismatchError: on every rank, if ranks make different calls. It is also a ``FailedPreconditionError``.
        ConfigurationError: for arguments that cannot work. It is also an ``InvalidArgumentError``.
    """
    dtypes = [tensor.dtype for tensor in tensors] if dtypes is None else dtypes
    check_can_wait(transport_of(process_set))
    if tf.executing_eagerly():
        caller = Caller(name, process_set)
        with with_status_codes():
            return [tf.constant(array) for array in function([_copy(tensor) for tensor in tensors], caller)]
    if is_session_graph():
        results = call_in_session(
            lambda name, arrays: function(arrays, Caller(name, process_set, in_background=True)),
            name or operation,
            tensors,
            dtypes,
        )
    else:

        def on_tensors(*eager: Any) -> list[Any]:
            return [tf.constant(array) for array in function([_copy(t) for t in eager], Caller(name, process_set))]

        results = call_python(on_tensors, inputs=tensors, outputs=dtypes)
    for result, shape in zip(results, shapes, strict=True):
        if shape is not None:
            result.set_shape(shape)
    return results


def on_device(device: str) -> AbstractContextManager[object]:
    """A block in which results are placed on a device; without a name of one, TensorFlow places them."""
    return tf.device(device) if device else nullcontext()


def with_gradient(tensors: Sequence[Any], results: Sequence[Any], gradient: Callable[..., Sequence[Any]]) -> list[Any]:
    """Give results of a collective a gradient with respect to its tensors.

    Args:
        tensors: the tensors that were passed to the collective.
        results: what it returned.
        gradient: function of the gradients with respect to the results, which returns those with respect to the
            tensors. Each is cast to the dtype of its tensor.
    """
    if not any(tensor.dtype.is_floating or tensor.dtype.is_complex for tensor in tensors):
        return list(results)

    def of_tensors(*_: Any) -> Any:
        def of_results(*upstream: Any) -> list[Any]:
            typed = [tf.cast(g, result.dtype) for g, result in zip(upstream, results, strict=True)]
            return [tf.cast(g, tensor.dtype) for g, tensor in zip(gradient(*typed), tensors, strict=True)]

        return [tf.identity(result) for result in results], of_results

    return list(tf.custom_gradient(of_tensors)(*tensors))


def name_of_gradient(name: str | None) -> str | None:
    """The name of the collective that forms the gradient of one with this name."""
    return None if name is None else f"gradient of {name}"


def _copy(tensor: Any) -> Array:
    return np.asarray(tensor.numpy())
