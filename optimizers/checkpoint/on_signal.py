"""A checkpoint when a batch system wants the machines back."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from signal import SIGTERM
from typing import Any

from lentando.optimizers.checkpoint.folder import checked_path
from lentando.optimizers.checkpoint.saving import save
from lentando.optimizers.checkpoint.training import Checkpointed, trainings_of
from lentando.optimizers.replica.stopping import SaveOnSignal, StopHandle

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
    """Save all ranks and end them with status 85 when one is told to stop, by a batch system that wants the machines.

    Collective: every rank calls it, once, after it has made the optimizer, and in the main thread. A rank that receives
    one of the signals tells the others in the next message that ranks exchange anyway: an outer step's, or that of an
    average of gradients; gossip and outer steps without an average send one of their own every 16 steps. All then save
    at the end of the same step, as ``save`` does, and exit. Resumed by ``load``, the run is the uninterrupted one, to
    the bit. A second signal ends a rank at once.

    Args:
        path: as for ``save``.
        optimizer: as for ``save``. Of a dict of several, the one that is named last looks for the signal, and all are
            saved at the end of its step: name that last whose step ends an iteration.
        extra: as for ``save``; or a function that returns it, called by each rank when it saves. By then the step is
            taken; what comes after it in your loop, a scheduler's step, has not been done.
        signals: that tell a rank to stop.
        keep: as for ``save``.
        every: send a message of its own every so many inner steps, for rounds that last longer than the batch system
            waits.
        automatic: False saves where the loop calls ``check()`` of what is returned, and not at the end of the
            optimizer's step.

    Returns:
        Whose ``check()`` saves and exits if the ranks have agreed to, and whose ``close()``, or end as a block, puts
        the handlers of before back. In TensorFlow it is a callback that ``fit`` must be given, for nothing can be saved
        from within a graph. A loop of your own round a ``tf.function`` calls its ``check()`` after each step; steps
        that are taken eagerly need neither.

    Raises:
        ConfigurationError: outside the main thread, or in a simulation.
        MismatchError: on every rank, if the ranks do not call it alike.
    """
    trainings = trainings_of(optimizer)
    checked_path(path)
    training = trainings[list(optimizer)[-1]] if isinstance(optimizer, Mapping) else trainings[""]

    def save_now(found: Any) -> Path:
        return save(path, optimizer, found, keep=keep)

    return training.stopping(SaveOnSignal(training.replica, save_now, extra, signals, every, automatic))
