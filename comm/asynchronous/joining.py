"""One rank's ``join()``: it contributes zeros to the sums of the others until all ranks have called it."""

import json

from lentando.comm.asynchronous.handle import Call, Handle, ZeroCall
from lentando.comm.errors import ConfigurationError
from lentando.comm.join_rounds import cancelled_joins
from lentando.comm.transport import Transport

__all__ = ["Joining"]


class Joining:
    """The ``join()`` in which this rank waits, if any. Callers hold the lock of its operations, except where stated.

    An error that all ranks get from an agreement cancels all joins, and a new round of them begins. Until rank 0 has
    confirmed that round, it still expects the zeros of the cancelled one.

    Args:
        transport: transport of the job.
        number: number of this rank in the job, for messages.
    """

    def __init__(self, transport: Transport, number: int) -> None:
        self._transport = transport
        self._number = number
        self._handle: Handle[int] | None = None
        self._zeros: ZeroCall | None = None
        self._round = self._round_to_follow = 0
        # Used by the background thread only.
        self._round_sent = self._round_followed = 0

    @property
    def is_waiting(self) -> bool:
        """Whether a thread of this rank waits in ``join()``. Needs no lock."""
        return self._handle is not None

    @property
    def is_ending(self) -> bool:
        """Whether rank 0 has not confirmed yet that a cancelled join is over."""
        return self._round_followed < self._round_to_follow

    def begin(self, handle: Handle[int], zeros: ZeroCall) -> int:
        """Begin to wait, and return the number of rounds that were cancelled before.

        Raises:
            ConfigurationError: if another thread of this rank waits already.
        """
        if self._handle is not None:
            raise ConfigurationError(f"rank {self._number} calls join() while another of its threads waits in it")
        self._handle, self._zeros = handle, zeros
        self._round = cancelled_joins(self._transport)
        return self._round

    def cancel(self) -> bool:
        """No longer wait, if an agreement has cancelled this round of joins. Returns whether it has."""
        cancelled = cancelled_joins(self._transport)
        if self._handle is None or cancelled <= self._round:
            return False
        self._handle = None
        self._round_to_follow = cancelled
        return True

    def new_round(self) -> int | None:
        """The number of cancelled rounds, if rank 0 has not been sent it. Called by the background thread."""
        cancelled = cancelled_joins(self._transport)
        if cancelled == self._round_sent:
            return None
        self._round_sent = cancelled
        return cancelled

    def follow(self, round_number: int) -> None:
        """Note the number of cancelled rounds that rank 0 knows. Called by the background thread."""
        self._round_followed = round_number

    def zeros(self, description: str) -> Call[object]:
        """The call by which this rank contributes zeros to an operation, described as JSON."""
        assert self._zeros is not None
        operation, *arguments = json.loads(description)
        return self._zeros(operation, arguments)

    def succeed(self, last_rank: int) -> None:
        """Return from ``join()``, because all ranks have called it."""
        if self._handle is not None:
            self._handle.succeed(last_rank)
            self._handle = None

    def fail(self, error: Exception) -> None:
        """Let ``join()`` raise an error."""
        if self._handle is not None:
            self._handle.fail(error)
            self._handle = None
