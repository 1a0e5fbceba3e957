"""A check that Lightning's Trainer, where a model belongs to one, leaves the ranks to Lentando."""

import sys

import torch

from lentando.comm.errors import ConfigurationError

__all__ = ["check_trainer"]


def check_trainer(model: torch.nn.Module | None, ranks: int) -> None:
    """Check that no Trainer averages the same model, or takes every rank for the only one.

    Args:
        model: the model of an optimizer.
        ranks: number of ranks that train it.

    Raises:
        ConfigurationError: if the model belongs to a Trainer of Lightning that has another strategy than Lentando's.
    """
    if model is None or "lightning.pytorch" not in sys.modules:
        return
    from lightning.pytorch import LightningModule

    if not isinstance(model, LightningModule):
        return
    try:
        trainer = model.trainer
    except RuntimeError:  # it belongs to none
        return
    strategy = trainer.strategy
    if max(ranks, trainer.world_size) > 1 and getattr(strategy, "strategy_name", None) != "lentando":
        raise ConfigurationError(
            f"the model belongs to a Trainer with {type(strategy).__name__}, but it is this optimizer that averages "
            "the ranks' models: use Trainer(strategy=LentandoStrategy()) of lentando.torch.lightning, and start the "
            "ranks by mpirun or torchrun"
        )
