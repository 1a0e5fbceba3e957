"""Averages that are formed by a background thread, until their results are taken."""

from collections.abc import Callable
from math import nan

from lentando.comm.background import BackgroundWork, Outcome
from lentando.comm.transport import Traffic

__all__ = ["AveragesInFlight"]


class AveragesInFlight:
    """The averages of all fragments of a model, each of which is formed again and again.

    Args:
        threads: the background thread; None to form averages in the thread that starts them.
        fragments: number of fragments.
        clock: returns the time in seconds, for the thread that starts averages.
        note: called with the time from the start of each average until it was formed, in seconds, by the thread that
            has formed it; or None.

    Attributes:
        are_finite: for each fragment, whether the average that was taken last was finite.
        seconds: for each fragment, the last of these times; NaN at first.
    """

    def __init__(
        self,
        threads: BackgroundWork | None,
        fragments: int,
        clock: Callable[[], float],
        note: Callable[[float], None] | None = None,
    ) -> None:
        self.are_finite = [True] * fragments
        self.seconds = [nan] * fragments
        self._threads = threads
        self._clock = clock
        self._note = note
        self._clock_of_thread = clock if threads is None else threads.transports[0].clock
        self._futures: list[Outcome[bool] | None] = [None] * fragments

    @property
    def are_formed(self) -> bool:
        """Whether all averages that were started have been formed."""
        return all(future is None or future.done() for future in self._futures)

    def start(self, number: int, form: Callable[[], bool]) -> None:
        """Begin to form the average of a fragment.

        Args:
            number: number of the fragment, none of whose averages is being formed.
            form: function that forms it, and returns whether it is finite.
        """
        began, clock, seconds, note = self._clock(), self._clock_of_thread, self.seconds, self._note

        def form_in_time() -> bool:
            is_finite = form()
            seconds[number] = clock() - began
            if note is not None:
                note(seconds[number])
            return is_finite

        if self._threads is None:
            self.are_finite[number] = form_in_time()
        else:
            self._futures[number] = self._threads.submit(0, form_in_time)

    def wait(self, number: int, traffic: Traffic) -> bool:
        """Wait until the average of a fragment is formed. Returns whether it is finite.

        Args:
            number: number of the fragment.
            traffic: counters to which the traffic of the thread is added.
        """
        future, self._futures[number] = self._futures[number], None
        if future is not None:
            self.are_finite[number] = future.result()
            if self._threads is not None and not any(self._futures):
                self._threads.count_traffic(traffic)
        return self.are_finite[number]

    def wait_for_all(self, traffic: Traffic) -> None:
        """Wait until all averages are formed."""
        for number in range(len(self._futures)):
            self.wait(number, traffic)

    def unfinished(self) -> list[Outcome[bool]]:
        """The averages whose results have not been taken."""
        return [future for future in self._futures if future is not None]
