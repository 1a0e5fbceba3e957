"""Names that a rank cannot give to another operation yet."""

from typing import Any
from weakref import ReferenceType, ref

from lentando.comm.asynchronous.handle import Handle
from lentando.comm.errors import ConfigurationError
from lentando.comm.job import job_of
from lentando.comm.transport import Transport
from lentando.comm.turns import Turns

__all__ = ["NamesInUse", "name_in_use"]

CLEARED_FROM = 1024
"""The least number of names at which those that are free again are forgotten."""


def name_in_use(number: int, key: str) -> ConfigurationError:
    """The error of a rank that gives the name of an operation in flight to another one.

    Args:
        number: number of the rank in the job.
        key: the name.
    """
    return ConfigurationError(
        f"rank {number} submits an operation named {key!r} while an earlier one of that name is in flight: wait for "
        "that first, or use another name"
    )


class NamesInUse:
    """Names of operations of which the program does not know yet that they are complete.

    The program knows it once it has waited for the operation, or ``poll`` has returned True. If it has dropped the
    handle, it can at best infer it, from any later call that has waited for other ranks. It depends on the order of the
    program's calls alone whether a name is in use, so that a program that submits it twice gets the error on every
    rank. With a rule that depends on whether the operation is complete, one rank would get the error, and another one
    submit an operation that is never executed.

    Args:
        transport: transport of the job.
    """

    def __init__(self, transport: Transport) -> None:
        self._turns = job_of(transport).get(Turns)
        self._seen = 0
        self._held: dict[str, tuple[ReferenceType[Handle[Any]], int]] = {}
        self._clear_at = CLEARED_FROM

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, key: str, handle: Handle[Any]) -> None:
        """Record that an operation was submitted."""
        if len(self._held) >= self._clear_at:
            self._held = {key: held for key, held in self._held.items() if self.is_held(key)}
            self._clear_at = max(CLEARED_FROM, 2 * len(self._held))
        self._held[key] = ref(handle), self._now

    def is_held(self, key: str) -> bool:
        """Whether the program does not know yet that the last operation of this name is complete."""
        held = self._held.get(key)
        if held is None:
            return False
        handle, since = held[0](), held[1]
        return not handle.is_seen if handle is not None else since == self._now

    def see(self) -> None:
        """Record that the program has noticed that an operation is complete."""
        self._seen += 1

    @property
    def _now(self) -> int:
        """A number that grows with every call by which the program may have noticed that operations are complete."""
        return self._seen + self._turns.ended
