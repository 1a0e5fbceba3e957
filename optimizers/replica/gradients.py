"""The average of gradients over the ranks, before each step of a base algorithm that averages gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from lentando.comm.agreement import Event, ranks_where
from lentando.comm.elastic import in_place, is_elastic
from lentando.comm.errors import NonFiniteError
from lentando.comm.transport import Array
from lentando.optimizers.framework import LeavingFramework
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.timing import Costs
from lentando.optimizers.replica.uneven_data import UnevenData
from lentando.optimizers.replica.weights import Weights
from lentando.optimizers.rules.non_finite import NonFinite, Verdict, first_non_finite, loss_to_send, mean_loss

__all__ = ["AveragedLoss", "Gradients"]


@dataclass(frozen=True)
class AveragedLoss:
    """What all ranks know after an average of gradients.

    Attributes:
        loss: mean of the ranks' losses, NaN if no rank has given one.
        overflowed: ranks whose gradients have overflowed.
    """

    loss: float
    overflowed: Sequence[int]


class Gradients:
    """Averages gradients over the ranks before each step.

    Args:
        setup: transport, framework and method of the replica.
        progress: progress of the replica.
        channel: sends the control messages.
        costs: counts bytes and time.
        non_finite: policy for values that are not finite.
        uneven: shares of the ranks in averages.
        weights: weights that the program may have set.
    """

    def __init__(
        self,
        setup: Setup,
        progress: Progress,
        channel: Channel,
        costs: Costs,
        non_finite: NonFinite,
        uneven: UnevenData,
        weights: Weights,
    ) -> None:
        framework = setup.framework
        self._leaving = framework if isinstance(framework, LeavingFramework) else None
        self._setup = setup
        self._progress = progress
        self._channel = channel
        self._costs = costs
        self._non_finite = non_finite
        self._uneven = uneven
        self._weights = weights
        self._deferred_error: NonFiniteError | None = None
        self._copies: list[Array] = []  # in an elastic job

    @property
    def may_stay(self) -> bool:
        """Whether large gradients need not be copied into the flat buffers, the same on all ranks."""
        return self._leaving is not None and self._searches_in_sum and self._setup.base.search.takes_parts

    @property
    def _searches_in_sum(self) -> bool:
        """Whether gradients are searched while they are summed, not before, the same on all ranks."""
        setup = self._setup
        return (
            setup.base.search.can_search
            and not self._progress.is_joined  # the average may be over some of the ranks
            and not self._non_finite.skips
            and not is_elastic(setup.transport)
        )

    def average(self, loss: float | None, has_overflowed: bool, is_scaled: bool, defer: bool) -> AveragedLoss:
        """Average the gradients of a step that has begun. Arguments and errors are those of ``average_gradients``."""
        setup = self._setup
        step = self._progress.inner_steps + 1
        is_searched = not (has_overflowed or is_scaled)
        searches = self._searches_in_sum
        parts = self._leaving.gradient_parts() if self._leaving is not None and self.may_stay else None
        found = first_non_finite(setup.framework.gradients) if is_searched and not searches else None
        own_loss = nan if has_overflowed or is_scaled else loss_to_send(loss)

        def attempt() -> AveragedLoss:
            by_rank = self._agree(own_loss, has_overflowed, found)
            self._weights.compare(ranks_where(by_rank["weights_set"]))
            verdict = self._deferred_error = None

            def judge(by_rank: Mapping[str, Array], found: str | None) -> None:
                nonlocal verdict
                try:
                    verdict = self._judge(by_rank, step, found)
                except NonFiniteError as error:
                    if not defer:
                        raise
                    self._deferred_error = error

            judge(by_rank, found)
            if self._uneven.is_partial:
                self._uneven.rates_of_active()
            if searches:
                by_search = setup.base.search.average_and_search(parts)
                if is_searched and self._deferred_error is None and any(by_search):
                    are_finite = np.array([name is None for name in by_search])
                    judge({**by_rank, "is_finite": are_finite}, by_search[setup.transport.rank])
            else:
                self._average(verdict)
            return AveragedLoss(
                mean_loss(by_rank["loss"]) if verdict is None else verdict.loss, ranks_where(by_rank["has_overflowed"])
            )

        with self._costs.of("gradients", step):
            gradients = [buffer.array for buffer in setup.framework.gradients]
            try:
                result = in_place(setup.transport, gradients, attempt, self._copies)
            except NonFiniteError:
                self._progress.is_in_step = False  # it is not taken, so that a checkpoint may be loaded here
                raise
        self._channel.forget_start()
        return result

    def average_of_others(self) -> tuple[Sequence[float], bool] | None:
        """Take part in an average of gradients without a batch.

        Returns:
            The learning rates of the step, one per parameter group, and whether gradients have overflowed on any rank.
            None if no rank has a batch left.
        """
        with self._costs.of("gradients", self._progress.inner_steps):
            by_rank = self._agree()
            if not self._uneven.active:
                return None
            self._weights.compare(ranks_where(by_rank["weights_set"]))
            verdict = self._judge(by_rank, self._progress.inner_steps + 1)
            rates = self._uneven.rates_of_active()
            self._setup.framework.load()  # on a device, what follows is then in order with the framework
            self._average(verdict)
        return rates, bool(by_rank["has_overflowed"].any())

    def settle_deferred(self, expected: bool) -> bool:
        """Raise the error that ``average_gradients`` was asked to defer, if there is one, or drop an expected one.

        Args:
            expected: whether gradients that are not finite are expected.

        Returns:
            Whether there was an expected error, on every rank: the averaged gradients are not finite.

        Raises:
            NonFiniteError: on every rank. The step is not taken.
        """
        error, self._deferred_error = self._deferred_error, None
        if error is not None and not expected:
            self._progress.is_in_step = False
            raise error
        return error is not None

    def _agree(self, loss: float = nan, has_overflowed: bool = False, found: str | None = None) -> Mapping[str, Array]:
        return self._channel.agree(
            Event.GRADIENTS,
            "averages the gradients of",
            loss=loss,
            has_overflowed=has_overflowed,
            is_finite=self._non_finite.is_clean(found),
            weights_set=self._setup.framework.watch.found,
        )

    def _judge(self, by_rank: Mapping[str, Array], step: int, found: str | None = None) -> Verdict | None:
        """Decide what is left out of the average. Gradients that have overflowed are left to their scaler."""
        if by_rank["has_overflowed"].any():
            return None
        setup, lasting = self._setup, None
        if found is not None and self._non_finite.skips and setup.outer is None:
            setup.framework.load()
            lasting = first_non_finite(setup.framework.buffers, constants=setup.constants)
        words = f"the gradient of {found!r}" if lasting is None else repr(lasting)
        return self._non_finite.judge(
            by_rank,
            f"average of gradients of inner step {step}",
            None if found is None else words,
            consequence="the step is not taken",
            is_active=self._uneven.is_active,
            is_lasting=lasting is not None,
        )

    def _average(self, verdict: Verdict | None) -> None:
        share = None if verdict is None else verdict.partial_average
        self._setup.base.steps.average_gradients(self._uneven.share() if share is None else share)
