"""Keras callbacks: Horovod's where they still apply, one that evaluates the average, and one that logs metrics."""

from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lentando.comm import operations
from lentando.comm.errors import ConfigurationError, MismatchError, grouped_by_rank
from lentando.comm.transport import Array
from lentando.optimizers.epoch_log import EpochLog
from lentando.optimizers.run_log import Logger
from lentando.tensorflow.names import by_number, by_number_alone
from lentando.tensorflow.optimizer import DistributedOptimizer
from lentando.tensorflow.state_variables import native
from lentando.tensorflow.variables import broadcast_variables

__all__ = [
    "AveragedModelCallback",
    "BroadcastGlobalVariablesCallback",
    "LentandoCallback",
    "MetricAverageCallback",
    "RunLogCallback",
]


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Broadcast one rank's weights and optimizer state when training begins, such as after it has restored them.

    This happens once for each callback object, in its first ``fit``: a second ``fit`` continues from what each rank
    has. A ``DistributedOptimizer`` broadcasts rank 0's weights when it is constructed, without this callback.

    Args:
        root_rank: rank whose weights and optimizer state are broadcast.
        device: ignored; accepted for scripts that were written for Horovod.
        local_variables: a variable or variables of the model that each rank keeps as they are.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None) -> None:
        super().__init__()
        self.root_rank = root_rank
        self._done = False
        self._local: list[Any] = []
        for variable in [local_variables] if _is_variable(local_variables) else local_variables or []:
            self.register_local_var(variable)

    def register_local_var(self, var: Any) -> None:
        """Let each rank keep its own value of a variable of the model.

        Args:
            var: the variable.
        """
        if not _is_variable(var):
            raise ConfigurationError(f"local_variables must be variables of the model, got {type(var).__name__}")
        self._local.append(native(var))

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Broadcast in the first ``fit``, if the model has been built already."""
        if self.model.built and not self._done:
            self._broadcast()

    def on_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Broadcast after the first batch, if that has built the model."""
        if not self._done:
            self._broadcast()

    def _broadcast(self) -> None:
        self._broadcast_weights()
        self._broadcast_optimizer()
        self._done = True

    def _broadcast_weights(self) -> None:
        shared = [v for v in self.model.weights if not any(native(v) is local for local in self._local)]
        broadcast_variables(by_number(shared), self.root_rank)

    def _broadcast_optimizer(self) -> None:
        optimizer = self.model.optimizer
        if optimizer is None:
            return
        if not optimizer.built and self.model.trainable_variables:
            optimizer.build(self.model.trainable_variables)  # on a rank that has not loaded it, say
        broadcast_variables(by_number_alone(optimizer.variables), self.root_rank)
        if isinstance(optimizer, DistributedOptimizer):
            optimizer.set_weights(optimizer.variables)  # continues from the root's count of steps


class MetricAverageCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Replace the metrics of each epoch by their means over the ranks, for all callbacks that follow in the list.

    Place it first, so that learning-rate reduction, early stopping and checkpoints decide equally on all ranks.

    Args:
        device: ignored; accepted for scripts that were written for Horovod.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Average the metrics of the epoch in place. Collective."""
        if logs is None:
            return
        metrics = {name: np.asarray(value, np.float64) for name, value in logs.items()}
        by_rank = operations.allgather_object(metrics, "metrics of an epoch")
        names = [", ".join(sorted(map(_with_shape, other.items()))) for other in by_rank]
        if len(set(names)) > 1:
            raise MismatchError(f"the metrics differ between ranks: {grouped_by_rank(names)}")
        for name, metric in metrics.items():
            mean = sum(other[name] for other in by_rank) / len(by_rank)
            logs[name] = mean if metric.shape else float(mean)


class AveragedModelCallback(MetricAverageCallback):
    """Evaluate the exact average of all replicas in the validation of ``fit`` and in all callbacks that follow.

    Place it first. The model holds the average from the validation of an epoch (or the end of an epoch without
    validation) until the next epoch begins, when each rank continues from its own weights. ``ModelCheckpoint`` saves
    the average, and ``EarlyStopping(restore_best_weights=True)`` ends with the best one. The metrics of the epoch are
    averaged over the ranks, so that all ranks decide equally. Passed to ``model.evaluate``, it evaluates the average.

    Collective: every rank uses it, with the same number of epochs, and validates in the same epochs. It does not change
    the training. After ``fit`` the model holds each rank's own weights again, unless a later callback restores other
    weights: save the average inside ``optimizer.averaged()`` then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._block: AbstractContextManager[None] | None = None
        self._is_training = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Begin with this rank's own weights, also after an interrupted ``fit``."""
        self._leave()
        self._is_training = True

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Continue from this rank's own weights."""
        self._leave()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Replace the weights by the average. Collective."""
        self._enter()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Restore this rank's own weights, unless callbacks of ``fit`` follow."""
        if not self._is_training:
            self._leave()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Replace the weights by the average, and average the metrics. Collective."""
        self._enter()
        super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Restore this rank's own weights, or their moving average (``use_ema``), with which ``fit`` ends."""
        self._is_training = False
        if self._leave() and self.model.optimizer.use_ema:
            self.model.optimizer.finalize_variable_values(self.model.trainable_variables)

    def _enter(self) -> None:
        optimizer = self.model.optimizer
        if self._block is None and isinstance(optimizer, DistributedOptimizer) and optimizer.built:
            block = optimizer.averaged()
            block.__enter__()
            self._block = block

    def _leave(self) -> bool:
        """Restore this rank's own weights. Returns whether the model held the average."""
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)
        return block is not None


class LentandoCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Add ``optimizer.report(flat=True)`` to the logs of each epoch, and thereby to ``history`` and TensorBoard.

    Args:
        prefix: string that the names of the metrics begin with in the logs.
    """

    def __init__(self, prefix: str = "lentando_") -> None:
        super().__init__()
        self.prefix = prefix

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the report of this rank to the logs."""
        if logs is not None and isinstance(self.model.optimizer, DistributedOptimizer):
            report = self.model.optimizer.report(flat=True)
            logs.update({f"{self.prefix}{name}": value for name, value in report.items()})


class RunLogCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Write a line to the log of the run after each epoch of ``fit``: ``lentando report`` draws it.

    A line contains the logs of the epoch, as means over ranks, and what the optimizer reports: ``optimizer.open_log``.
    Collective: every rank uses it, with the same number of epochs; not inside ``lt.join``, where the epochs of the
    ranks end at different times.

    Args:
        folder: folder of the run, which is created.
        with_consensus: whether to add the distance between the replicas, which costs an average each time.
        to: where rank 0 writes each line, too: a ``SummaryWriter``, or a function that takes a dict of numbers and the
            inner step, such as ``run.log`` of W&B or ``mlflow.log_metrics``. Other ranks may leave it out.

    Raises:
        ConfigurationError: when an epoch ends, on every rank, if a metric has a name that the log uses itself, if rank
            0 cannot write, or if the optimizer of the model is not one of Lentando's.

    Example:
        >>> import keras, numpy as np, tempfile, lentando.tensorflow as lt
        >>> lt.init()
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer=lt.SlowMo(keras.optimizers.SGD(0.1), model=model), loss="mse")
        >>> folder = tempfile.mkdtemp()
        >>> x, y = np.ones((4, 2), "float32"), np.ones((4, 1), "float32")
        >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[lt.RunLogCallback(folder)])
        >>> with open(f"{folder}/run.jsonl") as log:
        ...     len(log.readlines())  # the method, and one line for each epoch
        3
        >>> lt.shutdown()
    """

    def __init__(
        self, folder: "str | PathLike[str]", *, with_consensus: bool = False, to: Logger | None = None
    ) -> None:
        super().__init__()
        self._log = EpochLog(folder, with_consensus, to)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Write the line. Collective."""
        self._log.write(self.model.optimizer, logs or {})


def _with_shape(metric: tuple[str, Array]) -> str:
    """The name of a metric, with its shape if it is not one number."""
    name, value = metric
    return f"{name} {list(value.shape)}" if value.shape else name


def _is_variable(value: Any) -> bool:
    return isinstance(value, keras.Variable | tf.Variable)
