"""The messages of gossip: a push-sum weight and a share of the parameters, in contiguous memory."""

from collections.abc import Sequence

import numpy as np

from lentando.comm.array_module import array_module, is_on_host
from lentando.comm.errors import MismatchError
from lentando.comm.transport import Array
from lentando.optimizers.rules.wire import SentShare, Wire

__all__ = ["GossipMessage"]

HEADER = 2
"""Number of float64 values in the header: the weight w and the number of the gossip step."""


class GossipMessage:
    """A header of two float64 values and a share of each buffer of x, as one contiguous message.

    On a device the header is a separate message in host memory: the host reads it, and fetching it from the device
    would make the host wait for everything that the device has been given to do.

    Args:
        like: buffers of x.
        wire: coding of the shares.
        memory: ``size_bytes(like, wire)`` bytes of memory, such as that of another rank; new memory by default.

    Attributes:
        parts: arrays that are sent or received.
        shares: coded share of each buffer.
    """

    def __init__(self, like: Sequence[Array], wire: Wire, memory: Array | None = None) -> None:
        # Eight-byte numbers first, so that each share lies at a multiple of its size.
        ordered = sorted(range(len(like)), key=lambda number: -wire.alignment_bytes(like[number]))
        lengths = [wire.size_bytes(x) for x in like]
        header_bytes, size_bytes = 8 * HEADER, sum(lengths)
        if all(map(is_on_host, like)):
            if memory is None:
                memory = np.zeros(header_bytes + size_bytes, np.uint8)
            header, memory_of_shares = memory[:header_bytes], memory[header_bytes:]
            self.parts = [memory]
        else:
            header = np.zeros(header_bytes, np.uint8)
            memory_of_shares = array_module(like[0]).zeros(size_bytes, np.uint8)
            self.parts = [header, memory_of_shares]
        self._header = header.view(np.float64)
        by_number: dict[int, SentShare] = {}
        start = 0
        for number in ordered:
            by_number[number] = wire.share_in(memory_of_shares[start : start + lengths[number]], like[number])
            start += lengths[number]
        self.shares = [by_number[number] for number in range(len(like))]

    @staticmethod
    def size_bytes(like: Sequence[Array], wire: Wire) -> int:
        """Bytes of a message in host memory."""
        return 8 * HEADER + sum(wire.size_bytes(x) for x in like)

    @property
    def weight(self) -> float:
        """Share of the sender's push-sum weight."""
        return float(self._header[0])

    def whole_shares(self) -> list[Array]:
        """The share of each buffer, decoded, in the buffer's dtype."""
        return [share.read(slice(None)) for share in self.shares]

    def write_header(self, step: int, weight: float) -> None:
        """Fill the header with the number of the gossip step and a share of the push-sum weight."""
        self._header[:] = weight, step

    def restore(self, step: int, weight: float, shares: Sequence[Array]) -> None:
        """Fill the message with saved content, as if it had been received again."""
        self._header[:] = weight, step
        for share, values in zip(self.shares, shares, strict=True):
            share.restore(values)

    def check(self, peer: int, step: int) -> None:
        """Check the number of the gossip step: a lost or doubled message would change the model of every rank.

        Args:
            peer: rank that has sent the message.
            step: number of the gossip step in which the message was expected.

        Raises:
            MismatchError: if the message belongs to another step.
        """
        if self._header[1] != step:
            raise MismatchError(
                f"expected gossip message number {step} from rank {peer}, got number {int(self._header[1])}: a "
                "message was lost, doubled or overtaken in transit"
            )
