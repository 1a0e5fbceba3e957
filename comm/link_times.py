"""How long a message takes over the link of each rank, measured once, for those who look for a slow link."""

import time

import numpy as np

from lentando.comm.capabilities import SharedNode
from lentando.comm.transport import Transport

__all__ = ["PROBE_BYTES", "measure_link_seconds"]

PROBE_BYTES = 2**20
"""Size of the message: a tenth of a second at 100 Mbit/s, a millisecond at 10 Gbit/s."""


def measure_link_seconds(transport: Transport) -> float | None:
    """Measure how long the message of the previous rank takes, while every rank sends one to the next rank. Collective.

    A slow link of a rank shows in two times: its own, for what it receives, and that of the next rank, for what it
    sends. The second of two rounds counts, because the first sets up connections.

    Args:
        transport: transport that connects the ranks.

    Returns:
        The time in seconds; None if the previous rank is on the same node, or that is not known.
    """
    if not isinstance(transport, SharedNode) or transport.local_size == transport.size:
        return None
    previous, following = (transport.rank - 1) % transport.size, (transport.rank + 1) % transport.size
    sent, received = np.zeros(PROBE_BYTES, np.uint8), np.empty(PROBE_BYTES, np.uint8)
    seconds = 0.0
    for _ in range(2):
        transport.barrier()
        began = time.perf_counter()
        receive = transport.exchange([], [(previous, received)], overlap=False)
        send = transport.exchange([(following, sent)], [], overlap=False)
        receive.wait()
        seconds = time.perf_counter() - began
        send.wait()
    return None if previous in transport.same_node else seconds
