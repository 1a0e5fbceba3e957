"""Collectives for users, on NumPy arrays. Each checks first that all ranks make the same call.

The framework packages wrap them; names and semantics are Horovod's. Calls are matched in the order in which ranks make
them. Their names are compared, so that ranks that make them in different orders get an error and not each other's
values. Calls of several threads are matched as the module ``lentando.comm.turns`` describes.

A function ``..._call`` checks the arguments of one call and returns it as an object (``Collective``), which can be
executed now (``run``). The function without this ending does both.
"""

from lentando.comm.operations.broadcasting import broadcast, broadcast_call
from lentando.comm.operations.collective import Collective, refused
from lentando.comm.operations.exchanging import alltoall, alltoall_call
from lentando.comm.operations.gathering import allgather, allgather_call
from lentando.comm.operations.grouping import (
    grouped_allgather,
    grouped_allgather_call,
    grouped_allreduce,
    grouped_allreduce_call,
)
from lentando.comm.operations.joining import join
from lentando.comm.operations.objects import (
    allgather_object,
    allgather_object_call,
    barrier,
    barrier_call,
    broadcast_object,
    broadcast_object_call,
)
from lentando.comm.operations.op import Adasum, Average, Max, Min, Op, Product, Sum
from lentando.comm.operations.recording import start_timeline, stop_timeline
from lentando.comm.operations.reducing import allreduce, allreduce_call, allreduce_number
from lentando.comm.operations.scattering import (
    grouped_reducescatter,
    grouped_reducescatter_call,
    reducescatter,
    reducescatter_call,
)

__all__ = [
    "Adasum",
    "Average",
    "Collective",
    "Max",
    "Min",
    "Op",
    "Product",
    "Sum",
    "allgather",
    "allgather_call",
    "allgather_object",
    "allgather_object_call",
    "allreduce",
    "allreduce_call",
    "allreduce_number",
    "alltoall",
    "alltoall_call",
    "barrier",
    "barrier_call",
    "broadcast",
    "broadcast_call",
    "broadcast_object",
    "broadcast_object_call",
    "grouped_allgather",
    "grouped_allgather_call",
    "grouped_allreduce",
    "grouped_allreduce_call",
    "grouped_reducescatter",
    "grouped_reducescatter_call",
    "join",
    "reducescatter",
    "reducescatter_call",
    "refused",
    "start_timeline",
    "stop_timeline",
]
