"""Asynchronous operations in a thread of their own, in an order that rank 0 decides.

The thread sleeps while this rank has nothing in flight. Otherwise it sends to rank 0 what was submitted, all that has
accumulated in one message, and executes what rank 0 decides. Nothing is executed that some rank has not submitted, so
that a rank which computes does not have to answer.
"""

import os
import time
from contextlib import suppress
from typing import Any, TypeVar, cast

from lentando.comm.asynchronous.coordinator import Message
from lentando.comm.asynchronous.execution import Execution
from lentando.comm.asynchronous.handle import Call, Handle, ZeroCall
from lentando.comm.asynchronous.negotiation import Negotiation, OtherRankFailedError
from lentando.comm.asynchronous.pacing import Pace, sleep
from lentando.comm.asynchronous.reports import shortened
from lentando.comm.asynchronous.submissions import Submissions
from lentando.comm.background import BackgroundThreads
from lentando.comm.capabilities import Interruptible, SideChannel
from lentando.comm.errors import LentandoError, TransportError
from lentando.comm.numbering import numbers_of
from lentando.comm.stall import watched
from lentando.comm.thread_transports import Loan
from lentando.comm.transport import Transport

__all__ = ["NegotiatedOperations"]

R = TypeVar("R")
CONTROL_SECONDS = 0.02
"""While an operation is executed, errors of other ranks are received at this interval."""


