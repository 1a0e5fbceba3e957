"""Gossip as base algorithms: SGP, OSGP and D-PSGD, which are one push-sum with different settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from lentando.comm.checks import check_flag, check_has, check_integer
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import FlatBuffer
from lentando.comm.topology import OnePeerExponential, Topology
from lentando.comm.transport import Transport
from lentando.optimizers.rules.base_algorithm import BoundAlgorithm
from lentando.optimizers.rules.push_sum import PushSum
from lentando.optimizers.rules.wire import WireDtype, check_wire_dtype

__all__ = ["DPSGD", "OSGP", "SGP"]

MOST_STALENESS = 64
"""Papers go up to 3 or so. Each step takes the memory of a message or more, so that thousands are a mistake."""


class _Gossip:
    """What all three are, as ``BaseAlgorithm`` asks."""

    averages_gradients: ClassVar[bool] = False
    communicates: ClassVar[bool] = True
    mixes_parameters: ClassVar[bool] = True

    topology: Topology
    wire_dtype: WireDtype | None

    def __post_init__(self) -> None:
        check_has("topology", self.topology, ("for_size",), "Ring(), OnePeerExponential()")
        check_wire_dtype(self.wire_dtype)


@dataclass(frozen=True)
class SGP(_Gossip):
    """Stochastic gradient push: one push-sum gossip step after each inner step.

    Args:
        topology: who sends to whom; directed graphs and unequal degrees are welcome.
        wire_dtype: "bfloat16" or "float16" rounds the parameters in messages to 16 bits, which halves the bytes of
            float32; the error of rounding stays with the sender. float16 is the finer one, for parameters below 65504.

    Raises:
        ConfigurationError: for another ``wire_dtype``.
    """

    topology: Topology = field(default_factory=OnePeerExponential)
    wire_dtype: WireDtype | None = None

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        graphs = self.topology.for_size(transport.size)
        return PushSum(transport, parameters, graphs, wire_dtype=self.wire_dtype)


@dataclass(frozen=True)
class OSGP(_Gossip):
    """Overlap SGP: the messages of a step travel while the next steps compute.

    What a rank has sent is missing from its own x and w until others' shares arrive; z = x / w does not notice. With
    ``staleness=0`` it is ``SGP``, to the bit.

    Args:
        topology: who sends to whom.
        staleness: steps after which a message is waited for (the papers' other tau), 64 at most; so many rounds may be
            in flight, and there is memory for the messages of each.
        deterministic: use a message exactly ``staleness`` steps after it was sent, even if it came earlier, so that
            results do not depend on the speed of the network. By default it is used as soon as it has come.
        wire_dtype: see ``SGP``.

    Raises:
        ConfigurationError: if ``staleness`` is not an integer from 0 to 64, or for another ``wire_dtype``.
    """

    topology: Topology = field(default_factory=OnePeerExponential)
    staleness: int = 1
    deterministic: bool = False
    wire_dtype: WireDtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("staleness", self.staleness, 0, "inner steps")
        if self.staleness > MOST_STALENESS:
            raise ConfigurationError(
                f"staleness must be {MOST_STALENESS} inner steps at most, got {self.staleness}: each takes the memory "
                "of a message, and parameters that old are of no use"
            )
        check_flag("deterministic", self.deterministic)

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        graphs = self.topology.for_size(transport.size)
        return PushSum(transport, parameters, graphs, self.staleness, self.deterministic, wire_dtype=self.wire_dtype)


@dataclass(frozen=True)
class DPSGD(_Gossip):
    """D-PSGD: gossip with a doubly stochastic mixing matrix (Lian et al., NeurIPS 2017, arXiv 1705.09056).

    Adapts, then combines: x <- W (x - gamma g), which equals SGP on the same graphs. No weight travels.

    Args:
        topology: who talks to whom; each row of its mixing matrices must sum to 1, as each column does.
        wire_dtype: see ``SGP``.

    Raises:
        ConfigurationError: for another ``wire_dtype``; when the optimizer is made, if the topology is not doubly
            stochastic.
    """

    topology: Topology = field(default_factory=OnePeerExponential)
    wire_dtype: WireDtype | None = None

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        graphs = self.topology.for_size(transport.size)
        if graphs.stochasticity != "doubly":
            raise ConfigurationError(
                f"DPSGD needs doubly stochastic mixing matrices, but {graphs} has rows that do not sum to 1: without "
                "push-sum weights it would not find the mean. Use SGP, which has them, or another topology"
            )
        return PushSum(transport, parameters, graphs, weighted=False, wire_dtype=self.wire_dtype)
