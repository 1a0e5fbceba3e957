"""How a graph calls Python, and how it counts the steps that Python need not hear of."""

from collections.abc import Callable, Sequence
from functools import cache
from math import isfinite, nan
from threading import Lock, get_ident
from typing import Any, Literal, TypeVar, cast

import tensorflow as tf

from lentando.comm.capabilities import VirtualTime
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Transport
from lentando.optimizers.loss import as_number, not_one_number
from lentando.optimizers.replica import Replica
from lentando.tensorflow.model import KerasModel
from lentando.tensorflow.original_errors import note_error

__all__ = ["CountedSteps", "call_python", "check_can_wait", "check_loss", "record_loss", "unconverted"]

NEVER = 2.0**52

F = TypeVar("F", bound=Callable[..., Any])


def unconverted(function: F) -> F:
    """A function that AutoGraph leaves as it is when a user's ``tf.function`` calls it.

    Eagerly it is called as it is: TensorFlow's context would not survive that another simulated rank goes on inside.
    """
    in_graph = tf.autograph.experimental.do_not_convert(function)

    def called(*arguments: Any, **options: Any) -> Any:
        return (function if tf.executing_eagerly() else in_graph)(*arguments, **options)

    called.__name__, called.__doc__ = function.__name__, function.__doc__
    return cast("F", called)


def call_python(
    function: Callable[..., Any], touched: Sequence[Any] = (), inputs: Sequence[Any] = (), outputs: Sequence[Any] = ()
) -> list[Any]:
    """Let the graph that is being traced call a Python function.

    All such calls of a graph, and of the functions, branches and loops inside it, run one after the other in the order
    of the program: what they send and receive is paired with the other ranks' by order.

    Args:
        function: takes the inputs as eager tensors; returns as many tensors or arrays as there are ``outputs``.
        touched: the variables that it reads or changes. What the graph did to them before is done when it is called,
            and what the graph does to them afterwards waits for it.
        inputs: tensors of the graph.
        outputs: dtypes.
    """
    handles = [variable.handle for variable in (_order_token(), *touched)]

    def called(*arguments: Any) -> Any:
        try:
            with _one_thread_at_a_time:
                return function(*arguments[len(handles) :])
        except Exception as error:
            note_error(error)
            raise

    # Shown by XLA, which has no way to call Python, when it refuses.
    name = "Lentando_communicates_from_Python_which_needs_jit_compile_False"
    found = tf.py_function(called, [*handles, *inputs], list(outputs), name=name)
    return list(found) if outputs else []


