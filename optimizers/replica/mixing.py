"""Gossip: parameters are mixed with those of other ranks after each step, if the base algorithm mixes parameters."""

from collections.abc import Sequence

from lentando.comm.agreement import Event
from lentando.comm.elastic import without_vote
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.timing import Costs
from lentando.optimizers.replica.uneven_data import UnevenData
from lentando.optimizers.rules.non_finite import NonFinite, first_non_finite

__all__ = ["Mixing"]


class Mixing:
    """Mixes parameters by gossip after each step.

    Inside ``join`` a control message precedes each mixing, unless one has preceded the average of gradients.

    Args:
        setup: transport, framework and method of the replica.
        progress: progress of the replica.
        channel: sends the control messages.
        costs: counts bytes and time.
        non_finite: policy for values that are not finite.
        uneven: shares of the ranks in averages.
    """

    def __init__(
        self,
        setup: Setup,
        progress: Progress,
        channel: Channel,
        costs: Costs,
        non_finite: NonFinite,
        uneven: UnevenData,
    ) -> None:
        self._setup = setup
        self._progress = progress
        self._channel = channel
        self._costs = costs
        self._non_finite = non_finite
        self._uneven = uneven

    def mix(self) -> None:
        """Mix parameters after a step of this rank."""
        with self._costs.of("gossip", self._progress.inner_steps + 1):
            if self._progress.is_joined and not self._setup.settings.base.averages_gradients:
                self._agree()
                if self._uneven.is_partial:
                    self._uneven.rates_of_active()
            self._mix()

    def mix_with_others(self, rates: Sequence[float] | None) -> Sequence[float] | None:
        """Take part in the mixing after a step of other ranks.

        Args:
            rates: learning rates of the step, one per parameter group; None if they are not known yet.

        Returns:
            The learning rates, None if no rank has a batch left.
        """
        with self._costs.of("gossip", self._progress.inner_steps):
            if rates is None:
                self._agree()
                if not self._uneven.active:
                    return None
                rates = self._uneven.rates_of_active()
            self._mix()
        return rates

    def _agree(self) -> None:
        self._channel.agree(Event.STEP, "gossips about")

    def _mix(self) -> None:
        setup = self._setup
        setup.framework.load()
        found = first_non_finite(setup.framework.buffers, statistics=False) if self._non_finite.skips else None
        if found is not None:
            self._non_finite.drop_non_finite(found)
            setup.base.non_finite.drop_non_finite()
        if without_vote(setup.transport, setup.base.steps.after_step):
            setup.framework.store()
        if found is not None:
            setup.framework.reset_optimizer()
