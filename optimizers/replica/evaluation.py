"""What is done between steps and is not training: evaluating the mean of all replicas, and their distance from it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt

import numpy as np

from lentando.comm.agreement import Event
from lentando.comm.array_module import copy_into
from lentando.comm.collectives import plan_reduction
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.errors import ConfigurationError
from lentando.comm.numbering import number_of
from lentando.comm.transport import Array
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.timing import Timing
from lentando.optimizers.replica.whole_average import average_weights
from lentando.optimizers.rules.non_finite import ADVICE, NonFinite, first_non_finite
from lentando.optimizers.rules.streamed_step import StreamedOuterStep

__all__ = ["Evaluation"]

_log = logging.getLogger("lentando")


class Evaluation:
    """Evaluates the average of the replicas.

    Args:
        setup: transport, framework and method of the replica.
        channel: sends the control messages.
        timing: does not count the time of evaluations.
        non_finite: policy for values that are not finite.

    Attributes:
        is_open: whether the model holds the average now.
    """

    def __init__(self, setup: Setup, channel: Channel, timing: Timing, non_finite: NonFinite) -> None:
        self.is_open = False
        self._setup = setup
        self._channel = channel
        self._timing = timing
        self._non_finite = non_finite

    def refuse(self, action: str) -> None:
        """Refuse what is not possible while the model holds the average.

        Args:
            action: what is not possible, such as "a step".

        Raises:
            ConfigurationError: inside ``averaged()``.
        """
        if self.is_open:
            raise ConfigurationError(
                f"{action} is not possible inside averaged(): there the model is the average of all ranks, and the end "
                "of the block restores this rank's own weights, so that it would be lost. Leave the block first"
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the exact average of all replicas inside the block; see ``BetweenSteps.averaged``."""
        setup = self._setup
        self._timing.pause()
        buffers = setup.framework.buffers
        own: list[Array] = []

        def attempt() -> None:
            setup.framework.load()
            found = first_non_finite(buffers, constants=setup.constants)
            is_finite = self._non_finite.is_clean(found)
            by_rank = self._channel.agree(Event.EVALUATE, "evaluates the average of", is_finite=is_finite)
            verdict = self._non_finite.judge(
                by_rank,
                "evaluation of the average",
                None if found is None else repr(found),
                is_mixed=setup.settings.base.mixes_parameters,
            )
            share = None if verdict is None else verdict.partial_average
            setup.wait_in_flight()
            own.extend(buffer.array.copy() for buffer in buffers)
            if isinstance(setup.outer, StreamedOuterStep):
                setup.outer.preview(keeps_own=setup.framework.watch.found)
            setup.base.prepare_average(share)
            average_weights(setup, share)

        def put_back() -> None:
            for buffer, array in zip(buffers, own, strict=bool(own)):
                copy_into(buffer.array, array)
            own.clear()

        self._channel.together(attempt, put_back)
        setup.framework.store()
        recoveries = setup.recoveries
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False
            put_back()
            if setup.recoveries != recoveries:  # which took the average for this replica's parameters
                setup.base.outer_average.rebase_on_model()
            setup.framework.store()
            setup.framework.watch.mark()
            self._timing.resume()

    def check_finite(self, subject: str) -> None:
        """Check this rank's parameters at the end of training, which it may not learn otherwise.

        Args:
            subject: what has ended, such as "fit".

        Raises:
            NonFiniteError: on this rank alone, if they are not finite, unless the next outer step restores them.
        """
        setup = self._setup
        if self.is_open:
            return
        setup.framework.load()
        found = first_non_finite(setup.framework.buffers, constants=setup.constants)
        if found is None:
            return
        text = f"{subject} has ended on rank {number_of(setup.transport)} with {found!r} not finite"
        if not self._non_finite.skips:
            raise self._non_finite.error(f"{text}. {ADVICE}")
        _log.warning("%s: the next outer step restores it from the other ranks", text)

    def consensus_distance(self) -> float:
        """Return how far the replicas are apart; see ``BetweenSteps.consensus_distance``."""
        self._timing.pause()
        distance = self._channel.together(self._measure_distance)
        self._timing.resume()
        return distance

    def _measure_distance(self) -> float:
        setup = self._setup
        self._channel.agree(Event.EVALUATE, "measures the consensus distance of")
        setup.framework.load()
        squared = 0.0
        for buffer in setup.framework.buffers:
            own = buffer.parameters.astype(accumulator_dtype(buffer.array.dtype))
            reference = own.copy()
            setup.transport.broadcast(reference)
            own -= reference  # replicas that are equal have no distance, however the mean of equal numbers is rounded
            mean = own.copy()
            plan_reduction(setup.transport, mean, setup.settings.algorithm).all_reduce(mean=True)
            squared += float(np.square(own - mean, dtype=np.float64).sum())
        return sqrt(float(setup.transport.allgather(np.array([squared])).mean()))
