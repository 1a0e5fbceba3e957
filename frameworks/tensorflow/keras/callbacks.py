"""Horovod's Keras callbacks, under the name of Horovod's module."""

from typing import Any

import keras

from lentando.comm.errors import ConfigurationError
from lentando.tensorflow.callbacks import BroadcastGlobalVariablesCallback, MetricAverageCallback
from lentando.tensorflow.learning_rate_callbacks import LearningRateScheduleCallback, LearningRateWarmupCallback

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]
    """A ``ModelCheckpoint`` that keeps the best model only, whose file may be given later.

    Every rank that has this callback saves. Use it on rank 0 alone, or with ``filepath`` that differs between ranks.

    Args:
        monitor: name of the metric that is compared.
        verbose: whether to print a line when a model is saved: 0 or 1.
        save_weights_only: whether only the weights are saved, in a file that ends in ``.weights.h5``.
        mode: "min", "max" or "auto".
        save_freq: "epoch", or a number of batches.
        filepath: file of the model, ending in ``.keras`` or ``.h5``. Or None, to set the attribute ``filepath`` before
            training begins.

    Raises:
        ConfigurationError: when training begins, if there is no ``filepath``.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: Any = "epoch",
        *,
        filepath: Any = None,
    ) -> None:
        super().__init__(
            filepath=("best.weights.h5" if save_weights_only else "best.keras") if filepath is None else filepath,
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )
        if filepath is None:
            self.filepath: Any = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check that the file has been given."""
        if self.filepath is None:
            raise ConfigurationError("set the attribute filepath of the BestModelCheckpoint before training begins")
        super().on_train_begin(logs)
