"""Counting, inside a TensorFlow graph, of the steps between two calls of Python."""

from collections.abc import Callable, Sequence
from math import isfinite, nan
from typing import Any, Literal

import tensorflow as tf

from lentando.comm.transport import Array
from lentando.optimizers.loss_argument import as_number, not_one_number
from lentando.optimizers.replica import Replica
from lentando.tensorflow.model import KerasModel
from lentando.tensorflow.python_calls import call_python

__all__ = ["CountedSteps", "check_loss", "record_loss"]

NEVER = 2.0**52
"""A count of steps that is never reached, and exact in float64."""


def check_loss(loss: Any) -> None:
    """Check that a loss is a single number, as far as its shape is known while a graph is traced.

    Args:
        loss: a number, or a tensor.

    Raises:
        ConfigurationError: if it has another number of elements.
    """
    if not tf.is_tensor(loss):
        as_number(loss)
    elif loss.shape.rank is not None and loss.shape.num_elements() != 1:
        raise not_one_number(loss.shape.as_list())


def record_loss(replica: Replica, model: KerasModel, loss: float, count: int = 1) -> None:
    """Record a loss, except the infinite loss of a step that is skipped in order to adapt the loss scale."""
    if isfinite(loss) or not model.is_scaled or replica.needs_loss:
        replica.record_loss(loss, count)


class CountedSteps:
    """Counter of steps that graphs have taken and that have not been reported to the replica yet.

    Between outer steps of Local SGD a graph only adds six numbers to a variable.

    Args:
        replica: function that returns the replica, which may not exist before a graph has run.
        model: the framework adapter.
        others: variables that the replica reads or changes in addition to the model's.
        reporting: condition for a report to the replica after a step: "always", "sometimes" (when due) or "never".
    """

    def __init__(
        self,
        replica: Callable[[], Replica],
        model: KerasModel,
        others: Sequence[Any],
        reporting: Literal["never", "sometimes", "always"],
    ) -> None:
        self._replica = replica
        self._model = model
        self._reporting = reporting
        self._zeros = tf.zeros(6, tf.float64)
        self._sums = tf.Variable(self._zeros, trainable=False, name="steps_rates_losses_samples_counted")
        self._last_due = NEVER
        self._due = tf.Variable(NEVER, trainable=False, dtype=tf.float64, name="steps_until_due")
        self._begun = tf.Variable(initial_value=False, trainable=False, name="begun")
        self._others = [*others, self._sums, self._due, self._begun]
        self._touched = [*model.variables, *self._others]
        self._graph_exists = False

    def settle(self) -> None:
        """Report the steps that graphs have taken to the replica, which takes an outer step if it is due."""
        if not self._graph_exists:
            return
        counted = self._sums.numpy().tolist()
        self._sums.assign(self._zeros)
        self._report(counted)

    def _report(self, counted: Sequence[float]) -> None:
        """Report steps to the replica, which takes an outer step if it is due.

        Args:
            counted: what the variable held, which is zero again.
        """
        count, rate_sum, loss_sum, loss_count, samples, steps_with_samples = counted
        replica = self._replica()
        if loss_count:
            record_loss(replica, self._model, loss_sum, int(loss_count))
        if steps_with_samples:
            replica.rank_weights.record_samples(samples, int(steps_with_samples))
        if count:
            replica.after_steps(int(count), [rate_sum])
        self.refresh()

    def refresh(self) -> None:
        """Update the number of steps that graphs may take without a report. Called whenever it may have changed."""
        if self._graph_exists:
            steps = self._replica().steps_until_due()
            due = NEVER if steps is None else float(steps)
            if due != self._last_due:  # an assignment takes longer than the rest
                self._last_due = due
                self._due.assign(due)

    def restart(self) -> None:
        """Discard the counted steps, because the replica's state is being replaced."""
        self._sums.assign(self._zeros)
        self._begun.assign(value=False)

    def ask_before_next_step(self) -> None:
        """Make the next step of a graph call the replica before it changes anything."""
        self._begun.assign(value=False)

    # The methods below add operations to the graph that is being traced.

    def trace(self) -> None:
        """Prepare for a graph that takes steps, before any operation is added."""
        if not self._graph_exists:
            self._graph_exists = True
            with tf.init_scope():
                self._begun.assign(value=False)

    def begin(self) -> Any:
        """Add a call of the replica before the first step of the base optimizer.

        The model's variables are not listed as touched, which would cost time in every step: none has changed before.

        Returns:
            A tensor that the base optimizer's step must wait for.
        """

        def report() -> None:
            self.settle()
            self._replica().before_step()
            self._begun.assign(value=True)

        return _call_if(tf.logical_not(self._begun), report, [self._begun, self._sums, self._due])

    def average(
        self,
        average: Callable[[float, Sequence[Array]], Sequence[Array]],
        loss: Any | None,
        gradients: Sequence[Any],
        dtypes: Sequence[Any],
    ) -> list[Any]:
        """Add the average of gradients, before which the steps counted so far are reported to the replica.

        Args:
            average: function of the loss (NaN if there is none) and the gradients, which it must not change, as arrays.
                It returns new arrays with the averaged gradients.
            loss: loss of the step; None if it is not known.
            gradients: dense gradients.
            dtypes: dtypes of the averaged gradients.

        Returns:
            The averaged gradients.
        """
        mean_loss = tf.constant(nan, tf.float64) if loss is None else _scalar(loss)
        # The graph reads the count and sets it to zero: from Python that took a third to a half of the call. It does so
        # last, so that no count is lost with a graph that fails before the call.
        with tf.control_dependencies(gradients):
            counted = self._sums.read_value()
            self._sums.assign(tf.zeros_like(counted))

        def report_and_average(numbers: Array, *gradients: Array) -> Sequence[Array]:
            *counted, mean_loss = numbers.tolist()
            self._report(counted)
            return average(mean_loss, gradients)

        numbers = tf.concat([counted, [mean_loss]], axis=0)
        averaged = call_python(report_and_average, self._touched, [numbers, *gradients], dtypes, of_arrays=True)
        for tensor, gradient in zip(averaged, gradients, strict=True):
            tensor.set_shape(gradient.shape)
        return averaged

    def end(self, taken: Any | None, learning_rate: Any, loss: Any | None, samples: Any | None) -> None:
        """Add the count of a step that the base optimizer has taken, and a report to the replica where it is needed.

        Args:
            taken: boolean tensor, whether the base optimizer has stepped; None if it always does.
            learning_rate: learning rate of the step.
            loss: loss of the step; None if it is not known.
            samples: number of samples of the step; None if it is not known.
        """
        rate = tf.cast(learning_rate, tf.float64)
        one, zero = tf.constant(1.0, tf.float64), tf.constant(0.0, tf.float64)
        steps = one if taken is None else tf.cast(taken, tf.float64)
        losses = [zero, zero] if loss is None else [_scalar(loss), one]
        with_samples = [zero, zero] if samples is None else [steps * _scalar(samples), steps]
        sums = self._sums.assign_add(tf.stack([steps, steps * rate, *losses, *with_samples]))
        if self._reporting == "sometimes":
            _call_if(sums[0] >= self._due, self.settle, self._touched)
        elif self._reporting == "always":
            self._settle_with_values()

    def _settle_with_values(self) -> None:
        """Add a report in which the graph passes all values and gets them back, cheaper than reading and assigning."""
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
    """Add a call of a Python function that depends on a boolean tensor."""

    def call() -> Any:
        call_python(function, touched)
        return tf.constant(0)

    return tf.cond(condition, call, lambda: tf.constant(0))