class _OneThreadAtATime:
    """A block in which only one thread may be at a time. Unlike a lock it does not wait, because the order would vary.

    Raises:
        ConfigurationError: if another thread is inside.
    """

    def __init__(self) -> None:
        self._inside = Lock()
        self._thread: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._thread != get_ident():
            if not self._inside.acquire(blocking=False):
                raise ConfigurationError(
                    "two threads communicate at the same time, so that what they send may be paired with other values "
                    "on the other ranks: call functions that communicate from one thread, and not in tf.data pipelines"
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
    """A variable that every call of Python appears to change, so that TensorFlow keeps these calls in program order.

    TensorFlow orders operations that use the same variable. Two calls without a variable in common, such as the steps
    of two optimizers, it runs in any order, also at the same time.
    """
    with tf.init_scope(), tf.device("CPU:0"):
        return tf.Variable(initial_value=False, trainable=False, name="order_of_communication")


def check_can_wait(transport: Transport) -> None:
    """A graph calls Python from a thread of TensorFlow's, where a simulated rank cannot wait.

    Nor can it in ``fit``, whose contexts belong to the thread, and all simulated ranks share one.

    Raises:
        ConfigurationError: in a simulation, from a graph or from ``fit``.
    """
    if isinstance(transport, VirtualTime) and not (
        tf.executing_eagerly() and tf.distribute.get_replica_context() is _outside_strategies
    ):
        raise ConfigurationError(
            "simulated ranks cannot communicate from within a tf.function or model.fit: write the loop over batches, "
            "and call tf.config.run_functions_eagerly(True) in a simulation"
        )


_outside_strategies = tf.distribute.get_replica_context()
"""The replica context of a thread that is not inside ``Strategy.run``, through which ``fit`` takes every step."""


def check_loss(loss: Any) -> None:
    """A loss must be one number. One whose shape only the running graph knows is an error of TensorFlow's there.

    Raises:
        ConfigurationError: if it is not.
    """
    if not tf.is_tensor(loss):
        as_number(loss)
    elif loss.shape.rank is not None and loss.shape.num_elements() != 1:
        raise not_one_number(loss.shape.as_list())


def record_loss(replica: Replica, model: KerasModel, loss: float, count: int = 1) -> None:
    """As ``Replica.record_loss``. In a step that is skipped to scale the loss anew, it may well be infinite."""
    if isfinite(loss) or not model.is_scaled or replica.needs_loss:
        replica.record_loss(loss, count)


class CountedSteps:
    """Steps that a graph has taken and the replica has not been told of.

    Between outer steps of Local SGD a graph does nothing but add four numbers to ``sums``.

    Args:
        replica: gives the replica, which is told. It may not exist before a graph has run.
        model: that it averages.
        others: variables beside the model's that it reads or changes.
        telling: when it has something to do after a step: "never", "sometimes" or "always".
    """

    def __init__(
        self,
        replica: Callable[[], Replica],
        model: KerasModel,
        others: Sequence[Any],
        telling: Literal["never", "sometimes", "always"],
    ) -> None:
        self._replica = replica
        self._model = model
        self._telling = telling
        self._sums = tf.Variable(tf.zeros(4, tf.float64), trainable=False, name="steps_rates_losses_counted")
        self._due = tf.Variable(NEVER, trainable=False, dtype=tf.float64, name="steps_until_due")
        self._begun = tf.Variable(initial_value=False, trainable=False, name="begun")
        self._others = [*others, self._sums, self._due, self._begun]
        self._touched = [*model.variables, *self._others]
        self._graph_exists = False

    def settle(self) -> None:
        """Tell the replica of the steps that graphs have taken. Takes an outer step that is due."""
        if not self._graph_exists:
            return
        count, rate_sum, loss_sum, loss_count = self._sums.numpy().tolist()
        self._sums.assign(tf.zeros(4, tf.float64))
        replica = self._replica()
        if loss_count:
            record_loss(replica, self._model, loss_sum, int(loss_count))
        if count:
            replica.after_steps(int(count), [rate_sum])
        self.refresh()

    def refresh(self) -> None:
        """Let graphs know how many steps they may take by themselves; to be called when that may have changed."""
        if self._graph_exists:
            due = self._replica().steps_until_due()
            self._due.assign(NEVER if due is None else float(due))

    def restart(self) -> None:
        """Forget the steps, for the replica's state is being replaced."""
        self._sums.assign(tf.zeros(4, tf.float64))
        self._begun.assign(value=False)

    def ask_before_next_step(self) -> None:
        """Let the next step of a graph ask the replica before it changes anything."""
        self._begun.assign(value=False)

    # What follows adds to the graph that is being traced.

    def trace(self) -> None:
        """Begin."""
        if not self._graph_exists:
            self._graph_exists = True
            with tf.init_scope():
                self._begun.assign(value=False)

    def begin(self) -> Any:
        """Before the base optimizer steps, which must wait for what is returned: the first time, the replica must know.

        The model's variables need not be named, which would cost time in every step: none is changed before.
        """

        def tell() -> None:
            self.settle()
            self._replica().before_step()
            self._begun.assign(value=True)

        return _call_if(tf.logical_not(self._begun), tell, [self._begun, self._sums, self._due])

    def average(
        self, average: Callable[..., Any], loss: Any | None, gradients: Sequence[Any], dtypes: Sequence[Any]
    ) -> list[Any]:
        """The averaged gradients, of these dtypes; ``average`` is called with the loss (or NaN) and the gradients."""
        mean_loss = tf.constant(nan, tf.float64) if loss is None else _scalar(loss)
        averaged = call_python(average, self._touched, [mean_loss, *gradients], dtypes)
        for tensor, gradient in zip(averaged, gradients, strict=True):
            tensor.set_shape(gradient.shape)
        return averaged

    def end(self, taken: Any | None, learning_rate: Any, loss: Any | None) -> None:
        """After the base optimizer has stepped.

        Args:
            taken: whether it has; None if it always does.
            learning_rate: that it stepped with.
            loss: of the step.
        """
        rate = tf.cast(learning_rate, tf.float64)
        one, zero = tf.constant(1.0, tf.float64), tf.constant(0.0, tf.float64)
        added = [one, rate] if taken is None else [tf.cast(taken, tf.float64), tf.cast(taken, tf.float64) * rate]
        sums = self._sums.assign_add(tf.stack([*added, *([zero, zero] if loss is None else [_scalar(loss), one])]))
        if self._telling == "sometimes":
            _call_if(sums[0] >= self._due, self.settle, self._touched)
        elif self._telling == "always":
            self._settle_with_values()

    def _settle_with_values(self) -> None:
        """The graph hands the variables over and takes them back, which costs less than to read and assign each."""
        variables = self._model.variables
        values = [variable.read_value() for variable in variables]
        dtypes = [variable.dtype for variable in variables]

        def settle(*values: Any) -> Sequence[Any]:
            return self._model.with_values(values, self.settle)

        for variable, value in zip(variables, call_python(settle, self._others, values, dtypes), strict=True):
            value.set_shape(variable.shape)
            variable.assign(value)


def _scalar(loss: Any) -> Any:
    return tf.reshape(tf.cast(loss, tf.float64), [])


def _call_if(condition: Any, function: Callable[[], None], touched: Sequence[Any]) -> Any:
    def call() -> Any:
        call_python(function, touched)
        return tf.constant(0)

    return tf.cond(condition, call, lambda: tf.constant(0))
