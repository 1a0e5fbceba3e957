"""What the threads of a rank have submitted, shared with the background thread that executes it."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lentando.comm import timeline
from lentando.comm.asynchronous.coordinator import Message
from lentando.comm.asynchronous.handle import Call, Executor, Handle, ZeroCall, tensor_name
from lentando.comm.asynchronous.joining import Joining
from lentando.comm.asynchronous.names_in_use import NamesInUse, name_in_use
from lentando.comm.asynchronous.waits import Waits
from lentando.comm.errors import MismatchError, TransportError
from lentando.comm.transport import Transport

__all__ = ["Submissions"]

R = TypeVar("R")
GATHER_SECONDS = 5e-4
"""Submissions of this time are sent together, unless the program already waits for one of them."""

UNNAMED = "noname"
"""Operations without a name are matched by this name and their number."""


class Submissions:
    """The operations of one rank that are in flight, and the threads that wait for them.

    Callers hold ``changed``, unless a method says that it takes the lock itself.

    Args:
        transport: transport of the job.
        number: number of this rank in the job, for messages.

    Attributes:
        changed: lock, and condition which is notified whenever something has changed.
        waits: what the threads of this rank wait for.
        joining: the ``join()`` in which this rank waits, if any.
        failure: error that has ended all operations, None before that.
    """

    def __init__(self, transport: Transport, number: int) -> None:
        self.changed = threading.Condition()
        self.waits = Waits()
        self.joining = Joining(transport, number)
        self.failure: TransportError | None = None
        self._rank, self._number = transport.rank, number
        self._is_driven = False
        self._in_flight: dict[str, Handle[Any]] = {}
        self._unsent: list[Handle[Any]] = []
        self._unsent_since = 0.0
        self._unnamed = 0
        self._names = NamesInUse(transport)
        self._announcements: Message = {}
        self._is_leaving = False

    @property
    def is_urgent(self) -> bool:
        """Whether a thread waits for an operation, or in ``join()``. Needs no lock."""
        return self.waits.is_waiting or self.joining.is_waiting

    @property
    def is_any_pending(self) -> bool:
        """Whether messages of other ranks are needed, or rank 0 must be sent one."""
        return bool(
            self._in_flight or self._announcements or self.joining.is_waiting or self.joining.is_ending
            or self.waits.is_blocked or self._is_leaving
        )  # fmt: skip

    def add(self, call: Call[R], executor: Executor) -> Handle[R]:
        """Submit an operation.

        Args:
            call: the operation.
            executor: lets threads wait for it.

        Raises:
            ConfigurationError: if an earlier operation of the same name is in use (``NamesInUse``).
            TransportError: if an earlier asynchronous operation has failed in a way that ends them all.
        """
        self._require_usable()
        key = tensor_name(call) if call.name else f"{UNNAMED}.{self._unnamed}"
        if key in self._in_flight or self._names.is_held(key):
            raise name_in_use(self._number, key)
        self._unnamed += not call.name
        handle: Handle[R] = Handle(key, executor, call)
        if call.name:
            self._names.hold(key, handle)
        self._in_flight[key] = handle
        if not self._unsent:
            self._unsent_since = time.monotonic()
        self._unsent.append(handle)
        self.waits.add_user(threading.get_ident())
        recording = timeline.active  # another thread may stop it
        if recording is not None:
            recording.begin(f"NEGOTIATE_{call.operation.upper()}", key)
        return handle

    def join(self, handle: Handle[int], zeros: ZeroCall) -> None:
        """Contribute zeros to the sums of the other ranks from now on, until ``handle`` is complete.

        Raises:
            ConfigurationError: if another thread of this rank has joined.
            TransportError: as ``add``.
        """
        self._require_usable()
        self._announcements["join"] = self.joining.begin(handle, zeros)

    def wait_for(self, handle: Handle[Any]) -> None:
        """Wait until the operation of a handle is complete. Takes the lock."""
        thread = threading.get_ident()
        with self.changed:
            self.waits.begin(thread, handle.key)
            self.changed.notify_all()
            try:
                while not handle.is_complete:
                    self.changed.wait()
            finally:
                self.waits.end(thread)

    def names(self) -> list[str]:
        """Names of the operations in flight."""
        return list(self._in_flight)

    def note_seen(self) -> None:
        """Note that the program knows that an operation is complete. Needs no lock."""
        self._names.see()

    def leave(self) -> None:
        """Announce to rank 0 that this rank leaves the job."""
        self._is_leaving = True
        self._announcements["leave"] = True

    def end(self) -> None:
        """Wait until the background thread has stopped, and let all operations in flight, and later ones, fail."""
        while self._is_driven:
            self.changed.wait()
        self.failure = self.failure or TransportError(
            f"rank {self._number} submits an operation after the job has ended, by shutdown()"
        )
        self._fail_all(
            lambda key: MismatchError(
                f"operation {key!r} of rank {self._number} was not executed: the job has ended, by shutdown() or "
                "the end of the program, and another rank has not submitted it"
            ),
            MismatchError(f"rank {self._number} waits in join(), and the job has ended"),
        )

    def _require_usable(self) -> None:
        if self.failure is not None:
            raise TransportError(str(self.failure)) from self.failure

    # What follows is called by the background thread, except ``start_driving``.

    def start_driving(self) -> bool:
        """Note that the background thread works. Returns whether it did not."""
        was_driven, self._is_driven = self._is_driven, True
        return not was_driven

    def stop_driving(self) -> None:
        """Note that the background thread sleeps: a later submission must start it again."""
        self._is_driven = False
        self.changed.notify_all()

    def next_message(self, encode: Callable[[Handle[Any]], Any]) -> Message:
        """What rank 0 must be sent; empty if that is nothing. Takes the lock.

        Args:
            encode: returns what is sent for a submission.
        """
        with self.changed:
            message, self._announcements = self._announcements, {}
            if self._unsent:
                young = self._unsent_since + GATHER_SECONDS - time.monotonic()
                if young > 0 and not self.waits.is_waiting and not message:
                    self.changed.wait(young)
                recording = timeline.active
                if recording is not None:
                    recording.mark_cycle()
                unsent, self._unsent = self._unsent, []
                message["submit"] = [encode(handle) for handle in unsent]
            new_round = self.joining.new_round()
            if new_round is not None:
                message["round"] = new_round
        return message

    def follow(self, decision: Message) -> None:
        """Follow what rank 0 has decided besides the operations to execute. Takes the lock."""
        with self.changed:
            if "round" in decision:
                self.joining.follow(decision["round"])
            for key, text, absent in decision.get("errors", ()):
                if self._rank in absent:
                    self._count_unnamed(key)
                else:
                    self._in_flight.pop(key).fail(MismatchError(text))
            if "joined" in decision:
                self.joining.succeed(decision["joined"])
            if "end" in decision:
                self._is_leaving = False
                self.failure = TransportError("the job has ended")
            self.changed.notify_all()

    def begin(
        self, operations: Sequence[tuple[str, str]], absent: Sequence[Sequence[int]], executor: Executor
    ) -> tuple[list[Handle[Any]], list[Call[Any]]]:
        """Handles and calls of operations that are executed now. Takes the lock.

        Args:
            operations: key and description of each.
            absent: for each, the ranks that have joined, and contribute zeros.
            executor: executor of the operations.
        """
        handles: list[Handle[Any]] = []
        calls: list[Call[Any]] = []
        recording = timeline.active
        with self.changed:
            for (key, description), without in zip(operations, absent, strict=True):
                if self._rank in without:  # this rank has joined, and may have submitted a later one of this name
                    self._count_unnamed(key)
                    handle: Handle[Any] = Handle(key, executor, self.joining.zeros(description))
                else:
                    handle = self._in_flight[key]
                handles.append(handle)
                calls.append(handle.call)
                if recording is not None:
                    recording.finish(f"NEGOTIATE_{handle.call.operation.upper()}", key)
        return handles, calls

    def complete(self, handles: Sequence[Handle[Any]], outcomes: Sequence[Any]) -> None:
        """Give handles the results or errors of their operations. Takes the lock."""
        with self.changed:
            for handle, outcome in zip(handles, outcomes, strict=True):
                if self._in_flight.get(handle.key) is handle:
                    del self._in_flight[handle.key]
                if isinstance(outcome, Exception):
                    handle.fail(outcome)
                else:
                    handle.succeed(outcome)
            self.changed.notify_all()

    def fail(self, failure: TransportError) -> None:
        """Let all operations in flight, and all later ones, raise an error. Takes the lock."""
        with self.changed:
            self.failure = failure
            self._is_driven = False
            self._fail_all(lambda _: failure, failure)

    def _count_unnamed(self, key: str) -> None:
        """Count an operation without a name that other ranks have submitted, and this rank will not."""
        kind, _, number = key.partition(".")
        if kind == UNNAMED:
            self._unnamed = max(self._unnamed, int(number) + 1)

    def _fail_all(self, error_of: Callable[[str], Exception], error_of_join: Exception) -> None:
        """Let all operations in flight, and join(), raise an error."""
        for key, handle in self._in_flight.items():
            handle.fail(error_of(key))
        self._in_flight.clear()
        self.joining.fail(error_of_join)
        self.changed.notify_all()
