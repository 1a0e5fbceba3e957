"""The protocols of outer steps: what happens at the end of each round.

``DistributedOptimizer(outer=...)`` takes one of two kinds of objects, both frozen dataclasses:

- An ``OuterRule`` (``lentando.optimizers.rules.outer_rule``) is arithmetic on single elements, such as slow momentum.
  ``lentando.optimizers.rules.outer_step`` forms the exact average and applies the rule to it.
- An ``OuterAlgorithm`` decides itself what is exchanged and when: an average that overlaps with the next round, that is
  sent in fewer bits, or of a part of the parameters. Its ``bind`` makes an ``OuterStepping``, which works in one job.

The replica drives every ``OuterStepping`` in the same way, and learns from its attributes what is possible with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lentando.comm.collectives import Algorithm
from lentando.comm.flat import FlatBuffer
from lentando.comm.transport import Transport
from lentando.optimizers.rules.constant_statistics import Constants
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = ["OuterAlgorithm", "OuterOptions", "OuterStepping"]


class OuterStepping(Protocol):
    """The outer steps of one model in one job. A class that inherits from this one overrides what it does differently.

    At the end of a round the replica calls ``average`` and then ``step``, or ``adopt`` if the program has set weights
    meanwhile, or ``abort_average`` if the outer step is not taken. Between the two nothing else is called.

    An object that leaves messages in flight when a method returns, such as an average that overlaps with the next
    round, must deal with them in every method that is called next: it waits for them, or drops them on every rank. If
    a background thread sends them (``lentando.comm.background.BackgroundThreads``), the object calls that class's
    ``count_traffic`` when it has waited for them, because the replica's report counts only what the transport of the
    job itself has sent.

    Attributes:
        communicates: whether ``average`` exchanges messages. Then a control message precedes it, so that all ranks call
            it together. Otherwise each rank takes its outer steps alone.
        leaves_ranks_equal: whether all ranks have the same parameters after ``step``, so that gossip begins again from
            there. Otherwise gossip continues from what each rank has.
        supports_join: whether ``average`` takes a ``PartialAverage``, for ranks that have run out of batches. Otherwise
            ``join`` is refused.
        supports_skip: whether ``average`` takes a ``PartialAverage`` that leaves out values that are not finite.
            Otherwise ``on_nonfinite="skip"`` is refused.
        supports_elastic: whether ``abort_average`` undoes an ``average`` that was interrupted on another rank, and
            ``replan`` continues without ranks that have died. Otherwise elastic jobs are refused.
    """

    communicates: bool = True
    leaves_ranks_equal: bool = True
    supports_join: bool = False
    supports_skip: bool = False
    supports_elastic: bool = False

    def reset_anchor(self, forget_momentum: bool = False) -> None:
        """Begin a round from the present parameters, which are the same on all ranks unless those train apart.

        Args:
            forget_momentum: whether state of earlier rounds, such as a momentum, begins again.
        """

    def average(self, partial_average: PartialAverage | None = None) -> None:
        """Do everything in an outer step that can fail. Collective if ``communicates``.

        The buffers hold the parameters of this rank, or what gossip has prepared in their place for an exact average
        (if ``leaves_ranks_equal``).

        Args:
            partial_average: how this rank takes part in an average over some of the ranks; None for all ranks.

        Raises:
            NonFiniteError: on every rank, if the result would not be finite. The buffers are unchanged then.
        """

    def abort_average(self) -> None:
        """Undo ``average``: the buffers hold again what they held before."""

    def step(self, learning_rates: Sequence[float]) -> None:
        """Put the result into the buffers.

        Args:
            learning_rates: learning rate of each parameter group, the mean over the round's inner steps.
        """

    def adopt(self) -> None:
        """Put the average into the buffers without any rule, and begin again from it."""

    def replan(self) -> None:
        """Plan again for the remaining ranks after some have died. Collective over these."""
        return

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next outer steps besides the parameters. May wait for messages.

        Returns:
            A ``flat_state`` for each name (``lentando.optimizers.rules.flat_state``): arrays whose elements belong to
            those of the buffers, so that a checkpoint can be loaded on another number of ranks.
        """

    def whole_state(self) -> dict[str, Any]:
        """``state_dict()`` for the whole buffers, on every rank. Collective if ranks hold shards."""
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict()``.

        Raises:
            ConfigurationError: if it belongs to another model, world size or rule.
        """


@dataclass(frozen=True)
class OuterOptions:
    """Settings of a method that concern its outer steps.

    Attributes:
        exact_average: whether the exact average over all ranks is asked for.
        algorithm: algorithm of reductions; see ``lentando.comm.collectives.plan_reduction``.
        constants: statistics that may have values that are not finite.
    """

    exact_average: bool
    algorithm: Algorithm
    constants: Constants


@runtime_checkable
class OuterAlgorithm(Protocol):
    """Describes outer steps. It is a frozen dataclass, so that ranks and checkpoints can compare its settings."""

    @property
    def needs_learning_rate(self) -> bool:
        """Whether outer steps depend on the learning rate of the inner steps."""

    def bind(self, transport: Transport, buffers: Sequence[FlatBuffer], options: OuterOptions) -> OuterStepping:
        """Plan the outer steps of these buffers. Collective.

        Args:
            transport: transport that connects the ranks that train together.
            buffers: flat buffers of the model, each with its parameters first and its statistics behind them. They
                hold parameters that are equal on all ranks.
            options: settings of the method.

        Raises:
            ConfigurationError: for options that are not possible with it.
        """
