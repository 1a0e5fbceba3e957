"""The callbacks of ``lentando.tensorflow.keras``, with the arguments of ``horovod.keras``."""

from typing import Any

from lentando.tensorflow.keras import callbacks as _callbacks
from lentando.tensorflow.keras.callbacks import (
    BroadcastGlobalVariablesCallback,
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
    MetricAverageCallback,
)

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]


class BestModelCheckpoint(_callbacks.BestModelCheckpoint):
    """A ``ModelCheckpoint`` that keeps the best model only: as in ``lentando.tensorflow.keras``, for whole models.

    Args:
        monitor: name of the metric that is compared.
        verbose: whether to print a line when a model is saved: 0 or 1.
        mode: "min", "max" or "auto".
        save_freq: "epoch", or a number of batches.
        filepath: file of the model, ending in ``.keras`` or ``.h5``; None to set the attribute ``filepath`` later.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        mode: str = "auto",
        save_freq: Any = "epoch",
        *,
        filepath: Any = None,
    ) -> None:
        super().__init__(monitor, verbose, mode=mode, save_freq=save_freq, filepath=filepath)
