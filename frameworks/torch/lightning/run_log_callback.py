"""``RunLogCallback``: a log of each epoch of Lightning's Trainer, for ``lentando report`` and for its loggers."""

from functools import partial
from os import PathLike

from lightning.pytorch import Callback, LightningModule, Trainer

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.run_log import RunLog
from lentando.torch.optimizer import DistributedOptimizer

__all__ = ["RunLogCallback"]


class RunLogCallback(Callback):
    """Write a line to the log of the run after each epoch, and to the loggers of the Trainer.

    A line contains the metrics that the Trainer knows, as means over ranks, and what the optimizer reports:
    ``optimizer.open_log``. It uses the first optimizer of the module. ``TensorBoardLogger``, ``WandbLogger`` and
    ``MLFlowLogger``, given to the Trainer as usual, receive the line on rank 0, with the inner step.

    Args:
        folder: folder of the run, which is created: ``lentando report`` draws it.
        with_consensus: whether to add the distance between the replicas, which costs an average each time.

    Raises:
        ConfigurationError: when an epoch ends, on every rank, if a metric has a name that the log uses itself, or if
            the first optimizer is not one of Lentando's.

    Example:
        >>> import tempfile
        >>> from lentando.torch.lightning import RunLogCallback
        >>> callback = RunLogCallback(tempfile.mkdtemp())  # Trainer(strategy=LentandoStrategy(), callbacks=[callback])
    """

    def __init__(self, folder: "str | PathLike[str]", *, with_consensus: bool = False) -> None:
        super().__init__()
        self._folder, self._with_consensus = folder, with_consensus
        self._log: RunLog | None = None
        self._optimizer: DistributedOptimizer | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the line. Collective."""
        optimizer = trainer.optimizers[0]
        if not isinstance(optimizer, DistributedOptimizer):
            raise ConfigurationError(f"a log of a run needs an optimizer of Lentando's, got {type(optimizer).__name__}")
        if self._log is None or optimizer is not self._optimizer:
            self._optimizer = optimizer
            self._log = optimizer.open_log(self._folder, to=partial(_log_to, trainer))
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._log.write(with_consensus=self._with_consensus, **metrics)


def _log_to(trainer: Trainer, numbers: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:  # they write on rank 0 alone
        logger.log_metrics(numbers, step)
