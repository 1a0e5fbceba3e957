"""``sparse_allreduce_async``: combines sparse tensors by gathering their elements."""

import torch

from lentando.comm import operations
from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Average, Op, Sum
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.comm.transport import Array
from lentando.torch.convert import as_array, new_tensor
from lentando.torch.functions.calls import Handle, TensorCall, host_of
from lentando.torch.functions.refusals import refused_on_every_rank

__all__ = ["sparse_allreduce_async"]


@refused_on_every_rank
def sparse_allreduce_async(
    tensor: torch.Tensor, name: str | None, op: Op = Average, process_set: ProcessSet = global_process_set
) -> Handle[torch.Tensor]:
    """Start to combine sparse tensors of all ranks in the background, and return a handle.

    Both ``handle()`` and ``synchronize(handle)`` wait and return the result, a sparse tensor.

    Args:
        tensor: sparse tensor (COO), of the same shape, dtype and number of sparse axes on all ranks. Ranks may have
            different elements, or none.
        name: name of the operation. Calls are matched by it, in whatever order ranks make them.
        op: ``Average`` or ``Sum``. The sum of integers is one of integers; their average is floating point.
        process_set: the participating ranks.

    Raises:
        MismatchError: by ``synchronize`` on every rank, if shapes, dtypes or ops differ between ranks.
        ConfigurationError: for another tensor or op, on every rank if all have it; otherwise, a MismatchError.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.sparse_coo:
        kind = tensor.layout if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ConfigurationError(f"sparse_allreduce_async expects a sparse COO tensor, got {kind}")
    if op not in (Average, Sum):
        raise ConfigurationError(f"sparse_allreduce_async adds elements: op must be Average or Sum, got {op!r}")
    own = tensor.detach().coalesce()
    arrays = [as_array(host_of(part)) for part in (own.indices().t(), own.values())]
    gather = operations.grouped_allgather_call(arrays, name=name, process_set=process_set)
    arguments = [f"sparse {list(tensor.shape)}", op.value, *gather.arguments]
    collective = operations.Collective("sparse_allreduce", arguments, name, process_set, gather.execute)

    def finish(gathered: list[Array]) -> torch.Tensor:
        indices, values = (new_tensor(array).to(tensor.device) for array in gathered)
        if op is Average:
            values = values / collective.transport.size
        return torch.sparse_coo_tensor(indices.t(), values, tensor.shape, check_invariants=False)

    return TensorCall(collective, finish).start()
