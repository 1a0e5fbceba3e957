"""Rounds whose outer steps are streamed: contributed to an average after some steps, and adopted after others."""

from collections.abc import Mapping

from lentando.comm.errors import NonFiniteError
from lentando.comm.transport import Array
from lentando.optimizers.replica.rounds import FormedAverage, Rounds
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.rules.streamed_step import StreamedOuterStep

__all__ = ["StreamedRounds"]


class StreamedRounds(Rounds):
    """Takes the parts of streamed outer steps that are due.

    A control message precedes every contribution. Nothing is sent when a result is adopted.
    """

    def begin(self) -> None:
        super().begin()
        self._note_next()

    def end(self) -> bool:
        """Adopt, and then contribute, what is due after the steps so far. Ends the round if it is over."""
        progress, outer = self._progress, self._outer
        self._trained.follow()
        place = progress.steps, progress.steps_in_round or 1
        contributed = outer.timetable.contributed_after(*place)
        formed = None
        with self._costs.of("outer", progress.inner_steps):
            self._adopt_fragments(outer.due_to_adopt(*place, progress.inner_steps))
            if contributed:
                formed = self._channel.together(self._form, self._abort)
                assert formed is not None  # there is no ``join``
                self._contribute(contributed, formed)
        if formed is not None and progress.steps == progress.steps_in_round:
            self._begin_next(formed)
        else:
            self._note_next()
        return True

    @property
    def _outer(self) -> StreamedOuterStep:
        outer = self._setup.outer
        assert isinstance(outer, StreamedOuterStep)
        return outer

    def _average(self, share: PartialAverage | None) -> Mapping[str, Array] | None:
        """Average nothing yet: the ranks have agreed to contribute."""
        return None

    def _contribute(self, fragments: list[int], formed: FormedAverage) -> None:
        """Contribute fragments to their averages; without a delay, adopt these at once.

        If the program has set weights, all fragments are contributed, so that all begin again from what was set.
        """
        setup, inner_steps = self._setup, self._progress.inner_steps
        if formed.weights_set_on:
            self._adopt_fragments(self._outer.in_flight)
            setup.framework.watch.reset()
            self._weights.warn(formed.weights_set_on, self._progress.rounds + 1)
            fragments = list(range(self._outer.timetable.fragments))
        for number in fragments:
            self._outer.contribute(number, inner_steps, formed.rates, as_it_is=bool(formed.weights_set_on))
        if self._outer.timetable.delay == 0:
            self._adopt_fragments(fragments)

    def _adopt_fragments(self, fragments: list[int]) -> None:
        """Continue from the averages of fragments. Weights that the program has set remain as they are."""
        setup = self._setup
        if not fragments:
            return
        setup.framework.load()
        try:
            for number in fragments:
                self._outer.adopt_fragment(number, keeps_own=setup.framework.watch.found)
        except NonFiniteError:
            self._non_finite.was_reported = True
            raise
        setup.framework.store()
        if setup.settings.base_buffers == "reset":
            setup.framework.reset_optimizer()

    def _note_next(self) -> None:
        """Note after which step the next part of an outer step is due."""
        progress = self._progress
        assert progress.steps_in_round is not None
        progress.due = self._outer.next_due(progress.steps, progress.steps_in_round, progress.inner_steps)
