"""Calls of Python from a graph that a session of TensorFlow 1 runs (``tf.compat.v1.Session``).

A session runs only the operations that its result needs, in any order, on a few threads. The order in which two calls
communicate may thus differ between ranks, so that they are matched by name. A call that waits for other ranks must not
occupy one of these threads, since the calls for which the other ranks wait may need it. It therefore runs in an
iterator of ``tf.data``, which TensorFlow gives a thread of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import tensorflow as tf

from lentando.comm.errors import MismatchError
from lentando.comm.transport import Array
from lentando.tensorflow.original_errors import note_error

__all__ = ["call_in_session", "is_session_graph"]


def is_session_graph() -> bool:
    """Whether operations are being added to a graph that a session will run, or to a function inside such a graph."""
    with tf.init_scope():
        return not tf.executing_eagerly()


def call_in_session(
    function: Callable[[str, list[Array]], Sequence[Array]], name: str, inputs: Sequence[Any], dtypes: Sequence[Any]
) -> list[Any]:
    """Add a call of a function that waits for other ranks to a graph that a session will run.

    Args:
        function: function of a name, which is unique in the graph, and of arrays that it may change.
        name: name of the call, to which a number is added if the graph contains it already. Ranks build equal graphs.
        inputs: tensors of the graph.
        dtypes: dtypes of the results.

    Returns:
        The results, as tensors of the graph.

    Raises:
        FailedPreconditionError: in the session, if the function raises ``MismatchError``. TensorFlow makes
            ``InvalidArgumentError`` of ``ConfigurationError`` and ``UnknownError`` of other errors.
    """
    with tf.init_scope():
        graph = tf.compat.v1.get_default_graph()
        name = graph.unique_name(name)
        calls = _calls.setdefault(graph, _Calls())
        number = calls.add(lambda arrays: function(name, arrays))
        components = [tf.constant(number, tf.int64), *inputs]
        called = calls.function([tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in components], dtypes)
    called.add_to_graph()
    shapes = [tf.TensorShape(None)] * len(dtypes)
    dataset = tf.raw_ops.TensorDataset(components=components, output_shapes=[tensor.shape for tensor in components])
    mapped = tf.raw_ops.MapDataset(
        input_dataset=dataset,
        other_arguments=[],
        f=called,
        output_types=list(dtypes),
        output_shapes=shapes,
        use_inter_op_parallelism=False,  # the function runs on the thread of the iterator
    )
    iterator = tf.raw_ops.AnonymousIteratorV3(output_types=list(dtypes), output_shapes=shapes)
    with tf.control_dependencies([tf.raw_ops.MakeIterator(dataset=mapped, iterator=iterator)]):
        return list(tf.raw_ops.IteratorGetNext(iterator=iterator, output_types=list(dtypes), output_shapes=shapes))


class _Calls:
    """The Python functions that a graph calls, by number.

    TensorFlow copies the functions of a graph whenever a session runs a new part of it. All calls with inputs and
    results of the same shapes and dtypes therefore share one function of TensorFlow, and pass it their number.
    """

    def __init__(self) -> None:
        self._python: list[Callable[[list[Array]], Sequence[Array]]] = []
        self._functions: dict[Any, Any] = {}

    def add(self, function: Callable[[list[Array]], Sequence[Array]]) -> int:
        """Add a function, and return its number."""
        self._python.append(function)
        return len(self._python) - 1

    def function(self, signature: Sequence[Any], dtypes: Sequence[Any]) -> Any:
        """The function of TensorFlow for these inputs, of which the first is a number, and dtypes of the results."""

        def call(number: Any, *arrays: Array) -> list[Any]:
            try:
                return [b"", *self._python[int(number)]([np.array(array, order="C") for array in arrays])]
            except MismatchError as error:
                note_error(error)
                return [str(error).encode(), *(np.zeros(0, dtype.as_numpy_dtype) for dtype in dtypes)]
            except Exception as error:
                note_error(error)
                raise

        def checked(*tensors: Any) -> list[Any]:
            problem, *results = tf.numpy_function(call, list(tensors), [tf.string, *dtypes])
            with tf.control_dependencies([_fail_if_text(tf.reshape(problem, []))]):
                return [tf.identity(result) for result in results]

        # Shapes that are not known are equal to no others, not even to themselves.
        key = (*((str(spec.shape), spec.dtype) for spec in signature), *dtypes)
        if key not in self._functions:
            made = tf.function(checked, input_signature=signature, autograph=False)
            self._functions[key] = made.get_concrete_function()
        return self._functions[key]


_calls: WeakKeyDictionary[Any, _Calls] = WeakKeyDictionary()


def _fail_if_text(text: Any) -> Any:
    """An operation that fails with ``FailedPreconditionError`` and the text, unless the text is empty.

    TensorFlow has no operation for this, and gives another status code to every error that Python raises. A hash table
    in which a key gets two values does fail with this one, and shows the key.
    """
    table = tf.raw_ops.AnonymousHashTable(key_dtype=tf.string, value_dtype=tf.bool)
    values = tf.stack([False, tf.not_equal(text, "")])
    return tf.raw_ops.InitializeTableV2(table_handle=table, keys=tf.stack([text, text]), values=values)
