"""The outer step: an exact average with the slow rule applied in the middle of it.

Reduce-scatter gives each rank the mean of 1/n of the parameters; it applies slow momentum to that shard alone, and the
all-gather hands the results out. Slow momentum thus costs no message, 1/n of the arithmetic and 1/n of the memory.

In an elastic job every rank holds all of it instead, so that no momentum dies with a rank, and no parameter changes
before all ranks have the average. The same bytes travel, and the numbers are the same to the bit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lentando.comm.array_module import array_module, copy_into
from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import ConfigurationError, NonFiniteError, grouped_by_rank
from lentando.comm.flat import FlatBuffer, Range, all_finite, blocks
from lentando.comm.objects import allgather_object
from lentando.comm.reductions.none import NoReduction
from lentando.comm.reductions.reduction import Reduction
from lentando.comm.reductions.whole import WholeReduction
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.constant_statistics import Constants, is_finite_but_for
from lentando.optimizers.rules.flat_state import flat_state
from lentando.optimizers.rules.non_finite import ADVICE
from lentando.optimizers.rules.outer_rule import OuterRule
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = ["OuterStep"]


class OuterStep:
    """Averages the buffers of all replicas and steps from the anchor through the average.

    Args:
        transport: ranks that take part.
        buffers: what is averaged, in place.
        rule: slow momentum, or another rule; None adopts the average as it is.
        exact_average: False applies the rule to each replica's own parameters instead, and sends nothing (SlowMo's
            section 6, "SGP-SlowMo-noaverage").
        algorithm: how the average is formed.
        constants: statistics that are not finite without harm.
    """

    def __init__(
        self,
        transport: Transport,
        buffers: Sequence[FlatBuffer],
        rule: OuterRule | None,
        exact_average: bool = True,
        algorithm: Algorithm = "auto",
        constants: Constants | None = None,
    ) -> None:
        self._transport = transport
        self._constants = constants or Constants(transport.size)
        self._is_exact = exact_average
        self._sharded = exact_average and not is_elastic(transport)

        def reduction(buffer: FlatBuffer) -> Reduction:
            if not exact_average:
                return NoReduction(buffer.array)
            if not self._sharded:
                return WholeReduction(transport, buffer.array, algorithm)
            return plan_reduction(transport, buffer.array, algorithm, scatter_gather=True)

        self._shards = [_Shard(buffer, reduction(buffer), rule, self._constants) for buffer in buffers]

    def reset_anchor(self, forget_momentum: bool = False) -> None:
        """Take the parameters as they are now for the anchor, x_{t,0}, of the round that begins.

        Args:
            forget_momentum: the rule's momentum begins again at zero.
        """
        for shard in self._shards:
            shard.reset_anchor(forget_momentum)

    def replan(self) -> None:
        """There are fewer ranks now. Collective over them."""
        for shard in self._shards:
            shard.replan()

    def average(self, partial_average: PartialAverage | None = None) -> None:
        """Form the average; the buffers stay what they are.

        Args:
            partial_average: of this rank, if the average is not over all ranks.

        Raises:
            NonFiniteError: on every rank, naming parameter and rank, if the average is not finite.
        """
        divisor = self._transport.size if self._is_exact else 1
        finite = [shard.reduce(divisor, partial_average) for shard in self._shards]
        try:
            self._check_finite(all(finite))
        except NonFiniteError:
            self.abort_average()
            raise

    def abort_average(self) -> None:
        """The average is not adopted."""
        for shard in self._shards:
            shard.abort_average()

    def step(self, learning_rates: Sequence[float]) -> None:
        """Step outward from the anchor through the average, on all buffers.

        Args:
            learning_rates: mean over the round's inner steps, per parameter group.
        """
        for shard in self._shards:
            shard.step(learning_rates)

    def adopt(self) -> None:
        """Take the average as it is, as parameters and anchor: the rule's momentum begins again at zero."""
        for shard in self._shards:
            shard.adopt()

    def run(self, learning_rates: Sequence[float]) -> None:
        """Take one outer step on all buffers: ``average``, then ``step``."""
        self.average()
        self.step(learning_rates)

    def state_dict(self) -> dict[str, Any]:
        """Anchors and slow momenta of this rank's shards: arrays by buffer."""
        starts = [shard.start for shard in self._shards] if self._sharded else None
        return {name: flat_state(arrays, starts) for name, arrays in self._arrays().items()}

    def whole_state(self) -> dict[str, Any]:
        """``state_dict()`` of the whole buffers, on every rank. Collective if the ranks have shards."""
        found = {}
        for name, arrays in self._arrays().items():
            whole: list[Array | None] = []
            for shard, array in zip(self._shards, arrays, strict=True):
                if array is not None and self._sharded:
                    elements = array_module(array).zeros(shard.buffer.array.size, array.dtype)
                    elements[shard.start : shard.start + array.size] = array
                    plan_reduction(self._transport, elements, "engine").all_reduce(mean=False)  # of zeros elsewhere
                    whole.append(elements)
                else:
                    whole.append(array)
            found[name] = flat_state(whole)
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them.

        Raises:
            ConfigurationError: if they are of another shape, which means another model, world size or rule, or of
                other shards, which means ranks that were placed otherwise on their nodes.
        """
        for name, arrays in self._arrays().items():
            starts = state[name]["starts"] or [shard.start for shard in self._shards]
            for own, saved, shard, start in zip(arrays, state[name]["flat"], self._shards, starts, strict=True):
                if own is not None and saved is not None and shard.start != start:
                    raise ConfigurationError(
                        f"{name} of the outer step: rank {self._transport.rank} of {self._transport.size} has the "
                        f"elements from {shard.start} on, the state those from {start}: the ranks were placed "
                        "otherwise on their nodes. To go on from there, use lt.save and lt.load"
                    )
                if (own is None) != (saved is None) or (own is not None and own.shape != saved.shape):
                    found = "none" if saved is None else f"{saved.size} elements"
                    wanted = "none" if own is None else f"{own.size} elements"
                    raise ConfigurationError(f"{name} of the outer step: expected {wanted}, found {found} in the state")
                if own is not None:
                    copy_into(own, saved)

    def _arrays(self) -> dict[str, list[Array | None]]:
        return {
            "anchors": [shard.anchor for shard in self._shards],
            "slow_buffers": [shard.slow_buffer for shard in self._shards],
        }

    def _check_finite(self, finite: bool) -> None:
        if self._is_exact:
            # Each rank has seen its shard alone: all must know before any of them changes a parameter.
            finite = bool(self._transport.allgather(np.array([finite])).all())
        if finite:
            return
        own = self._constants.first_non_finite([shard.buffer for shard in self._shards])
        text = f"{own.name!r} is not finite" if own else "all parameters are finite"
        about: list[Any] = [text, own is not None and own.group is None]
        by_rank = allgather_object(self._transport, about) if self._is_exact else [about]
        found = grouped_by_rank([text for text, _ in by_rank]) if self._is_exact else text
        buffer = ". A buffer that is meant to hold such values must hold them when the optimizer is wrapped"
        raise NonFiniteError(
            f"the average of the parameters is not finite, so it was not adopted. First offending parameter: {found}. "
            f"{ADVICE}{buffer if any(is_statistic for _, is_statistic in by_rank) else ''}"
        )


class _Shard:
    """This rank's part of one buffer."""

    def __init__(self, buffer: FlatBuffer, reduction: Reduction, rule: OuterRule | None, constants: Constants) -> None:
        self.buffer = buffer
        self._constants = constants
        self.start = reduction.shard.start
        self._reduction = reduction
        self._rule = rule
        self._module = array_module(buffer.array)
        self._own = buffer.array[reduction.shard]
        self._ranges = _ranges_within(buffer.layout.ranges, reduction.shard)
        dtype = accumulator_dtype(buffer.array.dtype)
        self.anchor: Array | None = None if rule is None else self._module.empty(self._own.size, dtype)
        self.slow_buffer: Array | None = None
        if rule is not None and rule.keeps_momentum:
            self.slow_buffer = self._module.zeros(self._own.size, dtype)
        # Memory for every step anew would cost more than the arithmetic: the system clears each page of it.
        longest = next(blocks(self._own), slice(0, 0)).stop
        self._scratch: Array | None = None if rule is None else self._module.empty(longest, dtype)
        self._mean: Array = self._own
        self._left_out: list[tuple[Array, Array]] = []
        self.reset_anchor()

    def replan(self) -> None:
        if isinstance(self._reduction, WholeReduction):
            self._reduction.plan()

    def reset_anchor(self, forget_momentum: bool = False) -> None:
        if self.anchor is not None:
            self._module.copyto(self.anchor, self._own)
        if forget_momentum and self.slow_buffer is not None:
            self.slow_buffer[...] = 0

    def adopt(self) -> None:
        self._module.copyto(self._own, self._mean, casting="same_kind")
        self.reset_anchor(forget_momentum=True)
        self._reduction.all_gather()
        self._left_out = []

    def reduce(self, divisor: int, partial_average: PartialAverage | None) -> bool:
        """Form the mean of this shard; the buffer stays as it is. Tells whether it is finite.

        Where this rank does not count, its buffer is zero from then on, until ``step`` or ``abort_average``: in
        between, neighbours may read it.
        """
        constants = self._constants.within(self.buffer, self._reduction.shard)  # before what is left out becomes zero
        self._left_out = [] if partial_average is None else partial_average.leave_out(self.buffer)
        if partial_average is not None:
            self._mean = self._reduction.reduce_scatter()
            for part in self._ranges:
                mean = self._mean[part.start : part.stop]
                np.true_divide(mean, partial_average.divisor(part), out=mean)
            for constant in constants:
                constant.restore(self._mean)
            return is_finite_but_for(self._mean, constants)
        is_finite = True

        def divide_and_look(mean: Array) -> None:
            nonlocal is_finite
            if divisor != 1:
                np.true_divide(mean, divisor, out=mean)
            is_finite = is_finite and all_finite(mean)

        self._mean = self._reduction.reduce_scatter(divide_and_look)
        for constant in constants:
            constant.restore(self._mean)
        return is_finite or (bool(constants) and is_finite_but_for(self._mean, constants))

    def abort_average(self) -> None:
        """The average is not adopted. Every rank has formed its part of it, so nobody reads here any more."""
        for own, kept in self._left_out:
            self._module.copyto(own, kept)
        self._left_out = []

    def step(self, learning_rates: Sequence[float]) -> None:
        """Apply the rule to the mean and hand the result out."""
        if self._rule is None or self.anchor is None:
            self._module.copyto(self._own, self._mean, casting="same_kind")
        else:
            for part in self._ranges:
                for block in blocks(self._own[part.start : part.stop]):
                    elements = slice(part.start + block.start, min(part.start + block.stop, part.stop))
                    self._step_block(elements, None if part.group is None else learning_rates[part.group])
        self._reduction.all_gather()
        self._left_out = []

    def _step_block(self, elements: slice, learning_rate: float | None) -> None:
        """All passes over elements that the cache holds; without a learning rate they are statistics."""
        assert self._rule is not None and self.anchor is not None
        anchor, mean, own = self.anchor[elements], self._mean[elements], self._own[elements]
        if learning_rate is None:
            self._module.copyto(anchor, mean)
        else:
            slow = None if self.slow_buffer is None else self.slow_buffer[elements]
            self._rule.step(anchor, slow, mean, learning_rate, self._scratch)
        self._module.copyto(own, anchor, casting="same_kind")
        if own.dtype != anchor.dtype:
            # The next round starts from what the model can hold, so that is what its movement is measured from.
            self._module.copyto(anchor, own)


def _ranges_within(ranges: Sequence[Range], shard: slice) -> list[Range]:
    """The ranges cut to a shard, counted from the shard's start."""
    cut = [
        Range(max(r.start, shard.start) - shard.start, min(r.stop, shard.stop) - shard.start, r.group) for r in ranges
    ]
    return [r for r in cut if r.start < r.stop]
