"""Exchanges over MPI, which makes progress only inside its calls: a thread makes them while the caller computes."""

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from mpi4py import MPI

from lentando.comm.closed import ended
from lentando.comm.errors import NotInitializedError, TransportError
from lentando.comm.transport import Request

__all__ = ["FIRST_PAUSE_SECONDS", "POLL_SECONDS", "MPIExchange", "PollingRequest", "ProgressThread"]

POLL_SECONDS = 1e-3
"""Interval between two polls: short enough that the link stays busy, long enough to yield the core to other threads."""
FIRST_PAUSE_SECONDS = 20e-6
"""Pause after the first poll of a collective. Each pause is longer than the one before, until it is ``POLL_SECONDS``.

The ranks of a node pass a barrier in less time than that, and an all-reduce in their memory has several.
"""

TESTED_AT_ONCE = 64
"""Number of requests tested in one call. MPI progresses all requests in it, and a long list costs more than that."""


class MPIExchange:
    """Started MPI requests, completed by the caller that waits or by the progress thread, whichever is first.

    Args:
        pending: started requests.
        device: device whose memory the requests read or write; None for host memory.
        translate: function that turns an error of MPI into one of Lentando.
        rank: rank of this process, for messages.
    """

    def __init__(
        self,
        pending: list[MPI.Request],
        device: Any,
        translate: Callable[[MPI.Exception, Sequence[MPI.Status]], TransportError],
        rank: int,
    ) -> None:
        self.device = device
        self._pending = pending
        self._translate = translate
        self._rank = rank
        self._lock = threading.Lock()
        self._is_complete = False
        self._error: TransportError | NotInitializedError | None = None

    def wait(self) -> None:
        with self._lock:
            if not self._is_complete:
                self._finish(MPI.Request.Waitall)
        if self._error is not None:
            raise self._error

    def wait_for(self, seconds: float) -> bool:
        """Wait for ``seconds`` at most; return whether the exchange is complete. Spins, as waits in MPI do."""
        until = time.monotonic() + seconds

        def spin(requests: Sequence[MPI.Request], statuses: list[MPI.Status]) -> bool:
            while not MPI.Request.Testall(requests, statuses):
                if time.monotonic() >= until:
                    return False
            return True

        with self._lock:
            if not self._is_complete:
                self._finish(spin)
        if self._error is not None:
            raise self._error
        return self._is_complete

    def test(self) -> bool:
        self.progress()
        if self._error is not None:
            raise self._error
        return self._is_complete

    def progress(self) -> bool:
        """Let MPI make progress, unless another thread does; return whether the exchange is complete."""
        if not self._is_complete and self._lock.acquire(blocking=False):
            try:
                if not self._is_complete:
                    self._finish(MPI.Request.Testall)
            finally:
                self._lock.release()
        return self._is_complete

    @property
    def is_in_flight(self) -> bool:
        """Whether MPI may still read or write the arrays."""
        return bool(self._pending)

    def settle(self) -> bool:
        """Return whether MPI has finished with the arrays, by success or by an error of any of the requests."""
        with self._lock:
            self._pending[:] = [request for request in self._pending if not _is_over(request)]
        return not self._pending

    def _finish(self, call: Callable[[Sequence[MPI.Request], list[MPI.Status]], bool]) -> None:
        """Remove the requests that ``call`` reports as complete, in order, up to the first that is not."""
        # Without statuses, Open MPI 5 does not always report a message that is longer than its receive.
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
            self._error = self._translate(error, statuses)
        self._is_complete = True


def _is_over(request: MPI.Request) -> bool:
    try:
        return request.Test()
    except MPI.Exception:
        return True


class PollingRequest:
    """A request whose ``wait`` polls and sleeps instead of spinning.

    Args:
        request: request to poll.
        pause: function that sleeps between two polls.
    """

    def __init__(self, request: Request, pause: Callable[[], None]) -> None:
        self._request = request
        self._pause = pause

    def wait(self) -> None:
        while not self._request.test():
            self._pause()

    def wait_for(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self._request.test():
            if time.monotonic() >= until:
                return False
            self._pause()
        return True

    def test(self) -> bool:
        return self._request.test()


class ProgressThread:
    """A thread that polls MPI while an exchange is in flight, because MPI moves data only inside its calls.

    mpi4py releases the interpreter lock in these calls, so that the main thread computes meanwhile. The caller starts
    the exchanges; while the thread tests one of them, MPI progresses all. A blocking call would spin, and take a core
    from the computation that should hide the exchange (measured by ``benchmarks/overlap.py``).
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[MPIExchange | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, exchange: MPIExchange) -> None:
        """Poll an exchange until it is complete. The first one starts the thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lentando-progress", daemon=True)
            self._thread.start()
        self._queue.put(exchange)

    def close(self) -> None:
        """Wait until all submitted exchanges are complete, and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (exchange := self._queue.get()) is not None:
            if exchange.device is not None:
                exchange.device.use()  # each thread has a current device of its own
            while not exchange.progress():
                time.sleep(POLL_SECONDS)
