"""Horovod's elastic state for ``fit``, and the callbacks that commit it."""

from typing import Any

import keras

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.elastic_state import State
from lentando.tensorflow.elastic import TensorFlowKerasState, run

__all__ = [
    "CommitStateCallback",
    "KerasState",
    "TensorFlowKerasState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]


class KerasState(TensorFlowKerasState):
    """State of a Keras model and its optimizer; see ``TensorFlowKerasState``.

    Args:
        model: the model, which has been built.
        optimizer: the optimizer; by default that of the compiled model.
        **kwargs: initial value of each further attribute, such as ``batch=0, epoch=0``.

    Example:
        >>> import keras, numpy as np, lentando.tensorflow.keras as hvd
        >>> hvd.init()
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
        >>> state = hvd.elastic.KerasState(model, batch=0, epoch=0)
        >>> @hvd.elastic.run
        ... def train(state):
        ...     callbacks = [hvd.elastic.UpdateEpochStateCallback(state), hvd.elastic.CommitStateCallback(state)]
        ...     epochs = 3 - state.epoch
        ...     state.model.fit(np.ones([8, 2]), np.ones([8]), epochs=epochs, verbose=0, callbacks=callbacks)
        >>> train(state)
        >>> state.epoch
        3
        >>> hvd.shutdown()
    """

    def __init__(self, model: keras.Model, optimizer: Any = None, **kwargs: Any) -> None:
        super().__init__(model, optimizer, **kwargs)


class CommitStateCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Commit a state every so many batches, and at the end of every epoch. Place it after those that update the state.

    Args:
        state: the state.
        batches_per_commit: number of batches between two commits.
    """

    def __init__(self, state: State, batches_per_commit: int = 1) -> None:
        super().__init__()
        if batches_per_commit < 1:
            raise ConfigurationError(f"batches_per_commit must be at least 1, got {batches_per_commit}")
        self.state = state
        self.batches_per_commit = batches_per_commit
        self._remaining = batches_per_commit

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Count batches from here on, on all ranks alike."""
        self._remaining = self.batches_per_commit

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Commit after every ``batches_per_commit`` batches."""
        self._remaining -= 1
        if self._remaining == 0:
            self._remaining = self.batches_per_commit
            self.state.commit()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Commit what the epoch has reached."""
        self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Set ``state.batch`` to the number of the batch that has ended, and to 0 at the end of an epoch.

    Unlike Horovod's with Keras 2, it does not shorten the epoch that is repeated, which Keras 3 lets no callback do.
    Pass ``steps_per_epoch=total - state.batch`` to a first ``fit`` of one epoch.

    Args:
        state: the state, with an attribute ``batch``.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Set ``state.batch`` to this batch."""
        self.state.batch = batch

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Set ``state.batch`` to 0."""
        self.state.batch = 0


class UpdateEpochStateCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Set ``state.epoch`` to the number of epochs that have ended, in all calls of ``fit`` together.

    Args:
        state: the state, with an attribute ``epoch``.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self.initial_epoch = state.epoch

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Continue from the present ``state.epoch``, while ``fit`` counts from 0."""
        self.initial_epoch = self.state.epoch

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Set ``state.epoch`` to the epochs that have ended."""
        self.state.epoch = self.initial_epoch + epoch + 1
