"""A fragment of the model at work: what this rank has contributed, the anchor, the momentum, and their arithmetic."""

from collections.abc import Sequence

import numpy as np

from lentando.comm.collectives import Algorithm
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.flat import FlatBuffer, FlatLayout, blocks
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.constant_statistics import Constants
from lentando.optimizers.rules.outer_average import OuterAverage, plan_outer_average
from lentando.optimizers.rules.outer_rule import OuterRule, blocks_by_group
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.rules.whole_movement_average import WholeMovementAverage
from lentando.optimizers.rules.wire import WireDtype, wire_of

__all__ = ["FragmentArrays", "ModelFragment"]


class FragmentArrays:
    """The memory of all fragments: for each buffer of the model, whole arrays, of which each fragment has a range.

    Attributes:
        anchors: anchors, in float32 at least.
        slow_buffers: momenta of the outer rule, in float32 at least; None without momentum.
        contributions: parameters of this rank when it contributed them, in the dtype of the model.
        errors, mean_errors: what coded messages have left out, and are to send later, of contributions and of the
            averages that this rank forms, in float32 at least; None without a coding.

    Args:
        buffers: flat buffers of the model.
        rule: outer rule; None adopts averages as they are.
        is_coded: whether messages are coded.
    """

    def __init__(self, buffers: Sequence[FlatBuffer], rule: OuterRule | None, is_coded: bool = False) -> None:
        keeps_momentum = rule is not None and rule.keeps_momentum
        self.anchors: list[Array] = []
        self.slow_buffers: list[Array | None] = []
        self.contributions: list[Array] = []
        self.errors: list[Array | None] = []
        self.mean_errors: list[Array | None] = []
        for buffer in buffers:
            size, dtype = buffer.array.size, accumulator_dtype(buffer.array.dtype)
            self.anchors.append(np.zeros(size, dtype))
            self.slow_buffers.append(np.zeros(size, dtype) if keeps_momentum else None)
            self.contributions.append(np.zeros(size, buffer.array.dtype))
            self.errors.append(np.zeros(size, dtype) if is_coded else None)
            self.mean_errors.append(np.zeros(size, dtype) if is_coded else None)


class ModelFragment:
    """Consecutive parameters, which are averaged together: a range of each buffer.

    Args:
        transport: transport over which the average is formed.
        buffers: flat buffers of the model.
        entries: range of the entries of each buffer.
        arrays: memory of all fragments.
        rule: outer rule.
        blend: share of the rank's own parameters in what it adopts; None adds what it has moved.
        algorithm: algorithm of the reductions.
        constants: statistics that may have values that are not finite.
        wire_dtype: how contributions are coded when they are averaged; None for full precision.

    Attributes:
        contributions: this rank's contribution, a buffer per buffer of the model that the fragment has a range of.
    """

    def __init__(
        self,
        transport: Transport,
        buffers: Sequence[FlatBuffer],
        entries: Sequence[slice],
        arrays: FragmentArrays,
        rule: OuterRule | None,
        blend: float | None,
        algorithm: Algorithm,
        constants: Constants,
        wire_dtype: WireDtype | None = None,
    ) -> None:
        self._transport = transport
        self._constants = constants
        self._parts: list[_Part] = []
        self.contributions: list[FlatBuffer] = []
        for number, (buffer, part) in enumerate(zip(buffers, entries, strict=True)):
            if part.start == part.stop:
                continue
            layout = FlatLayout(buffer.layout.entries[part])
            start = buffer.layout.offsets[part.start]
            elements = slice(start, start + layout.size)
            slow = arrays.slow_buffers[number]
            contribution = FlatBuffer(layout, arrays.contributions[number][elements])
            self.contributions.append(contribution)
            errors, mean_errors = arrays.errors[number], arrays.mean_errors[number]
            average = (
                plan_outer_average(transport, contribution.array, algorithm, whole=True)
                if errors is None or mean_errors is None
                else WholeMovementAverage(
                    transport,
                    contribution.array,
                    contribution.parameters.size,
                    wire_of(wire_dtype),
                    (errors[elements], mean_errors[elements]),
                )
            )
            self._parts.append(
                _Part(
                    buffer.array[elements],
                    contribution,
                    arrays.anchors[number][elements],
                    None if slow is None else slow[elements],
                    average,
                    transport.size,
                    rule,
                    blend,
                    constants,
                )
            )

    def copy_parameters(self) -> None:
        """Contribute the present parameters."""
        for part in self._parts:
            np.copyto(part.contribution.array, part.own)

    def fill_contributions(self, value: float) -> None:
        """Replace a contribution that is not needed any more."""
        for part in self._parts:
            part.contribution.array[...] = value

    def form(self, learning_rates: Sequence[float], as_it_is: bool) -> bool:
        """Form the average, and let the anchor step through it. Returns whether the average is finite.

        Nothing is changed if it is not.
        """
        finite = [part.reduce(as_it_is) for part in self._parts]
        is_finite = all(finite)
        if self._constants.exist:  # which may have changed on some of the ranks
            is_finite = bool(self._transport.allgather(np.array([is_finite])).all())
        if not is_finite:
            return False
        for part in self._parts:
            part.step(learning_rates, as_it_is)
        return True

    def adopt(self) -> None:
        """Continue from the anchor."""
        for part in self._parts:
            part.adopt()

    def reset_anchor(self, forget_momentum: bool) -> None:
        """Set the anchor to the present parameters, and the momentum to zero if asked to."""
        for part in self._parts:
            np.copyto(part.anchor, part.own)
            if forget_momentum and part.slow_buffer is not None:
                part.slow_buffer[...] = 0
        self.begin_round(forget_errors=True)

    def begin_round(self, *, forget_errors: bool = False) -> None:
        """Note that the anchors have been set.

        Args:
            forget_errors: whether to forget rounding errors of earlier rounds.
        """
        for part in self._parts:
            part.average.begin_round(part.anchor, forget_errors=forget_errors)


