"""Calls of Python from inside a TensorFlow graph."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from threading import Lock, get_ident
from typing import Any, TypeVar, cast

import tensorflow as tf

from lentando.comm.capabilities import VirtualTime
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Transport
from lentando.tensorflow.original_errors import note_error

__all__ = ["call_python", "check_can_wait", "unconverted"]

F = TypeVar("F", bound=Callable[..., Any])


def unconverted(function: F) -> F:
    """A function that AutoGraph does not convert when a user's ``tf.function`` calls it.

    An eager call goes directly to the function, without the context of ``do_not_convert``: contexts belong to the
    thread, which simulated ranks share, and another rank may run inside this one's call.
    """
    in_graph = tf.autograph.experimental.do_not_convert(function)

    def called(*arguments: Any, **options: Any) -> Any:
        return (function if tf.executing_eagerly() else in_graph)(*arguments, **options)

    # Not functools.wraps: TensorFlow follows __wrapped__, and would convert the function that is inside.
    for name in ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__"):
        setattr(called, name, getattr(function, name))
    vars(called)["__signature__"] = inspect.signature(function)
    return cast("F", called)


def call_python(
    function: Callable[..., Any],
    touched: Sequence[Any] = (),
    inputs: Sequence[Any] = (),
    outputs: Sequence[Any] = (),
    *,
    of_arrays: bool = False,
) -> list[Any]:
    """Add a call of a Python function to the graph that is being traced.

    All such calls of a graph, and of the functions, branches and loops inside it, run one at a time in program order,
    because messages are matched with those of other ranks by their order.

    Args:
        function: function of the inputs as eager tensors, which returns one tensor or array per output.
        touched: variables that the function reads or changes. Earlier operations of the graph on them are complete when
            the function is called, and later ones wait for it.
        inputs: tensors of the graph.
        outputs: dtypes of the results.
        of_arrays: whether the function takes and returns arrays and not eager tensors, which is faster. It must not
            change nor keep the arrays that it is given, and must return new ones, whose memory the results adopt.

    Returns:
        The results, as tensors of the graph.
    """

    def called(*arguments: Any) -> Any:
        try:
            with _one_thread_at_a_time:
                return function(*arguments)
        except Exception as error:
            note_error(error)
            raise

    def call(*inputs: Any) -> Any:
        # TensorFlow orders this function of the graph by the variables that it appears to use. If the call of Python
        # itself took them, each would be converted in every call.
        for variable in (_order_token(), *touched):
            tf.identity(variable.handle)
        # XLA, which cannot call Python, shows this name in its error message.
        name = "Lentando_communicates_from_Python_which_needs_jit_compile_False"
        results = (tf.numpy_function if of_arrays else tf.py_function)(called, inputs, list(outputs), name=name)
        return list(results) if outputs else None

    return tf.function(call, autograph=False)(*inputs) or []


class _OneThreadAtATime:
    """A block for one thread at a time. A second thread gets an error and does not wait, since the order would vary.

    Raises:
        ConfigurationError: if another thread is inside the block.
    """

    def __init__(self) -> None:
        self._inside = Lock()
        self._thread: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._thread != get_ident():
            if not self._inside.acquire(blocking=False):
                raise ConfigurationError(
                    "two threads communicate at the same time, so that their messages may be matched with different "
                    "ones of other ranks: call functions that communicate from one thread, and not in tf.data pipelines"
                )
            self._thread = get_ident()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._thread = None
            self._inside.release()


_one_thread_at_a_time = _OneThreadAtATime()


@cache
def _order_token() -> Any:
    """A variable that every call of Python appears to change, so that TensorFlow runs these calls in program order.

    TensorFlow orders operations that use the same variable. Two calls without a common variable, such as the steps of
    two optimizers, may run in any order and at the same time.
    """
    with tf.init_scope(), tf.device("CPU:0"):
        return tf.Variable(initial_value=False, trainable=False, name="order_of_communication")


def check_can_wait(transport: Transport) -> None:
    """Check that a simulated rank is in a place where it can wait for messages.

    A graph calls Python from a thread of TensorFlow's, where a simulated rank cannot wait. ``fit`` enters contexts that
    belong to the thread, which all simulated ranks share.

    Args:
        transport: transport that connects the participating ranks.

    Raises:
        ConfigurationError: in a simulation, inside a graph or ``fit``.
    """
    if isinstance(transport, VirtualTime) and not (
        tf.executing_eagerly() and tf.distribute.get_replica_context() is _outside_strategies
    ):
        raise ConfigurationError(
            "simulated ranks cannot communicate inside a tf.function or model.fit: in a simulation, write the loop "
            "over batches, and call tf.config.run_functions_eagerly(True)"
        )


_outside_strategies = tf.distribute.get_replica_context()
"""The replica context of a thread outside ``Strategy.run``, through which ``fit`` takes every step."""
