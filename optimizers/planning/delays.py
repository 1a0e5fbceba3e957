"""What communication costs: the delay D of each operation, from a model of the network or from measurements.

D is the time that an operation takes once the last rank has come to it; waiting for that rank belongs to the compute
times (``maximum``). Latency and bandwidth parts are those of the alpha-beta model (Hockney 1994): a + b * bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lentando.comm.cluster.network import Network
from lentando.comm.control import CONTROL_BYTES
from lentando.comm.errors import ConfigurationError
from lentando.comm.reductions.plan import RING_FROM_BYTES

__all__ = ["Delay", "Delays", "fit_delay", "network_delays"]

GOSSIP_HEADER_BYTES = 16
FINITE_BYTES = 1
"""Of ``OuterStep``'s question whether the average is finite."""


@dataclass(frozen=True)
class Delay:
    """A delay that grows with the message: latency_seconds + seconds_per_byte * bytes.

    Attributes:
        latency_seconds: of an empty message.
        seconds_per_byte: one over the bandwidth.
    """

    latency_seconds: float
    seconds_per_byte: float

    def seconds(self, size_bytes: float) -> float:
        """The delay of a message of this size."""
        return self.latency_seconds + self.seconds_per_byte * size_bytes


def fit_delay(sizes_bytes: Sequence[float], seconds: Sequence[float]) -> Delay:
    """The ``Delay`` that fits measurements best: least squares of the relative errors, neither part negative.

    Relative, because the sizes of messages span orders of magnitude, and so do the errors of their times.

    Args:
        sizes_bytes: of the messages, at least two different ones.
        seconds: what each took, > 0.

    Raises:
        ConfigurationError: if the measurements do not determine a line.
    """
    sizes, times = np.asarray(sizes_bytes, np.float64), np.asarray(seconds, np.float64)
    if sizes.size != times.size or np.unique(sizes).size < 2 or not (times > 0).all():
        raise ConfigurationError(
            "a delay is fitted to times > 0 of messages of at least two sizes, got "
            f"{sizes.tolist()} bytes and {times.tolist()} seconds"
        )
    columns = np.stack([1.0 / times, sizes / times], axis=1)
    (latency, slope), *_ = np.linalg.lstsq(columns, np.ones(sizes.size), rcond=None)
    if latency < 0:
        ratio = columns[:, 1]
        return Delay(0.0, float(ratio.sum() / (ratio @ ratio)))
    if slope < 0:
        ratio = columns[:, 0]
        return Delay(float(ratio.sum() / (ratio @ ratio)), 0.0)
    return Delay(float(latency), float(slope))


@dataclass(frozen=True)
class Delays:
    """What each operation costs for one model on one set of ranks, in seconds.

    Attributes:
        gradient_average: D of synchronous SGD: control message and all-reduce of the gradients.
        outer_step: D of an outer step: control message, both halves of the average, and what lies between.
        slow_momentum: what slow momentum adds to it (arithmetic; no message).
        exchange: of a gossip step, from sending until the neighbours' shares are there.
        exchange_busy: for how much of that this rank's port is taken, so that the next message cannot leave yet.
        exchange_local: what a gossip step computes besides (mixing, de-biasing): time that no overlap hides.
    """

    gradient_average: float
    outer_step: float
    slow_momentum: float = 0.0
    exchange: float = 0.0
    exchange_busy: float = 0.0
    exchange_local: float = 0.0


def network_delays(network: Network, size: int, model_bytes: int, *, degree: int = 1, gossip_bytes: int = 0) -> Delays:
    """The delays of ``size`` ranks, each on a node of its own, on a modelled network. Arithmetic takes no time.

    With alpha the latency, beta one over the bandwidth and B the bytes of the model:

    - control message, an all-gather of c bytes: ceil(log2 n) alpha + (n - 1) c beta.
    - all-reduce by the ring: 2 (n - 1) (alpha + B / n beta), exact for messages of one segment; the latency of longer
      ones hides in part behind their other segments (an upper bound).
    - all-reduce by the engine: 2 ceil(log2 n) alpha + 2 (n - 1) / n B beta, as ``Network`` takes it; in halves, for the
      outer step, its all-gather comes on top: ceil(log2 n) alpha + (n - 1) / n B beta.
    - the outer step asks once, between its halves, whether the average is finite: an all-gather of 8 bytes.
    - gossip: alpha + degree (B + 16) beta: all messages of a step share the sender's port.

    Which of ring and engine it is, ``plan_reduction`` decides by size, and so does this.

    Args:
        network: its latency and bandwidth; links that differ are not looked at.
        size: number of ranks (n).
        model_bytes: of the parameters (B).
        degree: out-neighbours per gossip step.
        gossip_bytes: of the parameters as gossip sends them (float32 at least); ``model_bytes`` if 0.
    """
    if size == 1:
        return Delays(0.0, 0.0)
    alpha, beta = network.latency_seconds, 1 / network.bandwidth_bytes_per_second
    levels = (size - 1).bit_length()
    control = levels * alpha + (size - 1) * CONTROL_BYTES * beta
    if model_bytes >= RING_FROM_BYTES["several nodes"]:
        whole = in_halves = 2 * (size - 1) * (alpha + model_bytes / size * beta)
    else:
        moved = (size - 1) / size * model_bytes * beta
        whole = 2 * levels * alpha + 2 * moved
        in_halves = whole + levels * alpha + moved
    in_halves += levels * alpha + (size - 1) * FINITE_BYTES * beta
    busy = degree * ((gossip_bytes or model_bytes) + GOSSIP_HEADER_BYTES) * beta
    return Delays(control + whole, control + in_halves, exchange=alpha + busy, exchange_busy=busy)
