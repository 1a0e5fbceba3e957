"""How the average of an outer step is formed: the seam between the outer rule and what travels.

An outer step sees a buffer on every rank, and needs the sum of this rank's part of it (``reduce``) and a way to give
every rank the new values of all parts (``distribute``). ``ExactAverage`` sends the buffer's own values, and is made by
``plan_outer_average``. Another kind, such as one that sends what a round has moved in fewer bits, is another
``OuterAverage``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.division import divide
from lentando.comm.elastic import is_elastic
from lentando.comm.flat import all_finite
from lentando.comm.reductions.node import NodeReduction
from lentando.comm.reductions.none import NoReduction
from lentando.comm.reductions.reduction import Each, Reduction
from lentando.comm.reductions.whole import WholeReduction
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.constant_statistics import Constant, is_finite_but_for
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = ["ExactAverage", "OuterAverage", "plan_outer_average"]

Tag = TypeVar("Tag")


class OuterAverage(ABC):
    """The sum of one buffer over all ranks.

    Attributes:
        shard: range of the buffer whose sum ``reduce`` returns on this rank.
        is_rounded: whether ``distribute`` rounds what it sends, so that this rank's shard of the buffer changes, too.
    """

    shard: slice
    is_rounded: bool = False

    @property
    def is_formed_twice(self) -> bool:
        """Whether ``is_finite`` and ``replace`` may take the places of ``mean`` and ``distribute``."""
        return False

    def is_finite(self) -> bool:
        """Whether the sum of this rank's shard is finite. Nothing is kept."""
        raise NotImplementedError

    def replace(
        self, divisor: int, cut: Iterable[tuple[slice, Tag]], change: Callable[[slice, Tag, Array], object]
    ) -> None:
        """Form the mean of this rank's shard, change the shard, and give every rank the result, block by block.

        Args:
            divisor: number by which the sum is divided.
            cut: blocks of the shard, counted from its start, each with something that ``change`` needs to know.
            change: writes the new values of a block to this rank's shard of the buffer. It is called with the block,
                what came with it, and the mean of its elements, which may be overwritten.
        """
        raise NotImplementedError

    def begin_round(self, anchor: Array, *, forget_errors: bool = False) -> None:
        """Note the values from which the buffer begins to move, which are equal on all ranks.

        Called at the start and after every outer step.

        Args:
            anchor: array like the buffer. It is not changed, and may be the buffer itself.
            forget_errors: whether to forget rounding errors of earlier rounds, which would be sent later.
        """
        return

    @abstractmethod
    def reduce(self, each: Each | None = None, partial_average: PartialAverage | None = None) -> Array:
        """Return the sum over ranks of this rank's shard, in float32 at least. The buffer is not changed.

        Args:
            each: function that is called once with every piece of the result, in any order, once it is complete.
            partial_average: how this rank takes part in an average over some of the ranks; None for all ranks. Where
                it does not count, the buffer holds zeros.
        """

    def mean(
        self, divisor: int, constants: Sequence[Constant], partial_average: PartialAverage | None = None
    ) -> tuple[Array, bool]:
        """Return the mean of this rank's shard: what ``reduce`` returns, divided. The buffer is not changed.

        Args:
            divisor: number by which the sum is divided.
            constants: constants of the shard, which the mean takes over.
            partial_average: as in ``reduce``.

        Returns:
            The mean, and whether it is finite but for the constants.
        """
        is_finite = True

        def divide_and_look(mean: Array) -> None:
            nonlocal is_finite
            if divisor != 1:
                divide(mean, divisor, mean)
            is_finite = is_finite and all_finite(mean)

        mean = self.reduce(divide_and_look, partial_average)
        for constant in constants:
            constant.restore(mean)
        return mean, is_finite or (bool(constants) and is_finite_but_for(mean, constants))

    def arrays(self) -> dict[str, Array | None]:
        """State besides the anchor of this rank's shard, by name: arrays like the buffer."""
        return {}

    def shard_arrays(self) -> dict[str, Array | None]:
        """State besides the anchor of this rank's shard, by name: arrays like the shard."""
        return {}

    @abstractmethod
    def distribute(self) -> None:
        """Fill the other ranks' shards of the buffer with the values that those ranks hold there."""

    def replan(self) -> None:
        """Plan again for the remaining ranks of an elastic job. Collective over these."""
        return


class ExactAverage(OuterAverage):
    """The sum in full precision.

    Args:
        reduction: reduction that was planned for the buffer.
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self.shard = reduction.shard

    @property
    def is_formed_twice(self) -> bool:
        return isinstance(self._reduction, NodeReduction) and self._reduction.is_within_node

    def is_finite(self) -> bool:
        assert isinstance(self._reduction, NodeReduction)
        found = True

        def look(total: Array) -> None:
            nonlocal found
            found = found and all_finite(total)

        self._reduction.visit_sum(look)
        return found

    def replace(
        self, divisor: int, cut: Iterable[tuple[slice, Tag]], change: Callable[[slice, Tag, Array], object]
    ) -> None:
        assert isinstance(self._reduction, NodeReduction)

        def divide_and_change(block: slice, tag: Tag, total: Array) -> None:
            if divisor != 1:
                divide(total, divisor, total)
            change(block, tag, total)

        self._reduction.replace(cut, divide_and_change)

    def reduce(self, each: Each | None = None, partial_average: PartialAverage | None = None) -> Array:
        return self._reduction.reduce_scatter(each)

    def distribute(self) -> None:
        self._reduction.all_gather()

    def replan(self) -> None:
        if isinstance(self._reduction, WholeReduction):
            self._reduction.plan()


def plan_outer_average(
    transport: Transport, buffer: Array, algorithm: Algorithm, *, exact_average: bool = True, whole: bool = False
) -> ExactAverage:
    """Plan the average of a buffer. Collective.

    Args:
        transport: transport that connects the ranks; that of a background thread, if one forms the average.
        buffer: one-dimensional, contiguous array, used at each execution.
        algorithm: algorithm of the reduction.
        exact_average: whether there is an average over ranks; if False, nothing is sent.
        whole: whether every rank needs the sum of the whole buffer, which ``distribute`` then has no part in. So in an
            elastic job in any case.
    """
    if not exact_average:
        return ExactAverage(NoReduction(buffer))
    if whole or is_elastic(transport):
        return ExactAverage(WholeReduction(transport, buffer, algorithm))
    return ExactAverage(plan_reduction(transport, buffer, algorithm, scatter_gather=True))
