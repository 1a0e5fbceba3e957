"""The sum of sparse gradients, as embeddings with ``sparse=True`` have them: ranks exchange the rows that they use."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from lentando.c10d.calls import Calls
from lentando.c10d.memory import readable
from lentando.c10d.work import CollectiveWork
from lentando.comm.operations.slices import exchange_into
from lentando.comm.transport import Transport

__all__ = ["submit_sparse_sum"]


def submit_sparse_sum(calls: Calls, transport: Transport, tensors: Sequence[torch.Tensor], opts: Any) -> CollectiveWork:
    """Submit the sum of sparse tensors over all ranks, each in place, in the order of ranks.

    Args:
        calls: calls of the group.
        transport: transport of the group.
        tensors: tensors with layout ``torch.sparse_coo``, of the same shapes on all ranks.
        opts: options of torch.distributed.

    Raises:
        ValueError: for another reduction than a sum, or another device.
    """
    for tensor in tensors:
        _check(tensor, opts.reduceOp)

    def execute(_: ExitStack) -> None:
        for tensor in tensors:
            _all_reduce(transport, tensor)

    words = [f"sparse {[*tensor.shape]} of {tensor.dtype}" for tensor in tensors]
    return calls.submit("allreduce", words, execute, tensors, opts)


def _check(tensor: torch.Tensor, op: Any) -> None:
    if op != dist.ReduceOp.SUM or tensor.device.type != "cpu":
        raise ValueError(
            f"allreduce with {op} of a sparse tensor on {tensor.device}: sparse tensors can only be summed, and in "
            "host memory"
        )


def _all_reduce(transport: Transport, tensor: torch.Tensor) -> None:
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
