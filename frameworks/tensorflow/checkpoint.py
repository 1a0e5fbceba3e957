"""Saving and loading for TensorFlow; what a checkpoint is, ``lentando.optimizers.checkpoint`` knows."""

from os import PathLike
from pathlib import Path
from typing import Any

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.checkpoint import loading, saving
from lentando.optimizers.checkpoint.loading import OptimizerStateChoice
from lentando.optimizers.checkpoint.mapping import Mapping
from lentando.tensorflow.convert import to_plain
from lentando.tensorflow.optimizer import DistributedOptimizer
from lentando.tensorflow.training import KerasTraining

__all__ = ["load", "save"]


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
