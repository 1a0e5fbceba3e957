"""The gossip after each step, by base algorithms that mix parameters."""

from collections.abc import Sequence

from lentando.comm.control import Agreement, Event
from lentando.comm.elastic import without_vote
from lentando.optimizers.replica.part import Part
from lentando.optimizers.rules.non_finite import first_non_finite

__all__ = ["Mixing"]


class Mixing(Part):
    """Mixes parameters: after a step of this rank, or without a batch of its own after one of the others.

    Inside ``join`` a message precedes each mixing, unless one has preceded the average of gradients.
    """

    def mix(self) -> None:
        """This rank has stepped."""
        with self.costs.of("gossip", self.progress.inner_steps + 1):
            if self.progress.is_joined and not self.plan.settings.base.averages_gradients:
                agreement = self._agree()
                if not self.uneven.is_everybodys(agreement):
                    self.uneven.rates_of_active()
            self._mix()

    def mix_with_others(self, rates: Sequence[float] | None) -> Sequence[float] | None:
        """Take part without a batch.

        Args:
            rates: learning rates of the step; None if nothing has told of it yet.

        Returns:
            The same, None if no rank has a batch left.
        """
        with self.costs.of("gossip", self.progress.inner_steps):
            if rates is None:
                if not self._agree().weight:
                    return None
                rates = self.uneven.rates_of_active()
            self._mix()
        return rates

    def _agree(self) -> Agreement:
        return self.messages.agree(Event.STEP, "gossips about")

    def _mix(self) -> None:
        plan = self.plan
        plan.framework.load()
        found = first_non_finite(plan.framework.buffers, statistics=False) if self.non_finite.skips else None
        if found is not None:
            self.non_finite.drop_non_finite(found)
            plan.base.non_finite.drop_non_finite()
        if without_vote(plan.transport, plan.base.steps.after_step):
            plan.framework.store()
        if found is not None:
            plan.framework.reset_optimizer()
