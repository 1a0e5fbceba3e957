"""What communication costs: bytes, messages and time, by what it is for. Evaluation is not counted."""

from collections.abc import Iterator
from contextlib import contextmanager

from lentando.comm.stall import watched
from lentando.comm.transport import Transport
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.timing import Kind, Timing

__all__ = ["Costs"]

_WAITS: dict[Kind, str] = {
    "gradients": "the average of gradients of inner step",
    "gossip": "the gossip of inner step",
    "outer": "the outer step after inner step",
}


class Costs:
    """Counts what a replica's communication costs.

    Args:
        transport: whose traffic is counted.
        progress: tells whether this rank has run out of batches: its time is no longer counted then.
        timing: counts time.

    Attributes:
        bytes_sent: so far.
        messages: so far, point-to-point and collective.
    """

    def __init__(self, transport: Transport, progress: Progress, timing: Timing) -> None:
        self.bytes_sent = 0
        self.messages = 0
        self._transport = transport
        self._progress = progress
        self._timing = timing

    @contextmanager
    def of(self, kind: Kind, step: int) -> Iterator[None]:
        """Counts what the block costs; see ``Timing.begin``."""
        before = self._transport.traffic.copy()
        if not self._progress.has_ended:
            self._timing.begin(kind, step)
        try:
            with watched(self._transport, f"{_WAITS[kind]} {step}"):
                yield
        finally:
            after = self._transport.traffic
            if not self._progress.has_ended:
                self._timing.end()
            self.bytes_sent += after.bytes_sent - before.bytes_sent
            self.messages += after.messages + after.collectives - before.messages - before.collectives
