"""The traces that the ranks of a job have written, as ``comm/timeline.py`` writes them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lentando.comm.errors import ConfigurationError

__all__ = ["Span", "Trace", "read_traces"]


@dataclass(frozen=True)
class Span:
    """Something that a rank has done.

    Attributes:
        name: kind of the communication, such as ``OUTER_STEP`` or ``ALLREDUCE``.
        subject: inner step or tensor to which it belongs; equal on all ranks that did it together.
        began: beginning in microseconds, by the clock of rank 0.
        ended: end in microseconds, by the clock of rank 0.
        event: the event as it stands in the trace.
    """

    name: str
    subject: str
    began: float
    ended: float
    event: dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """What one rank has recorded.

    Attributes:
        rank: number of the rank.
        events: all events, as the file contains them.
        spans: communications, in the order of their beginnings.
        clock_uncertainty_us: largest error of the times, in microseconds, in comparison with the clock of rank 0.
        link_us: time in microseconds that a message of a megabyte took from the previous rank when the recording began;
            None if that rank is on the same node.
    """

    rank: int
    events: list[dict[str, Any]]
    spans: list[Span]
    clock_uncertainty_us: float
    link_us: float | None = None


def read_traces(folder: Path, merged: Path) -> list[Trace]:
    """Read all traces of a folder, ordered by rank.

    Args:
        folder: folder that contains the files of one job.
        merged: file that is not one of them, from an earlier call: that of a single rank looks like one.

    Raises:
        ConfigurationError: if there are none, or one cannot be read or is of another job.
    """
    files = [file for file in sorted(folder.glob("*.json")) if file.resolve() != merged.resolve()]
    traces = [trace for file in files if (trace := _read(file)) is not None]
    if not traces:
        raise ConfigurationError(
            f"{folder} contains no timeline: expected files such as timeline.json and timeline.rank1.json, which "
            f"LENTANDO_TIMELINE={folder} makes each rank of a job write"
        )
    traces.sort(key=lambda trace: trace.rank)
    ranks = [trace.rank for trace in traces]
    if ranks != list(range(len(ranks))):
        raise ConfigurationError(
            f"{folder} contains the timelines of ranks {ranks}: expected one of each rank of one job, from 0 on"
        )
    return traces


def _read(file: Path) -> Trace | None:
    """The trace of a rank; None for a file that has merged those of several."""
    try:
        events = json.loads(file.read_text())
        if len({event["pid"] for event in events}) > 1:
            return None
        about = next(event["args"] for event in events if event["name"] == "process_name")
        return Trace(
            int(about["name"].removeprefix("rank ")),
            events,
            sorted((_span(event) for event in events if event["ph"] == "X"), key=lambda span: span.began),
            float(about["clock_uncertainty_in_micros"]),
            about.get("message_from_previous_rank_in_micros"),
        )
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ConfigurationError(f"{file} is no timeline of a rank ({type(error).__name__}: {error})") from error


def _span(event: dict[str, Any]) -> Span:
    args = event.get("args", {})
    subject = next((str(args[key]) for key in ("inner step", "tensor", "tensors") if key in args), "")
    return Span(event["name"], subject, float(event["ts"]), float(event["ts"]) + float(event["dur"]), event)
