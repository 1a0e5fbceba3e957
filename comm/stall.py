"""Tells who is missing when ranks have waited for each other too long, and where in the program everybody stands.

A thread of each rank looks at a clock once in a while. Where this rank has waited for longer than
``LENTANDO_STALL_SECONDS``, it asks the others over the transport's side channel, whose inspectors answer whatever their
main threads do; a rank that does not answer is stopped, gone or out of reach. Ranks of Local SGD and of gossip may
drift apart as they like: only a wait is looked at.
"""

import json
import logging
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import lentando
from lentando.comm.capabilities import SideChannel
from lentando.comm.errors import ConfigurationError, ranks_in_words, ranks_of
from lentando.comm.transport import Transport

__all__ = ["STALLED_STATUS", "StallInspector", "Thresholds", "begin_inspection", "end_inspection", "watched"]

_log = logging.getLogger("lentando")

ANSWER_SECONDS = 2.0
"""How long the others have to say where they are: a busy interpreter may be slow to let another thread in."""
LAST_RESORT_SECONDS = 10.0
"""After this, a rank that left it to another to end the job does so itself."""
STALLED_STATUS = 75
"""Exit status of a job that is ended because it stalled: the "try again later" of sysexits.h."""


@dataclass(frozen=True)
class Thresholds:
    """When a wait is too long.

    Attributes:
        warn_seconds: tell who is missing after this time, and each time that it has passed once more; 0 never does.
        shutdown_seconds: end the job after this time; 0 never does.
    """

    warn_seconds: float
    shutdown_seconds: float

    @classmethod
    def from_environment(cls) -> "Thresholds":
        """``LENTANDO_STALL_SECONDS`` (60) and ``LENTANDO_STALL_SHUTDOWN_SECONDS`` (0), or Horovod's names for them.

        Raises:
            ConfigurationError: if one is not a number of seconds.
        """
        off = os.environ.get("HOROVOD_STALL_CHECK_DISABLE") == "1"
        warn = _seconds(("LENTANDO_STALL_SECONDS", "HOROVOD_STALL_CHECK_TIME_SECONDS"), 0.0 if off else 60.0)
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


_inspector: "StallInspector | None" = None
"""Of the job that this process belongs to."""


def begin_inspection(transport: Transport) -> None:
    """From here on, waits of the main thread on this transport are looked at. All ranks come together.

    Raises:
        ConfigurationError: as ``Thresholds.from_environment``.
    """
    global _inspector
    thresholds = Thresholds.from_environment()
    if transport.size > 1 and (thresholds.warn_seconds or thresholds.shutdown_seconds):
        _inspector = StallInspector(transport, thresholds)


def end_inspection() -> None:
    """They no longer are."""
    global _inspector
    if _inspector is not None:
        _inspector.close()
        _inspector = None


@contextmanager
def watched(transport: Transport, what: str) -> Iterator[None]:
    """What is done inside waits for other ranks. ``what`` says it in words, equal on all ranks that do the same."""
    inspector = _inspector
    if inspector is None or inspector.transport is not transport:
        yield
        return
    outer = inspector.begin(what)
    try:
        yield
    finally:
        inspector.end(outer)


@dataclass(frozen=True)
class _Wait:
    """What this rank waits in, and since when."""

    what: str
    since: float


@dataclass
class _Question:
    """Asked of all the others, with what has been answered so far."""

    number: int
    asked_at: float
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)


