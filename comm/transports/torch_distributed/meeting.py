"""The name under which the ranks meet in a store: drawn by rank 0, and new for each job.

torchrun keeps its store when it ends all ranks and starts them again (``--max-restarts``), with all that the earlier
ranks have written. A rank that is early would read there the address of a process that has died, and fail to connect to
it. No variable distinguishes the two jobs on all nodes: ``TORCHELASTIC_RESTART_COUNT`` counts the failures of one node.
Each rank therefore asks rank 0 by a question that no earlier process has asked, and waits for the answer to it.
"""

import secrets
import time
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]  # not in its stubs

__all__ = ["RanksMissingError", "agree_on_name"]

POLL_SECONDS = 5e-3


class RanksMissingError(RuntimeError):
    """Some ranks have not come in time.

    Args:
        ranks: their numbers.

    Attributes:
        ranks: the same.
    """

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"missing ranks: {ranks}")
        self.ranks = ranks


def agree_on_name(store: Store, rank: int, size: int, timeout: timedelta = timedelta.max) -> str:
    """Return a name that no earlier ranks have used in this store, the same on all ranks. Collective.

    Args:
        store: store that all ranks share; no other object uses its keys, except earlier calls of this function.
        rank: number of this rank.
        size: number of ranks.
        timeout: the longest time to wait for others.

    Raises:
        RanksMissingError: if they have not come by then.
    """
    until = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        name = secrets.token_hex(8)
        _answer(store, name, set(range(1, size)), until)
        return name
    question = secrets.token_hex(8)
    store.set(f"question/{rank}", question)
    answer: list[str] = []
    while answer[:1] != [question]:
        _pause(until, [0])
        answer = _read(store, f"answer/{rank}").split()
    store.set(f"{answer[1]}/{rank}", "received")
    return answer[1]


def _answer(store: Store, name: str, waiting: set[int], until: float) -> None:
    """Answer the latest question of each rank until all have received the answer."""
    answered: dict[int, str] = {}
    while waiting:
        for rank in sorted(waiting):
            question = _read(store, f"question/{rank}")
            if question != answered.get(rank, ""):
                store.set(f"answer/{rank}", f"{question} {name}")
                answered[rank] = question
        waiting = {rank for rank in waiting if not store.check([f"{name}/{rank}"])}
        _pause(until, sorted(waiting))


def _pause(until: float, missing: list[int]) -> None:
    if missing and time.monotonic() > until:
        raise RanksMissingError(missing)
    time.sleep(POLL_SECONDS)


def _read(store: Store, key: str) -> str:
    """Return the value of a key, or an empty text if there is none."""
    return store.get(key).decode() if store.check([key]) else ""
