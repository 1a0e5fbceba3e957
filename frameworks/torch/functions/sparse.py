"""``sparse_allreduce_async``: combines sparse tensors by gathering their elements."""

import torch

from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Average, Op, Sum
from lentando.comm.process_sets import ProcessSet, global_process_set, transport_of
from lentando.torch.functions.calls import Handle
from lentando.torch.functions.gathering import allgather_async

__all__ = ["sparse_allreduce_async"]


def sparse_allreduce_async(
    tensor: torch.Tensor, name: str | None, op: Op = Average, process_set: ProcessSet = global_process_set
) -> Handle[torch.Tensor]:
    """Start to combine sparse tensors of all ranks in the background, and return a handle.

    Both ``handle()`` and ``synchronize(handle)`` wait and return the result, a sparse tensor.

    Args:
        tensor: sparse tensor (COO), of the same shape, dtype and number of sparse axes on all ranks. Ranks may have
            different elements, or none.
        name: name of the operation. Calls are matched by it, in whatever order ranks make them.
        op: ``Average`` or ``Sum``.
        process_set: the participating ranks.

    Raises:
        ConfigurationError: for another tensor or op.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.sparse_coo:
        kind = tensor.layout if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ConfigurationError(f"sparse_allreduce_async expects a sparse COO tensor, got {kind}")
    if op not in (Average, Sum):
        raise ConfigurationError(f"sparse_allreduce_async adds elements: op must be Average or Sum, got {op!r}")
    own = tensor.detach().coalesce()
    names = [None if name is None else f"{name}.{part}" for part in ("indices", "values")]
    indices = allgather_async(own.indices().t().contiguous(), names[0], process_set)
    values = allgather_async(own.values(), names[1], process_set)
    divisor = transport_of(process_set).size if op is Average else 1

    def finish(gathered: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.sparse_coo_tensor(gathered[0].t(), gathered[1] / divisor, tensor.shape, check_invariants=False)

    return Handle(_Both(indices, values), finish)


class _Both:
    """Two operations that are waited for as one."""

    def __init__(self, indices: Handle[torch.Tensor], values: Handle[torch.Tensor]) -> None:
        self._handles = indices, values

    def poll(self) -> bool:
        return all(handle.poll() for handle in self._handles)

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        indices, values = self._handles
        return indices.wait(), values.wait()
