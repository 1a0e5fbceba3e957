"""Collectives for torch tensors, with the names, the order of arguments and the gradients of Horovod's."""

from lentando.torch.functions.broadcasting import broadcast, broadcast_, broadcast_async, broadcast_async_
from lentando.torch.functions.calls import Handle, poll, synchronize
from lentando.torch.functions.exchanging import alltoall, alltoall_async
from lentando.torch.functions.gathering import allgather, allgather_async, grouped_allgather, grouped_allgather_async
from lentando.torch.functions.objects import allgather_object, broadcast_object
from lentando.torch.functions.reducing import allreduce, allreduce_, allreduce_async, allreduce_async_
from lentando.torch.functions.reducing_groups import (
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
)
from lentando.torch.functions.scattering import (
    grouped_reducescatter,
    grouped_reducescatter_async,
    reducescatter,
    reducescatter_async,
)
from lentando.torch.functions.sparse import sparse_allreduce_async
from lentando.torch.functions.state import broadcast_optimizer_state, broadcast_parameters

__all__ = [
    "Handle",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "poll",
    "reducescatter",
    "reducescatter_async",
    "sparse_allreduce_async",
    "synchronize",
]
