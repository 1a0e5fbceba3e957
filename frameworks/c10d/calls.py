"""The collective calls of one group on this rank: each is compared between ranks, and ends within its timeout."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, TypeAlias

import torch
from torch.distributed import DistBackendError

from lentando.c10d.comparison import Comparison
from lentando.c10d.memory import overlap
from lentando.c10d.order import Order
from lentando.c10d.waiting import Waiting
from lentando.c10d.work import CollectiveWork
from lentando.comm.capabilities import Interruptible
from lentando.comm.errors import LentandoError
from lentando.comm.transport import Transport

__all__ = ["Calls", "Execute"]

Execute: TypeAlias = Callable[[ExitStack], object]
"""Moves the data of a call. What is written to tensors that are not contiguous is written at the end of the context."""

CLOSING_SECONDS = 5.0
"""How long a rank that leaves a group waits for operations whose result it has not waited for."""


class Calls:
    """Submits and executes the collective operations of one group.

    Args:
        transport: transport of the group, used by one thread at a time.
        failure: as for ``Waiting``.
        timeout: default limit of the duration of an operation.
        progress: as for ``Order``.

    Attributes:
        timeout: the same.
        count: number of operations that were submitted.
        has_failed: whether one had failed when the group was closed.
        comparison: the comparison of the operation that is being executed.
    """

    def __init__(
        self,
        transport: Transport,
        failure: Callable[[], str | None],
        timeout: timedelta,
        progress: Callable[[], object] | None = None,
    ) -> None:
        self.timeout = timeout
        self.count = 0
        self.has_failed = False
        self._transport = transport
        self._waiting = Waiting(failure, spins=transport.local_size == transport.size)
        self.comparison = Comparison(transport)
        if isinstance(transport, Interruptible):
            transport.while_waiting = self._waiting
        self._begun: list[Any] | None = None
        self._filling: Sequence[torch.Tensor] = ()
        self._order = Order("lentando-c10d", progress)
        self._broken: str | None = None
        self._error: BaseException | None = None
        self._is_closed = False

    def submit(
        self,
        operation: str,
        arguments: list[Any],
        execute: Execute,
        outputs: Sequence[torch.Tensor],
        opts: Any,
        *,
        compares_late: bool = False,
        send_ahead: Callable[[], object] | None = None,
    ) -> CollectiveWork:
        """Submit a call, which is executed after those that were submitted before.

        Args:
            operation: its name.
            arguments: what must be equal on all ranks, as JSON.
            execute: function that moves the data.
            outputs: the tensors that it fills.
            opts: options of torch.distributed, with a timeout and whether the caller waits at once; None for defaults.
            compares_late: whether ``execute`` ends the comparison itself, before it changes a tensor.
            send_ahead: sends what ``execute`` would send first, if that can be done while the operation before it waits
                for its last messages. It waits for nothing, and changes nothing.
        """
        description = f"{operation}({', '.join(map(str, arguments))})"
        is_default = opts is None or opts.timeout < timedelta(0)
        timeout = (self.timeout if is_default else opts.timeout).total_seconds()
        work = CollectiveWork(description, outputs, timeout, lambda: self._order.progressed)
        self.count += 1

        call = [operation, *arguments]

        def run() -> None:
            self._filling = outputs
            try:
                self._execute(call, description, execute, timeout, compares_late)
            finally:
                self._filling = ()

        def begin() -> None:
            # What the present operation has yet to fill may be what this one is to send.
            if self._broken is None and send_ahead is not None and not overlap(self._filling, outputs):
                self._begun = call
                self.comparison.begin(call, description)
                send_ahead()

        self._order.submit(work, run, at_once=opts is not None and not opts.asyncOp, send_ahead=begin)
        return work

    def send_next_ahead(self) -> None:
        """Called by an operation that has nothing more to send, and waits for messages only."""
        self._order.send_ahead()

    def close(self) -> bool:
        """End the thread, after what was submitted; after ``CLOSING_SECONDS``, end what is still waiting by an error.

        Returns:
            whether this is the first call.
        """
        if self._is_closed:
            return False
        self._is_closed = True
        if not self._order.close(CLOSING_SECONDS):
            self._waiting.stop("its rank has left the group")
            self._order.close(CLOSING_SECONDS)
        self.has_failed = self._broken is not None
        self.fail("this rank has left the group")
        return True

    def fail(self, reason: str) -> None:
        """Let all calls that have not begun raise an error.

        Args:
            reason: the end of a sentence that says why.
        """
        self._broken = self._broken or reason

    def _execute(
        self, call: list[Any], description: str, execute: Execute, timeout_seconds: float, compares_late: bool
    ) -> None:
        if self._broken is not None:
            raise DistBackendError(f"{description} is not possible any more: {self._broken}")
        rank, size = self._transport.rank, self._transport.size
        self._waiting.begin(f"{description} on rank {rank} of {size}", timeout_seconds)
        try:
            if self._begun is not call:
                self.comparison.begin(call, description)
            self._begun = None
            if not compares_late:
                self.comparison.end()
            with ExitStack() as stack:
                execute(stack)
        except BaseException as error:  # whatever it is, this rank may be out of step with the others
            self._error = error  # its traceback keeps the memory which MPI may still read, or fill with late messages
            reason = str(error) if isinstance(error, LentandoError | DistBackendError) else repr(error)
            self.fail(reason)
            if isinstance(error, DistBackendError) or not isinstance(error, Exception):
                raise
            raise DistBackendError(f"{description} has failed on rank {rank} of {size}: {reason}") from error
