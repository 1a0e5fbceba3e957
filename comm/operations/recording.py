"""Begins and ends the recording of a timeline, by Horovod's functions."""

from os import PathLike
from pathlib import Path

from lentando.comm import timeline
from lentando.comm.world import transport

__all__ = ["start_timeline", "stop_timeline"]


def start_timeline(file_path: "str | PathLike[str]", mark_cycles: bool = False) -> None:
    """Record what each rank communicates, as a Chrome trace for https://ui.perfetto.dev. Every rank calls this.

    The same happens from ``init()`` on if the environment variable ``LENTANDO_TIMELINE`` names a folder, or Horovod's
    ``HOROVOD_TIMELINE`` a file. The recording ends with ``stop_timeline()`` or ``shutdown()``; the file of a program
    that is killed contains all but the last twentieth of a second. Events are the negotiation of each collective call
    (``NEGOTIATE_ALLREDUCE``), its execution (``ALLREDUCE``) with names and bytes, and outer steps. Times are
    microseconds of rank 0's clock; each file states the measured offset of its rank's clock, and its uncertainty.

    Args:
        file_path: file of rank 0. Rank 1 writes ``NAME.rank1.SUFFIX`` in the same folder, and so on.
        mark_cycles: whether the beginning of each negotiation is marked, by ``CYCLE_START``.

    Raises:
        MismatchError: on every rank, if one of them does something else.
        ConfigurationError: on a rank that cannot write its file.
    """
    timeline.start(transport(), Path(file_path), mark_cycles)


def stop_timeline() -> None:
    """End the recording of this rank, and complete its file. Without a recording, this has no effect."""
    timeline.stop()
