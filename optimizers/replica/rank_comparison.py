"""One warning each about learning rates that differ between ranks, and about losses that do not.

Nothing is sent for it: the numbers are part of the control messages that precede an average anyway.
"""

import logging
from collections.abc import Mapping, Sequence
from math import isfinite, isnan, nan

from lentando.comm.agreement import Event
from lentando.comm.errors import grouped_by_rank
from lentando.comm.numbering import numbers_of
from lentando.comm.transport import Array, Transport
from lentando.optimizers.replica.progress import Progress

__all__ = ["RankComparison", "weighted_rate"]

_log = logging.getLogger("lentando")

SAME_RATE = 1e-6
"""Learning rates whose relative difference is below this are equal: some frameworks keep them in float32."""
SAME_LOSS_STEPS = 3
"""Number of steps whose losses must be the same on all ranks before there is a warning."""


def weighted_rate(rates: Sequence[float]) -> float:
    """Return a mean that differs if the learning rate of any parameter group does, even if the plain mean does not.

    It is NaN, which is not compared, if a group has no learning rate.

    Args:
        rates: learning rates, one per parameter group.
    """
    count = len(rates)
    return sum((number + 1) * rate for number, rate in enumerate(rates)) / (count * (count + 1) / 2)


class RankComparison:
    """Compares learning rates and losses of all ranks after each control message. Rank 0 warns.

    Args:
        transport: transport that connects the ranks that train together.
        rates_may_differ: whether learning rates that differ are intended.
        progress: progress of the replica.
    """

    def __init__(self, transport: Transport, rates_may_differ: bool, progress: Progress) -> None:
        self._transport = transport  # whose rank changes when ranks of an elastic job die
        self._progress = progress
        self._compares_rates = not rates_may_differ
        self._compares_losses = True
        self._same_losses: set[float] = set()
        self._same_steps = 0

    def contribute(self, event: Event) -> Mapping[str, float]:
        """Attach two means of the learning rates over the parameter groups: of the round, or else of the last step."""
        rates = self._progress.mean_rates() if event is Event.ROUND else self._progress.latest_rates
        # Inside join the ranks may have taken unequally many steps.
        is_compared = bool(rates) and not self._progress.is_joined
        return {
            "learning_rate": sum(rates) / len(rates) if rates else nan,
            "weighted_rate": weighted_rate(rates) if is_compared else nan,
        }

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        """Warn once if learning rates differ, and once if the losses that the message carries never do."""
        if self._compares_rates:
            rates = by_rank["weighted_rate"].tolist()
            least, most = min(rates), max(rates)
            if most - least > SAME_RATE * max(abs(most), abs(least)):
                self._compares_rates = False
                self._warn_of_rates(by_rank["learning_rate"])
        if self._compares_losses and "loss" in by_rank:
            self._compare_losses(by_rank["loss"].tolist(), self._progress.steps if event is Event.ROUND else 1)

    def _warn_of_rates(self, rates: Array) -> None:
        if self._transport.rank != 0:
            return
        means = grouped_by_rank([f"{rate:g}" for rate in rates], numbers_of(self._transport))
        _log.warning(
            "the learning rates differ between ranks at inner step %d. Mean over parameter groups: %s%s. A scheduler "
            "that follows the loss must be given the mean over all ranks (lt.allreduce, MetricAverageCallback); a "
            "checkpoint must be loaded on all of them. If they differ on purpose, give rates_may_differ=True. This "
            "warning is not repeated",
            self._progress.inner_steps,
            means,
            "" if ";" in means else ", but those of single groups differ",
        )

    def _compare_losses(self, losses: Sequence[float], steps: int) -> None:
        """Compare the first losses only: they differ if the ranks' data do.

        Args:
            losses: one per rank, NaN for a rank without a loss.
            steps: number of steps that each of them is the mean of.
        """
        first = losses[0]
        if isnan(first) and all(map(isnan, losses)):
            return  # no rank has one
        if len(losses) == 1 or not isfinite(first) or any(loss != first for loss in losses):
            self._compares_losses = False
            return
        self._same_losses.add(first)
        self._same_steps += steps
        # A model whose last layer begins at zero has the same first loss whatever the data are, and keeps it as long
        # as the learning rate is zero: one value proves nothing.
        if self._same_steps < SAME_LOSS_STEPS or len(self._same_losses) < 2:
            return
        self._compares_losses = False
        if self._transport.rank == 0:
            _log.warning(
                "all %d ranks have had exactly the same losses in the first %d steps: they seem to train on the same "
                "batches, so that averaging changes nothing. Give every rank its own part of the data, by lt.rank() "
                "and lt.size() (torch.utils.data.DistributedSampler, tf.data.Dataset.shard). This warning is not "
                "repeated",
                len(losses),
                self._same_steps,
            )
