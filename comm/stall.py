"""Reports stalls: which ranks are missing when others have waited too long, and which line each of them executes.

A thread of each rank checks the clock at intervals. If this rank has waited for longer than ``LENTANDO_STALL_SECONDS``,
it asks the others over the transport's side channel. Their inspectors answer whatever their main threads do; a rank
that does not answer is stopped, dead or unreachable. Ranks of Local SGD and of gossip may drift apart without limit:
only waits are inspected.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from lentando.comm.capabilities import SideChannel
from lentando.comm.errors import ConfigurationError
from lentando.comm.job import job_of
from lentando.comm.stall_report import program_line, report
from lentando.comm.transport import Transport

__all__ = [
    "STALLED_STATUS",
    "StallInspector",
    "Submitting",
    "Thresholds",
    "begin_inspection",
    "end_inspection",
    "inspect_submissions",
    "watched",
]

_log = logging.getLogger("lentando")

ANSWER_SECONDS = 2.0
"""Time that the others have to answer: a busy interpreter may be slow to switch threads."""
BLOCKED_SECONDS = 0.5
"""Time after which asynchronous operations, for which others may wait, are notified of a wait in a blocking call."""
SUBMITTED_NAMES = 100
"""The most names of asynchronous operations in an answer."""
LAST_RESORT_SECONDS = 10.0
"""A rank that relies on another one to end the job ends it itself after this time."""
STALLED_STATUS = 75
"""Exit status of a job that is ended because it stalled: EX_TEMPFAIL ("try again later") of sysexits.h."""


@dataclass(frozen=True)
class Thresholds:
    """Limits of how long a rank may wait for others.

    Attributes:
        warn_seconds: time after which the missing ranks are reported, repeatedly; 0 for never.
        shutdown_seconds: time after which the job is ended; 0 for never.
    """

    warn_seconds: float
    shutdown_seconds: float

    @classmethod
    def from_environment(cls) -> "Thresholds":
        """The values of ``LENTANDO_STALL_SECONDS`` (default 60) and ``LENTANDO_STALL_SHUTDOWN_SECONDS`` (default 0).

        Horovod's names for these variables are accepted as well.

        Raises:
            ConfigurationError: if one is not a number of seconds.
        """
        is_off = os.environ.get("HOROVOD_STALL_CHECK_DISABLE") == "1"
        warn = _seconds(("LENTANDO_STALL_SECONDS", "HOROVOD_STALL_CHECK_TIME_SECONDS"), 0.0 if is_off else 60.0)
        return cls(warn, _seconds(("LENTANDO_STALL_SHUTDOWN_SECONDS", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"), 0.0))


def _seconds(names: Sequence[str], default: float) -> float:
    for name in names:
        text = os.environ.get(name)
        if text is None:
            continue
        try:
            seconds = float(text)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds < float("inf"):
            raise ConfigurationError(f"{name}={text!r}: expected a number of seconds, 0 for never")
        return seconds
    return default


def begin_inspection(transport: Transport, like: Transport | None = None) -> None:
    """Start inspecting the waits of the main thread on this transport. Collective.

    Args:
        transport: transport of a job, or of a subset of its ranks.
        like: transport of the whole job, if ``transport`` is that of a subset: it is inspected only if the job is.

    Raises:
        ConfigurationError: as ``Thresholds.from_environment``.
    """
    if like is not None and job_of(like).find(StallInspector) is None:
        return
    thresholds = Thresholds.from_environment()
    if transport.size > 1 and (thresholds.warn_seconds or thresholds.shutdown_seconds):
        job_of(transport).put(StallInspector(transport, thresholds))


def end_inspection(transport: Transport) -> None:
    """Stop inspecting waits on this transport, if they are inspected."""
    inspector = job_of(transport).drop(StallInspector)
    if inspector is not None:
        inspector.close()


@contextmanager
def watched(transport: Transport, operation: str) -> Iterator[None]:
    """Within this context, the caller waits for other ranks, and the stall inspector watches it.

    Args:
        transport: transport of the job.
        operation: description of the operation, equal on all ranks that take part in it.
    """
    inspector = job_of(transport).find(StallInspector)
    if inspector is None:
        yield
        return
    is_outermost = inspector.begin(operation)
    try:
        yield
    finally:
        if is_outermost:
            inspector.end()


class Submitting(Protocol):
    """Asynchronous operations of this rank, for which other ranks may wait."""

    def names_in_flight(self) -> list[str]:
        """Names of the operations that this rank has submitted and that are not complete."""

    def may_continue_without(self, thread: int) -> bool:
        """Whether this rank may submit operations while a thread, of this identifier, waits in a blocking call."""

    def inspect(self, blocked_in: tuple[str, float] | None) -> None:
        """Called about once a second.

        Args:
            blocked_in: blocking call in which this rank has been waiting for a while, in words, and when that began;
                None outside of one.
        """


def inspect_submissions(transport: Transport, submitting: Submitting) -> None:
    """Let the stall inspector compare what ranks have submitted, if waits on this transport are inspected."""
    inspector = job_of(transport).find(StallInspector)
    if inspector is not None:
        inspector.submitting = submitting


@dataclass(frozen=True)
class _Wait:
    """A wait of this rank: the operation, the time at which it began, and the thread that waits."""

    operation: str
    since: float
    thread: int


@dataclass
class _Question:
    """A question to all other ranks, with the answers so far, by rank."""

    number: int
    asked_at: float
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)


class StallInspector:
    """A thread that inspects this rank's waits and answers the questions of other ranks.

    Args:
        transport: transport of the job.
        thresholds: limits of how long a wait may last.
    """

    def __init__(self, transport: Transport, thresholds: Thresholds) -> None:
        self.transport = transport
        self._thresholds = thresholds
        self._channel = transport if isinstance(transport, SideChannel) and transport.open_side_channel() else None
        self._main = threading.get_ident()
        self._waits: dict[int, _Wait] = {}
        self._last = "joined the job"
        self._asked = 0
        self._question: _Question | None = None
        self._reported_at: float | None = None
        self.submitting: Submitting | None = None
        self._stop = threading.Event()
        limits = [seconds for seconds in (thresholds.warn_seconds, thresholds.shutdown_seconds) if seconds]
        self._pause_seconds = min(1.0, min(limits) / 10)
        self._thread = threading.Thread(target=self._run, name="lentando-stalls", daemon=True)
        self._thread.start()

    def begin(self, operation: str) -> bool:
        """Enter a wait of this thread. Returns False if it is within another one, which describes it better."""
        thread = threading.get_ident()
        if thread in self._waits:
            return False
        self._waits[thread] = _Wait(operation, time.monotonic(), thread)
        return True

    def end(self) -> None:
        """Leave this thread's outermost wait."""
        self._last = self._waits.pop(threading.get_ident()).operation

    @property
    def _wait(self) -> _Wait | None:
        """The longest wait of this rank, None if no thread waits."""
        return min(tuple(self._waits.values()), key=lambda wait: wait.since, default=None)

    def close(self) -> None:
        """Stop the inspector's thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._pause_seconds):
            self._receive()
            wait, now = self._wait, time.monotonic()
            if self.submitting is not None:
                is_blocked = wait is not None and now - wait.since >= BLOCKED_SECONDS
                if wait is not None and is_blocked and not self.submitting.may_continue_without(wait.thread):
                    self.submitting.inspect((wait.operation, wait.since))
                else:
                    self.submitting.inspect(None)
            if wait is None:
                self._question = self._reported_at = None
                continue
            self._inspect(wait, now)

    def _inspect(self, wait: _Wait, now: float) -> None:
        warn, shutdown = self._thresholds.warn_seconds, self._thresholds.shutdown_seconds
        is_over = bool(shutdown) and now - wait.since >= shutdown
        question = self._question
        if question is None:
            since = wait.since if self._reported_at is None else max(wait.since, self._reported_at)
            if is_over or (warn and now - since >= warn):
                self._ask(now)
            return
        if len(question.answers) < self.transport.size - 1 and now - question.asked_at < ANSWER_SECONDS:
            return
        self._question, self._reported_at = None, now
        present = [rank for rank, answer in question.answers.items() if answer["waits_in"] == wait.operation]
        if min([*present, self.transport.rank]) == self.transport.rank:  # one rank reports for all that wait here
            answers = {**question.answers, self.transport.rank: self._answer()}
            seconds, can_ask = now - wait.since, self._channel is not None
            _log.warning("%s", report(self.transport, wait.operation, seconds, answers, can_ask))
        elif now - wait.since < shutdown + LAST_RESORT_SECONDS:
            return
        if is_over:
            _log.error(
                "rank %d ends the job with status %d: LENTANDO_STALL_SHUTDOWN_SECONDS=%g have passed",
                self.transport.rank, STALLED_STATUS, shutdown,
            )  # fmt: skip
            self.transport.abort(STALLED_STATUS)

    def _ask(self, now: float) -> None:
        self._asked += 1
        self._question = _Question(self._asked, now)
        if self._channel is not None:
            for peer in range(self.transport.size):
                if peer != self.transport.rank:
                    self._channel.send_nowait(peer, json.dumps({"question": self._asked}).encode())

    def _receive(self) -> None:
        """Answer the questions of other ranks, and record their answers."""
        while self._channel is not None and (received := self._channel.receive_nowait()) is not None:
            peer, content = received
            message = json.loads(content)
            if "question" in message:
                self._channel.send_nowait(peer, json.dumps({"to": message["question"], **self._answer()}).encode())
            elif self._question is not None and message["to"] == self._question.number:
                self._question.answers[peer] = message

    def _answer(self) -> dict[str, Any]:
        wait = self._wait
        return {
            "waits_in": None if wait is None else wait.operation,
            "seconds": 0.0 if wait is None else time.monotonic() - wait.since,
            "last": self._last,
            "submitted": [] if self.submitting is None else self.submitting.names_in_flight()[:SUBMITTED_NAMES],
            "at": program_line(sys._current_frames().get(self._main)),  # noqa: SLF001 - documented by Python
        }
