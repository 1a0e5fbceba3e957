"""Ranks that differ where they should agree, or agree where they should differ: one warning, from what messages tell.

Nothing is sent for it: the numbers travel in the control messages that precede an average anyway.
"""

import logging
from collections.abc import Sequence
from math import isfinite, isnan

from lentando.comm.control import Agreement
from lentando.comm.errors import grouped_by_rank

__all__ = ["RankComparison", "weighted_rate"]

_log = logging.getLogger("lentando")

SAME_RATE = 1e-6
"""Learning rates whose relative difference is below this are equal: some frameworks keep them in float32."""
SAME_LOSS_STEPS = 3
"""Of how many steps the losses must be the same on all ranks before that is worth a warning."""


def weighted_rate(rates: Sequence[float]) -> float:
    """A mean that differs if the learning rate of any parameter group does, even where the plain mean does not.

    NaN, which is not compared, if a group has no learning rate.
    """
    count = len(rates)
    return sum((number + 1) * rate for number, rate in enumerate(rates)) / (count * (count + 1) / 2)


class RankComparison:
    """Looks at what the ranks have said in a control message. Every rank looks; rank 0 warns.

    Args:
        rank: this one.
        rates_may_differ: learning rates that differ are intended.
    """

    def __init__(self, rank: int, rates_may_differ: bool) -> None:
        self._rank = rank
        self._looks_at_rates = not rates_may_differ
        self._looks_at_losses = True
        self._same_losses: set[float] = set()
        self._same_steps = 0

    def look(self, agreement: Agreement, inner_step: int, loss_steps: int) -> None:
        """Warn, once each, about learning rates that differ and about losses that never do.

        Args:
            agreement: what came of the message.
            inner_step: steps taken so far.
            loss_steps: of how many of them the losses in the message are the mean.
        """
        if self._looks_at_rates:
            rates = agreement.weighted_rates
            least, most = min(rates), max(rates)
            if most - least > SAME_RATE * max(abs(most), abs(least)):
                self._looks_at_rates = False
                self._warn_of_rates(agreement, inner_step)
        if self._looks_at_losses:
            self._look_at_losses(agreement.losses, loss_steps)

    def _warn_of_rates(self, agreement: Agreement, inner_step: int) -> None:
        if self._rank != 0:
            return
        means = grouped_by_rank([f"{rate:g}" for rate in agreement.learning_rates])
        _log.warning(
            "the learning rates differ between ranks at inner step %d. Mean over parameter groups: %s%s. A scheduler "
            "that follows the loss must be given the mean over all ranks (lt.allreduce, MetricAverageCallback); a "
            "checkpoint must be loaded on all of them. If they differ on purpose, say rates_may_differ=True. This "
            "is said once",
            inner_step,
            means,
            "" if ";" in means else ", but those of single groups differ",
        )

    def _look_at_losses(self, losses: Sequence[float], steps: int) -> None:
        """Only the first ones are looked at: ranks whose data differ show it there."""
        first = losses[0]
        if isnan(first) and all(map(isnan, losses)):
            return  # a message that carries none
        if len(losses) == 1 or not isfinite(first) or any(loss != first for loss in losses):
            self._looks_at_losses = False
            return
        self._same_losses.add(first)
        self._same_steps += steps
        # A model whose last layer begins at zero has the same first loss whatever the data are, and keeps it as long
        # as the learning rate is zero: one value proves nothing.
        if self._same_steps < SAME_LOSS_STEPS or len(self._same_losses) < 2:
            return
        self._looks_at_losses = False
        if self._rank == 0:
            _log.warning(
                "all %d ranks have had exactly the same losses in the first %d steps: they seem to train on the same "
                "batches, so that averaging changes nothing. Give every rank its own part of the data, by lt.rank() "
                "and lt.size() (torch.utils.data.DistributedSampler, tf.data.Dataset.shard). This is said once",
                len(losses),
                self._same_steps,
            )
