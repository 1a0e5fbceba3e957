"""Metrics of torchmetrics, computed from the states of all ranks."""

from typing import Any

import torch
from torchmetrics import Metric

from lentando.comm.world import size
from lentando.torch.functions import allgather

__all__ = ["connect_metrics"]


def connect_metrics(model: torch.nn.Module) -> None:
    """Let the metrics of a model gather their states over the job, without torch.distributed."""
    for module in model.modules():
        if isinstance(module, Metric) and module.dist_sync_fn is None:
            module.dist_sync_fn = _gather
            module.distributed_available_fn = _is_distributed


def _is_distributed() -> bool:
    return size() > 1


def _gather(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """The states of a metric of all ranks, whose first dimensions may differ."""
    if tensor.ndim == 0:
        return list(allgather(tensor.unsqueeze(0)))
    lengths = allgather(torch.tensor([len(tensor)]))
    return list(torch.split(allgather(tensor), lengths.tolist()))
