"""A checkpoint when a signal asks the job to stop, such as that of a batch system before it ends the job."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from signal import SIGTERM
from typing import Any

from lentando.optimizers.checkpoint.folder import checked_path
from lentando.optimizers.checkpoint.saving import save
from lentando.optimizers.checkpoint.training import Checkpointed, trainings_of
from lentando.optimizers.replica.save_on_signal import SaveOnSignal
from lentando.optimizers.replica.stopping import StopHandle

__all__ = ["save_on_signal"]


def save_on_signal(
    path: str | PathLike[str],
    optimizer: Checkpointed | Mapping[str, Checkpointed],
    extra: Any = None,
    signals: Sequence[int] = (SIGTERM,),
    *,
    keep: int | None = None,
    every: int | None = None,
    automatic: bool = True,
) -> StopHandle:
    """Save a checkpoint and exit with status 85 on all ranks when one of them receives a signal to stop.

    Collective: every rank calls it once, in the main thread, after it has created the optimizer. A rank that receives
    one of the signals reports it with the next control message, that of an outer step or of an average of gradients;
    gossip, and outer steps without an average, send a message for this purpose every 16 steps. All ranks then save at
    the end of the same step, as ``save`` does, and exit. A run that is resumed by ``load`` is bit-identical to one that
    was not interrupted. A second signal ends a rank at once.

    Args:
        path: as for ``save``.
        optimizer: as for ``save``. Of a dict of several, the last one reports the signal, and all are saved at the end
            of its step: the optimizer whose step ends an iteration must come last.
        extra: as for ``save``; or a function that returns it, which each rank calls when it saves. By then the step has
            been taken, but not what follows it in your loop, such as a scheduler's step.
        signals: signals that ask a rank to stop.
        keep: as for ``save``.
        every: number of inner steps between additional messages, for rounds that last longer than the time that the
            batch system grants.
        automatic: False saves where the loop calls ``check()`` of the returned handle, and not at the end of the
            optimizer's step.

    Returns:
        A handle. ``check()`` saves and exits once all ranks have agreed to stop; ``close()``, or leaving a ``with``
        block, restores the previous signal handlers. In TensorFlow the handle is a callback, which must be passed to
        ``fit``, because nothing can be saved from within a graph. A loop of your own around a ``tf.function`` calls
        ``check()`` after each step; steps that are taken eagerly need neither.

    Raises:
        ConfigurationError: outside the main thread, or in a simulation.
        MismatchError: on every rank, if the ranks do not call it alike.
    """
    trainings = trainings_of(optimizer)
    checked_path(path)
    training = trainings[list(optimizer)[-1]] if isinstance(optimizer, Mapping) else trainings[""]

    def save_now(extra: Any) -> Path:
        return save(path, optimizer, extra, keep=keep)

    return training.stopping(SaveOnSignal(training.replica, save_now, extra, signals, every, automatic))
