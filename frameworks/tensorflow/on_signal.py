"""Stopping when told to, where ``fit`` trains."""

from typing import Any

import keras

from lentando.optimizers.replica.stopping import SaveOnSignal

__all__ = ["SaveOnSignalCallback"]


class SaveOnSignalCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """What ``save_on_signal`` returns: a callback for ``fit``, and ``check()`` for loops of your own.

    Implements ``lentando.optimizers.replica.stopping.StopHandle``.

    Args:
        stop: makes the ranks agree.
    """

    def __init__(self, stop: SaveOnSignal) -> None:
        super().__init__()
        self._stop = stop

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Outside the graph, in which nothing can be saved."""
        self.check()

    def check(self) -> None:
        """See ``lentando.optimizers.replica.stopping.SaveOnSignal.check``."""
        self._stop.check()

    def close(self) -> None:
        """See ``lentando.optimizers.replica.stopping.SaveOnSignal.close``."""
        self._stop.close()

    def __enter__(self) -> "SaveOnSignalCallback":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.__exit__(*error)