class _Part:
    """The range of one buffer that belongs to a fragment; arguments are ranges of arrays."""

    def __init__(
        self,
        own: Array,
        contribution: FlatBuffer,
        anchor: Array,
        slow_buffer: Array | None,
        average: OuterAverage,
        size: int,
        rule: OuterRule | None,
        blend: float | None,
        constants: Constants,
    ) -> None:
        self.own, self.contribution, self.anchor, self.slow_buffer = own, contribution, anchor, slow_buffer
        self.average = average
        self._size = size
        self._rule = rule
        self._blend = blend
        self._constants = constants
        self._mean: Array = anchor
        self._scratch = np.empty(next(blocks(own), slice(0, 0)).stop, anchor.dtype)

    def reduce(self, as_it_is: bool) -> bool:
        """Form the mean, in full precision if it will be adopted as it is. Returns whether it is finite."""
        share = PartialAverage(True, self._size, self._size, in_full=as_it_is)
        self._mean, is_finite = self.average.mean(self._size, self._constants.within(self.contribution), share)
        return is_finite

    def step(self, learning_rates: Sequence[float], as_it_is: bool) -> None:
        """Let the anchor step through the mean."""
        if as_it_is and self.slow_buffer is not None:
            self.slow_buffer[...] = 0
        rule = None if as_it_is else self._rule
        for elements, group in blocks_by_group(self.own, self.contribution.layout.ranges):
            anchor = self.anchor[elements]
            slow = None if self.slow_buffer is None else self.slow_buffer[elements]
            if rule is None or group is None:
                np.copyto(anchor, self._mean[elements])
            else:
                rule.step(anchor, slow, self._mean[elements], learning_rates[group], self._scratch)
            if anchor.dtype != self.own.dtype:  # rounded like the parameters that will move from it
                np.copyto(anchor, anchor.astype(self.own.dtype))
        self.average.begin_round(self.anchor, forget_errors=as_it_is)

    def adopt(self) -> None:
        """Continue from the anchor, with what this rank has moved since its contribution, or a share of its own."""
        blend = self._blend
        if blend == 1:
            return
        for elements, group in blocks_by_group(self.own, self.contribution.layout.ranges):
            own, anchor = self.own[elements], self.anchor[elements]
            if blend == 0 or (blend is None and group is None):  # a statistic, such as a variance, does not move
                np.copyto(own, anchor, casting="same_kind")
                continue
            origin = self.contribution.array[elements] if blend is None else anchor
            moved = np.subtract(own, origin, dtype=anchor.dtype)
            if blend is not None:
                moved *= blend
            moved += anchor
            np.copyto(own, moved, casting="same_kind")
