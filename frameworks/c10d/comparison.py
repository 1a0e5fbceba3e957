"""The comparison of a call between the ranks of a group, in one round of messages."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.distributed import DistBackendError

from lentando.comm.agreement import fingerprint
from lentando.comm.errors import grouped_by_rank
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Array, Request, Transport

__all__ = ["Comparison"]

TAG = 4
"""Tag that separates fingerprints from the messages of rings (0), slices (2), and gathered tensors (3)."""


class Comparison:
    """Compares calls, one after the other. Each rank sends a fingerprint of its call to every other one.

    That is one round of messages where a gathering takes several, each of which a slow link or a busy machine delays.
    What a rank sends between ``send`` and ``end`` is on its way meanwhile.

    Args:
        transport: transport of the group, for the thread that executes operations.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._others = [rank for rank in range(transport.size) if rank != transport.rank]
        self._own: Array = np.zeros(1, np.int64)
        self._found: Array = np.zeros((transport.size, 1), np.int64)
        self._description = ""
        self._is_pending = False
        self._request: Request | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a call is being compared: ``end`` will wait for all ranks."""
        return self._is_pending

    def begin(self, call: Sequence[Any], description: str) -> None:
        """Begin to compare a call. Sends nothing yet.

        Args:
            call: name and arguments, as JSON.
            description: the same in words.
        """
        if not self._others:
            return
        self._description = description
        self._own[0] = self._found[self._transport.rank, 0] = fingerprint(call)
        self._is_pending = True

    def send(self) -> None:
        """Send the fingerprint of the call to the other ranks, without waiting for theirs."""
        if not self._is_pending or self._request is not None:
            return
        sends = [(rank, self._own) for rank in self._others]
        receives = [(rank, self._found[rank]) for rank in self._others]
        self._request = self._transport.exchange(sends, receives, TAG, overlap=False)

    def end(self) -> None:
        """Wait for the fingerprints of all ranks, which have then come as far as ``send``. Sends before, if need be.

        Without effect if no comparison is pending.

        Raises:
            DistBackendError: on every rank, with the calls of all, if they differ.
        """
        self.send()
        if self._request is None:
            return
        self._request.wait()
        self._request, self._is_pending = None, False
        if (self._found != self._own).any():
            by_rank = grouped_by_rank(allgather_object(self._transport, self._description))
            raise DistBackendError(
                f"the ranks of the group are not about to do the same thing. {by_rank}. Every rank must call the same "
                "operations in the same order, with tensors of the same number of elements and dtype"
            )
