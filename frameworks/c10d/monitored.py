"""A barrier whose rank 0 says which ranks are missing, for finding the rank that a job waits for."""

import time
from datetime import timedelta

import torch
from torch.distributed import DistBackendError

from lentando.c10d.messages import TAGS, Messages

__all__ = ["monitored_barrier"]

TAG = TAGS
"""Tag of its messages, which programs cannot use."""


def monitored_barrier(messages: Messages, rank: int, size: int, timeout: timedelta, wait_all_ranks: bool) -> None:
    """Wait until all ranks have called this. Not in order with other operations: it works while one of them hangs.

    Args:
        messages: messages of the group.
        rank: number of this rank.
        size: number of ranks.
        timeout: the longest time to wait.
        wait_all_ranks: whether rank 0 waits for all others before it reports those that are missing, not the first one.

    Raises:
        DistBackendError: on all ranks that have called it, if others do not in time.
    """
    token = torch.zeros(1, dtype=torch.uint8)
    if rank > 0:
        try:
            messages.send([token], 0, TAG).wait(timeout)
            messages.receive([token], 0, TAG).wait(timeout)
        except DistBackendError as error:
            raise DistBackendError(
                f"Rank {rank} successfully reached monitoredBarrier, but received errors while waiting for send/recv "
                f"from rank 0, which says which ranks are missing: {error}"
            ) from error
        return
    if timeout <= timedelta(0):
        raise DistBackendError("Rank 0 timed out in monitoredBarrier: its timeout is 0 s")
    until = time.monotonic() + timeout.total_seconds()
    arrivals = {other: messages.receive([torch.zeros(1, dtype=torch.uint8)], other, TAG) for other in range(1, size)}
    missing = []
    for other, arrival in arrivals.items():
        left = max(until - time.monotonic(), 0.001)
        try:
            arrival.wait(timedelta(seconds=left))
        except DistBackendError:
            missing.append(other)
            if not wait_all_ranks:
                break
    if missing:
        raise DistBackendError(f"{_words(missing)} failed to pass monitoredBarrier in {timeout.total_seconds():g} s")
    for work in [messages.send([token], other, TAG) for other in arrivals]:
        work.wait(timeout)


def _words(ranks: list[int]) -> str:
    return f"Rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
