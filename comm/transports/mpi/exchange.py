"""Messages under way: MPI moves them only inside its calls, which a thread makes while the caller computes."""

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from mpi4py import MPI

from lentando.comm.closed import ended
from lentando.comm.errors import NotInitializedError, TransportError

__all__ = ["POLL_SECONDS", "MPIExchange", "ProgressThread"]

POLL_SECONDS = 1e-3
"""Often enough to keep a link busy that fills MPI's buffers meanwhile, seldom enough to leave the core to others."""

TESTED_AT_ONCE = 64
"""Requests that one call asks MPI about: it progresses all, and a long list costs more than the progress."""


class MPIExchange:
    """Started MPI requests, completed by whoever comes first: the caller that waits or the progress thread.

    Attributes:
        device: whose memory they read or write, None for host memory.

    Args:
        pending: the requests.
        device: see above.
        as_ours: makes an error of MPI's one of ours.
        rank: of this process, for messages.
    """

    def __init__(
        self,
        pending: list[MPI.Request],
        device: Any,
        as_ours: Callable[[MPI.Exception, Sequence[MPI.Status]], TransportError],
        rank: int,
    ) -> None:
        self.device = device
        self._pending = pending
        self._as_ours = as_ours
        self._rank = rank
        self._completing = threading.Lock()
        self._done = False
        self._error: TransportError | NotInitializedError | None = None

    def wait(self) -> None:
        with self._completing:
            if not self._done:
                self._finish(MPI.Request.Waitall)
        if self._error is not None:
            raise self._error

    def wait_for(self, seconds: float) -> bool:
        """True once complete, False if that takes longer. Spins, as MPI's own waiting does."""
        until = time.monotonic() + seconds

        def spin(requests: Sequence[MPI.Request], statuses: list[MPI.Status]) -> bool:
            while not MPI.Request.Testall(requests, statuses):
                if time.monotonic() >= until:
                    return False
            return True

        with self._completing:
            if not self._done:
                self._finish(spin)
        if self._error is not None:
            raise self._error
        return self._done

    def test(self) -> bool:
        self.progress()
        if self._error is not None:
            raise self._error
        return self._done

    def progress(self) -> bool:
        """True once complete. Lets MPI move what it can, unless another thread is at it."""
        if not self._done and self._completing.acquire(blocking=False):
            try:
                if not self._done:
                    self._finish(MPI.Request.Testall)
            finally:
                self._completing.release()
        return self._done

    @property
    def is_under_way(self) -> bool:
        """Whether MPI may still read or write the arrays."""
        return bool(self._pending)

    def settle(self) -> bool:
        """True once MPI has finished with the arrays, in whatever way: one message that fails ends the wait for all."""
        with self._completing:
            self._pending[:] = [request for request in self._pending if not _is_over(request)]
        return not self._pending

    def _finish(self, call: Callable[[Sequence[MPI.Request], list[MPI.Status]], bool]) -> None:
        """Complete the requests that ``call`` says are complete, in order, up to the first that is not."""
        # Without statuses to fill, Open MPI 5 does not always report a message that is longer than its receive.
        statuses: list[MPI.Status] = []
        try:
            if MPI.Is_finalized():
                self._pending.clear()
                self._error = ended(self._rank)
            while self._pending:
                if not call(self._pending[:TESTED_AT_ONCE], statuses):
                    return
                del self._pending[:TESTED_AT_ONCE]
        except MPI.Exception as error:
            self._error = self._as_ours(error, statuses)
        self._done = True


def _is_over(request: MPI.Request) -> bool:
    try:
        return request.Test()
    except MPI.Exception:
        return True


class ProgressThread:
    """Calls MPI every now and then while an exchange is under way, because MPI moves data only inside its calls.

    mpi4py releases the interpreter lock in that call, so the main thread computes meanwhile. Exchanges are posted by
    the caller; while the thread asks for one of them, MPI progresses all of them. A call that blocks would spin, and
    take a core from the computation that the exchange should hide behind: ``benchmarks/overlap.py`` tells.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[MPIExchange | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, exchange: MPIExchange) -> None:
        """Let it progress until it is complete. Starts the thread with the first."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lentando-progress", daemon=True)
            self._thread.start()
        self._queue.put(exchange)

    def close(self) -> None:
        """End the thread, with all that was submitted complete."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (exchange := self._queue.get()) is not None:
            if exchange.device is not None:
                exchange.device.use()  # each thread has a current device of its own
            while not exchange.progress():
                time.sleep(POLL_SECONDS)
