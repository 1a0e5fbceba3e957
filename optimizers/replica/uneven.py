"""Ranks that have taken unequally many steps (``join``): whose numbers count, and whose learning rates hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lentando.comm.control import Agreement
from lentando.optimizers.replica.plan import Plan
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.timing import Timing
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = ["Uneven"]


@dataclass
class Uneven:
    """What a rank does about ranks that have run out of batches, or is one itself.

    Args:
        plan: what the replica is made of.
        progress: how far it is.
        timing: is told of steps that were counted and not taken.
    """

    plan: Plan
    progress: Progress
    timing: Timing

    def is_everybodys(self, agreement: Agreement) -> bool:
        """Whether all ranks take this step."""
        return agreement.weight == self.plan.transport.size

    def share(self, agreement: Agreement, is_active: bool | None = None) -> PartialAverage:
        """This rank's share in an average over some of the ranks."""
        is_active = not self.progress.has_ended if is_active is None else is_active
        gossips = self.plan.settings.base.mixes_parameters
        return PartialAverage(is_active, round(agreement.weight), self.plan.transport.size, gossips)

    def rates_of_active(self) -> list[float]:
        """The learning rates of this step on the first rank that takes it. Collective."""
        own = [float(not self.progress.has_ended), *self.plan.framework.learning_rates()]
        by_rank = self.plan.transport.allgather(np.array(own, np.float64))
        rates: list[float] = by_rank[int(by_rank[:, 0].argmax()), 1:].tolist()
        return rates

    def settle_round(self, rates: Sequence[float]) -> list[float]:
        """Count the round's steps as the rank did that took most, by whose learning rates all step outward. Collective.

        A rank with more steps has seen more of a learning rate that changes; where one took them all, gamma is what it
        would be on even data.
        """
        progress = self.progress
        own = [progress.steps - progress.steps_along, progress.steps, *rates]
        by_rank = self.plan.transport.allgather(np.array(own, np.float64))
        missed = int(by_rank[:, 1].max()) - progress.steps
        progress.inner_steps += missed
        self.timing.skip(missed)
        leading: list[float] = by_rank[int(by_rank[:, 0].argmax()), 2:].tolist()
        return leading
