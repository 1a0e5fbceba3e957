"""``allgather``: every rank gets the tensors of all ranks."""

from collections.abc import Iterable, Sequence

import torch

from lentando.comm import operations
from lentando.comm.operations import Average
from lentando.comm.process_sets import ProcessSet, global_process_set, transport_of
from lentando.torch.convert import as_array, new_tensor
from lentando.torch.functions.calls import Handle, TensorCall, check_tensor, check_tensors, host_of
from lentando.torch.functions.gradients import with_gradient
from lentando.torch.functions.reduction_calls import allreduce_of, grouped_allreduce_of
from lentando.torch.functions.refusals import refused_on_every_rank

__all__ = ["allgather", "allgather_async", "grouped_allgather", "grouped_allgather_async"]


@refused_on_every_rank
def allgather(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """Concatenate the tensors of all ranks along the first axis, in which they may differ in length.

    The gradient of a rank's tensor is its part of the average of the ranks' gradients.

    Args:
        tensor: dense tensor of any dtype; a scalar counts as a tensor of length 1.
        name: name of the call, which is compared between ranks and shown in messages.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, if names, dtypes or the other axes differ between ranks.

    Example:
        >>> import lentando.torch as lt
        >>> lt.init()
        >>> lt.allgather(torch.tensor([1, 2]))
        tensor([1, 2])
        >>> lt.shutdown()
    """
    check_tensor(tensor, "allgather", has_gradient=True)

    def part(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        averaged = allreduce_of(gradients[0].clone(), None, Average, 1.0, 1.0, process_set).run()
        return _parts_of_this_rank([averaged], [tensor], process_set)

    (gathered,) = with_gradient(lambda given: [_call(given[0], name, process_set).run()], part, [tensor])
    return gathered


@refused_on_every_rank
def allgather_async(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle[torch.Tensor]:
    """Start an ``allgather`` in the background, without a gradient, and return its handle for ``synchronize``.

    The tensor must not be changed before ``synchronize`` has returned. Calls are matched by ``name``, in whatever order
    ranks make them; calls without a name by their order among those.
    """
    check_tensor(tensor, "allgather_async")
    return _call(tensor, name, process_set).start()


@refused_on_every_rank
def grouped_allgather(
    tensors: Iterable[torch.Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[torch.Tensor]:
    """Concatenate each of several tensors as ``allgather`` does, in one operation. Gradients are grouped as well.

    Args:
        tensors: dense tensors, equal on all ranks in number, dtypes and all axes but the first.
        name: name of the call, which is compared between ranks and shown in messages.
        process_set: the participating ranks.
    """
    tensors = check_tensors(tensors, "grouped_allgather", has_gradient=True)

    def parts(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        copies = [gradient.clone() for gradient in gradients]
        averaged = grouped_allreduce_of(copies, None, Average, 1.0, 1.0, process_set).run()
        return _parts_of_this_rank(averaged, tensors, process_set)

    return with_gradient(lambda given: _grouped_call(given, name, process_set).run(), parts, tensors)


@refused_on_every_rank
def grouped_allgather_async(
    tensors: Iterable[torch.Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle[list[torch.Tensor]]:
    """Start a ``grouped_allgather`` in the background, without a gradient, and return its handle."""
    tensors = check_tensors(tensors, "grouped_allgather_async")
    return _grouped_call(tensors, name, process_set).start()


def _call(tensor: torch.Tensor, name: str | None, process_set: ProcessSet) -> TensorCall[torch.Tensor]:
    device = tensor.device
    collective = operations.allgather_call(as_array(host_of(tensor)), name=name, process_set=process_set)
    return TensorCall(collective, lambda array: new_tensor(array).to(device))


def _grouped_call(
    tensors: Sequence[torch.Tensor], name: str | None, process_set: ProcessSet
) -> TensorCall[list[torch.Tensor]]:
    devices = [tensor.device for tensor in tensors]
    arrays = [as_array(host_of(tensor)) for tensor in tensors]
    collective = operations.grouped_allgather_call(arrays, name=name, process_set=process_set)
    return TensorCall(
        collective,
        lambda gathered: [new_tensor(array).to(device) for array, device in zip(gathered, devices, strict=True)],
    )


def _parts_of_this_rank(
    gathered: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], process_set: ProcessSet
) -> list[torch.Tensor]:
    """This rank's part of each tensor that is laid out like the result of ``allgather(tensors)``. Collective."""
    own = [tensor.shape[0] if tensor.dim() else 1 for tensor in tensors]
    lengths = _call(torch.tensor([own]), None, process_set).run()
    starts = lengths[: transport_of(process_set).rank].sum(0).tolist()
    return [
        whole.narrow(0, start, length).reshape(tensor.shape)
        for whole, start, length, tensor in zip(gathered, starts, own, tensors, strict=True)
    ]
