"""Outer steps that hide: averages that are formed while the inner steps continue, and of a fragment at a time.

After the steps of a ``Timetable`` each rank contributes the parameters C of a fragment. A background thread forms their
mean and lets the outer rule step from the anchor A through it, as ``lentando.optimizers.rules.outer_step`` does, while
the rank takes further inner steps. A given number of steps later, the same on all ranks, the rank adopts the result.
Its parameters x become A + (x - C), the new anchor and what the rank itself has moved since its contribution. With a
blend alpha they become A + alpha (x - A) instead, as in Streaming DiLoCo (arXiv 2501.18512).

Every rank holds whole anchors and momenta, since it has the whole mean anyway. So nothing is sent when a result is
adopted, all ranks find the same values that are not finite, and a checkpoint holds what is in flight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np

from lentando.comm.array_module import is_on_host
from lentando.comm.background import start_background_work
from lentando.comm.collectives import Algorithm
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import ConfigurationError
from lentando.comm.final_checks import wait_before_leaving
from lentando.comm.flat import FlatBuffer
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.averages_in_flight import AveragesInFlight
from lentando.optimizers.rules.constant_statistics import Constants
from lentando.optimizers.rules.delay_choice import DelayChoice
from lentando.optimizers.rules.flat_state import flat_state, load_shards
from lentando.optimizers.rules.fragments import Streaming, Timetable, cut_layouts
from lentando.optimizers.rules.model_fragments import FragmentArrays, ModelFragment
from lentando.optimizers.rules.non_finite import error_of_average
from lentando.optimizers.rules.outer_rule import OuterRule
from lentando.optimizers.rules.outer_stepping import OuterStepping
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.rules.wire import WireDtype

__all__ = ["StreamedOuterStep"]


class StreamedOuterStep(OuterStepping):
    """Takes the outer steps of a model's fragments, each in two parts: ``contribute`` and ``adopt_fragment``.

    Args:
        transport: transport that connects the ranks.
        buffers: flat buffers of the model.
        rule: outer rule, such as slow momentum; None adopts the average as it is.
        streaming: delay, fragments and blend.
        algorithm: algorithm of the reductions.
        constants: statistics that may have values that are not finite.
        wire_dtype: how contributions are coded when they are averaged; None for full precision.

    Attributes:
        timetable: after which steps fragments are contributed and adopted.
        delay_choice: measures how long averages take, and what delay follows; None if the delay is given.
        contributed_at: number of inner steps at each fragment's contribution; None if it is not in flight.
        is_overlapped: whether averages are formed by a background thread. Otherwise the backend admits one thread only,
            and they are formed at the contribution, with the same result.

    Raises:
        ConfigurationError: on every rank, if the job or the model does not allow it.
    """

    leaves_ranks_equal = False

    def __init__(
        self,
        transport: Transport,
        buffers: Sequence[FlatBuffer],
        rule: OuterRule | None,
        streaming: Streaming,
        algorithm: Algorithm = "auto",
        constants: Constants | None = None,
        wire_dtype: WireDtype | None = None,
    ) -> None:
        if is_elastic(transport):
            raise ConfigurationError(
                "delay, fragments and blend are not possible in an elastic job (init(elastic=True)): an average in "
                "flight could not be repeated by the survivors. Use delay=0, fragments=1 and blend=None"
            )
        if not all(is_on_host(buffer.array) for buffer in buffers):
            raise ConfigurationError(
                "delay, fragments and blend need parameters that are sent from host memory, and here they are sent "
                "from a GPU: use delay=0, fragments=1 and blend=None"
            )
        self.delay_choice = DelayChoice(streaming.fragments) if streaming.delay == "auto" else None
        self.timetable = Timetable(streaming.fragments, None if streaming.delay == "auto" else streaming.delay)
        self.contributed_at: list[int | None] = [None] * streaming.fragments
        self._transport = transport
        self._buffers = buffers
        self._constants = constants or Constants(transport.size)
        cut = cut_layouts([buffer.layout for buffer in buffers], streaming.fragments)
        threads = start_background_work(transport, "lentando-outer") if streaming.delay else None
        over = threads.transports[0] if threads else transport
        self.is_overlapped = threads is not None
        self._arrays = FragmentArrays(buffers, rule, is_coded=wire_dtype is not None)
        more = rule, streaming.blend, algorithm, self._constants, wire_dtype
        self._fragments = [ModelFragment(over, buffers, entries, self._arrays, *more) for entries in cut]
        self._in_flight = AveragesInFlight(
            threads, len(cut), transport.clock, None if self.delay_choice is None else self.delay_choice.add
        )
        wait_before_leaving(transport, self, self._in_flight.unfinished)
        self.reset_anchor()

    # The order of a round

    def next_due(self, steps: int, round_steps: int, inner_steps: int) -> int:
        """Number of steps of the round after which the next fragment is contributed or adopted.

        Args:
            steps: steps of the round that have been taken.
            round_steps: length of the round.
            inner_steps: number of inner steps taken.
        """
        return self.timetable.next_after(steps, round_steps, self._ages(inner_steps))

    def due_to_adopt(self, steps: int, round_steps: int, inner_steps: int) -> list[int]:
        """Fragments that are adopted now. Arguments are those of ``next_due``."""
        return self.timetable.adopted_after(steps, round_steps, self._ages(inner_steps))

    def choose_delay(self, average_seconds: Array, step_seconds: Array, period: int) -> int | None:
        """Choose the delay, if it is to be chosen and all ranks have measured enough. Every rank does so.

        Until then averages are adopted right before the next contribution, so that they are measured while they hide.

        Args:
            average_seconds: time of an average on each rank (``DelayChoice.longest_seconds``).
            step_seconds: mean compute time of an inner step on each rank; NaN where it is not known.
            period: inner steps of a round.

        Returns:
            the delay if it was chosen now, else None.
        """
        choice = self.delay_choice
        if choice is None or choice.chosen is not None:
            return None
        # What is formed at the contribution hides behind nothing.
        chosen = choice.choose(average_seconds, step_seconds, longest=period if self.is_overlapped else 0)
        if chosen is not None:
            self.timetable = replace(self.timetable, delay=chosen)
        return chosen

    @property
    def are_formed(self) -> bool:
        """Whether no average is being formed, so that nothing would be waited for."""
        return self._in_flight.are_formed

    @property
    def average_seconds(self) -> float:
        """Time from the last contribution of a fragment until its average was formed, the longest of all fragments.

        NaN before all have been averaged.
        """
        return float(np.max(self._in_flight.seconds))

    @property
    def in_flight(self) -> list[int]:
        """Fragments that were contributed and have not been adopted."""
        return [number for number, since in enumerate(self.contributed_at) if since is not None]

    def contribute(self, number: int, inner_steps: int, learning_rates: Sequence[float], as_it_is: bool) -> None:
        """Contribute a fragment to its average, and begin to form it. Every rank does so.

        Args:
            number: number of the fragment, which is not in flight.
            inner_steps: number of inner steps taken, equal on all ranks.
            learning_rates: learning rate of each parameter group, for the outer rule.
            as_it_is: whether the average becomes the anchor without the outer rule, and the momentum becomes zero.
        """
        fragment, rates = self._fragments[number], list(learning_rates)
        fragment.copy_parameters()
        self.contributed_at[number] = inner_steps
        self._in_flight.start(number, lambda: fragment.form(rates, as_it_is))

    def adopt_fragment(self, number: int, keeps_own: bool = False) -> None:
        """Wait for the average of a fragment, and continue from it. Every rank does so.

        Args:
            number: number of the fragment.
            keeps_own: whether this rank keeps its own parameters, which the program has set meanwhile.

        Raises:
            NonFiniteError: on every rank, naming parameter and rank, if the average is not finite. It is not adopted.
        """
        is_finite = self._in_flight.wait(number, self._transport.traffic)
        self.contributed_at[number] = None
        fragment = self._fragments[number]
        if not is_finite:
            raise error_of_average(self._transport, self._constants, fragment.contributions, is_exact=True)
        if not keeps_own:
            fragment.adopt()

    def adopt_all(self, keeps_own: bool = False) -> None:
        """Adopt whatever is in flight now. Every rank does so. Argument and errors are those of ``adopt_fragment``."""
        for number in self.in_flight:
            self.adopt_fragment(number, keeps_own)

    def share_contributions(self) -> None:
        """Replace what this rank has contributed and not adopted by rank 0's, whose parameters it has got. Collective.

        The averages in flight remain what they are.
        """
        self._in_flight.wait_for_all(self._transport.traffic)
        if self.in_flight:
            for array in self._arrays.contributions:
                self._transport.broadcast(array)

    def preview(self, keeps_own: bool = False) -> None:
        """Put into the buffers what adopting everything in flight would put there. It remains in flight.

        Args:
            keeps_own: as ``adopt_fragment``.

        Raises:
            NonFiniteError: on every rank, as ``adopt_fragment``.
        """
        since = list(self.contributed_at)
        try:
            self.adopt_all(keeps_own)
        finally:
            self.contributed_at = since

    def _ages(self, inner_steps: int) -> list[int | None]:
        return [None if since is None else inner_steps - since for since in self.contributed_at]

    # Other methods of an OuterStepping

    def reset_anchor(self, forget_momentum: bool = False) -> None:
        self._in_flight.wait_for_all(self._transport.traffic)
        self.contributed_at = [None] * len(self._fragments)
        for fragment in self._fragments:
            fragment.reset_anchor(forget_momentum)

    def average(self, partial_average: PartialAverage | None = None) -> None:
        """Do nothing: ``contribute`` begins an average once all ranks have agreed to."""

    def abort_average(self) -> None:
        """Do nothing: no average has begun."""

    def step(self, learning_rates: Sequence[float]) -> None:
        """Take the outer step of the whole model at once."""
        self._take_at_once(learning_rates, as_it_is=False)

    def adopt(self) -> None:
        self._take_at_once((), as_it_is=True)

    def _take_at_once(self, learning_rates: Sequence[float], as_it_is: bool) -> None:
        self.adopt_all()
        for number in range(len(self._fragments)):
            self.contribute(number, 0, learning_rates, as_it_is)
        self.adopt_all()

    def state_dict(self) -> dict[str, Any]:
        """Anchors, momenta and contributions in flight, an array per buffer. Waits for averages in flight."""
        self._in_flight.wait_for_all(self._transport.traffic)
        arrays = self._arrays
        state = {"anchors": flat_state(arrays.anchors), "slow_buffers": flat_state(arrays.slow_buffers)}
        if any(error is not None for error in arrays.errors):
            state |= {"errors": flat_state(arrays.errors), "mean_errors": flat_state(arrays.mean_errors)}
        if self.in_flight:
            states = zip(self._fragments, self.contributed_at, self._in_flight.are_finite, strict=True)
            for fragment, since, is_finite in states:
                if since is None or not is_finite:  # NaN on every rank, so that every rank will refuse it
                    fragment.fill_contributions(nan if since is not None else 0.0)
            state["contributions"] = flat_state(arrays.contributions)
        return state

    def timetable_state(self) -> dict[str, Any]:
        """Which fragments are in flight since which inner step, and what is known about a delay that is chosen."""
        state: dict[str, Any] = {"contributed_at": list(self.contributed_at)}
        if self.delay_choice is not None:
            state["delay"] = self.delay_choice.state_dict()
        return state

    def load_timetable(self, state: Mapping[str, Any]) -> None:
        """Continue from ``timetable_state()``."""
        self.contributed_at = list(state["contributed_at"])
        if self.delay_choice is not None:
            self.delay_choice.load_state_dict(state["delay"])
            self.timetable = replace(self.timetable, delay=self.delay_choice.chosen)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` has returned. The caller calls ``load_timetable``.

        Raises:
            ConfigurationError: if arrays have another shape, which means another model or rule.
        """
        self._in_flight.wait_for_all(self._transport.traffic)
        arrays = self._arrays
        parts: dict[str, Sequence[Array | None]] = {
            "anchors": arrays.anchors, "slow_buffers": arrays.slow_buffers, "contributions": arrays.contributions,
            "errors": arrays.errors, "mean_errors": arrays.mean_errors,
        }  # fmt: skip
        for name, saved in state.items():
            load_shards(f"{name} of the outer step", self._transport, parts[name], saved)
        for number, fragment in enumerate(self._fragments):
            fragment.begin_round()
            self._in_flight.are_finite[number] = self._constants.first_non_finite(fragment.contributions) is None
