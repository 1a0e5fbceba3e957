"""Synchronous SGD with buckets: gradients that are averaged during the backward pass, and what happens if they change.

Where the buckets do not hold the gradients of all ranks, they are filled again, after the backward pass. Which steps
have overlapped therefore changes no bit of a result, neither in this run nor in one that resumes from a checkpoint.
"""

import logging
from collections.abc import Mapping, Sequence

from lentando.comm.agreement import Event
from lentando.comm.collectives import plan_reduction
from lentando.comm.flat import FlatBuffer
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.base_algorithm import BoundAlgorithm
from lentando.optimizers.rules.gradient_buckets import BucketCoverage, Buckets, OverlapsGradients
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = ["OverlappedGradients"]

_log = logging.getLogger("lentando")

FEWEST_WASTED, WASTED_SHARE = 3, 4
"""An overlap that was chosen automatically is given up after this many steps whose averages were useless, if they are
at least one of ``WASTED_SHARE`` steps: a useless average costs about twice what an overlap saves."""


class OverlappedGradients(BoundAlgorithm, OverlapsGradients):
    """Uses the means that the buckets hold, where they hold them on all ranks.

    Args:
        transport: transport that connects the ranks.
        gradients: flat gradients, laid out by ``gradient_layouts``.
        buckets: buckets of these gradients.
        whole: averages all gradients over some of the ranks.
    """

    def __init__(
        self, transport: Transport, gradients: Sequence[FlatBuffer], buckets: Buckets, whole: BoundAlgorithm
    ) -> None:
        self._buckets = buckets
        self._whole = whole
        self._transport = transport
        self._presence = [
            plan_reduction(transport, flat.array[flat.layout.offsets[-1] :], "backend") for flat in gradients
        ]
        self._agreed = BucketCoverage.NONE
        self._is_given_up = False
        self._steps = self._wasted = 0

    @property
    def buckets(self) -> Buckets | None:
        return None if self._is_given_up else self._buckets

    def contribute(self, event: Event) -> Mapping[str, float]:
        """Attach which of this rank's gradients of this step the buckets hold."""
        return {"coverage": self._buckets.coverage}

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        """Finish the buckets before an average of gradients, for which the least coverage of any rank counts."""
        if event is Event.GRADIENTS:
            self.finish_buckets(BucketCoverage(int(by_rank["coverage"].min())))

    def finish_buckets(self, agreed: BucketCoverage) -> None:
        buckets = self._buckets
        self._agreed, buckets.coverage = agreed, BucketCoverage.NONE
        if agreed is BucketCoverage.ABANDONED:
            buckets.start_all()
        elif buckets.is_automatic and buckets.is_in_flight:
            self._consider_giving_up(agreed)
        if buckets.is_in_flight:
            buckets.wait(self._transport.traffic)

    def average_gradients(self, partial_average: PartialAverage | None = None) -> None:
        agreed, self._agreed = self._agreed, BucketCoverage.NONE
        if partial_average is not None:
            self._whole.average_gradients(partial_average)
            return
        if agreed not in (BucketCoverage.ALL_PRESENT, BucketCoverage.ALL):
            self._buckets.start_all()
            self._buckets.wait(self._transport.traffic)
        self._buckets.take_over()
        if agreed is not BucketCoverage.ALL:
            for reduction in self._presence:
                reduction.all_reduce(mean=True)

    def _consider_giving_up(self, agreed: BucketCoverage) -> None:
        """Decide, alike on all ranks, whether the next backward passes fill no buckets any more."""
        self._steps += 1
        self._wasted += agreed is BucketCoverage.NONE
        if agreed is BucketCoverage.UNSUPPORTED:
            reason = "a gradient is sparse"
        elif self._wasted >= max(FEWEST_WASTED, self._steps / WASTED_SHARE):
            reason = f"gradients were changed between the backward pass and the step in {self._wasted} steps"
        else:
            return
        self._is_given_up = True
        if self._transport.rank == 0:
            _log.info(
                "gradients are averaged after the backward pass from now on, because %s: AllReduce(overlap=False) does "
                "so from the start. Inside no_sync() backward passes only accumulate gradients, and synchronize() "
                "averages them before they are clipped",
                reason,
            )