class NegotiatedOperations:
    """The asynchronous operations of one rank.

    Args:
        transport: transport of the job.
        data: transport of the same ranks for the thread; its side channel is open.
    """

    def __init__(self, transport: Transport, data: Transport) -> None:
        numbers = numbers_of(transport)
        self._number = numbers[transport.rank]
        self._transport = transport
        self._submissions = Submissions(transport, self._number)
        self._negotiation = Negotiation(transport.rank, numbers, cast(SideChannel, data))
        self._execution = Execution(data)
        self._threads = BackgroundThreads([Loan(data)], "lentando-asynchronous")
        if isinstance(data, Interruptible):
            data.while_waiting = self._while_executing
        self._pid = os.getpid()
        # Used by the thread only.
        self._pace = Pace(is_crowded=transport.local_size > (os.cpu_count() or 1))
        self._looked_at = 0.0
        self._question = 0
        self._running: list[tuple[str, str]] = []

    def submit(self, call: Call[R]) -> Handle[R]:
        """Submit an operation. Returns at once.

        Raises:
            ConfigurationError: if an earlier operation of the same name is in use (``NamesInUse``).
            TransportError: if an earlier asynchronous operation has failed in a way that ends them all.
            RuntimeError: if the thread that executes operations cannot be started.
        """
        self._require_parent()
        with self._submissions.changed:
            self._threads.start()  # first: if no thread can be started, nothing has been submitted
            handle = self._submissions.add(call, self)
            self._ensure_driving()
        return handle

    def join(self, zeros: ZeroCall) -> Handle[int]:
        """Contribute zeros to the sums of the other ranks from now on, until all ranks have called this method.

        Args:
            zeros: makes this rank's contribution.

        Returns:
            a handle, whose result is the rank that was the last to call it: its number in the job.
        """
        self._require_parent()
        with self._submissions.changed:
            self._threads.start()
            handle: Handle[int] = Handle("join", self)
            self._submissions.join(handle, zeros)
            self._ensure_driving()
        return handle

    def cancel_join(self) -> None:
        """No longer wait in join(), if an agreement has ended it by an error on all ranks.

        Zeros are contributed until rank 0 confirms that it expects no more of them.
        """
        with self._submissions.changed:
            if self._submissions.joining.cancel():
                self._ensure_driving()

    def names_in_flight(self) -> list[str]:
        """Names of the operations that this rank has submitted and that are not complete."""
        with self._submissions.changed:
            return self._submissions.names()

    def inspect(self, blocked_in: tuple[str, float] | None) -> None:
        """Called about once a second, because other ranks may wait for this rank while it submits nothing.

        Args:
            blocked_in: blocking call in which this rank has been waiting for a while, in words, and when that began;
                None outside of one.
        """
        submissions = self._submissions
        with submissions.changed:
            if submissions.waits.set_blocked_in(blocked_in) and submissions.failure is None:
                self._ensure_driving()

    def may_continue_without(self, thread: int) -> bool:
        """Whether this rank may submit operations while a thread waits in a blocking call.

        Other threads are expected to do so if they have submitted operations or waited for them before.

        Args:
            thread: identifier of the thread that waits.
        """
        with self._submissions.changed:
            return bool(self._submissions.waits.running_users() - {thread})

    def close(self) -> None:
        """End the thread. Collective: all ranks have agreed to leave the job. Operations in flight get an error."""
        if os.getpid() != self._pid:
            return
        submissions = self._submissions
        with submissions.changed:
            submissions.leave()
            is_idle = submissions.failure is None and submissions.start_driving()
        if is_idle:
            self._drive()  # here: at the end of a program, Python 3.12 starts no thread
        with submissions.changed:
            submissions.end()
        data = self._threads.transports[0]
        if isinstance(data, Interruptible):
            data.while_waiting = None  # this object becomes garbage, which ends the thread

    def _require_parent(self) -> None:
        """Called without the lock: in a forked child it may be held permanently, by a thread that exists no longer."""
        if os.getpid() != self._pid:
            raise TransportError(
                f"process {os.getpid()} was made by fork from rank {self._number}, and only the rank itself can submit "
                "operations or wait for them"
            )

    def wait_for(self, handle: Handle[Any]) -> None:
        """Wait until the operation of a handle is complete."""
        self._require_parent()
        with watched(self._transport, "an asynchronous operation"):
            self._submissions.wait_for(handle)

    def poll_for(self, handle: Handle[Any]) -> None:
        """Do nothing: the thread completes handles."""

    def note_seen(self) -> None:
        """Note that the program knows that an operation is complete."""
        self._submissions.note_seen()

    def _ensure_driving(self) -> None:
        """Let the thread work. The caller holds the lock."""
        self._threads.start()
        if self._submissions.start_driving():
            self._threads.submit(0, self._drive)

    def _drive(self) -> None:
        """Send, receive and execute until nothing is in flight on this rank. Runs in the thread, or in ``close``."""
        self._pace.reset()
        try:
            while self._has_work():
                if self._take_turn():
                    self._pace.reset()
                else:
                    self._report_waits()
                    self._sleep()
        except OtherRankFailedError as error:
            self._submissions.fail(error)
        except BaseException as error:  # the handles of all ranks raise it
            where = shortened([repr(key) for key, _ in self._running], 3) or "its background thread"
            text = f"rank {self._number} has failed in {where}: {type(error).__name__}: {error}"
            with suppress(LentandoError):
                self._negotiation.report_failure(text)
            failure = TransportError(text)
            failure.__cause__ = error
            self._submissions.fail(failure)
            if not isinstance(error, Exception):
                raise

    def _has_work(self) -> bool:
        submissions = self._submissions
        with submissions.changed:
            if submissions.failure is None and (submissions.is_any_pending or not self._negotiation.has_sent_all):
                return True
            submissions.stop_driving()
            return False

    def _take_turn(self) -> bool:
        """Do whatever can be done without waiting. Returns whether that was anything."""
        has_progress = self._negotiation.poll()  # first: rank 0 records who joins in the order of arrival
        message = self._submissions.next_message(self._encoded)
        if message:
            has_progress = True
            self._submissions.waits.forget_report()
            self._negotiation.report(message)
            has_progress |= self._negotiation.poll()
        while self._negotiation.decisions:
            self._follow(self._negotiation.decisions.popleft())
        return has_progress

    def _encoded(self, handle: Handle[Any]) -> Any:
        return self._negotiation.encode(handle.key, handle.call.description)

    def _follow(self, decision: Message) -> None:
        self._submissions.waits.forget_report()
        if "run" in decision:
            operations = [self._negotiation.decode(sent) for sent in decision["run"]]
            self._run(operations, decision.get("absent") or [[]] * len(operations))
        self._question = decision.get("ask", self._question)
        self._submissions.follow(decision)

    def _run(self, operations: list[tuple[str, str]], absent: list[list[int]]) -> None:
        handles, calls = self._submissions.begin(operations, absent, self)
        self._pace.reset()
        self._running = operations
        for done, outcomes in self._execution.run(calls):
            self._submissions.complete([handles[number] for number in done], outcomes)
            self._pace.reset()

    def _while_executing(self) -> None:
        """Called again and again while an operation waits for other ranks."""
        now = time.monotonic()
        if now - self._looked_at > CONTROL_SECONDS:
            self._looked_at = now
            self._negotiation.poll()
        sleep(self._pace.pause_seconds(is_urgent=self._submissions.is_urgent, is_executing=True))

    def _sleep(self) -> None:
        submissions = self._submissions
        with submissions.changed:
            pause = self._pace.pause_seconds(is_urgent=submissions.is_urgent)
            if pause:
                submissions.changed.wait(pause)
        if not pause:
            sleep(0)

    def _report_waits(self) -> None:
        """Report to rank 0 what this rank's threads wait for."""
        submissions = self._submissions
        with submissions.changed:
            messages = submissions.waits.reports(
                self._pace.waited_seconds, self._question, submissions.joining.is_waiting
            )
        for message in messages:
            self._negotiation.report(message)
