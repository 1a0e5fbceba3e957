"""The ranks' agreement on ``delay="auto"``, in the control messages of outer steps."""

import logging
from collections.abc import Mapping

from lentando.comm.agreement import Event
from lentando.comm.transport import Array
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.rules.delay_choice import DelayChoice
from lentando.optimizers.rules.streamed_step import StreamedOuterStep

__all__ = ["DelayAgreement"]

_log = logging.getLogger("lentando")


class DelayAgreement:
    """Lets all ranks choose the same delay after the same round, from what each of them has measured.

    Args:
        setup: transport, framework and method of the replica.
        progress: progress of the replica.
    """

    def __init__(self, setup: Setup, progress: Progress) -> None:
        self._setup = setup
        self._progress = progress

    def contribute(self, event: Event) -> Mapping[str, float]:
        """Attach the time of an average on this rank."""
        return {"average_seconds": self._choice.longest_seconds()} if event is Event.ROUND else {}

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        """Choose the delay, once all ranks know the times of an average and of a step."""
        if event is not Event.ROUND:
            return
        average_seconds, step_seconds = by_rank["average_seconds"], by_rank["compute_seconds"]
        chosen = self._outer.choose_delay(average_seconds, step_seconds, self._progress.steps_in_round or 1)
        if chosen is not None and self._setup.transport.rank == 0:
            _log.info(
                "delay %d from outer step %d on: an average takes %.3g s, and an inner step %.3g s",
                chosen,
                self._progress.rounds + 1,
                average_seconds.max(),
                self._choice.step_seconds,
            )

    @property
    def _outer(self) -> StreamedOuterStep:
        outer = self._setup.outer
        assert isinstance(outer, StreamedOuterStep)
        return outer

    @property
    def _choice(self) -> DelayChoice:
        choice = self._outer.delay_choice
        assert choice is not None
        return choice
