"""Notes in the store of a group about ranks that have left it, so that others do not wait until the timeout."""

import time

from torch._C._distributed_c10d import Store

__all__ = ["Endings"]

GRACE_SECONDS = 2.0
"""How long a rank that waits lets an operation continue after it has read that another one has left: what that one has
done before may still be on its way."""


class Endings:
    """The notes of one group.

    Args:
        store: store that the members share.
        prefix: start of the keys, for this group only.
        rank: number of this rank in the group.
        size: number of members.
    """

    def __init__(self, store: Store, prefix: str, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._any = f"{prefix}/ended"
        self._found: str | None = None
        self._found_at = 0.0

    def note(self, what: str) -> None:
        """Note that this rank takes part in no more operations. Without effect if the store's rank has ended.

        Args:
            what: what it has done, as the rest of a sentence about it.
        """
        try:
            self._store.set(self._key(self._rank), what)
            self._store.set(self._any, "")
        except RuntimeError:  # its rank has ended: the others learn that from their own calls
            return

    def found(self) -> str | None:
        """The ranks that left some time ago, and why, in a sentence; None if nothing is known of any."""
        if self._found is None:
            self._found = self._look()
            self._found_at = time.monotonic()
        return self._found if self._found and time.monotonic() > self._found_at + GRACE_SECONDS else None

    def _look(self) -> str | None:
        try:
            if not self._store.check([self._any]):
                return None
            others = [rank for rank in range(self._size) if rank != self._rank]
            ended = [rank for rank in others if self._store.check([self._key(rank)])]
            return "; ".join(f"rank {rank} {self._store.get(self._key(rank)).decode()}" for rank in ended) or None
        except RuntimeError as error:
            return f"the store of the group, which rank 0 of the job holds, cannot be reached ({error})"

    def _key(self, rank: int) -> str:
        return f"{self._any}/{rank}"
