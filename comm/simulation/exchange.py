"""An exchange of a virtual rank: the request that ``SimulatedTransport.exchange`` returns."""

from collections.abc import Callable

from lentando.comm.errors import RankLostError, TransportError
from lentando.comm.simulation.notice_board import NoticeBoard
from lentando.comm.simulation.scheduler import Scheduler
from lentando.comm.simulation.tasks import Task, Wait
from lentando.comm.transport import Array

__all__ = ["SimulatedExchange", "format_bytes"]


class SimulatedExchange(Wait):
    """Messages in flight, complete when all receives are filled and all sends have left.

    Args:
        task: rank that started the exchange.
        scheduler: scheduler of the simulation.
        notices: notices of all ranks; ``wait_for`` returns early when there is one to read.
        describe_missing: returns a description of the messages that an exchange still waits for.

    Attributes:
        missing: number of receives that are not filled, plus sends that must be received and are not.
        left_at: virtual time at which the last send has left, in seconds.
        sent: (receiver, array, bytes of the array when it was sent) of each send, to detect changes.
        unacknowledged: (sender, receiver, tag) of the sends that must be received and are not.
        error: error to raise at the end, for a message that did not fit its receive.
        failure: reason why the exchange will never be complete; None if it can be.
    """

    __slots__ = (
        "_describe_missing", "_notices", "_polled_at", "_reads_notices", "_scheduler", "error", "failure", "left_at",
        "missing", "sent", "task", "unacknowledged",
    )  # fmt: skip

    def __init__(
        self,
        task: Task,
        scheduler: Scheduler,
        notices: NoticeBoard,
        describe_missing: "Callable[[SimulatedExchange], str]",
    ) -> None:
        self.task = task
        self._scheduler, self._notices, self._describe_missing = scheduler, notices, describe_missing
        self.missing = 0
        self.left_at = task.clock
        self.sent: list[tuple[int, Array, bytes]] = []
        self.unacknowledged: list[tuple[int, int, int]] = []
        self.error: TransportError | None = None
        self.failure: str | None = None
        self._reads_notices = False
        self._polled_at = -1.0

    def wait(self) -> None:
        """Block until the exchange is complete."""
        task = self.task
        if self.is_pending:
            self._scheduler.block(task, self)
        if self.left_at > task.clock and self.failure is None:
            self._scheduler.advance(task, self.left_at)
        self._finish()

    def wait_for(self, seconds: float) -> bool:
        """Block until the exchange is complete (True) or there is a notice to read (False), however long it takes."""
        if self.is_pending:
            if self._notices.has_unread(self.task):
                return False
            self._reads_notices = True
            self._scheduler.block(self.task, self)
            self._reads_notices = False
            if self.is_pending:
                return False
        self.wait()
        return True

    def test(self) -> bool:
        """Whether the exchange is complete. A second call at the same moment advances the clock to the next event."""
        task = self.task
        self._scheduler.check_alive(task)
        if self._polled_at == task.clock and not self.is_complete():
            if not self.missing:
                self._scheduler.at(self.left_at, lambda time: None)  # the next event may be that the send has left
            self._scheduler.poll(task, self)
        self._polled_at = task.clock
        if not self.is_complete():
            return False
        self._finish()
        return True

    @property
    def is_pending(self) -> bool:
        """Whether the exchange waits for other ranks."""
        return self.missing > 0 and self.failure is None

    @property
    def ends_on_notice(self) -> bool:
        """Whether a notice of another rank ends the wait: that of ``wait_for``."""
        return self._reads_notices

    def is_complete(self) -> bool:
        """Whether ``wait`` would return, or raise an error, at once."""
        return self.failure is not None or (not self.missing and self.left_at <= self.task.clock)

    def fail(self, reason: str, time: float) -> None:
        """Let the exchange fail for this reason, unless all messages that it waited for have arrived."""
        if self.is_pending:
            self.failure = reason
            if self.task.waiting is self:
                self._scheduler.wake(self.task, time)

    def complete_one(self, time: float) -> None:
        """Record that a receive has been filled, or a send received."""
        self.missing -= 1
        if not self.missing and self.task.waiting is self:
            self._scheduler.wake(self.task, time)

    def describe(self) -> str:
        """Return a description of the messages that the exchange still waits for."""
        return self._describe_missing(self)

    def _finish(self) -> None:
        if self.failure is not None:
            raise RankLostError(self.failure)
        if self.error is not None:
            raise self.error
        for peer, array, data in self.sent:
            if array.tobytes() != data:
                raise TransportError(
                    f"rank {self.task.rank} changed an array of {format_bytes(len(data))} while it was being sent to "
                    f"rank {peer}: wait until the exchange is complete, or send a copy"
                )
        self.sent.clear()


def format_bytes(count: int) -> str:
    """``1 byte`` or ``8 bytes``, for messages."""
    return "1 byte" if count == 1 else f"{count} bytes"
