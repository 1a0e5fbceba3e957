"""A line on rank 0 about long work that prints nothing, so that it is not taken for a hang."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["announced_if_long"]

QUIET_SECONDS = 5.0
"""Work that ends within this time is not mentioned."""


@contextmanager
def announced_if_long(work: str, rank: int = 0) -> Iterator[None]:
    """Say on stderr what rank 0 does within this context, if it takes more than five seconds; and when it has ended.

    Args:
        work: what is done, in words: ``saving a checkpoint to runs/slowmo``.
        rank: number of this rank. Ranks other than 0 write nothing.

    Example:
        >>> with announced_if_long("reading 40 GB"):
        ...     total = sum(range(10))
    """
    if rank != 0:
        yield
        return
    began = time.monotonic()
    is_announced = threading.Event()

    def announce() -> None:
        is_announced.set()
        _write(f"Lentando: {work} ...")

    timer = threading.Timer(QUIET_SECONDS, announce)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if is_announced.is_set():
            _write(f"Lentando: {work} has ended after {time.monotonic() - began:.0f} s")


def _write(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
