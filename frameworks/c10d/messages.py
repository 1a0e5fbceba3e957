"""Messages between two ranks of a group: send and recv, which are in no order with collective operations."""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import torch
from torch._C._distributed_c10d import Work
from torch.distributed import DistBackendError
from torch.futures import Future

from lentando.c10d.futures import ResultFuture
from lentando.c10d.memory import check_tensors, readable, writable
from lentando.c10d.progress import Progress
from lentando.c10d.receives import Receive, Receives, pieces_of
from lentando.c10d.waiting import Waiting
from lentando.c10d.work import NO_LIMIT
from lentando.comm.errors import LentandoError
from lentando.comm.transport import Transport, as_bytes

__all__ = ["TAGS", "MessageWork", "Messages", "check_tag"]

TAGS = 32_767
"""Number of tags that programs can use: every MPI has one more, which ``monitored`` uses."""


class _Exchange(Protocol):
    def test(self) -> bool:
        """Whether a message has been sent or received; raises the error of one that cannot be."""


Start: TypeAlias = Callable[[], tuple[int, _Exchange] | None]
"""Starts to exchange a message, and returns the rank that sends it; None as long as nothing is to be received."""


class MessageWork(Work):
    """A message that is being sent or received.

    Args:
        start: starts the exchange; called again until it is known who sends.
        begin_waiting: returns what paces a wait of so many seconds at most, and ends it by an error; of the group's
            timeout for None.
        finish: called once when the message is complete.
        tensors: the tensors that are sent or filled.
        source: rank that sends, -1 if it is not known yet.
    """

    def __init__(
        self,
        start: Start,
        begin_waiting: Callable[[float | None], Waiting],
        finish: Callable[[], object],
        tensors: Sequence[torch.Tensor],
        source: int,
    ) -> None:
        super().__init__()
        self._start = start
        self._begin_waiting = begin_waiting
        self._finish = finish
        self._tensors = list(tensors)
        self._source = source
        self._lock = threading.Lock()
        self._request: _Exchange | None = None
        self._is_over = False
        self._error: Exception | None = None
        self._future: ResultFuture | None = None
        self._advance()

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """Wait until the message has been sent or received.

        Args:
            timeout: the longest time to wait; that of the group by default.

        Raises:
            DistBackendError: if it has failed, or is not complete in time.
        """
        waiting = self._begin_waiting(timeout.total_seconds() if timeout > NO_LIMIT else None)
        while not self.is_completed():
            waiting()
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        """Wait until the message is complete, as ``wait`` does."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether the message is complete, or has failed."""
        if not self._is_over and self._lock.acquire(blocking=False):
            try:
                self._advance()
            finally:
                self._lock.release()
        return self._is_over

    def is_success(self) -> bool:
        """Whether the message is complete."""
        return self.is_completed() and self._error is None

    def exception(self) -> Exception | None:
        """The error of a message that has failed."""
        return self._error

    def source_rank(self) -> int:
        """The rank that has sent the message."""
        return self._source

    _source_rank = source_rank

    def result(self) -> list[torch.Tensor]:
        """The tensors, once the message is complete."""
        self.wait()
        return self._tensors

    def get_future(self) -> Future[list[torch.Tensor]]:
        """A future of the tensors, which a thread completes."""
        with self._lock:
            is_new = self._future is None
            future = self._future = self._future or ResultFuture(self.result)
        if is_new:
            future.complete_on_thread()
        return future.future

    def _advance(self) -> None:
        if self._is_over:  # another thread was faster
            return
        try:
            if self._request is None and (started := self._start()) is not None:
                self._source, self._request = started
            if self._request is not None and self._request.test():
                self._finish()
                self._is_over = True
        except DistBackendError as error:
            self._error, self._is_over = error, True
        except LentandoError as error:
            self._error, self._is_over = DistBackendError(str(error)), True


class Messages:
    """Sends and receives of one group on this rank.

    Args:
        transport: transport of the group.
        failure: as for ``Waiting``.
        timeout: returns the longest time to wait for a message.
    """

    def __init__(
        self, transport: Transport, failure: Callable[[], str | None], timeout: Callable[[], timedelta]
    ) -> None:
        self._transport: Any = transport
        self._failure = failure
        self._timeout = timeout
        self._progress = Progress()
        self._receives = Receives()
        self._starting = threading.Lock()
        self._is_closed = False

    def send(self, tensors: Sequence[torch.Tensor], peer: int, tag: int) -> MessageWork:
        """Start to send a tensor to a rank of the group."""
        tensor = _only(tensors, "send")

        def start() -> tuple[int, _Exchange]:
            pieces = pieces_of(as_bytes(readable(tensor)), self._transport.longest_message(peer))
            return self._transport.rank, self._transport.exchange(
                [(peer, piece) for piece in pieces], [], tag, overlap=False
            )

        return self._started(start, f"send to rank {peer}", lambda: None, tensors, self._transport.rank)

    def receive(self, tensors: Sequence[torch.Tensor], peer: int | None, tag: int) -> MessageWork:
        """Start to receive a tensor from a rank, or from whichever sends first.

        Args:
            tensors: the tensor to be filled.
            peer: rank that sends; None for any.
            tag: tag of the message.
        """
        tensor = _only(tensors, "recv")
        stack = ExitStack()
        receive = Receive(self._transport, as_bytes(writable(tensor, stack)), peer, tag)
        with self._starting:
            self._receives.add(receive)

        def start() -> tuple[int, _Exchange] | None:
            self._receives.advance(tag)
            if self._receives.is_waiting(receive) or receive.source is None:
                return None
            return receive.source, receive

        whom = "any rank" if peer is None else f"rank {peer}"
        source = -1 if peer is None else peer
        return self._started(start, f"recv from {whom}", stack.close, tensors, source)

    def close(self) -> None:
        """Let no more messages start or progress."""
        with self._starting:
            self._is_closed = True
        self._progress.close()

    def _started(
        self, start: Start, action: str, finish: Callable[[], object], tensors: Sequence[torch.Tensor], source: int
    ) -> MessageWork:
        def start_alone() -> tuple[int, _Exchange] | None:
            # Between the question for the next message and its receive, no other receive may take it. The pieces of a
            # long message must not be mixed with those of another one either.
            with self._starting:
                if self._is_closed:
                    raise DistBackendError(f"{action} is not possible any more: this rank has left the group")
                return start()

        work = MessageWork(start_alone, self._waiting_for(action), finish, tensors, source)
        if not work.is_completed():
            self._progress.add(work)
        return work

    def _waiting_for(self, action: str) -> Callable[[float | None], Waiting]:
        def begin(seconds: float | None) -> Waiting:
            waiting = Waiting(self._failure, spins=self._transport.local_size == self._transport.size)
            limit = self._timeout().total_seconds() if seconds is None else seconds
            waiting.begin(f"{action} on rank {self._transport.rank} of {self._transport.size}", limit)
            return waiting

        return begin


def check_tag(tag: int) -> None:
    """Check that programs can use a tag.

    Raises:
        ValueError: if they cannot.
    """
    if not 0 <= tag < TAGS:
        raise ValueError(f"message with tag {tag}: expected a tag from 0 to {TAGS - 1}")


def _only(tensors: Sequence[torch.Tensor], operation: str) -> torch.Tensor:
    check_tensors(tensors, operation)
    if len(tensors) != 1:
        raise ValueError(f"{operation} of {len(tensors)} tensors: expected one")
    return tensors[0]
