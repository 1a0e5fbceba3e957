"""Uneven data (``join``): ranks that have run out of batches take part in the steps and rounds of the other ranks.

Averages are over the ranks that take the step, and by their learning rates.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeAlias, overload, runtime_checkable
from weakref import proxy

import numpy as np

from lentando.comm import operations
from lentando.comm.agreement import Event
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.stopping import Stopping
from lentando.optimizers.replica.timing import Timing
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = ["Joinable", "StepAlong", "UnevenData", "join"]

StepAlong: TypeAlias = Callable[[Sequence[float], bool], bool]
"""Lets the base optimizer of a rank without a batch take a step with the averaged gradients.

It is called with the learning rates of the ranks that have batches, by parameter group, and whether their gradients
overflowed; it returns whether that was an inner step.
"""


@runtime_checkable
class Joinable(Protocol):
    """An optimizer whose ranks may have unequal numbers of batches."""

    def joined(self) -> AbstractContextManager[None]:
        """A block in which they may; entered by ``join``."""


@overload
def join(optimizer: Joinable) -> AbstractContextManager[None]: ...


@overload
def join(optimizer: int = -1) -> int: ...


def join(optimizer: Joinable | int = -1) -> AbstractContextManager[None] | int:
    """Train on uneven data: put the loop over batches inside this block, on every rank.

    A rank that runs out of batches leaves its loop and waits at the end of the block until all ranks have. Meanwhile it
    takes part in the communication of the others with weight 0: averages are over the ranks that have taken steps, and
    it adopts them. The steps of its last, incomplete round count. When the last rank has no batch left, a round that
    has begun is closed by an exact average, and gossip waits for its messages in flight. Without gossip, all ranks
    leave the block with the same parameters. An exception leaves the block at once.

    While no rank has run out of batches, training is the same as without the block, except for one control message per
    gossip step.

    Inside the block only the optimizer's steps may communicate: evaluate, save and load outside of it. A learning rate
    that changes within the block is that of the ranks that take steps. Schedules that count steps should count rounds
    or epochs instead, because otherwise they fall behind on ranks with fewer batches.

    Without an optimizer this is Horovod's function: it returns when all ranks have called it. Until then this rank
    contributes zeros to the sums and averages of the others, by ``allreduce`` and its relatives; optimizers need the
    block.

    Args:
        optimizer: a ``DistributedOptimizer`` of any framework. Or nothing, or the number of a device, as in Horovod,
            where it has no effect.

    Returns:
        The block; without an optimizer, the rank that was the last to call the function.

    Raises:
        ConfigurationError: for another optimizer, inside such a block, or if the method never waits for other ranks
            (local steps with ``exact_average=False``).
        MismatchError: on every rank, if other ranks train without this block.
    """
    if isinstance(optimizer, int):
        return operations.join()
    if not isinstance(optimizer, Joinable):
        raise ConfigurationError(f"join needs a DistributedOptimizer, got {type(optimizer).__name__}")
    return optimizer.joined()


class GradientAverage(Protocol):
    """The average of gradients before each step."""

    def average_of_others(self) -> tuple[Sequence[float], bool] | None:
        """Take part without a batch; see ``lentando.optimizers.replica.gradients.Gradients``."""


class ParameterMixing(Protocol):
    """The gossip after each step."""

    def mix_with_others(self, rates: Sequence[float] | None) -> Sequence[float] | None:
        """Take part without a batch; see ``lentando.optimizers.replica.mixing.Mixing``."""


class OuterSteps(Protocol):
    """The outer steps that end rounds."""

    def end(self) -> bool:
        """Take an outer step; see ``lentando.optimizers.replica.rounds.Rounds``."""


class UnevenData:
    """Keeps track of which ranks take a step, and lets a rank without batches take part in the others' steps.

    Args:
        setup: transport, framework and method of the replica.
        progress: progress of the replica.
        channel: its messages carry whether ranks have run out of batches, inside ``join``.
        timing: leaves out steps that were counted and not taken.

    Attributes:
        is_active: whether this rank's values count in the average that the last control message preceded.
        active: number of ranks whose values count in it.
        has_ended_anywhere: whether a rank had run out of batches.
    """

    def __init__(self, setup: Setup, progress: Progress, channel: Channel, timing: Timing) -> None:
        self._setup = setup
        self._progress = progress
        self._channel: Channel = proxy(channel)  # see ``Channel.add``
        self._timing = timing
        self._forget()

    def contribute(self, event: Event) -> Mapping[str, float]:
        """Attach whether this rank's values count, and whether it has run out of batches."""
        progress = self._progress
        takes_step = not progress.has_ended
        self.is_active = progress.steps > progress.steps_along if event is Event.ROUND else takes_step
        return {"is_active": self.is_active, "has_ended": progress.has_ended}

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        """Count the ranks whose values count."""
        self.active = int(by_rank["is_active"].sum())
        self.has_ended_anywhere = bool(by_rank["has_ended"].any())

    @property
    def is_partial(self) -> bool:
        """Whether the values of some ranks do not count."""
        return self._progress.is_joined and self.active != self._setup.transport.size

    def share(self) -> PartialAverage | None:
        """Return this rank's share in an average over some of the ranks, None if the values of all ranks count."""
        if not self.is_partial:
            return None
        gossips = self._setup.settings.base.mixes_parameters
        return PartialAverage(self.is_active, self.active, self._setup.transport.size, gossips)

    def rates_of_active(self) -> list[float]:
        """Return the learning rates of this step on the first rank that takes it. Collective."""
        own = [float(not self._progress.has_ended), *self._setup.framework.learning_rates()]
        by_rank = self._setup.transport.allgather(np.array(own, np.float64))
        rates: list[float] = by_rank[int(by_rank[:, 0].argmax()), 1:].tolist()
        return rates

    def settle_round(self, rates: Sequence[float]) -> list[float]:
        """Count the steps of the round as the rank that took most of them. Collective.

        A rank with more steps has seen more of a learning rate that changes. If one rank took all steps, gamma is what
        it would be on even data.

        Args:
            rates: mean learning rates of the round on this rank, one per parameter group.

        Returns:
            Those of the rank that took most steps, with which all ranks take the outer step.
        """
        progress = self._progress
        own = [progress.steps - progress.steps_along, progress.steps, *rates]
        by_rank = self._setup.transport.allgather(np.array(own, np.float64))
        missed = int(by_rank[:, 1].max()) - progress.steps
        progress.inner_steps += missed
        self._timing.skip(missed)
        leading: list[float] = by_rank[int(by_rank[:, 0].argmax()), 2:].tolist()
        return leading

    def _check_joinable(self) -> None:
        setup, settings = self._setup, self._setup.settings
        if is_elastic(self._setup.transport):
            raise ConfigurationError(
                "join is not possible in an elastic job (init(elastic=True)) yet: give all ranks equally many batches"
            )
        if self._progress.is_joined:
            raise ConfigurationError("join blocks of one optimizer cannot be nested: leave one before the next")
        if settings.streaming.is_needed:
            raise ConfigurationError(
                "join is not possible with delay, fragments or blend yet, because a rank without batches has no step "
                "after which it adopts an average: give all ranks equally many batches"
            )
        if setup.outer is not None and not setup.outer.supports_join:
            raise ConfigurationError(
                f"join is not possible with the outer step {settings.outer!r}, which always averages over all ranks: "
                "give all ranks equally many batches"
            )
        if not setup.has_common_rounds and not settings.base.communicates:
            raise ConfigurationError(
                f"{settings.base!r} with exact_average=False sends nothing, so that no rank waits for another: "
                "leave join out"
            )

    @contextmanager
    def block(self) -> Iterator[None]:
        """Let ranks have unequal numbers of batches inside the block. Every rank enters and leaves it.

        Raises:
            ConfigurationError: if they may not.
        """
        self._check_joinable()
        self._progress.is_joined = True
        self._channel.attach(self)
        try:
            yield
        finally:
            self._channel.detach(self)
            self._progress.is_joined = self._progress.has_ended = False
            self._forget()

    def _forget(self) -> None:
        """Let the values of all ranks count, as outside of ``join``."""
        self.is_active = True
        self.active = self._setup.transport.size
        self.has_ended_anywhere = False

    def take_part(
        self,
        gradients: GradientAverage,
        mixing: ParameterMixing,
        rounds: OuterSteps,
        stopping: Stopping,
        step_along: StepAlong,
        count: Callable[[int, Sequence[float]], None],
    ) -> None:
        """Take part in the steps and rounds of the other ranks until none has a batch left. Collective.

        Args:
            gradients: average of gradients before each step.
            mixing: gossip after each step.
            rounds: outer steps.
            stopping: stops this rank after a step, if the ranks have agreed to stop.
            step_along: takes a step with the averaged gradients; see ``StepAlong``.
            count: counts steps with the sums of their learning rates.
        """
        settings, progress = self._setup.settings, self._progress
        if not settings.base.averages_gradients and not settings.base.mixes_parameters:
            while rounds.end():
                stopping.stop_if_agreed(automatic=False)
            return
        while self._step(gradients, mixing, step_along, count):
            if progress.steps == progress.due:
                rounds.end()
            stopping.stop_if_agreed(automatic=False)
        if self._setup.has_common_rounds and progress.steps:
            rounds.end()
        self._setup.wait_in_flight()

    def _step(
        self,
        gradients: GradientAverage,
        mixing: ParameterMixing,
        step_along: StepAlong,
        count: Callable[[int, Sequence[float]], None],
    ) -> bool:
        """Take part in a step of the other ranks. Returns whether there was one."""
        base = self._setup.settings.base
        rates: Sequence[float] | None = None
        if base.averages_gradients:
            averaged = gradients.average_of_others()
            if averaged is None:
                return False
            rates, has_overflowed = averaged
            if not step_along(rates, has_overflowed):
                return True
            self._setup.framework.watch.mark()
        if base.mixes_parameters:
            rates = mixing.mix_with_others(rates)
        if rates is None:
            return False
        count(1, rates)
        self._progress.steps_along += 1
        self._timing.skip(1)
        return True
