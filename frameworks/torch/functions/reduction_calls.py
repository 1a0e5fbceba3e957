"""Calls that combine tensors of all ranks, alone or in groups, in place or with a gradient."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lentando.comm import operations
from lentando.comm.operations import Op
from lentando.comm.process_sets import ProcessSet
from lentando.optimizers.no_gradient import check_has_gradient
from lentando.torch.compression import Compressor
from lentando.torch.convert import as_array
from lentando.torch.functions.calls import TensorCall, host_of
from lentando.torch.functions.gradients import compressed_with_gradient, needs_gradient
from lentando.torch.local_tensors import is_same_memory

__all__ = ["allreduce_of", "allreduced", "grouped_allreduce_of", "store"]


def allreduced(
    function: str,
    tensors: Sequence[torch.Tensor],
    name: str | None,
    compression: type[Compressor],
    op: Op,
    *options: Any,
) -> list[torch.Tensor]:
    """Combine tensors into new ones, compressed while they are sent, with a gradient."""
    is_group = function != "allreduce"

    def combined(given: Sequence[torch.Tensor], name: str | None = None) -> list[torch.Tensor]:
        copies = [tensor.detach().clone() for tensor in given]
        if is_group:
            return grouped_allreduce_of(copies, name, op, *options).run()
        return [allreduce_of(copies[0], name, op, *options).run()]

    if needs_gradient(tensors):
        check_has_gradient(function, op)
    return compressed_with_gradient(lambda given: combined(given, name), combined, tensors, compression)


def allreduce_of(
    tensor: torch.Tensor,
    name: str | None,
    op: Op,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
) -> TensorCall[torch.Tensor]:
    """A call that combines a tensor in place."""
    host = host_of(tensor)
    collective = operations.allreduce_call(
        as_array(host),
        op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        name=name,
        process_set=process_set,
    )
    return TensorCall(collective, partial(_stored, tensor, host))


def _stored(tensor: torch.Tensor, host: torch.Tensor, _: None) -> torch.Tensor:
    return store(tensor, host)


def grouped_allreduce_of(
    tensors: Sequence[torch.Tensor],
    name: str | None,
    op: Op,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
) -> TensorCall[list[torch.Tensor]]:
    """A call that combines several tensors in place."""
    hosts = [host_of(tensor) for tensor in tensors]
    collective = operations.grouped_allreduce_call(
        [as_array(host) for host in hosts],
        op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        name=name,
        process_set=process_set,
    )
    return TensorCall(collective, lambda _: list(map(store, tensors, hosts)))


def store(tensor: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """Fill a tensor with the values that ``host_of(tensor)`` has now, and return it."""
    if host is not tensor and (tensor.device != host.device or not is_same_memory(tensor, host)):
        with torch.no_grad():
            tensor.copy_(host)
    return tensor
