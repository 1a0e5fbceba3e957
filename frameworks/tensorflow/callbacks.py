"""Keras callbacks: Horovod's, where they still mean something, and one that logs what communication costs."""

from typing import Any

import keras

from lentando.comm import operations
from lentando.comm.errors import MismatchError, grouped_by_rank
from lentando.tensorflow.functions import broadcast_variables
from lentando.tensorflow.optimizer import DistributedOptimizer

__all__ = ["BroadcastGlobalVariablesCallback", "LentandoCallback", "MetricAverageCallback"]


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Give every rank the root's weights and optimizer state when training begins, as one rank has restored them.

    A ``DistributedOptimizer`` does so by itself with rank 0's weights when it is made.

    Args:
        root_rank: whose.
        device: ignored; for scripts that were written for Horovod.
    """

    def __init__(self, root_rank: int, device: str = "") -> None:
        super().__init__()
        self.root_rank = root_rank
        self._done = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """If there is a model yet."""
        if self.model.built:
            self._broadcast()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """If the first batch has built the model."""
        if not self._done:
            self._broadcast()

    def _broadcast(self) -> None:
        self._done = True
        broadcast_variables(self.model.weights, self.root_rank)
        broadcast_variables(self.model.optimizer.variables, self.root_rank)


class MetricAverageCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Replace the metrics of each epoch by their means over ranks, for the callbacks after it in the list.

    Put it first, so that learning-rate reduction, early stopping and checkpoints decide alike on all ranks.
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Collective."""
        if logs is None:
            return
        own = {name: float(value) for name, value in logs.items()}
        by_rank = operations.allgather_object(own, "metrics of an epoch")
        names = [", ".join(sorted(metrics)) for metrics in by_rank]
        if len(set(names)) > 1:
            raise MismatchError(f"the metrics differ between ranks: {grouped_by_rank(names)}")
        for name in own:
            logs[name] = sum(metrics[name] for metrics in by_rank) / len(by_rank)


class LentandoCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Add ``optimizer.report(flat=True)`` to the logs of each epoch, so that it is in ``history`` and TensorBoard.

    Args:
        prefix: of its names in the logs.
    """

    def __init__(self, prefix: str = "lentando_") -> None:
        super().__init__()
        self.prefix = prefix

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Of this rank."""
        if logs is not None and isinstance(self.model.optimizer, DistributedOptimizer):
            report = self.model.optimizer.report(flat=True)
            logs.update({f"{self.prefix}{name}": value for name, value in report.items()})
