"""``RunLogCallback``: a log of each epoch of Lightning's Trainer, for ``lentando report`` and for its loggers."""

from os import PathLike

from lightning.pytorch import Callback, LightningModule, Trainer

from lentando.optimizers.epoch_log import EpochLog

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
        self._trainer: Trainer | None = None
        self._log = EpochLog(folder, with_consensus, self._write_to_loggers)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the line. Collective."""
        self._trainer = trainer
        self._log.write(trainer.optimizers[0], trainer.callback_metrics)

    def _write_to_loggers(self, numbers: dict[str, float], step: int) -> None:
        assert self._trainer is not None
        for logger in self._trainer.loggers:  # they write on rank 0 alone
            logger.log_metrics(numbers, step)
