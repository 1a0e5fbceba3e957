"""Notices weights that the program assigns to a model's variables."""

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
        step: how many optimizer steps were taken by then.
        began: the sample at the beginning of the last step, if the program assigned then, too; else None.
        ended: the sample at its end, before the first of the assignments.
        now: the sample after the last of them.
        was_set: whether the program had set the variable before that step, and no outer step has come since.
    """

    step: int
    began: Array | None
    ended: Array
    now: Array
    was_set: bool

    @property
    def is_jump(self) -> bool:
        if np.array_equal(self.ended, self.now, equal_nan=True):
            return False  # the program has put back what was there
        return self.began is None or is_jump(self.began, self.ended, self.now)


class Assignments:
    """Implements ``lentando.optimizers.weight_watch.WeightWatch`` for variables, by observing ``variable.assign``.

    ``set_weights``, ``load_weights``, callbacks that restore weights, and loops of the user's own all end there, while
    the updates of a graph or of an optimizer do not. Nothing is done at steps, of which graphs take many without a call
    of Python. It does not see assignments inside a ``tf.function``, nor those to the ``tf.Variable`` beneath a Keras
    variable.

    Args:
        variables: that are trained.
        steps: tells how many optimizer steps were taken so far.
    """

    def __init__(self, variables: Sequence[Any], steps: Callable[[], int]) -> None:
        self._steps = steps
        self._is_paused = False
        self._found = False
        self._assigned: dict[int, _Assigned] = {}
        self._set: set[int] = set()
        self._natives = [native(variable) for variable in variables]
        for number, variable in enumerate(variables):
            # An attribute of this variable alone, which comes before its class's method.
            variable.assign = _ObservedAssign(variable, number, self)

    @property
    def found(self) -> bool:
        return self._found or bool(self._set)

    def look(self) -> None:
        """Assignments were seen when they happened."""

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
        """Assignments inside are the base optimizer's, such as those of Keras's constraints."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def observe(self, number: int, assign: Callable[[], Any]) -> Any:
        """Call ``assign``, which changes the variable of this number."""
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
    """Stands before a variable's ``assign``.

    Args:
        variable: whose.
        number: by which ``observer`` knows it.
        observer: is told; it may be gone before the variable is.
    """

    def __init__(self, variable: Any, number: int, observer: Assignments) -> None:
        self._variable = ref(variable)
        self._number = number
        self._observer = ref(observer)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """As the variable's own."""
        assign = _method(self._variable())
        observer = self._observer()
        if observer is None:
            return assign(*arguments, **options)
        return observer.observe(self._number, lambda: assign(*arguments, **options))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the variable has its own."""
        return _method(memo[id(self._variable())])


def _method(variable: Any) -> Any:
    return MethodType(type(variable).assign, variable)
