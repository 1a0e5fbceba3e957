"""Asynchronous operations over a backend that admits one thread only: executed by the thread that waits for them.

All ranks that wait exchange what they have submitted, and execute what all have. Nothing happens between a submission
and a wait. Unlike with a thread, ranks must therefore wait for asynchronous operations and make blocking calls in one
order.
"""

from typing import Any, TypeVar

from lentando.comm.agreement import Event, Intent, agree
from lentando.comm.asynchronous.handle import Call, Handle, ZeroCall, tensor_name
from lentando.comm.asynchronous.names_in_use import name_in_use
from lentando.comm.asynchronous.reports import deadlock, different, waits_for
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import ConfigurationError, LentandoError, MismatchError, TransportError
from lentando.comm.numbering import numbers_of
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Transport
from lentando.comm.turns import turn

__all__ = ["OperationsInTurn"]

R = TypeVar("R")


class OperationsInTurn:
    """The asynchronous operations of one rank.

    Args:
        transport: transport of the job.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._in_flight: dict[str, Handle[Any]] = {}
        self._unnamed = 0
        self._polled: set[str] = set()

    def submit(self, call: Call[R]) -> Handle[R]:
        """Submit an operation. In a world of one rank, it is executed at once.

        Raises:
            ConfigurationError: if an operation of the same name is in flight on this rank, or the job is elastic.
        """
        transport = self._transport
        if is_elastic(transport):
            raise ConfigurationError(
                f"an elastic job has no asynchronous operations, which could not be repeated after a death: call "
                f"{call.operation} without _async, or init() without elastic=True"
            )
        key = tensor_name(call) if call.name else f"noname.{self._unnamed}"
        if key in self._in_flight:
            raise name_in_use(numbers_of(transport)[transport.rank], key)
        self._unnamed += not call.name
        handle: Handle[R] = Handle(key, self, call)
        self._in_flight[key] = handle
        if transport.size == 1:
            self._execute(key)
        return handle

    def join(self, zeros: ZeroCall) -> Handle[int]:
        """Refuse to join.

        Raises:
            ConfigurationError: always.
        """
        reason = "in an elastic job" if is_elastic(self._transport) else f"over transport {self._transport.name!r}"
        raise ConfigurationError(
            f"join() is not possible {reason}, which admits no asynchronous operations in a thread of their own: train "
            "inside `with join(optimizer):`, or with equally many batches on all ranks"
        )

    def cancel_join(self) -> None:
        """Do nothing, because no rank has joined."""

    def names_in_flight(self) -> list[str]:
        """Names of the operations that this rank has submitted and that are not complete."""
        return list(self._in_flight)

    def may_continue_without(self, thread: int) -> bool:
        """False: this rank submits nothing that others wait for without it."""
        return False

    def inspect(self, blocked_in: tuple[str, float] | None) -> None:
        """Do nothing: ranks that wait for this one wait in a blocking call themselves."""

    def close(self) -> None:
        """Let the operations in flight raise an error."""
        self._fail_all(MismatchError("the operation was not executed: the job has ended, and no rank waited for it"))

    def poll_for(self, handle: Handle[Any]) -> None:
        """Wait from the second call on: a program that polls until the operation is complete must come to its end."""
        if handle.key in self._polled:
            self.wait_for(handle)
        self._polled.add(handle.key)

    def note_seen(self) -> None:
        """Do nothing: an operation that is complete has left its name free."""

    def wait_for(self, handle: Handle[Any]) -> None:
        """Execute what all ranks have submitted, until the operation of a handle is complete."""
        while not handle.is_complete:
            with turn(self._transport):
                self._meet(handle)

    def _meet(self, handle: Handle[Any]) -> None:
        """Exchange with all ranks, which wait too, what they have submitted, and execute what all have."""
        transport = self._transport
        agree(transport, Intent(Event.ASYNCHRONOUS), lambda: f"waits for the asynchronous operation {handle.key!r}")
        mine = [handle.key, {key: submitted.call.description for key, submitted in self._in_flight.items()}]
        by_rank: list[Any] = allgather_object(transport, mine)
        submitted: list[dict[str, str]] = [keys for _, keys in by_rank]
        ready = [key for key in submitted[0] if all(key in keys for keys in submitted)]
        for key in ready:
            problem = different(key, dict(enumerate(keys[key] for keys in submitted)), numbers_of(transport))
            if problem is None:
                error = self._execute(key)
                if error is not None and key == handle.key:
                    return  # its wait() raises the error
                if error is not None:
                    raise error
            else:
                self._in_flight.pop(key).fail(MismatchError(problem))
        if not ready:
            names = {name for keys in submitted for name in keys}
            having = {name: [rank for rank, keys in enumerate(submitted) if name in keys] for name in names}
            texts = [waits_for([key], having, numbers_of(transport)) for key, _ in by_rank]
            self._fail_all(MismatchError(deadlock(texts, numbers_of(transport))))

    def _fail_all(self, error: MismatchError) -> None:
        for handle in self._in_flight.values():
            handle.fail(error)
        self._in_flight.clear()

    def _execute(self, key: str) -> Exception | None:
        """Execute an operation. Returns its error if other ranks may not have got it, which must not continue."""
        handle = self._in_flight.pop(key)
        self._polled.discard(key)
        try:
            handle.succeed(handle.call.execute(self._transport))
        except Exception as error:  # noqa: BLE001 - wait() raises it
            handle.fail(error)
            return None if isinstance(error, LentandoError) and not isinstance(error, TransportError) else error
        except BaseException as error:
            number = numbers_of(self._transport)[self._transport.rank]
            handle.fail(TransportError(f"rank {number} was interrupted in {key!r} by {type(error).__name__}"))
            raise
        return None
