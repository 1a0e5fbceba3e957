"""Calls of collectives by users, which are compared between ranks before data move."""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lentando.comm.agreement import Event, Intent, RanksHaveJoinedError, agree, fingerprint
from lentando.comm.asynchronous import reports
from lentando.comm.elastic import current_rank, initial_number, transaction
from lentando.comm.errors import ConfigurationError, MismatchError
from lentando.comm.numbering import numbers_of
from lentando.comm.objects import allgather_object, broadcast_object
from lentando.comm.transport import Transport
from lentando.comm.turns import turn

__all__ = ["JOINABLE", "CheckedCall", "Root", "called_by_others", "gather_objects"]

T = TypeVar("T")

JOINABLE = {"joinable": 1.0}
"""Attached to the control messages of calls of which ranks that have joined are notified."""


def called_by_others(world: Transport, found: RanksHaveJoinedError, description: str | None) -> tuple[str, str | None]:
    """Exchange which operation is called on some ranks, while others have joined. Collective.

    Args:
        world: transport of the participating ranks.
        found: what ``agree`` has raised on all ranks.
        description: the operation with its arguments as JSON; None on a rank that has joined.

    Returns:
        the description, and why the operation is not possible, None if it is.
    """
    described: str = broadcast_object(world, description, found.calling)
    return described, reports.joined(described, found.joined, numbers_of(world))


class Root:
    """The rank whose value the others get: always the same process, even if deaths of others change its number.

    Args:
        world: transport of the participating ranks.
        rank: number of the rank in the whole job.

    Raises:
        ConfigurationError: if it is not one of the participating ranks.
    """

    def __init__(self, world: Transport, rank: int) -> None:
        ranks = numbers_of(world)
        if rank not in ranks:
            expected = f"0 to {world.size - 1}" if isinstance(ranks, range) else f"one of process set {list(ranks)}"
            raise ConfigurationError(f"root_rank must be a rank of this job, {expected}, got {rank}")
        self._world = world
        self._number = initial_number(world, ranks.index(rank))

    @property
    def now(self) -> int:
        """The present number of that rank among the participating ones."""
        return current_rank(self._world, self._number, "broadcast")


class CheckedCall:
    """A collective call by the user, which is compared between ranks before data move.

    Args:
        world: transport of the job.
        operation: name of the collective operation.
        arguments: arguments that must be equal on all ranks, as JSON.
        name: name that the user has given to the call.
    """

    def __init__(self, world: Transport, operation: str, arguments: list[Any], name: str | None) -> None:
        self._world = world
        named = f" named {name!r}" if name else ""
        self._description = f"calls {operation}({', '.join(map(str, arguments))}){named}"
        self._call = [operation, *arguments]
        self._intent = Intent(Event.OPERATION, subject=fingerprint([operation, *arguments, name]))

    def agree(self) -> None:
        """Compare the call between ranks. Collective.

        Raises:
            MismatchError: on every rank, if ranks make different calls, or if some have joined and the call needs their
                values.
        """
        try:
            agree(self._world, self._intent, lambda: self._description, JOINABLE)
        except RanksHaveJoinedError as found:
            _, problem = called_by_others(self._world, found, json.dumps(self._call))
            if problem is not None:
                raise MismatchError(problem) from None

    def run(self, function: Callable[[], T]) -> T:
        """Call ``function``, which executes the operation, while no other thread of this rank executes one."""
        with turn(self._world, self._intent):
            return function()


def gather_objects(world: Transport, operation: str, value: Any, arguments: Sequence[str] = ()) -> list[Any]:
    """Return the values of all ranks, by rank, after they have agreed that all make the same call. Collective.

    Args:
        world: transport of the participating ranks.
        operation: name of the operation, for messages.
        value: value of this rank, of the types that ``lentando.comm.objects`` lists.
        arguments: arguments that must be equal on all ranks.

    Raises:
        MismatchError: on every rank, if ranks make different calls.
    """
    call = CheckedCall(world, operation, [*arguments], None)

    def attempt() -> list[Any]:
        call.agree()
        return allgather_object(world, value)

    return call.run(lambda: transaction(world, attempt))
