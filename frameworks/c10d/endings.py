"""Notes in the store of a group about ranks that have left it, so that others do not wait until the timeout.

A call of the store does not return while the process that holds it, rank 0 of the job, stands still. Such calls are
therefore left to a thread, for which no other one waits longer than some time.
"""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from torch._C._distributed_c10d import Store

__all__ = ["Endings"]

GRACE_SECONDS = 2.0
"""How long a rank that waits lets an operation continue after it has read that another one has left: what that one has
done before may still be on its way."""
ANSWER_SECONDS = 0.05
"""How long a rank that waits for an operation waits for the store; it reads a later answer when it asks again."""
NOTE_SECONDS = 2.0
"""How long a rank that leaves waits for the store."""


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
        self._asking = threading.Lock()
        self._has_looked = threading.Event()
        self._has_looked.set()
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lentando-store", daemon=True)
        if size > 1:
            self._thread.start()  # now: at the end of a program, when a rank leaves, no thread can be started

    def note(self, what: str) -> None:
        """Note that this rank takes part in no more operations. The last call; nothing is found after it.

        Without effect if rank 0 of the job has ended or stands still, which the others learn from their own calls.

        Args:
            what: what it has done, as the rest of a sentence about it.
        """
        if self._size > 1:
            self._calls.put(lambda: self._write(what))
            self._calls.put(None)
            self._thread.join(NOTE_SECONDS)

    def found(self) -> str | None:
        """The ranks that left some time ago, and why, in a sentence; None if nothing is known of any."""
        if self._size == 1:
            return None
        with self._asking:
            if self._found is None and self._has_looked.is_set():
                self._has_looked.clear()
                self._calls.put(self._look)
        self._has_looked.wait(ANSWER_SECONDS)
        return self._found if self._found and time.monotonic() > self._found_at + GRACE_SECONDS else None

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def _write(self, what: str) -> None:
        try:
            self._store.set(self._key(self._rank), what)
            self._store.set(self._any, "")
        except RuntimeError:  # rank 0 of the job has ended
            return

    def _look(self) -> None:
        found = self._read()
        self._found_at = time.monotonic()
        self._found = found
        self._has_looked.set()

    def _read(self) -> str | None:
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
