"""A timeline of what each rank communicates, as a Chrome trace: open it in https://ui.perfetto.dev or chrome://tracing.

Each rank writes a file of its own. It is valid JSON at any time, also after the process was killed: events are appended
by a thread, up to a twentieth of a second later, and each append replaces the end of the array. Time is that of rank
0's clock: at the start, ranks measure by messages how much their clocks differ, and the file states how exactly.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lentando.comm.agreement import Event, Intent, agree, fingerprint
from lentando.comm.clocks import ClockOffset, measure_clock
from lentando.comm.errors import ConfigurationError
from lentando.comm.link_times import measure_link_seconds
from lentando.comm.transport import Transport
from lentando.comm.turns import turn

__all__ = ["Timeline", "active", "recorded", "start", "start_from_environment", "stop"]

P = ParamSpec("P")
T = TypeVar("T")

WRITE_SECONDS = 0.05
"""Time after which an event has been written."""
END = b"\n]\n"
"""End of the file, which the next events replace."""

_log = logging.getLogger("lentando")


class Timeline:
    """Records the events of one rank.

    Args:
        path: file to write; an existing one is replaced.
        rank: number of this rank.
        clock: difference between the clocks of rank 0 and of this rank.
        mark_cycles: whether the beginning of each negotiation is marked.
        link_seconds: time that a message of ``PROBE_BYTES`` takes from the previous rank, as ``measure_link_seconds``
            has measured it.
    """

    def __init__(
        self,
        path: Path,
        rank: int,
        clock: ClockOffset,
        mark_cycles: bool = False,
        link_seconds: float | None = None,
    ) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._rank = rank
        self._offset_us = clock.seconds * 1e6
        self._mark_cycles = mark_cycles
        self._threads: set[int] = set()
        self._events: list[dict[str, Any]] = []
        self._has_events = threading.Event()
        self._is_stopped = False
        self._end = 0
        self._writing = threading.Lock()
        started = {
            "start_time_since_epoch_in_micros": int(time.time() * 1e6 - self.now()),
            "clock_offset_in_micros": round(self._offset_us, 3),
            "clock_uncertainty_in_micros": round(clock.uncertainty_seconds * 1e6, 3),
        }
        if link_seconds is not None:
            started["message_from_previous_rank_in_micros"] = round(link_seconds * 1e6, 3)
        self._add("M", "process_name", args={"name": f"rank {rank}", **started})
        self._add("M", "process_sort_index", args={"sort_index": rank})
        self._write()
        threading.Thread(target=self._write_events, name="lentando-timeline", daemon=True).start()

    def now(self) -> float:
        """Time in microseconds, by the clock of rank 0."""
        return time.perf_counter_ns() / 1e3 + self._offset_us

    def span(self, name: str, since: float, args: Mapping[str, Any]) -> None:
        """Record what this thread has done until now.

        Args:
            name: what it was.
            since: its beginning, as ``now`` returned it.
            args: further values, as JSON.
        """
        self._add("X", name, ts=since, dur=self.now() - since, args=args)

    def begin(self, name: str, key: str) -> None:
        """Record the beginning of something that other events may overlap."""
        self._add("b", name, cat="negotiation", id=key, args={"tensor": key})

    def finish(self, name: str, key: str) -> None:
        """Record the end of what ``begin`` has recorded."""
        self._add("e", name, cat="negotiation", id=key)

    def mark_cycle(self) -> None:
        """Record that a negotiation begins, if that was asked for."""
        if self._mark_cycles:
            self._add("i", "CYCLE_START", s="g")

    def close(self) -> None:
        """Write all events, and close the file."""
        self._is_stopped = True
        self._has_events.set()
        with self._writing:
            self._write_or_end()
            self._close_file()

    def _add(self, phase: str, name: str, **values: Any) -> None:
        if self._file < 0:
            return
        thread = threading.get_ident()
        if thread not in self._threads:
            self._threads.add(thread)
            self._add("M", "thread_name", args={"name": threading.current_thread().name})
        event = {"name": name, "ph": phase, "pid": self._rank, "tid": thread & 0x7FFFFFFF, "ts": self.now(), **values}
        self._events.append(event)
        if not self._has_events.is_set():
            self._has_events.set()

    def _write_events(self) -> None:
        while not self._is_stopped:
            self._has_events.wait()
            time.sleep(WRITE_SECONDS)
            self._has_events.clear()
            with self._writing:
                self._write_or_end()

    def _write_or_end(self) -> None:
        """Write, or end the recording with a warning, and the file with the last event that fits."""
        try:
            self._write()
        except OSError as error:
            _log.warning(
                "rank %d cannot write its timeline any more (%s): the timeline ends here, and the job continues",
                self._rank,
                error.strerror,
            )
            with suppress(OSError):  # reported above
                os.ftruncate(self._file, self._end)
                os.pwrite(self._file, END, self._end)
            self._close_file()

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _write(self) -> None:
        events = self._events[:]
        del self._events[: len(events)]  # not a new list: another thread may be about to append to this one
        if not events or self._file < 0:
            return
        text = ",\n".join(json.dumps(event) for event in events).encode()
        start = b",\n" if self._end else b"[\n"
        content, position = start + text + END, self._end
        while content:  # a disk that becomes full takes a part
            written = os.pwrite(self._file, content, position)
            content, position = content[written:], position + written
        self._end = position - len(END)


active: Timeline | None = None
"""The timeline of this process; None if nothing is recorded."""


def recorded(name: str, function: Callable[P, T], **args: Any) -> Callable[P, T]:
    """The function itself, or one that also records each call while a timeline is active.

    Args:
        name: name of the event.
        function: function to call.
        args: further values of the event, as JSON.
    """
    timeline = active
    if timeline is None:
        return function

    @wraps(function)
    def call(*positional: P.args, **named: P.kwargs) -> T:
        since = timeline.now()
        try:
            return function(*positional, **named)
        finally:
            timeline.span(name, since, args)

    return call


def start(transport: Transport, path: str | Path, mark_cycles: bool = False) -> None:
    """Begin to record. All ranks call this together; an active timeline ends.

    Args:
        transport: transport of the job.
        path: file of rank 0. That of rank 1 is called ``NAME.rank1.SUFFIX``, and so on.
        mark_cycles: whether the beginning of each negotiation is marked, by ``CYCLE_START``.

    Raises:
        MismatchError: on every rank, if one of them does something else.
        ConfigurationError: on a rank that cannot write its file.
    """
    global active  # noqa: PLW0603 - one per process
    stop()
    intent = Intent(Event.OPERATION, subject=fingerprint(["start_timeline"]))
    with turn(transport, intent):
        agree(transport, intent, lambda: "calls start_timeline()")
        clock = measure_clock(transport)
        link_seconds = measure_link_seconds(transport)
    own = Path(path)
    if transport.rank:
        own = own.with_name(f"{own.stem}.rank{transport.rank}{own.suffix}")
    try:
        own.parent.mkdir(parents=True, exist_ok=True)
        active = Timeline(own, transport.rank, clock, mark_cycles, link_seconds)
    except OSError as error:
        raise ConfigurationError(f"rank {transport.rank} cannot write the timeline {own}: {error.strerror}") from error


def stop() -> None:
    """End the recording, and complete the file. Without one this has no effect. Other ranks are not waited for."""
    global active
    timeline, active = active, None
    if timeline is not None:
        timeline.close()


def start_from_environment(transport: Transport) -> None:
    """Begin to record if ``LENTANDO_TIMELINE``, a folder, or Horovod's ``HOROVOD_TIMELINE``, a file, is set.

    Collective. The files in the folder are called ``timeline.json`` (rank 0), ``timeline.rank1.json`` and so on.
    """
    folder, file = os.environ.get("LENTANDO_TIMELINE"), os.environ.get("HOROVOD_TIMELINE")
    marks = os.environ.get("HOROVOD_TIMELINE_MARK_CYCLES") == "1"
    if folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"LENTANDO_TIMELINE={folder!r} is no folder: {error.strerror}") from error
        start(transport, Path(folder, "timeline.json"), marks)
    elif file and file != "DYNAMIC":  # Horovod's word for: not before start_timeline() is called
        start(transport, file, marks)


def _drop_in_child() -> None:
    global active  # noqa: PLW0603
    active = None  # the file belongs to the rank


os.register_at_fork(after_in_child=_drop_in_child)
