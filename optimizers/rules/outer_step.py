"""The outer step: an exact average, with the outer rule applied between its reduce-scatter and its all-gather.

The reduce-scatter gives each rank the mean of 1/n of the parameters. The rank applies the outer rule to this shard, and
the all-gather distributes the results. Slow momentum thus needs no message, 1/n of the arithmetic and 1/n of the
memory.

In an elastic job every rank holds all shards instead, so that no momentum is lost with a rank, and no parameter changes
before all ranks have the average. The messages have the same bytes, and the numbers are bit-identical.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import hypot
from typing import Any

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.collectives import Algorithm
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import NonFiniteError
from lentando.comm.flat import FlatBuffer, all_moderate
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.constant_statistics import Constants, is_finite_but_for
from lentando.optimizers.rules.flat_state import flat_state, joined_shards, load_shards
from lentando.optimizers.rules.movement_average import MovementAverage
from lentando.optimizers.rules.non_finite import error_of_average
from lentando.optimizers.rules.outer_average import OuterAverage, plan_outer_average
from lentando.optimizers.rules.outer_rule import OuterRule, blocks_by_group
from lentando.optimizers.rules.outer_stepping import OuterStepping
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.rules.wire import WireDtype, wire_of

__all__ = ["OuterStep"]


class OuterStep(OuterStepping):
    """Averages the buffers of all replicas and steps from the anchor through the average.

    Args:
        transport: transport that connects the ranks.
        buffers: flat buffers that are averaged in place.
        rule: outer rule, such as slow momentum; None adopts the average as it is.
        exact_average: whether the average over all ranks is formed. If False, the rule is applied to each replica's own
            parameters, without communication (SlowMo's section 6, "SGP-SlowMo-noaverage").
        algorithm: algorithm of the reductions.
        constants: statistics that may have values that are not finite.
        wire_dtype: how movements since the anchor are coded when they are averaged; None averages parameters in full
            precision.
        is_weighted: whether movements are averaged in any case, which can be weighted.
    """

    supports_join = supports_skip = supports_elastic = True

    def __init__(
        self,
        transport: Transport,
        buffers: Sequence[FlatBuffer],
        rule: OuterRule | None,
        exact_average: bool = True,
        algorithm: Algorithm = "auto",
        constants: Constants | None = None,
        wire_dtype: WireDtype | None = None,
        is_weighted: bool = False,
    ) -> None:
        self.communicates = self.leaves_ranks_equal = exact_average
        self._transport = transport
        self._constants = constants or Constants(transport.size)
        self._is_exact = exact_average
        self._sharded = exact_average and not is_elastic(transport)

        def planned(buffer: FlatBuffer) -> OuterAverage:
            if wire_dtype is not None or is_weighted:
                return MovementAverage(transport, buffer.array, buffer.parameters.size, wire_of(wire_dtype))
            return plan_outer_average(transport, buffer.array, algorithm, exact_average=exact_average)

        self._shards = [_Shard(buffer, planned(buffer), rule, self._constants) for buffer in buffers]

    def reset_anchor(self, forget_momentum: bool = False) -> None:
        """Set the anchor x_{t,0} of the round that begins to the present parameters.

        Args:
            forget_momentum: whether to set the rule's momentum to zero.
        """
        for shard in self._shards:
            shard.reset_anchor(forget_momentum)

    def replan(self) -> None:
        """Plan the reductions again for the remaining ranks. Collective over these."""
        for shard in self._shards:
            shard.average.replan()

    def average(self, partial_average: PartialAverage | None = None) -> None:
        """Form the average, and leave the buffers as they are.

        Args:
            partial_average: how this rank takes part in an average over some of the ranks; None for all ranks.

        Raises:
            NonFiniteError: on every rank, naming parameter and rank, if the average is not finite.
        """
        divisor = self._transport.size if self._is_exact else 1
        found = [shard.reduce(divisor, partial_average) for shard in self._shards]
        is_finite = self._all_agree(all(found))
        if not is_finite and any(shard.is_formed_twice for shard in self._shards):
            found = [
                shard.average.is_finite() if shard.is_formed_twice else was
                for shard, was in zip(self._shards, found, strict=True)
            ]
            is_finite = self._all_agree(all(found))
        try:
            self._check_finite(is_finite)
        except NonFiniteError:
            self.abort_average()
            raise

    def abort_average(self) -> None:
        """Discard the average, so that it is not adopted."""
        for shard in self._shards:
            shard.abort_average()

    def step(self, learning_rates: Sequence[float]) -> None:
        """Step outward from the anchor through the average, on all buffers.

        Args:
            learning_rates: learning rate of each parameter group, the mean over the round's inner steps.
        """
        for shard in self._shards:
            shard.step(learning_rates)

    def movement_norm(self) -> float:
        """Euclidean norm of what this rank's parameters have moved since the anchor, where movements are averaged."""
        return hypot(*(shard.movement_norm() for shard in self._shards))

    def adopt(self) -> None:
        """Make the average the parameters and the anchor, without the outer rule, and set the momentum to zero."""
        for shard in self._shards:
            shard.adopt()

    def run(self, learning_rates: Sequence[float]) -> None:
        """Take one outer step on all buffers: ``average``, then ``step``."""
        self.average()
        self.step(learning_rates)

    def state_dict(self) -> dict[str, Any]:
        """Anchors and slow momenta of this rank's shards, an array per buffer."""
        starts = [shard.start for shard in self._shards] if self._sharded else None
        state = {name: flat_state(arrays, starts) for name, arrays in self._arrays().items()}
        return state | {name: flat_state(arrays) for name, arrays in self._whole_arrays().items()}

    def whole_state(self) -> dict[str, Any]:
        arrays = self._arrays()
        whole = {name: flat_state(parts) for name, parts in self._whole_arrays().items()}
        if not self._sharded:
            return {name: flat_state(parts) for name, parts in arrays.items()} | whole
        sizes, starts = [shard.buffer.array.size for shard in self._shards], [shard.start for shard in self._shards]
        return {name: joined_shards(self._transport, parts, starts, sizes) for name, parts in arrays.items()} | whole

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore anchors and slow momenta.

        Raises:
            ConfigurationError: if arrays have another shape, which means another model, world size or rule, or belong
                to other shards, which means another placement of the ranks on their nodes.
        """
        starts = [shard.start for shard in self._shards]
        for name, arrays in self._arrays().items():
            load_shards(f"{name} of the outer step", self._transport, arrays, state[name], starts)
        for name, arrays in self._whole_arrays().items():
            load_shards(f"{name} of the outer step", self._transport, arrays, state[name])

    def _arrays(self) -> dict[str, list[Array | None]]:
        """This rank's shards of arrays, by name, an array per buffer."""
        return {
            "anchors": [shard.anchor for shard in self._shards],
            "slow_buffers": [shard.slow_buffer for shard in self._shards],
            **_by_name([shard.average.shard_arrays() for shard in self._shards]),
        }

    def _whole_arrays(self) -> dict[str, list[Array | None]]:
        """Arrays that cover the whole buffers on every rank, by name, an array per buffer."""
        return _by_name([shard.average.arrays() for shard in self._shards])

    def _all_agree(self, found: bool) -> bool:
        """Whether all ranks have found so. All must agree before any of them changes a parameter."""
        return bool(self._transport.allgather(np.array([found])).all()) if self._is_exact else found

    def _check_finite(self, is_finite: bool) -> None:
        if is_finite:
            return
        buffers = [shard.buffer for shard in self._shards]
        raise error_of_average(self._transport, self._constants, buffers, is_exact=self._is_exact)


class _Shard:
    """This rank's shard of one buffer.

    Attributes:
        is_formed_twice: whether the mean of the present round is not kept, equal on all ranks.
    """

    def __init__(self, buffer: FlatBuffer, average: OuterAverage, rule: OuterRule | None, constants: Constants) -> None:
        self.buffer = buffer
        self._constants = constants
        self.start = average.shard.start
        self.average = average
        self._rule = rule
        self._module = array_module(buffer.array)
        self._own = buffer.array[average.shard]
        self._ranges = buffer.layout.ranges_within(average.shard)
        self._cut = list(blocks_by_group(self._own, self._ranges))
        dtype = accumulator_dtype(buffer.array.dtype)
        self.anchor: Array | None = None if rule is None else self._module.empty(self._own.size, dtype)
        self.slow_buffer: Array | None = None
        if rule is not None and rule.keeps_momentum:
            self.slow_buffer = self._module.zeros(self._own.size, dtype)
        # New memory for every step would cost more than the arithmetic, because the system clears each page of it.
        longest = max((elements.stop - elements.start for elements, _ in self._cut), default=0)
        self._scratch: Array | None = None if rule is None else self._module.empty(longest, dtype)
        self._mean: Array | None = None  # while it is kept, between ``reduce`` and ``step``
        self.is_formed_twice = False
        self._divisor = 1
        self._left_out: list[tuple[Array, Array]] = []
        self.reset_anchor()

    def movement_norm(self) -> float:
        return self.average.movement_norm() if isinstance(self.average, MovementAverage) else 0.0

    def reset_anchor(self, forget_momentum: bool = False) -> None:
        if self.anchor is not None:
            self._module.copyto(self.anchor, self._own)
        if forget_momentum and self.slow_buffer is not None:
            self.slow_buffer[...] = 0
        self.average.begin_round(self.buffer.array, forget_errors=True)

    def adopt(self) -> None:
        self._replace(lambda elements, _, mean: self._module.copyto(self._own[elements], mean, casting="same_kind"))
        self.reset_anchor(forget_momentum=True)
        self._left_out = []

    def reduce(self, divisor: int, partial_average: PartialAverage | None) -> bool:
        """Form the mean of this shard, and leave the buffer as it is. Returns whether the mean is finite.

        Within a node the mean is not kept: ``step`` forms it again, which takes less time than writing it to memory and
        reading it back. It need not even be formed here if the values of each rank are so small that it is finite in
        any case. Returns whether this rank's are; only if not all are, ``average.is_finite`` must be asked.

        Where this rank does not count, its buffer is zero from then on, until ``step`` or ``abort_average``: in
        between, neighbours may read it.
        """
        self._mean, self._divisor = None, divisor
        self.is_formed_twice = self.average.is_formed_twice and partial_average is None and not self._constants.exist
        if self.is_formed_twice:
            return all_moderate(self.buffer.array)
        constants = []
        if self._constants.exist:  # before elements are set to zero
            constants = self._constants.within(self.buffer, self.average.shard)
        self._left_out = [] if partial_average is None else partial_average.leave_out(self.buffer)
        if partial_average is not None:
            self._mean = self.average.reduce(None, partial_average)
            for part in self._ranges:
                mean = self._mean[part.start : part.stop]
                np.true_divide(mean, partial_average.divisor(part), out=mean)
            for constant in constants:
                constant.restore(self._mean)
            return is_finite_but_for(self._mean, constants)
        self._mean, is_finite = self.average.mean(divisor, constants)
        return is_finite

    def abort_average(self) -> None:
        """Restore the elements that were set to zero. All shards are formed, so no other rank reads them any more."""
        for own, kept in self._left_out:
            self._module.copyto(own, kept)
        self._left_out = []

    def step(self, learning_rates: Sequence[float]) -> None:
        """Apply the rule to the mean, and distribute the result."""
        self._replace(partial(self._step_block, learning_rates))
        if self.average.is_rounded and self.anchor is not None:
            self._module.copyto(self.anchor, self._own)
        self.average.begin_round(self.buffer.array)
        self._left_out = []

    def _replace(self, change: Callable[[slice, int | None, Array], object]) -> None:
        """Let ``change`` write to this shard, given elements, their group and their mean, and distribute the result."""
        if self._mean is None:
            self.average.replace(self._divisor, self._cut, change)
            return
        for elements, group in self._cut:
            change(elements, group, self._mean[elements])
        self.average.distribute()

    def _step_block(self, learning_rates: Sequence[float], elements: slice, group: int | None, mean: Array) -> None:
        """Make all passes over elements that fit the cache. Statistics, which have no group, adopt the mean."""
        own = self._own[elements]
        if self._rule is None or self.anchor is None:
            self._module.copyto(own, mean, casting="same_kind")
            return
        anchor = self.anchor[elements]
        slow = None if self.slow_buffer is None else self.slow_buffer[elements]
        if group is None:
            self._module.copyto(anchor, mean)
        else:
            self._rule.step(anchor, slow, mean, learning_rates[group], self._scratch)
        self._module.copyto(own, anchor, casting="same_kind")
        if own.dtype != anchor.dtype:
            # The next round starts from numbers of the model's dtype, and its movement is measured from them.
            self._module.copyto(anchor, own)


def _by_name(found: Sequence[dict[str, Array | None]]) -> dict[str, list[Array | None]]:
    """Arrays that each buffer has under the same names, as a list for each name."""
    return {name: [arrays[name] for arrays in found] for name in found[0]} if found else {}
