"""Asynchronous operations in a thread of their own, in an order that rank 0 decides.

The thread sleeps while this rank has nothing in flight. Otherwise it sends to rank 0 what was submitted, all that has
accumulated in one message, and executes what rank 0 decides. Nothing is executed that some rank has not submitted, so
that a rank which computes does not have to answer.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

from lentando.comm import timeline
from lentando.comm.asynchronous.coordinator import Message
from lentando.comm.asynchronous.execution import Execution
from lentando.comm.asynchronous.handle import Call, Handle, ZeroCall, tensor_name
from lentando.comm.asynchronous.joining import Joining
from lentando.comm.asynchronous.names_in_use import NamesInUse, name_in_use
from lentando.comm.asynchronous.negotiation import Negotiation, OtherRankFailedError
from lentando.comm.asynchronous.pacing import Pace, sleep
from lentando.comm.asynchronous.reports import shortened
from lentando.comm.asynchronous.waits import Waits
from lentando.comm.background import BackgroundThreads
from lentando.comm.capabilities import Interruptible, SideChannel
from lentando.comm.errors import LentandoError, MismatchError, TransportError
from lentando.comm.numbering import numbers_of
from lentando.comm.stall import watched
from lentando.comm.thread_transports import Loan
from lentando.comm.transport import Transport

__all__ = ["NegotiatedOperations"]

R = TypeVar("R")
GATHER_SECONDS = 5e-4
"""Submissions of this time are sent together, unless the program already waits for one of them."""
CONTROL_SECONDS = 0.02
"""While an operation is executed, errors of other ranks are received at this interval."""

UNNAMED = "noname"
"""Operations without a name are matched by this name and their number."""


class NegotiatedOperations:
    """The asynchronous operations of one rank.

    Args:
        transport: transport of the job.
        data: transport of the same ranks for the thread; its side channel is open.
    """

    def __init__(self, transport: Transport, data: Transport) -> None:
        numbers = numbers_of(transport)
        self._rank, self._number = transport.rank, numbers[transport.rank]
        self._transport = transport
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
        # Guarded by the condition.
        self._changed = threading.Condition()
        self._is_driving = False
        self._in_flight: dict[str, Handle[Any]] = {}
        self._unsent: list[Handle[Any]] = []
        self._unsent_since = 0.0
        self._unnamed = 0
        self._names = NamesInUse(transport)
        self._waits = Waits()
        self._joining = Joining(transport, self._number)
        self._announcements: Message = {}
        self._is_leaving = False
        self._failure: TransportError | None = None

    def submit(self, call: Call[R]) -> Handle[R]:
        """Submit an operation. Returns at once.

        Raises:
            ConfigurationError: if an earlier operation of the same name is in use (``NamesInUse``).
            TransportError: if an earlier asynchronous operation has failed in a way that ends them all.
        """
        self._require_parent()
        with self._changed:
            self._require_usable()
            key = tensor_name(call) if call.name else f"{UNNAMED}.{self._unnamed}"
            if key in self._in_flight or self._names.is_held(key):
                raise name_in_use(self._number, key)
            self._unnamed += not call.name
            handle: Handle[R] = Handle(key, self, call)
            if call.name:
                self._names.hold(key, handle)
            self._in_flight[key] = handle
            if not self._unsent:
                self._unsent_since = time.monotonic()
            self._unsent.append(handle)
            self._waits.add_user(threading.get_ident())
            recording = timeline.active  # another thread may stop it
            if recording is not None:
                recording.begin(f"NEGOTIATE_{call.operation.upper()}", key)
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
        handle: Handle[int] = Handle("join", self)
        with self._changed:
            self._require_usable()
            self._announcements["join"] = self._joining.begin(handle, zeros)
            self._ensure_driving()
        return handle

    def cancel_join(self) -> None:
        """No longer wait in join(), if an agreement has ended it by an error on all ranks.

        Zeros are contributed until rank 0 confirms that it expects no more of them.
        """
        with self._changed:
            if self._joining.cancel():
                self._ensure_driving()

    def names_in_flight(self) -> list[str]:
        """Names of the operations that this rank has submitted and that are not complete."""
        with self._changed:
            return list(self._in_flight)

    def inspect(self, blocked_in: tuple[str, float] | None) -> None:
        """Called about once a second, because other ranks may wait for this rank while it submits nothing.

        Args:
            blocked_in: blocking call in which this rank has been waiting for a while, in words, and when that began;
                None outside of one.
        """
        with self._changed:
            if self._waits.set_blocked_in(blocked_in) and self._failure is None:
                self._ensure_driving()

    def may_continue_without(self, thread: int) -> bool:
        """Whether this rank may submit operations while a thread waits in a blocking call.

        Other threads are expected to do so if they have submitted operations or waited for them before.

        Args:
            thread: identifier of the thread that waits.
        """
        with self._changed:
            return bool(self._waits.running_users() - {thread})

    def close(self) -> None:
        """End the thread. Collective: all ranks have agreed to leave the job. Operations in flight get an error."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._is_leaving = True
            self._announcements["leave"] = True
            if self._failure is None:
                self._ensure_driving()
            while self._is_driving:
                self._changed.wait()
            self._failure = self._failure or TransportError(
                f"rank {self._number} submits an operation after the job has ended, by shutdown()"
            )
            self._fail_all(
                lambda key: MismatchError(
                    f"operation {key!r} of rank {self._number} was not executed: the job has ended, by shutdown() or "
                    "the end of the program, and another rank has not submitted it"
                ),
                MismatchError(f"rank {self._number} waits in join(), and the job has ended"),
            )
        data = self._threads.transports[0]
        if isinstance(data, Interruptible):
            data.while_waiting = None  # this object becomes garbage, which ends the thread

    def _require_usable(self) -> None:
        if self._failure is not None:
            raise TransportError(str(self._failure)) from self._failure

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
        thread = threading.get_ident()
        with watched(self._transport, "an asynchronous operation"), self._changed:
            self._waits.begin(thread, handle.key)
            self._changed.notify_all()
            try:
                while not handle.is_complete:
                    self._changed.wait()
            finally:
                self._waits.end(thread)

    def poll_for(self, handle: Handle[Any]) -> None:
        """Do nothing: the thread completes handles."""

    def note_seen(self) -> None:
        """Note that the program knows that an operation is complete."""
        self._names.see()

    def _ensure_driving(self) -> None:
        """Let the thread work. The caller holds the lock."""
        if not self._is_driving:
            self._is_driving = True
            self._threads.submit(0, self._drive)

    def _drive(self) -> None:
        """Send, receive and execute until nothing is in flight on this rank. Runs in the thread."""
        self._pace.reset()
        try:
            while self._has_work():
                if self._take_turn():
                    self._pace.reset()
                else:
                    self._report_waits()
                    self._sleep()
        except OtherRankFailedError as error:
            self._fail(error)
        except BaseException as error:  # noqa: BLE001 - the handles of all ranks raise it
            where = shortened([repr(key) for key, _ in self._running], 3) or "its background thread"
            text = f"rank {self._number} has failed in {where}: {type(error).__name__}: {error}"
            with suppress(LentandoError):
                self._negotiation.report_failure(text)
            failure = TransportError(text)
            failure.__cause__ = error
            self._fail(failure)

    def _has_work(self) -> bool:
        with self._changed:
            if self._failure is None and (
                self._in_flight or self._announcements or self._joining.is_waiting or self._joining.is_ending
                or self._waits.is_blocked or self._is_leaving or not self._negotiation.has_sent_all
            ):  # fmt: skip
                return True
            self._is_driving = False  # while the lock is held: a later submission starts the thread again
            self._changed.notify_all()
            return False

    def _take_turn(self) -> bool:
        """Do whatever can be done without waiting. Returns whether that was anything."""
        has_progress = self._negotiation.poll()  # first: rank 0 records who joins in the order of arrival
        message = self._next_message()
        if message:
            has_progress = True
            self._waits.forget_report()
            self._negotiation.report(message)
            has_progress |= self._negotiation.poll()
        while self._negotiation.decisions:
            self._follow(self._negotiation.decisions.popleft())
        return has_progress

    def _next_message(self) -> Message:
        """What rank 0 must be sent; empty if that is nothing."""
        with self._changed:
            message, self._announcements = self._announcements, {}
            if self._unsent:
                young = self._unsent_since + GATHER_SECONDS - time.monotonic()
                if young > 0 and not self._waits.is_waiting and not message:
                    self._changed.wait(young)
                recording = timeline.active
                if recording is not None:
                    recording.mark_cycle()
                unsent, self._unsent = self._unsent, []
                message["submit"] = [self._encoded(handle) for handle in unsent]
            new_round = self._joining.new_round()
            if new_round is not None:
                message["round"] = new_round
        return message

    def _encoded(self, handle: Handle[Any]) -> Any:
        assert handle.call is not None  # nothing is complete before it is sent
        return self._negotiation.encode(handle.key, handle.call.description)

    def _follow(self, decision: Message) -> None:
        self._waits.forget_report()
        if "run" in decision:
            operations = [self._negotiation.decode(sent) for sent in decision["run"]]
            self._run(operations, decision.get("absent") or [[]] * len(operations))
        self._question = decision.get("ask", self._question)
        with self._changed:
            if "round" in decision:
                self._joining.follow(decision["round"])
            for key, text, absent in decision.get("errors", ()):
                if self._rank in absent:
                    self._count_unnamed(key)
                else:
                    self._in_flight.pop(key).fail(MismatchError(text))
            if "joined" in decision:
                self._joining.succeed(decision["joined"])
            if "end" in decision:
                self._is_leaving = False
                self._failure = TransportError("the job has ended")
            self._changed.notify_all()

    def _count_unnamed(self, key: str) -> None:
        """Count an operation without a name that other ranks have submitted, and this rank will not."""
        kind, _, number = key.partition(".")
        if kind == UNNAMED:
            self._unnamed = max(self._unnamed, int(number) + 1)

    def _run(self, operations: list[tuple[str, str]], absent: list[list[int]]) -> None:
        handles: list[Handle[Any]] = []
        calls: list[Call[Any]] = []
        recording = timeline.active
        with self._changed:
            for (key, description), without in zip(operations, absent, strict=True):
                if self._rank in without:  # this rank has joined, and may have submitted a later one of this name
                    self._count_unnamed(key)
                    handle: Handle[Any] = Handle(key, self, self._joining.zeros(description))
                else:
                    handle = self._in_flight[key]
                assert handle.call is not None
                handles.append(handle)
                calls.append(handle.call)
                if recording is not None:
                    recording.finish(f"NEGOTIATE_{handle.call.operation.upper()}", key)
        self._pace.reset()
        self._running = operations
        for done, outcomes in self._execution.run(calls):
            with self._changed:
                for number, outcome in zip(done, outcomes, strict=True):
                    handle = handles[number]
                    if self._in_flight.get(handle.key) is handle:
                        del self._in_flight[handle.key]
                    if isinstance(outcome, Exception):
                        handle.fail(outcome)
                    else:
                        handle.succeed(outcome)
                self._changed.notify_all()
            self._pace.reset()

    def _while_executing(self) -> None:
        """Called again and again while an operation waits for other ranks."""
        now = time.monotonic()
        if now - self._looked_at > CONTROL_SECONDS:
            self._looked_at = now
            self._negotiation.poll()
        sleep(self._pace.pause_seconds(is_urgent=self._is_urgent, is_executing=True))

    @property
    def _is_urgent(self) -> bool:
        return self._waits.is_waiting or self._joining.is_waiting

    def _sleep(self) -> None:
        with self._changed:
            pause = self._pace.pause_seconds(is_urgent=self._is_urgent)
            if pause:
                self._changed.wait(pause)
        if not pause:
            sleep(0)

    def _report_waits(self) -> None:
        """Report to rank 0 what this rank's threads wait for."""
        with self._changed:
            messages = self._waits.reports(self._pace.waited_seconds, self._question, self._joining.is_waiting)
        for message in messages:
            self._negotiation.report(message)

    def _fail(self, failure: TransportError) -> None:
        """Let all operations in flight, and all later ones, raise an error."""
        with self._changed:
            self._failure = failure
            self._is_driving = False
            self._fail_all(lambda _: failure, failure)

    def _fail_all(self, error_of: Callable[[str], Exception], error_of_join: Exception) -> None:
        """Let all operations in flight, and join(), raise an error. The caller holds the lock."""
        for key, handle in self._in_flight.items():
            handle.fail(error_of(key))
        self._in_flight.clear()
        self._joining.fail(error_of_join)
        self._changed.notify_all()
