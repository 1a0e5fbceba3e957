"""Detection of weights that the program assigns to a model's variables."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import ref

import numpy as np
import tensorflow as tf

from lentando.comm.transport import Array
from lentando.optimizers.weight_watch import SAMPLES, is_jump
from lentando.tensorflow.convert import as_array
from lentando.tensorflow.state_variables import native

__all__ = ["Assignments"]


@dataclass
class _Assigned:
    """Samples of a variable around the program's assignments to it between two steps.

    Attributes:
        step: number of optimizer steps taken before the assignments.
        began: sample at the beginning of the last step if the program assigned at that time too, else None.
        ended: sample at the end of the last step, before the first of the assignments.
        now: sample after the last of the assignments.
        was_set: whether the program had set the variable before that step, with no outer step since.
    """

    step: int
    began: Array | None
    ended: Array
    now: Array
    was_set: bool

    @property
    def is_jump(self) -> bool:
        if np.array_equal(self.ended, self.now, equal_nan=True):
            return False  # the program has restored the previous value
        return self.began is None or is_jump(self.began, self.ended, self.now)


class Assignments:
    """Implements ``lentando.optimizers.weight_watch.WeightWatch`` for variables by observing ``variable.assign``.

    ``set_weights``, ``load_weights``, callbacks that restore weights and custom training loops all call it, while
    graphs and optimizers do not call it for their updates. Steps cost nothing: a graph takes many without a call of
    Python. Assignments inside a ``tf.function``, and to the ``tf.Variable`` inside a Keras variable, are not detected.

    Args:
        variables: the trained variables.
        steps: function that returns the number of optimizer steps taken so far.
    """

    def __init__(self, variables: Sequence[Any], steps: Callable[[], int]) -> None:
        self._steps = steps
        self._is_paused = False
        self._found = False
        self._assigned: dict[int, _Assigned] = {}
        self._set: set[int] = set()
        self._natives = [native(variable) for variable in variables]
        for number, variable in enumerate(variables):
            # An attribute of this variable alone, which takes precedence over the method of its class.
            variable.assign = _ObservedAssign(variable, number, self)

    @property
    def found(self) -> bool:
        return self._found or bool(self._set)

    def look(self) -> None:
        """Nothing to do: assignments are observed when they happen."""

    def mark(self) -> None:
        self._found = self.found
        self._set.clear()

    def forget(self) -> None:
        self._assigned.clear()

    def reset(self, found: bool = False) -> None:
        self._found = found
        self._set.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore assignments inside the block, which are the base optimizer's, such as those of Keras's constraints."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def observe(self, number: int, assign: Callable[[], Any]) -> Any:
        """Call ``assign``, which changes the variable with this number, and record whether its value has jumped."""
        if self._is_paused or not tf.executing_eagerly():
            return assign()
        step, last = self._steps(), self._assigned.get(number)
        if last is None or last.step != step:
            began = last.now if last is not None and last.step == step - 1 else None
            ended = self._sample(number)
            last = self._assigned[number] = _Assigned(step, began, ended, ended, number in self._set)
        result = assign()
        last.now = self._sample(number)
        (self._set.add if last.was_set or last.is_jump else self._set.discard)(number)
        return result

    def _sample(self, number: int) -> Array:
        values = as_array(self._natives[number].read_value()).reshape(-1)
        return values[:: max(1, values.size // SAMPLES)].astype(np.float64)


class _ObservedAssign:
    """Replacement for the ``assign`` method of one variable that reports each call.

    Args:
        variable: the variable, which is not kept alive.
        number: number of the variable in ``observer``.
        observer: receiver of the calls, which is not kept alive either.
    """

    def __init__(self, variable: Any, number: int, observer: Assignments) -> None:
        self._variable = ref(variable)
        self._number = number
        self._observer = ref(observer)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Assign a value as the variable's own method does."""
        assign = _method(self._variable())
        observer = self._observer()
        if observer is None:
            return assign(*arguments, **options)
        return observer.observe(self._number, lambda: assign(*arguments, **options))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The method of the copied variable, whose assignments are not observed."""
        return _method(memo[id(self._variable())])


def _method(variable: Any) -> Any:
    return MethodType(type(variable).assign, variable)
