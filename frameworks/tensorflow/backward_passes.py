"""Accumulation of the gradients of several backward passes before they are sent: ``backward_passes_per_step``."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from lentando.comm.errors import ConfigurationError
from lentando.tensorflow.gradient_averages import Pairs
from lentando.tensorflow.state_variables import native

__all__ = ["BackwardPasses"]


class BackwardPasses:
    """Sums gradients of several backward passes on this rank. The last of them takes the step, with the sum.

    Args:
        passes: number of backward passes in a step, > 1.
        takes_mean: whether the step is taken with the mean over the passes, not with the sum.
        variables: variables of the gradients.
    """

    def __init__(self, passes: int, takes_mean: bool, variables: Sequence[Any]) -> None:
        self._passes = passes
        self._takes_mean = takes_mean
        self._count = tf.Variable(0, trainable=False, dtype=tf.int64, name="backward_passes")
        self._sums = {
            id(native(v)): tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False, name="sum_of_gradients")
            for v in variables
        }

    @property
    def variables(self) -> list[Any]:
        """The count of passes, and the sums of the step that has not been taken."""
        return [self._count, *self._sums.values()]

    def add(self, pairs: Pairs, step: Callable[[Pairs], None]) -> None:
        """Add the gradients of a backward pass, and call ``step`` with their sums after the last one.

        In a graph the call becomes a part of the graph that runs after the last pass only.

        Args:
            pairs: pairs of gradient and variable. A variable has a gradient in all passes of a step, or in none.
            step: function that takes a step.
        """
        for gradient, variable in pairs:
            if gradient is not None:
                self._sum_of(variable).assign_add(tf.convert_to_tensor(gradient))
        is_last = tf.equal(self._count.assign_add(1) % self._passes, 0)

        def last() -> Any:
            step([(None if gradient is None else self._taken(variable), variable) for gradient, variable in pairs])
            return tf.constant(0)

        if tf.executing_eagerly():
            if is_last:
                last()
        else:
            tf.cond(is_last, last, lambda: tf.constant(0))

    def _taken(self, variable: Any) -> Any:
        """The sum or mean of the gradients of a variable, whose next sum begins with zero."""
        total = self._sum_of(variable)
        value = total.read_value()
        with tf.control_dependencies([value]):
            total.assign(tf.zeros_like(value))
        return value / tf.cast(self._passes, value.dtype) if self._takes_mean else value

    def _sum_of(self, variable: Any) -> Any:
        try:
            return self._sums[id(native(variable))]
        except KeyError as error:
            raise ConfigurationError(
                f"the optimizer was built without variable {getattr(variable, 'path', variable.name)!r}: make a new "
                "optimizer when the trainable variables change"
            ) from error
