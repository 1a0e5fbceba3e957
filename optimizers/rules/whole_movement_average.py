"""The average of movements, of which every rank gets the whole: for outer steps that are formed in the background.

As in ``lentando.optimizers.rules.movement_average``, rank i sends q_i = Q(m_i + e_i) of what it has moved since the
anchor a, and keeps e_i. Then the rank that has formed a part of the mean movement sends p = Q(sum_i q_i / n + e'), and
keeps e'. All ranks apply the outer rule to a + p, bit by bit the same. The errors are updated at once: such an average
is never repeated.
"""

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.division import divide
from lentando.comm.reductions.reduction import Each, quiet, visit
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.coded_exchange import CodedExchange, Piece
from lentando.optimizers.rules.outer_average import OuterAverage
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.rules.wire import Wire, wire_of

__all__ = ["WholeMovementAverage"]


class WholeMovementAverage(OuterAverage):
    """The average of the movements of one buffer, on every rank.

    Args:
        transport: transport that connects the ranks.
        buffer: one-dimensional array, used at each execution.
        parameters: number of parameters in the buffer. The statistics behind them are sent as they are.
        wire: coding of the messages.
        errors: memory for the errors of this rank, and for those of the part of the mean that it forms: two arrays like
            the buffer, in float32 at least.
    """

    def __init__(
        self, transport: Transport, buffer: Array, parameters: int, wire: Wire, errors: tuple[Array, Array]
    ) -> None:
        self._transport = transport
        self._buffer = buffer
        self._anchor = buffer
        self._error, self._mean_error = errors
        self._coded = CodedExchange(transport, buffer, parameters, wire)
        self.shard = slice(0, buffer.size)
        self._sum: Array = array_module(buffer).empty(buffer.size, self._error.dtype)

    def begin_round(self, anchor: Array, *, forget_errors: bool = False) -> None:
        self._anchor = anchor
        if forget_errors:
            self._error[...] = self._mean_error[...] = 0

    def reduce(self, each: Each | None = None, partial_average: PartialAverage | None = None) -> Array:
        exchange, ranks = self._coded, self._transport.size
        if partial_average is not None and partial_average.in_full:
            exchange = CodedExchange(self._transport, self._buffer, 0, wire_of(None))  # once in a while
        for piece in exchange.pieces():
            values = self._sum[piece.elements]
            if piece.is_coded:
                with quiet():
                    np.subtract(self._buffer[piece.elements], self._anchor[piece.elements], out=values)
            else:
                array_module(values).copyto(values, self._buffer[piece.elements])
            piece.write_with_error(values, self._error[piece.elements])

        def finish(piece: Piece, total: Array) -> None:
            if piece.is_coded:
                divide(total, ranks, total)

        total = exchange.reduce(finish)
        for piece in exchange.pieces(own=True):
            piece.write_with_error(total[piece.in_shard], self._mean_error[piece.elements])
        exchange.gather()
        for piece in exchange.pieces():
            values = self._sum[piece.elements]
            array_module(values).copyto(values, piece.read())
            if piece.is_coded:
                with quiet():
                    np.add(values, self._anchor[piece.elements], out=values)
                    np.multiply(values, ranks, out=values)
        visit(self._sum, each)
        return self._sum

    def distribute(self) -> None:
        """Do nothing: the shard is the whole buffer."""
