"""What a replica does about weights that the program has set, and a new round that begins from the present weights."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from lentando.comm.array_module import copy_into, to_host
from lentando.comm.collectives import plan_reduction
from lentando.comm.control import Event
from lentando.comm.elastic import in_place, without_vote
from lentando.comm.errors import MismatchError, ranks_in_words
from lentando.comm.transport import as_bytes
from lentando.optimizers.replica.messages import Messages
from lentando.optimizers.replica.plan import Plan
from lentando.optimizers.rules.non_finite import NonFinite, first_non_finite
from lentando.optimizers.rules.partial_average import mean_over_some

__all__ = ["Weights"]

_log = logging.getLogger("lentando")


@dataclass
class Weights:
    """Weights that training has not reached by its own steps.

    Args:
        plan: what the replica is made of.
        messages: precede what is sent.
        non_finite: what is done about values that are not finite.
    """

    plan: Plan
    messages: Messages
    non_finite: NonFinite
    _is_continued: bool = field(default=False, init=False)  # gossip, from the weights that were found

    def look(self, has_stepped: bool = False) -> None:
        """The program has had its turn: see whether it has set the weights of this rank.

        Args:
            has_stepped: the base optimizer has had its turn as well, so that there is nothing to compare with.
        """
        watch = self.plan.framework.watch
        if not has_stepped:
            watch.look()
        if not self.plan.settings.base.mixes_parameters:
            return
        is_known, self._is_continued = self._is_continued, watch.found
        if self._is_continued and not is_known:
            self._continue_gossip()
            if self.plan.outer is None:  # no outer step will ask, and the next time is to be noticed as well
                watch.reset()
                self._is_continued = False

    def compare(self, ranks: Sequence[int]) -> None:
        """Synchronous training has nothing but equal weights: see whether they are equal still. Collective.

        Args:
            ranks: those whose weights the program has set.

        Raises:
            MismatchError: on every rank, if the ranks now have different weights.
        """
        if not ranks or self.plan.outer is not None or self.plan.settings.base.mixes_parameters:
            return  # the next outer step averages them, as gossip does
        self.plan.framework.load()
        if not self._are_equal(statistics=False):
            raise MismatchError(
                f"the program has set weights on {ranks_in_words(ranks)} of {self.plan.transport.size}, and the ranks "
                "now have different weights, which synchronous training would keep apart. Set the same weights on "
                "every rank, or call broadcast_parameters, or restart() of the optimizer, which averages them"
            )
        self.plan.framework.watch.reset()

    def warn(self, ranks: Sequence[int], rounds: int) -> None:
        """An outer step has adopted weights that the program has set."""
        if self.plan.settings.outer is None:
            return  # it always adopts the average, so that nothing is lost
        rank, size, is_average = self.plan.transport.rank, self.plan.transport.size, self.plan.settings.exact_average
        if is_average and rank != 0:
            return
        where = "all ranks" if len(ranks) == size else f"{ranks_in_words(ranks)} of {size}"
        _log.warning(
            "the program has set weights on %s since the last outer step: outer step %d adopts %s as it is, and the "
            "outer momentum begins again at zero. Call restart() of the optimizer where you set weights on purpose",
            where,
            rounds,
            "the average over all ranks" if is_average else "each replica's own weights",
        )

    def restart(self) -> None:
        """See ``Replica.restart``: everything but the counts. Collective."""
        plan = self.plan
        plan.framework.load()
        found = first_non_finite(plan.framework.buffers, constants=plan.constants)

        def attempt() -> None:
            agreement = self.messages.agree(Event.RESTART, "begins a new round of", found=found)
            verdict = self.non_finite.judge(agreement, "restart", None if found is None else repr(found))
            self._drain()
            share = None if verdict is None else verdict.partial_average
            if share is not None or not self._are_equal():  # the mean of equal numbers may differ from them by a bit
                for buffer in plan.framework.buffers:
                    constants = plan.constants.within(buffer)
                    reduction = plan_reduction(plan.transport, buffer.array, plan.settings.algorithm)
                    if share is None:
                        reduction.all_reduce(mean=True)
                    else:
                        mean_over_some(reduction, buffer.array, share)
                    for constant in constants:
                        constant.restore(buffer.array)

        in_place(plan.transport, [buffer.array for buffer in plan.framework.buffers], attempt)
        plan.base.outer_average.adopt_consensus()
        if plan.outer is not None:
            plan.outer.reset_anchor(forget_momentum=True)
        plan.framework.store()
        plan.framework.watch.reset()
        plan.framework.watch.mark()
        self.messages.forget_start()

    def _continue_gossip(self) -> None:
        """Gossip continues from the new weights of this rank; what it has received before is about the old ones."""
        plan = self.plan
        plan.framework.load()
        without_vote(plan.transport, self._drain)
        plan.base.outer_average.rebase_on_model()
        plan.framework.store()

    def _drain(self) -> None:
        """Receive what is in flight, and keep the weights as they are."""
        buffers = self.plan.framework.buffers
        kept = [buffer.array.copy() for buffer in buffers] if self.plan.settings.base.mixes_parameters else []
        self.plan.base.outer_average.wait_in_flight()
        for buffer, array in zip(buffers, kept, strict=bool(kept)):
            copy_into(buffer.array, array)

    def _are_equal(self, statistics: bool = True) -> bool:
        """Whether all ranks hold the same weights. Collective.

        Args:
            statistics: and the same statistics.
        """
        checksum = 0
        for buffer in self.plan.framework.buffers:
            own = buffer.array if statistics else buffer.parameters
            checksum = crc32(as_bytes(to_host(own)).data, checksum)
        checksums = self.plan.transport.allgather(np.array([checksum], np.int64))
        return bool((checksums == checksums[0]).all())
