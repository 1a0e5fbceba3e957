"""Broadcast and all-gather of Python objects that may contain tensors."""

from collections.abc import Callable
from typing import Any

from lentando.comm import operations
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.tensorflow.convert import to_plain, to_tensorflow

__all__ = ["allgather_object", "broadcast_object", "broadcast_object_fn"]


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return the root rank's object on every rank. It is sent without pickle.

    Args:
        obj: None, numbers, strings, bytes, paths, tensors and arrays of any dtype, in lists, tuples, sets and dicts
            (``OrderedDict``, ``Counter``, ``defaultdict`` of a built-in type), whose types are preserved.
        root_rank: rank whose object all ranks receive, by its number in the whole job.
        session: no effect: a session of TensorFlow 1 is not needed.
        name: name of the operation, which is compared between ranks and shown in messages.
        process_set: the participating ranks.

    Raises:
        ConfigurationError: on every rank, if the object contains anything else, with its location.
    """
    return to_tensorflow(operations.broadcast_object(obj, root_rank, name, to_plain, process_set))


def broadcast_object_fn(
    root_rank: int = 0, session: Any = None, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Callable[[Any], Any]:
    """Return a function that broadcasts an object.

    Args:
        root_rank: as for ``broadcast_object``, like all arguments that follow.
        session: no effect.
        name: name of the operation.
        process_set: the participating ranks.
    """
    return lambda obj: broadcast_object(obj, root_rank, session, name, process_set)


def allgather_object(
    obj: Any, session: Any = None, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Any]:
    """Return the objects of all ranks, in a list by rank.

    Args:
        obj: this rank's object, as for ``broadcast_object``.
        session: no effect.
        name: name of the operation.
        process_set: the participating ranks.
    """
    gathered: list[Any] = to_tensorflow(operations.allgather_object(obj, name, to_plain, process_set))
    return gathered
