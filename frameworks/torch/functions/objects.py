"""Objects of Python, sent without pickle."""

from typing import Any

from lentando.comm import operations
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.torch.convert import to_plain, to_torch

__all__ = ["allgather_object", "broadcast_object"]


def broadcast_object(
    obj: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """Return the object of rank ``root_rank`` on every rank. It is sent without pickle.

    Args:
        obj: None, numbers, strings, bytes, paths, tensors and arrays of any dtype, in lists, tuples, sets and dicts
            (``OrderedDict``, ``Counter``, ``defaultdict`` of a built-in type), whose types are kept.
        root_rank: number of the rank in the whole job, whose object is sent.
        name: name of the call, which is compared between ranks and shown in messages.
        process_set: the participating ranks.

    Raises:
        ConfigurationError: on every rank, if the object contains anything else. The message says where.
    """
    return to_torch(operations.broadcast_object(obj, root_rank, name, to_plain, process_set=process_set))


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """Return the objects of all ranks, in the order of ranks. They are sent without pickle."""
    gathered: list[Any] = to_torch(operations.allgather_object(obj, name, to_plain, process_set=process_set))
    return gathered
