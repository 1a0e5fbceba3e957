"""Adasum as base algorithm: every rank takes its own step, and the steps are combined."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lentando.comm.agreement import Event, Intent, agree
from lentando.comm.array_module import array_module, copy_into, to_host
from lentando.comm.dtypes import accumulator_dtype, numpy_dtype
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import FlatBuffer
from lentando.comm.operations.adasum import adasum
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.base_algorithm import BoundAlgorithm, OuterAverageHooks, StatefulAlgorithm
from lentando.optimizers.rules.rounding import SixteenBits, check_sent_dtype, rounded_into

__all__ = ["AdasumDeltas"]


@dataclass(frozen=True)
class AdasumDeltas:
    """Every rank takes its own step, and all move by the Adasum of their steps, parameter by parameter.

    Adasum (Maleki et al., MLSys 2021, arXiv 2006.02924) adds steps that are orthogonal and averages steps that are
    parallel: of a and b it is (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b, applied along a tree of pairs. Steps of the
    base optimizer are combined, not gradients, so that momenta and other state are each rank's own.

    ``DistributedOptimizer(op=Adasum)``, Horovod's way to ask for it, has the same meaning.

    Args:
        wire_dtype: "bfloat16" or "float16", to which steps are rounded before they are sent, or None.

    Raises:
        ConfigurationError: if ``wire_dtype`` is unknown; from ``bind``, in an elastic job.

    Example:
        Two ranks, which are threads here, take orthogonal steps of length 1:

        >>> from lentando.comm.flat import Entry, FlatBuffer, build_layouts
        >>> from lentando.comm.testing import run_ranks
        >>> (layout,) = build_layouts([Entry("w", (2,), "float64", 0)])
        >>> def stepped(transport):
        ...     model = FlatBuffer(layout, np.zeros(2))
        ...     algorithm = AdasumDeltas().bind(transport, [model], [])
        ...     model.array[transport.rank] += 1  # a step of the base optimizer
        ...     algorithm.after_step()
        ...     return model.array.tolist()
        >>> run_ranks(2, stepped)
        [[1.0, 1.0], [1.0, 1.0]]
    """

    wire_dtype: SixteenBits | None = None

    averages_gradients: ClassVar[bool] = False
    communicates: ClassVar[bool] = True
    mixes_parameters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sent_dtype(self.wire_dtype)

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        if is_elastic(transport):
            raise ConfigurationError("Adasum cannot continue without a rank that has died: leave out elastic=True")
        return _CombinedSteps(transport, parameters, self.wire_dtype)


class _CombinedSteps(BoundAlgorithm, OuterAverageHooks, StatefulAlgorithm):
    """Adasum at work on one rank.

    Args:
        transport: transport that connects the ranks that train together.
        parameters: flat buffers of the model.
        wire_dtype: 16-bit dtype to which steps are rounded, or None.
    """

    def __init__(self, transport: Transport, parameters: Sequence[FlatBuffer], wire_dtype: SixteenBits | None) -> None:
        self._transport = transport
        self._wire_dtype = wire_dtype
        self._buffers = parameters
        self._start: list[Array] = []
        self._steps = 0
        self._note_start()

    def after_step(self) -> None:
        step = self._steps = self._steps + 1
        agree(self._transport, Intent(Event.GOSSIP, step=step), lambda: f"combines step {step} by Adasum")
        for buffer, start in zip(self._buffers, self._start, strict=True):
            parameters = buffer.parameters
            moved = parameters.astype(start.dtype) - start
            sent = moved
            if self._wire_dtype is not None:
                sent = array_module(moved).empty_like(moved, dtype=numpy_dtype(self._wire_dtype))
                rounded_into(sent, moved)
            combined = to_host(sent)
            adasum(
                self._transport, combined, [entry.size for entry in buffer.layout.entries if entry.group is not None]
            )
            copy_into(sent, combined)
            np.add(start, sent.astype(start.dtype), out=start)
            array_module(parameters).copyto(parameters, start, casting="same_kind")

    def wait_in_flight(self) -> None:
        return

    def prepare_average(self) -> None:
        return

    def abort_average(self) -> None:
        return

    def adopt_consensus(self) -> None:
        self._note_start()

    def rebase_on_model(self) -> None:
        self._note_start()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._note_start()

    def _note_start(self) -> None:
        """Keep a copy of the present parameters, from which the next step is measured."""
        self._start = [buffer.parameters.astype(accumulator_dtype(buffer.parameters.dtype)) for buffer in self._buffers]
