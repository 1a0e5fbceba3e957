"""Return of a replica to an earlier step, when other ranks may have been alive, and continuation from rank 0's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lentando.comm.elastic import is_elastic, transaction
from lentando.comm.objects import broadcast_object
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.evaluation import Evaluation
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.state import return_to_state, state_to_return_to
from lentando.optimizers.replica.weights import Weights
from lentando.optimizers.rules.streamed_step import StreamedOuterStep

__all__ = ["Rollback"]


class Rollback:
    """Takes snapshots of a replica in memory, and returns to them.

    Weights and the state of the base optimizer are saved and restored by the caller. Unlike in a checkpoint, the state
    of gossip is not saved: it depends on the ranks that take part, and begins again from the restored weights.

    Args:
        setup: transport, framework and method of the replica.
        progress: progress of the replica.
        channel: sends the control messages.
        weights: weights that the program may have set.
        evaluation: evaluates the average.
    """

    def __init__(
        self, setup: Setup, progress: Progress, channel: Channel, weights: Weights, evaluation: Evaluation
    ) -> None:
        self._setup = setup
        self._progress = progress
        self._channel = channel
        self._weights = weights
        self._evaluation = evaluation

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the counts, the period's schedule, and the outer momentum. Not collective."""
        return state_to_return_to(self._setup, self._progress)

    def roll_back(self, snapshot: Mapping[str, Any]) -> None:
        """Return to a snapshot. A step that an error has interrupted is not taken. Not collective.

        Raises:
            ConfigurationError: inside ``averaged()``.
        """
        self._evaluation.refuse("to roll back")
        self._progress.is_in_step = False
        return_to_state(snapshot, self._setup, self._progress)
        if self._setup.settings.base.mixes_parameters:
            self._setup.framework.watch.reset(found=True)  # lets gossip begin again from the restored weights
        self._channel.forget_start()

    def adopt_rank_0(self) -> None:
        """Continue from rank 0's weights, which the caller has given to all ranks between two steps. Collective.

        In an elastic job, whose ranks may have returned to different steps, all of them also adopt the counts of rank 0
        and its outer momentum.

        Raises:
            ConfigurationError: inside ``averaged()``.
        """
        setup = self._setup
        self._evaluation.refuse("to adopt the weights of rank 0")
        if is_elastic(setup.transport):
            own = self.snapshot()
            self.roll_back(transaction(setup.transport, lambda: broadcast_object(setup.transport, own)))
        if setup.settings.base.mixes_parameters and self._progress.has_started:
            self._weights.continue_gossip()
            if is_elastic(setup.transport):
                transaction(setup.transport, self._align_exchanges)
        if isinstance(setup.outer, StreamedOuterStep):
            setup.outer.share_contributions()
        setup.framework.load()
        setup.framework.watch.reset()
        setup.framework.watch.mark()

    def _align_exchanges(self) -> None:
        """Let all ranks begin their next exchange of gossip with the same number, as they continue at the same step."""
        recovery = self._setup.base.recovery
        most = int(self._setup.transport.allgather(np.array([recovery.begun_exchanges], np.int64)).max())
        self._setup.framework.load()
        recovery.resume_after_failure(most, most)
        self._setup.framework.store()
