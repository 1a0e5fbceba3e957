"""The broadcast of an array."""

from lentando.comm.checked_calls import Root
from lentando.comm.operations.collective import Agree, Collective, check_in_place, described, refused_on_every_rank
from lentando.comm.process_sets import ProcessSet, global_process_set, transport_of
from lentando.comm.transport import Array, Transport

__all__ = ["broadcast", "broadcast_call"]


def broadcast(
    array: Array, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> None:
    """Fill ``array`` on every rank with the root's.

    Args:
        array: contiguous array, of equal shape and dtype on all ranks.
        root_rank: rank whose array the others get, by its number in the whole job.
        name: name of the call, compared between ranks and shown in messages.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, if name, shape, dtype or root differ between ranks.
        ConfigurationError: on every rank, if the root is not one of the participating ranks, or an array is not
            contiguous.
    """
    broadcast_call(array, root_rank, name=name, process_set=process_set).run()


@refused_on_every_rank("broadcast")
def broadcast_call(
    array: Array, root_rank: int, *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Collective[None]:
    """One call of ``broadcast``, with its arguments."""
    check_in_place(array)
    root = Root(transport_of(process_set), root_rank)

    def execute(transport: Transport, agree: Agree) -> None:
        agree()
        transport.broadcast(array, root.now)

    arguments = [*described(array), f"from rank {root_rank}"]
    return Collective("broadcast", arguments, name, process_set, execute, [array])
