"""The callback that saves and stops training in ``fit`` after a signal."""

from typing import Any

import keras

from lentando.optimizers.replica.save_on_signal import SaveOnSignal

__all__ = ["SaveOnSignalCallback"]


class SaveOnSignalCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """The result of ``save_on_signal``: a callback for ``fit``, with ``check()`` for custom training loops.

    Implements ``lentando.optimizers.replica.stopping.StopHandle``.

    Args:
        stop: object by which the ranks agree to stop, and which saves the checkpoint.
    """

    def __init__(self, stop: SaveOnSignal) -> None:
        super().__init__()
        self._stop = stop

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save and exit if all ranks have agreed to: here, since nothing can be saved inside the graph."""
        self.check()

    def check(self) -> None:
        """Save and exit if all ranks have agreed to stop, as ``SaveOnSignal.check`` does."""
        self._stop.check()

    def close(self) -> None:
        """Restore the previous signal handlers, as ``SaveOnSignal.close`` does."""
        self._stop.close()

    def __enter__(self) -> "SaveOnSignalCallback":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.__exit__(*error)
