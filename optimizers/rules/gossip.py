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
from lentando.optimizers.rules.wire import WireDtype, check_wire_dtype, wire_of

__all__ = ["DPSGD", "OSGP", "SGP"]

MOST_STALENESS = 64
"""Papers use 3 at most. Each step takes the memory of a message or more, so that thousands are a mistake."""


class _Gossip:
    """Declarations and arguments that the three have in common."""

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
        topology: graphs that determine the receivers of each rank's messages, by step. Directed graphs and unequal
            degrees are possible.
        wire_dtype: how messages hold parameters, one of ``lentando.optimizers.rules.wire.WireDtype``: "bfloat16" or
            "float16", to which they are rounded, which halves the bytes of float32; "int8" or "int4", integers with a
            scale for each block of 256 parameters, a quarter or an eighth of the bytes; None sends them unrounded. The
            rounding error remains with the sender. float16 has the smaller error, for parameters below 65504; that of
            "int8" is up to 0.4 % of the largest parameter of the block at each step, and that of "int4" 7 %.

    Raises:
        ConfigurationError: if ``wire_dtype`` is unknown.

    Example:
        Three ranks with different parameters, which are threads here, approach the mean, 1:

        >>> import numpy as np
        >>> from lentando.comm.flat import Entry, FlatBuffer, build_layouts
        >>> from lentando.comm.testing import run_ranks
        >>> (layout,) = build_layouts([Entry("w", (2,), "float64", 0)])
        >>> def mixed(transport):
        ...     model = FlatBuffer(layout, np.full(2, float(transport.rank)))
        ...     gossip = SGP().bind(transport, [model], [])
        ...     for _ in range(40):
        ...         gossip.after_step()
        ...     return model.array.round(6).tolist()
        >>> run_ranks(3, mixed)
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """

    topology: Topology = field(default_factory=OnePeerExponential)
    wire_dtype: WireDtype | None = None

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        graphs = self.topology.for_size(transport.size)
        return PushSum(transport, parameters, graphs, wire=wire_of(self.wire_dtype))


@dataclass(frozen=True)
class OSGP(_Gossip):
    """Overlap SGP: the messages of a step are sent while the next steps compute.

    The share that a rank has sent is missing from its x and w until shares of other ranks arrive; z = x / w is not
    affected. With ``staleness=0`` it is bit-identical to ``SGP``.

    Args:
        topology: graphs that determine the receivers of each rank's messages, by step, as in ``SGP``.
        staleness: number of steps after which a rank waits for a message (the papers' other tau), 64 at most. The
            messages of so many steps may be in flight, and each of them takes memory.
        deterministic: whether to use a message exactly ``staleness`` steps after it was sent, even if it arrived
            earlier, so that results do not depend on the speed of the network. By default a message is used as soon as
            it has arrived.
        wire_dtype: how messages hold parameters, as in ``SGP``.

    Raises:
        ConfigurationError: if ``staleness`` is not an integer from 0 to 64, or ``wire_dtype`` is unknown.

    Example:
        >>> from lentando.comm.topology import Ring
        >>> OSGP(Ring(), staleness=2)
        OSGP(topology=Ring(), staleness=2, deterministic=False, wire_dtype=None)
        >>> OSGP(staleness=100)
        Traceback (most recent call last):
        lentando.comm.errors.ConfigurationError: staleness must be 64 inner steps at most, got 100: ...
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
        return PushSum(transport, parameters, graphs, self.staleness, self.deterministic, wire=wire_of(self.wire_dtype))


@dataclass(frozen=True)
class DPSGD(_Gossip):
    """D-PSGD: gossip with a doubly stochastic mixing matrix (Lian et al., NeurIPS 2017, arXiv 1705.09056).

    Adapts, then combines: x <- W (x - gamma g), which equals SGP on the same graphs. Messages carry no weight.

    Args:
        topology: graphs that determine the receivers of each rank's messages, by step; each row of their mixing
            matrices must sum to 1, as each column does.
        wire_dtype: how messages hold parameters, as in ``SGP``.

    Raises:
        ConfigurationError: if ``wire_dtype`` is unknown; from ``bind``, if the topology is not doubly stochastic.

    Example:
        >>> from lentando.comm.topology import Ring
        >>> DPSGD(Ring())
        DPSGD(topology=Ring(), wire_dtype=None)
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
        return PushSum(transport, parameters, graphs, weighted=False, wire=wire_of(self.wire_dtype))
