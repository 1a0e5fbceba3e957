"""Saving and loading for TensorFlow; what a checkpoint is, ``lentando.optimizers.checkpoint`` knows."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from signal import SIGTERM
from typing import Any

import keras

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.checkpoint import loading, saving
from lentando.optimizers.checkpoint.loading import OptimizerStateChoice
from lentando.optimizers.checkpoint.mapping import Mapping
from lentando.optimizers.stopping import SaveOnSignal
from lentando.tensorflow.convert import to_plain
from lentando.tensorflow.optimizer import DistributedOptimizer
from lentando.tensorflow.training import KerasTraining

__all__ = ["SaveOnSignalCallback", "load", "save", "save_on_signal"]


class SaveOnSignalCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """What ``save_on_signal`` returns: a callback for ``fit``, and ``check()`` for loops of your own.

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
        """See ``lentando.optimizers.stopping.SaveOnSignal.check``."""
        self._stop.check()

    def close(self) -> None:
        """See ``lentando.optimizers.stopping.SaveOnSignal.close``."""
        self._stop.close()

    def __enter__(self) -> "SaveOnSignalCallback":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save(
    path: str | PathLike[str], optimizer: DistributedOptimizer, extra: Any = None, *, keep: int | None = None
) -> Path:
    """Save model, base optimizer and all that decides the next step of every rank, for any framework to go on from.

    Collective: every rank calls it, eagerly, between steps. A checkpoint appears when it is complete; until then, an
    earlier one at the same place stays what it was. With ``model=`` given to the optimizer, PyTorch can find out by
    itself which of its parameters is which variable.

    Args:
        path: a folder that all ranks see; made if need be.
        optimizer: the optimizer, built.
        extra: whatever else this rank wants back (epoch, random generators): None, numbers, strings, lists, tuples,
            dicts, arrays and tensors.
        keep: makes ``path`` a folder of checkpoints by step, ``step-00000480`` and so on, of which the newest so many
            are kept. Without it ``path`` is one checkpoint, which is replaced.

    Returns:
        The folder of this checkpoint.

    Raises:
        CheckpointError: on every rank, if one of them fails (disk full, ...).
        MismatchError: on every rank, if the ranks are not at the same step.
    """
    return saving.save(_training(optimizer), Path(path), to_plain(extra), keep)


def save_on_signal(
    path: str | PathLike[str],
    optimizer: DistributedOptimizer,
    extra: Any = None,
    signals: Sequence[int] = (SIGTERM,),
    *,
    keep: int | None = None,
    every: int | None = None,
    automatic: bool = True,
) -> SaveOnSignalCallback:
    """Save all ranks and end them with status 85 when one is told to stop, by a batch system that wants the machines.

    Collective: every rank calls it, once, after it has made the optimizer, and in the main thread. A rank that receives
    one of the signals tells the others in the next message that ranks exchange anyway: an outer step's, or that of an
    average of gradients; gossip and outer steps without an average send one of their own every 16 steps. All then save
    at the end of the same step, as ``save`` does, and exit. Resumed by ``load``, the run is the uninterrupted one, to
    the bit. A second signal ends a rank at once.

    Args:
        path: as for ``save``.
        optimizer: the optimizer, built.
        extra: as for ``save``; or a function that returns it, called by each rank when it saves, after the step.
        signals: that tell a rank to stop.
        keep: as for ``save``.
        every: send a message of its own every so many inner steps, for rounds that last longer than the batch system
            waits.
        automatic: False saves where the loop calls ``check()`` of what is returned, and not at the end of ``apply``.

    Returns:
        A callback that ``fit`` must be given, for nothing can be saved from within a graph. A loop of your own round a
        ``tf.function`` calls its ``check()`` after each step, which saves and exits if the ranks have agreed to; steps
        that are taken eagerly need neither. Its ``close()``, or its end as a block, puts the handlers of before back.

    Raises:
        ConfigurationError: outside the main thread, or in a simulation.
        MismatchError: on every rank, if the ranks do not call it alike.
    """
    training = _training(optimizer)

    def save_now(found: Any) -> Path:
        return save(path, optimizer, found, keep=keep)

    stop = SaveOnSignal(training.replica, save_now, extra, signals, every, automatic)
    training.refresh()
    return SaveOnSignalCallback(stop)


def load(
    path: str | PathLike[str],
    optimizer: DistributedOptimizer,
    mapping: Mapping | None = None,
    *,
    optimizer_state: OptimizerStateChoice = "saved",
) -> Any:
    """Continue from a checkpoint: to the bit, if as many ranks of the same framework have saved it.

    Collective: every rank calls it, eagerly. The variables are filled in place; learning rate and count of iterations
    are restored with the base optimizer's state, except from another framework, whose learning rate stays there.

    Another number of ranks continues from the average of those that there were, with the outer step's state as it was;
    one warning says what is exact then and what is approximated.

    Args:
        path: as given to ``save``: a checkpoint, or a folder of several, of which the newest is taken.
        optimizer: built for the same model, with the same settings.
        mapping: from the names in the checkpoint to those of the model, where they differ. A checkpoint from another
            framework needs none if both optimizers were given ``model=``.
        optimizer_state: "new" starts the base optimizer afresh, whatever was saved.

    Returns:
        ``extra`` as the rank of this number saved it, or else as rank 0 did, with arrays for tensors.

    Raises:
        CheckpointError: on every rank, with the reason, if one of them cannot continue from it; nothing has changed
            then.
        MismatchError: on every rank, if the ranks are not at the same step.
    """
    return loading.load(_training(optimizer), Path(path), mapping, optimizer_state)


def _training(optimizer: DistributedOptimizer) -> KerasTraining:
    if not isinstance(optimizer, DistributedOptimizer):
        raise ConfigurationError(f"expected a DistributedOptimizer, got {type(optimizer).__name__}: wrap it first")
    return optimizer.training()
