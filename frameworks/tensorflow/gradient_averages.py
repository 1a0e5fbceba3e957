"""Averaging of gradients over the ranks, in eager steps and in graphs."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.optimizers.replica import Replica
from lentando.tensorflow.convert import as_array, as_tensor, copy_for_graph
from lentando.tensorflow.counted_steps import CountedSteps
from lentando.tensorflow.local_variables import LocalVariables
from lentando.tensorflow.model import KerasModel
from lentando.tensorflow.sparse_tensors import as_dense
from lentando.tensorflow.state_variables import native

__all__ = ["GradientAverages", "Pairs"]

Pairs: TypeAlias = Sequence[tuple[Any, Any]]
"""Pairs of gradient and variable; None in place of a gradient that does not exist."""


class GradientAverages:
    """Averages the gradients of a step over the ranks.

    Args:
        replica: function that returns the replica. All steps have been reported to it when gradients are averaged.
        model: the framework adapter of the model.
        counted: counter of steps, through which graphs call Python.
        variables: variables that the optimizer was built with, without local ones.
        local: variables whose gradients are not averaged.
    """

    def __init__(
        self,
        replica: Callable[[], Replica],
        model: KerasModel,
        counted: CountedSteps,
        variables: Sequence[Any],
        local: LocalVariables,
    ) -> None:
        self._replica = replica
        self._model = model
        self._counted = counted
        self._dtypes = [native(variable).dtype for variable in variables]
        self._local = local
        self._numbers = {id(native(variable)): number for number, variable in enumerate(variables)}

    def knows(self, variable: Any) -> bool:
        """Whether the optimizer was built with this variable."""
        return id(native(variable)) in self._numbers or variable in self._local

    def eager(self, pairs: Pairs, loss: float | None) -> Pairs:
        """Average eager gradients at once."""
        given = self._by_variable(pairs)
        dense = [as_dense(gradient) for gradient in given]
        self._average([None if gradient is None else as_array(gradient) for gradient in dense], loss)
        return self._in_pairs(self._model.flat_gradients.scatter(as_tensor), pairs)

    def traced(self, pairs: Pairs, loss: Any | None) -> Pairs:
        """Add to the graph that is being traced an average of its gradients."""
        given = self._by_variable(pairs)
        present = [number for number, gradient in enumerate(given) if gradient is not None]

        def average(mean_loss: float, gradients: Sequence[Array]) -> list[Any]:
            by_number = dict(zip(present, gradients, strict=True))
            self._average([by_number.get(number) for number in range(len(given))], None if loss is None else mean_loss)
            averaged = self._model.flat_gradients.scatter(copy_for_graph)
            returned = [number for number, gradient in enumerate(averaged) if gradient is not None]
            if returned != present:
                names = [self._model.names[number] for number in set(returned) - set(present)]
                raise ConfigurationError(
                    f"other ranks have gradients for {names} and this rank has none: a graph cannot change which "
                    "variables it updates. Use all of them on every rank, or run eagerly"
                )
            return [averaged[number] for number in present]

        dense = [as_dense(given[number]) for number in present]
        averaged = self._counted.average(average, loss, dense, [self._dtypes[number] for number in present])
        by_number = dict(zip(present, averaged, strict=True))
        return self._in_pairs([by_number.get(number) for number in range(len(given))], pairs)

    def _average(self, gradients: Sequence[Array | None], loss: float | None) -> None:
        """Leave the mean of the gradients of all ranks, given in the order of the variables, in the flat buffers."""
        self._model.flat_gradients.gather(gradients)
        self._replica().average_gradients(loss, is_scaled=self._model.is_scaled)

    def _by_variable(self, pairs: Pairs) -> list[Any | None]:
        """A gradient or None for each variable that the optimizer was built with, in the same order."""
        given = {self._number(variable): gradient for gradient, variable in pairs if variable not in self._local}
        return [given.get(number) for number in range(len(self._numbers))]

    def _in_pairs(self, averaged: Sequence[Any | None], pairs: Pairs) -> Pairs:
        """The pairs of the step: averaged gradients, and this rank's own for local variables."""
        return [
            (self._local.gradient(gradient) if variable in self._local else averaged[self._number(variable)], variable)
            for gradient, variable in pairs
        ]

    def _number(self, variable: Any) -> int:
        return self._numbers[id(native(variable))]
