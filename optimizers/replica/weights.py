"""Weights that the program has set between steps, and a new round that begins from the present weights."""

import logging
from collections.abc import Sequence

import numpy as np

from lentando.comm.agreement import Event
from lentando.comm.array_module import copy_into
from lentando.comm.elastic import in_place, without_vote
from lentando.comm.errors import MismatchError
from lentando.comm.numbering import all_in_words, in_words
from lentando.comm.transport import Array
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.whole_average import are_equal, average_weights
from lentando.optimizers.rules.non_finite import NonFinite, first_non_finite

__all__ = ["Weights"]

_log = logging.getLogger("lentando")


class Weights:
    """Handles weights that training has not reached by its own steps.

    Args:
        setup: transport, framework and method of the replica.
        channel: sends the control messages.
        non_finite: policy for values that are not finite.
    """

    def __init__(self, setup: Setup, channel: Channel, non_finite: NonFinite) -> None:
        self._setup = setup
        self._channel = channel
        self._non_finite = non_finite
        self._is_continued = False  # whether gossip continues from the weights that were set

    def continue_gossip_if_set(self) -> None:
        """Let gossip continue from the weights of this rank, if the program has set them since this was last called."""
        watch = self._setup.framework.watch
        was_continued, self._is_continued = self._is_continued, watch.found
        if self._is_continued and not was_continued:
            self.continue_gossip()
            if self._setup.outer is None:  # no outer step will read the watch, and the next change must be noticed too
                watch.reset()
                self._is_continued = False

    def compare(self, ranks: Sequence[int]) -> None:
        """Check that all ranks still have the same weights in synchronous training, if the program has set some.

        Collective, after the control message of an average of gradients.

        Args:
            ranks: ranks whose weights the program has set.

        Raises:
            MismatchError: on every rank, if the ranks now have different weights.
        """
        setup = self._setup
        if not ranks or setup.outer is not None or setup.settings.base.mixes_parameters:
            return  # the next outer step averages them, as gossip does
        setup.framework.load()
        if not are_equal(setup, statistics=False):
            who = f"{in_words(setup.transport, ranks)} of {all_in_words(setup.transport)}"
            raise MismatchError(
                f"the program has set weights on {who}, and the "
                "ranks now have different weights, which synchronous training would keep apart. Set the same weights "
                "on every rank, or call broadcast_parameters, or restart() of the optimizer, which averages them"
            )
        setup.framework.watch.reset()

    def warn(self, ranks: Sequence[int], rounds: int) -> None:
        """Log that an outer step has adopted weights that the program has set.

        Args:
            ranks: ranks whose weights the program has set.
            rounds: number of the outer step.
        """
        transport, setup = self._setup.transport, self._setup
        if setup.settings.outer is None:
            return  # every outer step adopts the average, so nothing is lost
        rank, size, is_average = transport.rank, transport.size, setup.has_common_rounds
        if is_average and rank != 0:
            return
        where = "all ranks" if len(ranks) == size else f"{in_words(transport, ranks)} of {all_in_words(transport)}"
        _log.warning(
            "the program has set weights on %s since the last outer step: outer step %d adopts %s as it is, and the "
            "outer momentum begins again at zero. Call restart() of the optimizer where you set weights on purpose",
            where,
            rounds,
            "the average over all ranks" if is_average else "each replica's own weights",
        )

    def restart(self) -> None:
        """Average the weights, and restart gossip and outer momentum from them; see ``BetweenSteps.restart``."""
        setup = self._setup
        setup.framework.load()
        found = first_non_finite(setup.framework.buffers, constants=setup.constants)

        def attempt() -> None:
            is_finite = self._non_finite.is_clean(found)
            by_rank = self._channel.agree(Event.RESTART, "begins a new round of", is_finite=is_finite)
            verdict = self._non_finite.judge(by_rank, "restart", None if found is None else repr(found))
            self._drain()
            share = None if verdict is None else verdict.partial_average
            average_weights(setup, share)

        in_place(setup.transport, [buffer.array for buffer in setup.framework.buffers], attempt)
        setup.base.outer_average.adopt_consensus()
        if setup.outer is not None:
            setup.outer.reset_anchor(forget_momentum=True)
        setup.framework.store()
        setup.framework.watch.reset()
        setup.framework.watch.mark()
        self._channel.forget_start()

    def replace(self, averages: Sequence[Array]) -> bool:
        """Replace the weights of this rank by their average over the ranks. Collective.

        Args:
            averages: what becomes the content of each buffer, equal on all ranks.

        Returns:
            Whether that has changed the weights of any rank.
        """
        setup = self._setup
        setup.framework.load()
        pairs = list(zip(setup.framework.buffers, averages, strict=True))
        changes = np.array([any(bool((buffer.array != average).any()) for buffer, average in pairs)], np.int64)
        changed_on = self._channel.together(lambda: setup.transport.allgather(changes))
        for buffer, average in pairs:
            copy_into(buffer.array, average)
        setup.framework.store()
        setup.framework.watch.mark()
        return bool(changed_on.any())

    def continue_gossip(self) -> None:
        """Let gossip continue from the new weights of this rank, and drop what it has received for the old ones."""
        setup = self._setup
        setup.framework.load()
        without_vote(setup.transport, self._drain)
        setup.base.outer_average.rebase_on_model()
        setup.framework.store()

    def _drain(self) -> None:
        """Receive the messages in flight, and keep the weights as they are."""
        buffers = self._setup.framework.buffers
        kept = [buffer.array.copy() for buffer in buffers] if self._setup.settings.base.mixes_parameters else []
        self._setup.base.outer_average.wait_in_flight()
        for buffer, array in zip(buffers, kept, strict=bool(kept)):
            copy_into(buffer.array, array)
