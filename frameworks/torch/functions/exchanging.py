"""``alltoall``: every rank sends a part of its tensor to each rank."""

from collections.abc import Sequence
from typing import Any

import torch

from lentando.comm import operations
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.comm.transport import Array
from lentando.torch.convert import as_array, new_tensor
from lentando.torch.functions.calls import Handle, TensorCall, check_tensor, host_of
from lentando.torch.functions.gradients import with_gradient
from lentando.torch.functions.refusals import refused_on_every_rank

__all__ = ["alltoall", "alltoall_async"]

Splits = torch.Tensor | Sequence[int] | None


@refused_on_every_rank
def alltoall(
    tensor: torch.Tensor,
    splits: Splits = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send a part of the tensor to each rank, and concatenate the parts that this rank receives, by rank.

    The gradient goes the way back: it is an ``alltoall`` of the gradients with the lengths of the received parts.

    Args:
        tensor: dense tensor of any dtype, of the same dtype and axes but the first on all ranks.
        splits: lengths of the parts for each rank, as a tensor of integers or a list, whose sum is the length of the
            tensor; None for equal parts.
        name: name of the call, which is compared between ranks and shown in messages.
        process_set: the participating ranks.

    Returns:
        The received parts as one tensor. If ``splits`` is given, a pair of it and the lengths of the received parts.

    Raises:
        MismatchError: on every rank, if names, dtypes or the other axes differ between ranks.
        ConfigurationError: if the tensor cannot be divided in this way.

    Example:
        >>> import lentando.torch as lt
        >>> lt.init()
        >>> lt.alltoall(torch.tensor([5, 6]), splits=[2])
        (tensor([5, 6]), tensor([2], dtype=torch.int32))
        >>> lt.shutdown()
    """
    check_tensor(tensor, "alltoall", has_gradient=True)
    received: list[Array] = []

    def forward(given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        collected, lengths = _collective(given[0], splits, name, process_set).run()
        received.append(lengths)
        return [new_tensor(collected).to(given[0].device)]

    def backward(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        returned, _ = _collective(gradients[0], received[0].tolist(), None, process_set).run()
        return [new_tensor(returned).to(gradients[0].device)]

    (result,) = with_gradient(forward, backward, [tensor])
    return result if splits is None else (result, _as_splits(received[0], splits))


@refused_on_every_rank
def alltoall_async(
    tensor: torch.Tensor,
    splits: Splits = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle[tuple[torch.Tensor, torch.Tensor]]:
    """Start an ``alltoall`` in the background, without a gradient, and return its handle for ``synchronize``.

    ``synchronize`` returns a pair of tensor and lengths of the received parts, with or without ``splits``.
    """
    check_tensor(tensor, "alltoall_async")
    device = tensor.device

    def finish(result: tuple[Array, Array]) -> tuple[torch.Tensor, torch.Tensor]:
        return new_tensor(result[0]).to(device), _as_splits(result[1], splits)

    return TensorCall(_collective(tensor, splits, name, process_set), finish).start()


def _collective(tensor: torch.Tensor, splits: Splits, name: str | None, process_set: ProcessSet) -> Any:
    lengths = as_array(host_of(splits)) if isinstance(splits, torch.Tensor) else splits
    return operations.alltoall_call(as_array(host_of(tensor)), lengths, name=name, process_set=process_set)


def _as_splits(lengths: Array, splits: Splits) -> torch.Tensor:
    """Lengths of received parts, with the dtype and on the device of the splits that were given, int32 otherwise."""
    received = torch.tensor(lengths.tolist(), dtype=torch.int32)
    return received.to(splits.device, splits.dtype) if isinstance(splits, torch.Tensor) else received
