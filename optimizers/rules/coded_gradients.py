"""The average or sum of gradients, sent in few bits with error feedback.

Rank i sends q_i = Q(g_i + e_i), and keeps e_i <- g_i + e_i - q_i for its next gradients. The rank that forms the mean m
of a part sends p = Q(m + e'), and keeps e' <- m + e' - p (Seide et al., INTERSPEECH 2014; as "two-way" error feedback:
Tang et al., ICML 2019, arXiv 1905.05957). All ranks use p, bit by bit the same.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lentando.comm.array_module import array_module, copy_into
from lentando.comm.division import divide
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import FlatBuffer
from lentando.comm.reductions.reduction import quiet
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.base_algorithm import BoundAlgorithm, Resizable, StatefulAlgorithm
from lentando.optimizers.rules.coded_exchange import CodedExchange, Piece
from lentando.optimizers.rules.flat_state import flat_state, load_shards
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.rules.wire import Wire

__all__ = ["CodedGradients"]


class CodedGradients(BoundAlgorithm, StatefulAlgorithm, Resizable):
    """Reduces the gradients of all parameters in coded messages, after the backward pass.

    Memory, for each parameter of float32: 4 bytes for the error, 4 for that of the mean (a part of it on each rank is
    used), and twice the bytes of a coded gradient for messages.

    Args:
        transport: transport that connects the ranks that train together.
        parameters: flat buffers of the model.
        gradients: flat buffers of the gradients, laid out by ``gradient_layouts``.
        is_sum: whether the sum over the ranks is formed, not the mean.
        wire: coding of the messages.
    """

    def __init__(
        self,
        transport: Transport,
        parameters: Sequence[FlatBuffer],
        gradients: Sequence[FlatBuffer],
        is_sum: bool,
        wire: Wire,
    ) -> None:
        if is_elastic(transport):
            raise ConfigurationError(
                "wire_dtype='int8' or 'int4' of gradients is not possible in an elastic job (init(elastic=True)), in "
                "which rounding errors would be lost with a rank: use 'bfloat16'"
            )
        self._transport = transport
        self._is_sum = is_sum
        self._parts = [_Part(transport, buffer, wire) for buffer in gradients]
        # A buffer of statistics alone has no gradients.
        parts = iter(self._parts)
        self._by_buffer = [next(parts) if buffer.parameters.size else None for buffer in parameters]

    def average_gradients(self, partial_average: PartialAverage | None = None) -> None:
        ranks = self._transport.size if partial_average is None else partial_average.active_ranks
        counts = partial_average is None or (partial_average.is_active and partial_average.is_finite)
        for part in self._parts:
            part.reduce(1 if self._is_sum else ranks, counts)

    def state_dict(self) -> dict[str, Any]:
        """The errors, an array per buffer."""
        return {name: flat_state(arrays) for name, arrays in self._arrays().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the errors.

        Raises:
            ConfigurationError: if arrays have another shape, which means another model.
        """
        for name, arrays in self._arrays().items():
            load_shards(f"{name} of the gradients", self._transport, arrays, state[name])

    def prepared_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> Sequence[Array]:
        return parameters

    def state_for_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> dict[str, Any]:
        """Errors of 0: they are a part of a step that is not taken."""
        return {
            name: flat_state([None if array is None else np.zeros_like(array) for array in arrays["flat"]])
            for name, arrays in state.items()
        }

    def _arrays(self) -> dict[str, Sequence[Array | None]]:
        return {
            "errors": [None if part is None else part.error for part in self._by_buffer],
            "mean_errors": [None if part is None else part.mean_error for part in self._by_buffer],
        }


class _Part:
    """The gradients of one flat buffer."""

    def __init__(self, transport: Transport, buffer: FlatBuffer, wire: Wire) -> None:
        parameters = buffer.layout.offsets[-1]  # behind them is which parameters have a gradient, which is sent exactly
        self._buffer = buffer.array
        self._exchange = CodedExchange(transport, buffer.array, parameters, wire)
        module, dtype = array_module(buffer.array), accumulator_dtype(buffer.array.dtype)
        self.error: Array = module.zeros(parameters, dtype)
        self.mean_error: Array = module.zeros(parameters, dtype)

    def reduce(self, divisor: int, counts: bool) -> None:
        """Replace the gradients by their sum over ranks, divided.

        Args:
            divisor: number by which the sum is divided.
            counts: whether this rank's gradients count. If not, its errors wait until they do.
        """
        exchange = self._exchange
        for piece in exchange.pieces():
            self._send(piece, self._buffer[piece.elements] if counts else None, self.error)

        def finish(piece: Piece, total: Array) -> None:
            if divisor != 1:
                divide(total, divisor, total)

        total = exchange.reduce(finish)
        for piece in exchange.pieces(own=True):
            self._send(piece, total[piece.in_shard], self.mean_error)
        exchange.gather()
        for piece in exchange.pieces():
            with quiet():
                copy_into(self._buffer[piece.elements], piece.read())

    def _send(self, piece: Piece, given: Array | None, errors: Array) -> None:
        """Write values and what remains of earlier ones, and keep what is not sent; zeros if nothing is given."""
        values = self._exchange.scratch(piece)
        if given is None:
            values[...] = 0
            piece.write(values)
            return
        array_module(values).copyto(values, given)
        piece.write_with_error(values, errors[piece.elements])
