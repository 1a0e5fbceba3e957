"""A line of a log for each epoch, as the callbacks of trainers write it."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.replica_optimizer import ReplicaOptimizer
from lentando.optimizers.run_log import Logger, RunLog

__all__ = ["EpochLog"]


class EpochLog:
    """The log of a run of whose optimizer a trainer's callback learns only when an epoch ends.

    Args:
        folder: folder of the run, which is created.
        with_consensus: whether to add the distance between the replicas, which costs an average each time.
        to: as for ``open_log`` of an optimizer.
    """

    def __init__(self, folder: "str | PathLike[str]", with_consensus: bool, to: Logger | None) -> None:
        self._folder, self._with_consensus, self._to = folder, with_consensus, to
        self._log: RunLog | None = None
        self._optimizer: ReplicaOptimizer | None = None

    def write(self, optimizer: object, metrics: Mapping[str, Any]) -> None:
        """Write a line. The log is opened for the first one, and for each new optimizer. Collective.

        Args:
            optimizer: the optimizer of the epoch.
            metrics: numbers of this rank, which are averaged over ranks; anything that ``float`` takes.

        Raises:
            ConfigurationError: on every rank, if a metric has a name that the log uses itself, or if rank 0 cannot
                write; and for an optimizer that is not one of Lentando's.
        """
        if not isinstance(optimizer, ReplicaOptimizer):
            raise ConfigurationError(f"a log of a run needs an optimizer of Lentando's, got {type(optimizer).__name__}")
        if self._log is None or optimizer is not self._optimizer:
            self._optimizer = optimizer
            self._log = optimizer.open_log(self._folder, to=self._to)
        numbers = {name: float(value) for name, value in metrics.items()}
        self._log.write(with_consensus=self._with_consensus, **numbers)
