"""The sum of sparse gradients, as embeddings with ``sparse=True`` have them: ranks exchange the rows that they use."""

from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from lentando.c10d.memory import readable
from lentando.comm.operations.slices import exchange_into
from lentando.comm.transport import Transport

__all__ = ["all_reduce_sparse", "check_sparse"]


def check_sparse(tensor: torch.Tensor, op: Any) -> None:
    """Check that a sparse tensor can be summed.

    Args:
        tensor: tensor with layout ``torch.sparse_coo``.
        op: reduction as torch.distributed passes it.

    Raises:
        ValueError: for another reduction than a sum, or another device.
    """
    if op != dist.ReduceOp.SUM or tensor.device.type != "cpu":
        raise ValueError(
            f"allreduce with {op} of a sparse tensor on {tensor.device}: sparse tensors can only be summed, and in "
            "host memory"
        )


def all_reduce_sparse(transport: Transport, tensor: torch.Tensor) -> None:
    """Sum a sparse tensor over all ranks, in place, in the order of ranks. Collective.

    Args:
        transport: transport of the participating ranks.
        tensor: tensor with layout ``torch.sparse_coo``, of the same shape on all ranks.
    """
    own = tensor.detach().coalesce()
    counts = transport.allgather(np.array([own.values().shape[0]], np.int64))[:, 0].tolist()
    indices = _exchanged(transport, own.indices().T.contiguous(), counts)
    values = _exchanged(transport, own.values().contiguous(), counts)
    total = torch.zeros_like(own)
    for rows, parts in zip(indices, values, strict=True):
        total += torch.sparse_coo_tensor(rows.T, parts, own.shape, is_coalesced=True)
    with torch.no_grad():
        tensor.copy_(total)  # not of tensor.detach(), which has indices and values of its own


def _exchanged(transport: Transport, own: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """The tensors of all ranks, which have ``counts`` rows."""
    found = [own.new_empty((count, *own.shape[1:])) for count in counts]
    exchange_into(transport, [readable(own)] * transport.size, [readable(each) for each in found])
    return found