class StallInspector:
    """Looks at this rank's waits, answers the others' questions.

    Args:
        transport: of the job.
        thresholds: when a wait is too long.
    """

    def __init__(self, transport: Transport, thresholds: Thresholds) -> None:
        self.transport = transport
        self._thresholds = thresholds
        self._channel = transport if isinstance(transport, SideChannel) and transport.open_side_channel() else None
        self._main = threading.get_ident()
        self._wait: _Wait | None = None
        self._last = "joined the job"
        self._asked = 0
        self._question: _Question | None = None
        self._told_at: float | None = None
        self._stop = threading.Event()
        limits = [seconds for seconds in (thresholds.warn_seconds, thresholds.shutdown_seconds) if seconds]
        self._pause_seconds = min(1.0, min(limits) / 10)
        self._thread = threading.Thread(target=self._run, name="lentando-stalls", daemon=True)
        self._thread.start()

    def begin(self, what: str) -> "_Wait | None":
        """Enter a wait; what is to be given to ``end``."""
        outer = self._wait
        if outer is None:  # the wider one tells more
            self._wait = _Wait(what, time.monotonic())
        return outer

    def end(self, outer: "_Wait | None") -> None:
        """Leave it."""
        if outer is None and self._wait is not None:
            self._last = self._wait.what
            self._wait = None

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._pause_seconds):
            self._hear()
            wait, now = self._wait, time.monotonic()
            if wait is None:
                self._question = self._told_at = None
                continue
            self._look_at(wait, now)

    def _look_at(self, wait: _Wait, now: float) -> None:
        warn, shutdown = self._thresholds.warn_seconds, self._thresholds.shutdown_seconds
        is_over = bool(shutdown) and now - wait.since >= shutdown
        question = self._question
        if question is None:
            since = wait.since if self._told_at is None else max(wait.since, self._told_at)
            if is_over or (warn and now - since >= warn):
                self._ask(now)
            return
        if len(question.answers) < self.transport.size - 1 and now - question.asked_at < ANSWER_SECONDS:
            return
        self._question, self._told_at = None, now
        present = [rank for rank, answer in question.answers.items() if answer["waits_in"] == wait.what]
        if min([*present, self.transport.rank]) == self.transport.rank:  # one of them speaks for all
            _log.warning("%s", self._in_words(wait, now - wait.since, question))
        elif now - wait.since < shutdown + LAST_RESORT_SECONDS:
            return
        if is_over:
            _log.error(
                "rank %d ends the job with status %d: LENTANDO_STALL_SHUTDOWN_SECONDS=%g are over",
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

    def _hear(self) -> None:
        """Answer what others ask, and take in what they answer."""
        while self._channel is not None and (heard := self._channel.receive_nowait()) is not None:
            peer, content = heard
            said = json.loads(content)
            if "question" in said:
                self._channel.send_nowait(peer, json.dumps({"to": said["question"], **self._answer()}).encode())
            elif self._question is not None and said["to"] == self._question.number:
                self._question.answers[peer] = said

    def _answer(self) -> dict[str, Any]:
        wait = self._wait
        return {
            "waits_in": None if wait is None else wait.what,
            "seconds": 0.0 if wait is None else time.monotonic() - wait.since,
            "last": self._last,
            "at": _place(sys._current_frames().get(self._main)),  # noqa: SLF001 - documented by Python
        }

    def _in_words(self, wait: _Wait, seconds: float, question: _Question) -> str:
        answers = {**question.answers, self.transport.rank: self._answer()}
        present = sorted(rank for rank, answer in answers.items() if answer["waits_in"] == wait.what)
        have = "has" if len(present) == 1 else "have"
        where = _grouped(answers, present)
        text = f"{ranks_in_words(present)} {have} waited for {seconds:.0f} s in {wait.what} ({where})"
        if self._channel is None:
            return f"{text}. Who is missing, transport {self.transport.name!r} has no way to ask"
        missing = [
            f"rank {rank} {_standing(answers.get(rank))}" for rank in range(self.transport.size) if rank not in present
        ]
        if not missing:
            return f"{text}. All ranks are there: the network or the engine underneath does not get on"
        return f"{text}. Missing: {'; '.join(missing)}"


def _grouped(answers: dict[int, dict[str, Any]], ranks: Sequence[int]) -> str:
    """Where each of these ranks stands, those at the same place together."""
    places = ranks_of((rank, answers[rank]["at"]) for rank in ranks)
    if len(places) == 1:
        return f"at {next(iter(places))}"
    return "; ".join(f"{ranks_in_words(same)} at {place}" for place, same in places.items())


def _standing(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return "does not answer: its process is stopped, gone or out of reach"
    if answer["waits_in"] is not None:
        return f"has waited for {answer['seconds']:.0f} s in {answer['waits_in']}, at {answer['at']}"
    return f"is at {answer['at']}, after {answer['last']}"


_LIBRARIES = tuple(
    {
        folder
        for path in (*(path for name, path in sysconfig.get_paths().items() if "lib" in name), *lentando.__path__)
        for folder in (path, str(Path(path).resolve()))
    }
)


def _place(frame: FrameType | None) -> str:
    """File, line and function where a stack leaves the user's program: the last frame that is no library's."""
    while frame is not None:
        if not _is_library(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "no line of the program"  # which has come to its end


def _is_library(path: str) -> bool:
    """Of Lentando, Python, or what is installed."""
    return path.startswith(("<frozen", *_LIBRARIES))
