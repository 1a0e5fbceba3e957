"""Collectives of Python objects, and the barrier."""

from collections.abc import Callable
from typing import Any

from lentando.comm import objects
from lentando.comm.checked_calls import Root
from lentando.comm.operations.collective import Agree, Collective, refused_on_every_rank
from lentando.comm.process_sets import ProcessSet, global_process_set, transport_of
from lentando.comm.transport import Transport

__all__ = [
    "allgather_object",
    "allgather_object_call",
    "barrier",
    "barrier_call",
    "broadcast_object",
    "broadcast_object_call",
]


def broadcast_object(
    value: Any,
    root_rank: int = 0,
    name: str | None = None,
    plain: Callable[[Any], Any] | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return the root's object on every rank. It is sent without pickle.

    Args:
        value: the object, of the types that the module ``lentando.comm.objects`` lists. Ignored on all ranks but the
            root.
        root_rank: rank whose object all ranks get, by its number in the whole job.
        name: name of the call, compared between ranks and shown in messages.
        plain: converts the object to these types, and raises ``ConfigurationError`` if it cannot.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, if name or root differ between ranks.
        ConfigurationError: on every rank, if the object cannot be sent.
    """
    return broadcast_object_call(value, root_rank, plain, name=name, process_set=process_set).run()


@refused_on_every_rank("broadcast_object")
def broadcast_object_call(
    value: Any,
    root_rank: int = 0,
    plain: Callable[[Any], Any] | None = None,
    *,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Collective[Any]:
    """One call of ``broadcast_object``, with its arguments."""
    root = Root(transport_of(process_set), root_rank)

    def execute(transport: Transport, agree: Agree) -> Any:
        agree()
        return objects.broadcast_object(transport, value, root.now, plain)

    return Collective("broadcast_object", [f"from rank {root_rank}"], name, process_set, execute)


def allgather_object(
    value: Any,
    name: str | None = None,
    plain: Callable[[Any], Any] | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[Any]:
    """Return the objects of all ranks, by rank. They are sent without pickle.

    Args:
        value: this rank's object, of the types that the module ``lentando.comm.objects`` lists.
        name: name of the call, compared between ranks and shown in messages.
        plain: converts the object to these types, and raises ``ConfigurationError`` if it cannot.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, if names differ between ranks.
        ConfigurationError: on every rank, if the object of one of them cannot be sent.
    """
    return allgather_object_call(value, plain, name=name, process_set=process_set).run()


def allgather_object_call(
    value: Any,
    plain: Callable[[Any], Any] | None = None,
    *,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Collective[list[Any]]:
    """One call of ``allgather_object``, with its arguments."""

    def execute(transport: Transport, agree: Agree) -> list[Any]:
        agree()
        return objects.allgather_object(transport, value, plain)

    return Collective("allgather_object", [], name, process_set, execute)


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return once every rank has called this function.

    Args:
        process_set: the participating ranks.
    """
    barrier_call(process_set=process_set).run()


def barrier_call(*, name: str | None = None, process_set: ProcessSet = global_process_set) -> Collective[None]:
    """One call of ``barrier``, which can be executed later."""

    def execute(transport: Transport, agree: Agree) -> None:
        agree()  # once all ranks have agreed, all have called it

    return Collective("barrier", [], name, process_set, execute)
