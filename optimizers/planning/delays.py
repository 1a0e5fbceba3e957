"""The delay D of each operation, from a model of the network or from measurements.

D is the time that an operation takes once the last rank has reached it. The time spent waiting for that rank counts as
compute time (``maximum``). D has a latency and a bandwidth part, as in the alpha-beta model (Hockney 1994):
a + b * bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lentando.comm.agreement import CONTROL_MESSAGE_BYTES
from lentando.comm.cluster import Network
from lentando.comm.errors import ConfigurationError
from lentando.comm.reductions.plan import RING_FROM_BYTES
from lentando.optimizers.rules.coded_exchange import PAIRWISE_FROM_BYTES

__all__ = ["Delays", "LinearDelay", "fit_delay", "network_delays"]

GOSSIP_HEADER_BYTES = 16
FINITE_BYTES = 1
"""Size of the flag by which ``OuterStep`` agrees whether the average is finite."""


@dataclass(frozen=True)
class LinearDelay:
    """A delay that grows with the message: latency_seconds + seconds_per_byte * bytes.

    Attributes:
        latency_seconds: delay of an empty message.
        seconds_per_byte: one over the bandwidth.

    Example:
        >>> LinearDelay(latency_seconds=50e-6, seconds_per_byte=1e-9).seconds(1_000_000)
        0.00105
    """

    latency_seconds: float
    seconds_per_byte: float

    def seconds(self, size_bytes: float) -> float:
        """Return the delay of a message of this size."""
        return self.latency_seconds + self.seconds_per_byte * size_bytes


def fit_delay(sizes_bytes: Sequence[float], seconds: Sequence[float]) -> LinearDelay:
    """Fit a ``LinearDelay`` to measurements: least squares of the relative errors, neither part negative.

    The errors are relative because the sizes of messages span orders of magnitude, and so do the errors of their times.

    Args:
        sizes_bytes: sizes of the messages in bytes, at least two different ones.
        seconds: duration of each message, > 0.

    Raises:
        ConfigurationError: if the measurements do not determine a line.

    Example:
        >>> fitted = fit_delay([1_000, 1_000_000], [0.00011, 0.00111])
        >>> round(fitted.latency_seconds, 6), round(1 / fitted.seconds_per_byte)
        (0.000109, 999000000)
    """
    sizes, times = np.asarray(sizes_bytes, np.float64), np.asarray(seconds, np.float64)
    if sizes.size != times.size or np.unique(sizes).size < 2 or not (times > 0).all():
        raise ConfigurationError(
            "expected times > 0 of messages of at least two sizes, to fit a delay to, got "
            f"{sizes.tolist()} bytes and {times.tolist()} seconds"
        )
    columns = np.stack([1.0 / times, sizes / times], axis=1)
    (latency, slope), *_ = np.linalg.lstsq(columns, np.ones(sizes.size), rcond=None)
    if latency < 0:
        ratio = columns[:, 1]
        return LinearDelay(0.0, float(ratio.sum() / (ratio @ ratio)))
    if slope < 0:
        ratio = columns[:, 0]
        return LinearDelay(float(ratio.sum() / (ratio @ ratio)), 0.0)
    return LinearDelay(float(latency), float(slope))


@dataclass(frozen=True)
class Delays:
    """Delay of each operation for one model on one set of ranks, in seconds.

    Attributes:
        gradient_average: D of synchronous SGD: control message and all-reduce of the gradients.
        outer_step: D of an outer step: control message, reduce-scatter, the outer rule and all-gather.
        slow_momentum: additional time of slow momentum in an outer step (arithmetic only, no message).
        exchange: time of a gossip step's messages, from sending until the neighbours' messages have arrived.
        exchange_busy: part of ``exchange`` during which this rank's port is occupied and can send nothing else.
        exchange_local: arithmetic of a gossip step (mixing, de-biasing), which no overlap hides.
    """

    gradient_average: float
    outer_step: float
    slow_momentum: float = 0.0
    exchange: float = 0.0
    exchange_busy: float = 0.0
    exchange_local: float = 0.0


def network_delays(
    network: Network, size: int, model_bytes: int, *, degree: int = 1, gossip_bytes: int = 0, coded_bytes: int = 0
) -> Delays:
    """Return the delays of ``size`` ranks, one per node, on a modelled network where arithmetic takes no time.

    With alpha the latency, beta one over the bandwidth and B the bytes of the model:

    - control message, an all-gather of c bytes: ceil(log2 n) alpha + (n - 1) c beta.
    - all-reduce by the ring: 2 (n - 1) (alpha + B / n beta). Exact for messages of one segment. For longer messages it
      is an upper bound, because latency is partly hidden behind their other segments.
    - all-reduce by MPI: 2 ceil(log2 n) alpha + 2 (n - 1) / n B beta, as the simulator charges it. As reduce-scatter and
      all-gather, for the outer step, the all-gather is added: ceil(log2 n) alpha + (n - 1) / n B beta.
    - outer step in coded messages of C bytes in all: each half is a message to each other rank, (n - 1) (alpha + C / n
      beta), one after the other. Short messages are sent at once: one alpha, and the time per byte is a lower bound.
    - the outer step checks between the two whether the average is finite: an all-gather of one byte.
    - gossip: alpha + degree (B + 16) beta, because all messages of a step share the sender's port.

    The ring is used from the same size as by ``plan_reduction``.

    Args:
        network: description whose common latency and bandwidth are used; links that differ are ignored.
        size: number of ranks (n).
        model_bytes: size of the parameters (B).
        degree: number of out-neighbours per gossip step.
        gossip_bytes: size of the parameters as gossip sends them (float32 at least); ``model_bytes`` if 0.
        coded_bytes: size of the parameters as outer steps send them, with a ``wire_dtype``; 0 without one.

    Example:
        >>> from lentando.comm.cluster import Network
        >>> delays = network_delays(Network(50e-6, 1.25e9), size=8, model_bytes=100_000_000)
        >>> round(delays.gradient_average, 3), round(delays.exchange, 3)
        (0.141, 0.08)
    """
    if size == 1:
        return Delays(0.0, 0.0)
    alpha, beta = network.latency_seconds, 1 / network.bandwidth_bytes_per_second
    levels = (size - 1).bit_length()
    control = levels * alpha + (size - 1) * CONTROL_MESSAGE_BYTES * beta
    if model_bytes >= RING_FROM_BYTES["several nodes"]:
        whole = separate = 2 * (size - 1) * (alpha + model_bytes / size * beta)
    else:
        moved = (size - 1) / size * model_bytes * beta
        whole = 2 * levels * alpha + 2 * moved
        separate = whole + levels * alpha + moved
    if coded_bytes:
        turns = size - 1 if coded_bytes / size >= PAIRWISE_FROM_BYTES else 1
        separate = 2 * (turns * alpha + (size - 1) / size * coded_bytes * beta)
    separate += levels * alpha + (size - 1) * FINITE_BYTES * beta
    busy = degree * ((gossip_bytes or model_bytes) + GOSSIP_HEADER_BYTES) * beta
    return Delays(control + whole, control + separate, exchange=alpha + busy, exchange_busy=busy)
