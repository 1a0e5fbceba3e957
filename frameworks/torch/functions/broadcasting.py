"""``broadcast``: every rank gets the tensor of one rank."""

from collections.abc import Sequence

import torch

from lentando.comm import operations
from lentando.comm.operations import Average
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.comm.world import rank
from lentando.torch.convert import as_array
from lentando.torch.functions.calls import Handle, TensorCall, check_tensor, host_of
from lentando.torch.functions.gradients import with_gradient
from lentando.torch.functions.reduction_calls import allreduce_of, store
from lentando.torch.functions.refusals import refused_on_every_rank

__all__ = ["broadcast", "broadcast_", "broadcast_async", "broadcast_async_"]


@refused_on_every_rank
def broadcast(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """Return the tensor of rank ``root_rank`` as a new tensor.

    The gradient is the average of the ranks' gradients on rank ``root_rank``, and zero on the others.

    Args:
        tensor: dense tensor of any dtype, of the same shape and dtype on all ranks.
        root_rank: number of the rank in the whole job, whose tensor all ranks get.
        name: name of the call, which is compared between ranks and shown in messages.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, if names, shapes, dtypes or roots differ between ranks.

    Example:
        >>> import lentando.torch as lt
        >>> lt.init()
        >>> lt.broadcast(torch.tensor([1, 2]), root_rank=0)
        tensor([1, 2])
        >>> lt.shutdown()
    """
    check_tensor(tensor, "broadcast", has_gradient=True)

    def forward(given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [_call(given[0].detach().clone(), root_rank, name, process_set).run()]

    def backward(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        averaged = allreduce_of(gradients[0].clone(), None, Average, 1.0, 1.0, process_set).run()
        return [averaged if rank() == root_rank else torch.zeros_like(averaged)]

    (result,) = with_gradient(forward, backward, [tensor])
    return result


@refused_on_every_rank
def broadcast_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """Fill the tensor with that of rank ``root_rank``, in place, and return it. It has no gradient."""
    check_tensor(tensor, "broadcast_", is_in_place=True)
    return _call(tensor, root_rank, name, process_set).run()


@refused_on_every_rank
def broadcast_async(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle[torch.Tensor]:
    """Start a ``broadcast`` in the background, without a gradient, and return its handle for ``synchronize``.

    Calls are matched by ``name``, in whatever order ranks make them; calls without a name by their order among those.
    """
    check_tensor(tensor, "broadcast_async")
    return _call(tensor.detach().clone(), root_rank, name, process_set).start()


@refused_on_every_rank
def broadcast_async_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle[torch.Tensor]:
    """Start a ``broadcast_`` in the background. The tensor must not be used before ``synchronize`` has returned."""
    check_tensor(tensor, "broadcast_async_", is_in_place=True)
    return _call(tensor, root_rank, name, process_set).start()


def _call(tensor: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet) -> TensorCall[torch.Tensor]:
    """A call that fills a tensor in place."""
    host = host_of(tensor)
    collective = operations.broadcast_call(as_array(host), root_rank, name=name, process_set=process_set)
    return TensorCall(collective, lambda _: store(tensor, host))
