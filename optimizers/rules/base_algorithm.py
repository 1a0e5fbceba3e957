"""The protocols of base algorithms: how replicas communicate around each inner step, between two outer steps.

A base algorithm is two objects. A ``BaseAlgorithm`` is a description, a frozen dataclass that users write
(``SGP(Ring())``). Its ``bind`` makes a ``BoundAlgorithm``, which works in one job, on the flat buffers of one model.

A ``BoundAlgorithm`` needs the two step hooks only. Everything else is optional, and each option is a protocol:

- ``OuterAverageHooks``: parameters are kept in another form than the model's, or messages are in flight between steps.
- ``StatefulAlgorithm``: something besides the model decides the next steps, and must be saved with it.
- ``DropsNonFinite``: parameters are mixed, and a rank's NaN can be kept from its neighbours.
- ``Recoverable``: ranks may have begun unequal numbers of message exchanges when one of them dies.
- ``Resizable``: a saved state can be continued on another number of ranks.
- ``SearchesGradients``: gradients that are not finite are found while they are averaged.
- ``lentando.optimizers.rules.gradient_buckets.OverlapsGradients``: gradients are averaged during the backward pass.
- ``lentando.comm.agreement.Participant``: the algorithm attaches numbers to the control messages, and receives those of
  all ranks.

An algorithm has an option by having all methods of its protocol. Inheriting from the protocol is not necessary, but
lets a type checker compare signatures. ``lentando.optimizers.rules.algorithm_hooks`` holds the neutral defaults for the
options that an algorithm lacks, and ``lentando.optimizers.testing.check_base_algorithm`` is the conformance suite.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from lentando.comm.flat import FlatBuffer
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = [
    "BaseAlgorithm",
    "BoundAlgorithm",
    "DropsNonFinite",
    "OuterAverageHooks",
    "Recoverable",
    "Resizable",
    "SearchesGradients",
    "StatefulAlgorithm",
]


LARGE_ELEMENTS = 64 * 1024
"""Gradients of at least so many elements may stay where they are computed, if the base algorithm permits it."""


class BaseAlgorithm(Protocol):
    """Describes a base algorithm. Describing one neither communicates nor starts anything: ``bind`` does.

    Attributes:
        averages_gradients: whether every step begins with ``average_gradients``.
        communicates: whether anything is sent between outer steps.
        mixes_parameters: whether ``after_step`` reads and changes the parameters.
    """

    averages_gradients: ClassVar[bool]
    communicates: ClassVar[bool]
    mixes_parameters: ClassVar[bool]

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> "BoundAlgorithm":
        """Plan the messages for these buffers. Collective.

        Args:
            transport: transport that connects the ranks that train together.
            parameters: flat buffers of the model, each with its parameters first and its statistics behind them.
            gradients: flat buffers of the gradients, laid out by ``gradient_layouts``; empty unless
                ``averages_gradients``.
        """


class BoundAlgorithm(Protocol):
    """A base algorithm at work in one job. A class that inherits from this one overrides the hooks that it needs."""

    def average_gradients(self, partial_average: PartialAverage | None = None) -> None:
        """Average the gradient buffers in place; called before the base optimizer steps, if ``averages_gradients``.

        Args:
            partial_average: how this rank takes part in an average over some of the ranks (inside ``join``, or when
                values are not finite); None for the mean over all ranks.
        """
        return

    def after_step(self) -> None:
        """Mix the parameters with those of other ranks; called after the base optimizer has stepped."""
        return


@runtime_checkable
class OuterAverageHooks(Protocol):
    """What happens around an exact average of the parameter buffers, which the caller forms.

    By default the buffers themselves are averaged, and nothing is in flight.
    """

    def wait_in_flight(self) -> None:
        """Wait for the messages in flight, and apply them to the parameters."""

    def prepare_average(self) -> None:
        """Wait for the messages in flight, and fill the buffers with the arrays whose mean is the exact average."""

    def abort_average(self) -> None:
        """Undo ``prepare_average``, because no average was formed: the buffers hold the parameters again."""

    def adopt_consensus(self) -> None:
        """Begin again from the buffers, which hold new parameters that are equal on all ranks."""

    def rebase_on_model(self) -> None:
        """Continue from the buffers, whose parameters were changed on this rank alone."""


@runtime_checkable
class StatefulAlgorithm(Protocol):
    """State besides the model's parameters. By default there is none."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next steps, as numbers, strings, lists, dicts and arrays. May wait for messages."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of an earlier run, with the model of that run in the buffers."""


@runtime_checkable
class DropsNonFinite(Protocol):
    """Keeps a rank's parameters from its neighbours when they are not finite (``on_nonfinite="skip"``).

    By default ``on_nonfinite="skip"`` is refused for algorithms that mix parameters.
    """

    def allow_drop(self) -> None:
        """Prepare for calls of ``drop_non_finite``. Called once, right after ``bind``, on all ranks.

        Raises:
            ConfigurationError: if the algorithm cannot do without the parameters of a rank.
        """

    def drop_non_finite(self) -> None:
        """Send nothing of this rank's parameters in the next ``after_step``: they are not finite."""


@runtime_checkable
class Recoverable(Protocol):
    """Begins again after ranks have died, for which the replica calls ``bind`` on the remaining ranks.

    By default the algorithm begins again from the parameters that each rank has.
    """

    @property
    def begun_exchanges(self) -> int:
        """Number of steps in which this rank has begun to exchange messages."""

    def resume_after_failure(self, begun_exchanges: int, most_begun: int) -> None:
        """Begin from the parameters, and exchange nothing in the steps that any rank has begun already.

        Args:
            begun_exchanges: ``begun_exchanges`` of this rank's algorithm before the failure.
            most_begun: largest ``begun_exchanges`` of any rank.
        """


@runtime_checkable
class Resizable(Protocol):
    """Continues a saved state on another number of ranks, from the mean of the replicas. Both methods change nothing.

    By default that is possible if there is no state.
    """

    def prepared_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> Sequence[Array]:
        """What ``prepare_average`` would have put into the buffers of a rank.

        Args:
            state: ``state_dict()`` of that rank.
            parameters: one-dimensional parameters of that rank, one array per buffer.
        """

    def state_for_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> dict[str, Any]:
        """State with which a world of another size begins from the average.

        Args:
            state: ``state_dict()`` of a rank of the former world.
            parameters: the average, one one-dimensional array per buffer.

        Raises:
            ConfigurationError: if the algorithm cannot continue from it.
        """


@runtime_checkable
class SearchesGradients(Protocol):
    """Finds gradients that are not finite while it averages them, which saves a pass over memory.

    By default each rank searches its gradients before the average.
    """

    @property
    def can_search(self) -> bool:
        """Whether ``average_and_search`` is possible, the same on all ranks."""

    @property
    def takes_parts(self) -> bool:
        """Whether ``average_and_search`` is faster if large gradients are not copied, the same on all ranks."""

    def average_and_search(self, parts: Sequence[Sequence[Array]] | None = None) -> Sequence[str | None]:
        """Average the gradients in place over all ranks, as ``average_gradients`` does.

        All ranks have exchanged a message since their gradients were complete.

        Args:
            parts: for each gradient buffer, arrays that hold its elements one after the other; None on all ranks, if
                these are the buffers.

        Returns:
            By rank the name of the first parameter whose gradient was not finite, None if all were; equal on all ranks.
        """
