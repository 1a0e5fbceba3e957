"""Calls of collectives by users, which are compared between ranks before data move."""

from collections.abc import Callable
from typing import Any, TypeVar

from lentando.comm.agreement import Event, Intent, agree, fingerprint
from lentando.comm.elastic import current_rank, initial_number
from lentando.comm.errors import ConfigurationError
from lentando.comm.numbering import numbers_of
from lentando.comm.transport import Transport
from lentando.comm.turns import turn

__all__ = ["CheckedCall", "Root"]

T = TypeVar("T")


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
        self._intent = Intent(Event.OPERATION, subject=fingerprint([operation, *arguments, name]))

    def agree(self) -> None:
        """Compare the call between ranks. Collective.

        Raises:
            MismatchError: on every rank, if ranks make different calls.
        """
        agree(self._world, self._intent, lambda: self._description)

    def run(self, function: Callable[[], T]) -> T:
        """Call ``function``, which executes the operation, while no other thread of this rank executes one."""
        with turn(self._world, self._intent):
            return function()
