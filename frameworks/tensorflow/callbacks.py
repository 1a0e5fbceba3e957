"""Keras callbacks: Horovod's, where they still mean something, one that evaluates the average, one that logs costs."""

from contextlib import AbstractContextManager
from typing import Any

import keras

from lentando.comm import operations
from lentando.comm.errors import MismatchError, grouped_by_rank
from lentando.tensorflow.functions import broadcast_variables
from lentando.tensorflow.optimizer import DistributedOptimizer

__all__ = [
    "AveragedModelCallback",
    "BroadcastGlobalVariablesCallback",
    "LentandoCallback",
    "MetricAverageCallback",
]


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


class AveragedModelCallback(MetricAverageCallback):
    """Let validation in ``fit``, and the callbacks after this one, judge the exact average of all replicas.

    Put it first. From the validation of an epoch on, or from the end of an epoch without one, the model is the average,
    until the next epoch begins and each rank continues from its own weights. ``ModelCheckpoint`` saves the average, and
    ``EarlyStopping(restore_best_weights=True)`` ends with the best one. The metrics of the epoch are averaged over the
    ranks, so that all of them decide alike. Given to ``model.evaluate``, it evaluates the average.

    Collective: every rank gives it, has as many epochs, and validates in the same ones. Training is not changed by it.
    After ``fit`` the model is each rank's own again, unless a later callback restores other weights: save the average
    then inside ``optimizer.averaged()``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._block: AbstractContextManager[None] | None = None
        self._trains = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Begin with this rank's own weights, also if a former ``fit`` was interrupted."""
        self._leave()
        self._trains = True

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Continue from this rank's own weights."""
        self._leave()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Collective: hold the average."""
        self._enter()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Continue with this rank's own weights, unless callbacks of ``fit`` are to follow."""
        if not self._trains:
            self._leave()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Collective: hold the average, and average the metrics."""
        self._enter()
        super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Continue with this rank's own weights, or their moving average (``use_ema``) with which ``fit`` ends."""
        self._trains = False
        if self._leave() and self.model.optimizer.use_ema:
            self.model.optimizer.finalize_variable_values(self.model.trainable_variables)

    def _enter(self) -> None:
        optimizer = self.model.optimizer
        if self._block is None and isinstance(optimizer, DistributedOptimizer) and optimizer.built:
            block = optimizer.averaged()
            block.__enter__()
            self._block = block

    def _leave(self) -> bool:
        """Put this rank's own weights back. True if it held the average."""
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)
        return block is not None


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
