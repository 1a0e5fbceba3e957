"""``grouped_allreduce``: combines several tensors of all ranks in one operation."""

from collections.abc import Iterable

import torch

from lentando.comm.operations import Op
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.optimizers.horovod_arguments import op_of
from lentando.torch.compression import Compression, Compressor
from lentando.torch.functions.calls import Handle, check_tensors
from lentando.torch.functions.reduction_calls import allreduced, grouped_allreduce_of
from lentando.torch.functions.refusals import refused_on_every_rank

__all__ = ["grouped_allreduce", "grouped_allreduce_", "grouped_allreduce_async", "grouped_allreduce_async_"]


@refused_on_every_rank
def grouped_allreduce(
    tensors: Iterable[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """Combine several tensors, each as ``allreduce`` does, in one operation. Gradients are grouped in the same way.

    Args:
        tensors: dense tensors, equal on all ranks in number, shapes and dtypes.
        average: older argument of Horovod in place of ``op``: True for ``Average``, False for ``Sum``.
        name: name of the call, which is compared between ranks and shown in messages.
        compression: how the tensors are compressed while they are sent.
        op: how values are combined, as for ``allreduce``.
        prescale_factor: factor by which the tensors are multiplied before they are combined.
        postscale_factor: factor by which the results are multiplied.
        process_set: the participating ranks.
    """
    tensors = check_tensors(tensors, "grouped_allreduce", has_gradient=True)
    return allreduced(
        "grouped_allreduce",
        tensors,
        name,
        compression,
        op_of(op, average),
        prescale_factor,
        postscale_factor,
        process_set,
    )


@refused_on_every_rank
def grouped_allreduce_(
    tensors: Iterable[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """Combine several tensors as ``grouped_allreduce`` does, but in place, and return them. They have no gradient."""
    tensors = check_tensors(tensors, "grouped_allreduce_", is_in_place=True)
    return grouped_allreduce_of(tensors, name, op_of(op, average), prescale_factor, postscale_factor, process_set).run()


@refused_on_every_rank
def grouped_allreduce_async(
    tensors: Iterable[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle[list[torch.Tensor]]:
    """Start a ``grouped_allreduce`` in the background, without a gradient, and return its handle."""
    tensors = check_tensors(tensors, "grouped_allreduce_async")
    copies = [tensor.detach().clone() for tensor in tensors]
    return grouped_allreduce_of(
        copies, name, op_of(op, average), prescale_factor, postscale_factor, process_set
    ).start()


@refused_on_every_rank
def grouped_allreduce_async_(
    tensors: Iterable[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle[list[torch.Tensor]]:
    """Start a ``grouped_allreduce_`` in the background. The tensors must not be used before ``synchronize`` returns."""
    tensors = check_tensors(tensors, "grouped_allreduce_async_", is_in_place=True)
    return grouped_allreduce_of(
        tensors, name, op_of(op, average), prescale_factor, postscale_factor, process_set
    ).start()
