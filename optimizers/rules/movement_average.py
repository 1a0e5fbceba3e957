"""The average of what the ranks have moved since the anchor: it can be sent in fewer bits, and weighted.

Rank i has moved by m_i = x_i - a since the anchor a, which is equal on all ranks. With a factor f_i for each rank (1 in
an equal average), the mean over k ranks is

    x = (k a + sum_i q_i) / k,   q_i = Q(f_i m_i + e_i),   e_i <- f_i m_i + e_i - q_i

where Q is what receivers read of a coded message (``lentando.optimizers.rules.wire``), and the error e_i, zero at
first, is kept by rank i and sent with its later movements. This is error feedback (Seide et al., INTERSPEECH 2014;
Karimireddy et al., ICML 2019, arXiv 1901.09847), here of rounds, as in Qsparse-local-SGD (Basu et al., NeurIPS 2019,
arXiv 1906.02367). The outer rule makes y of x. Its result is coded again: the rank r that has formed a part of y sends

    p = Q(y - a + e'_r),   e'_r <- y - a + e'_r - p,   and all ranks continue from a + p

so that all replicas are bit-identical. Both halves of the average thus shrink, and no rounding error is lost.
Statistics (BatchNorm's) are sent as they are.
"""

from math import sqrt

import numpy as np

from lentando.comm.array_module import array_module, copy_into
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.reductions.reduction import Each, quiet
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.coded_exchange import CodedExchange, Piece
from lentando.optimizers.rules.outer_average import OuterAverage
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.rules.wire import Wire, wire_of

__all__ = ["MovementAverage"]


class MovementAverage(OuterAverage):
    """The average of the movements of one buffer.

    Memory, for each parameter of float32: 4 bytes for the anchor, and 4 / n for the sum of this rank's shard; if
    messages are coded, 4 bytes for the error, and 8 / n for the errors of this rank's shard; and for messages, twice
    the bytes of a coded parameter (2.03 for int8, 1.03 for int4, 8 if they are not coded). In a job of one rank nothing
    is coded.

    Args:
        transport: transport that connects the ranks.
        buffer: one-dimensional array, used at each execution.
        parameters: number of parameters in the buffer. The statistics behind them are sent as they are.
        wire: coding of the messages.

    Attributes:
        shard: range of the buffer whose sum ``reduce`` returns on this rank.
        anchor: values from which the buffer began to move.
        error: what this rank has not sent yet of its movements; None without a coding.
        shard_error: what this rank has not sent yet of the results for its shard; None without a coding.
        is_rounded: whether ``distribute`` rounds what it sends.
    """

    def __init__(self, transport: Transport, buffer: Array, parameters: int, wire: Wire) -> None:
        self._transport = transport
        self._buffer = buffer
        self._coded = CodedExchange(transport, buffer, parameters, wire)
        self._exchange = self._coded  # that of the last ``reduce``
        self.shard = self._coded.shard
        module, dtype = array_module(buffer), accumulator_dtype(buffer.dtype)
        self.anchor: Array = module.empty(buffer.size, dtype)
        self.error: Array | None = None
        self.shard_error: Array | None = None
        self._next_shard_error: Array | None = None
        if not self._coded.is_exact:
            self.error = module.zeros(buffer.size, dtype)
            self.shard_error = module.zeros(self.shard.stop - self.shard.start, dtype)
            self._next_shard_error = module.zeros(self.shard.stop - self.shard.start, dtype)
        self.is_rounded = self.error is not None
        self._factor = 1.0

    def arrays(self) -> dict[str, Array | None]:
        return {"round_anchors": self.anchor, "errors": self.error}

    def shard_arrays(self) -> dict[str, Array | None]:
        return {"shard_errors": self.shard_error}

    def begin_round(self, anchor: Array, *, forget_errors: bool = False) -> None:
        array_module(self.anchor).copyto(self.anchor, anchor)
        if forget_errors:
            for error in (self.error, self.shard_error):
                if error is not None:
                    error[...] = 0

    def reduce(self, each: Each | None = None, partial_average: PartialAverage | None = None) -> Array:
        ranks, self._factor, self._exchange = self._transport.size, 1.0, self._coded
        if partial_average is not None:
            ranks = partial_average.ranks_with_parameters
            self._factor = partial_average.factor
            if partial_average.in_full:
                self._exchange = CodedExchange(self._transport, self._buffer, 0, wire_of(None))  # once in a while
        for piece in self._exchange.pieces():
            sent = piece.write(self._values(piece))
            if piece.is_coded and self.error is not None and self._next_shard_error is not None and self._is_own(piece):
                np.subtract(self._exchange.scratch(piece), sent, out=self._next_shard_error[piece.in_shard])

        def finish(piece: Piece, total: Array) -> None:
            if piece.is_coded:
                with quiet():
                    np.add(total, np.multiply(self.anchor[piece.elements], ranks), out=total)
            if each is not None:
                each(total)

        return self._exchange.reduce(finish)

    def distribute(self) -> None:
        self._keep_errors()
        exchange, module = self._exchange, array_module(self._buffer)
        for piece in exchange.pieces(own=True):
            values, own = exchange.scratch(piece), self._buffer[piece.elements]
            if piece.is_coded:
                np.subtract(own, self.anchor[piece.elements], out=values)
            else:
                module.copyto(values, own)
            if self.shard_error is None:
                piece.write(values)
            else:
                piece.write_with_error(values, self.shard_error[piece.in_shard])
        exchange.gather()
        for piece in exchange.pieces():
            values = piece.read()
            if piece.is_coded:
                values = np.add(self.anchor[piece.elements], values, out=exchange.scratch(piece))
            copy_into(self._buffer[piece.elements], values)

    def movement_norm(self) -> float:
        """Euclidean norm of this rank's movement, of the parameters alone, summed in float64."""
        total = 0.0
        for piece in self._coded.pieces():
            if piece.is_coded:
                values = self._coded.scratch(piece)
                np.subtract(self._buffer[piece.elements], self.anchor[piece.elements], out=values)
                moved = values.astype(np.float64)
                total += float(np.dot(moved, moved))
        return sqrt(total)

    def _values(self, piece: Piece) -> Array:
        """What this rank sends of a piece, in scratch memory."""
        values, own = self._exchange.scratch(piece), self._buffer[piece.elements]
        if not piece.is_coded:
            array_module(values).copyto(values, own)
        elif self._factor == 0:  # the error waits until this rank counts again
            values[...] = 0
        else:
            np.subtract(own, self.anchor[piece.elements], out=values)
            if self._factor != 1:
                np.multiply(values, self._factor, out=values)
            if self.error is not None:
                np.add(values, self.error[piece.elements], out=values)
        return values

    def _keep_errors(self) -> None:
        """Note what the messages of ``reduce`` have left out, before their memory is used again."""
        if (
            self.error is None
            or self._next_shard_error is None
            or self._factor == 0
            or self._exchange is not self._coded
        ):
            return
        for piece in self._exchange.pieces(own=False):
            if piece.is_coded:
                np.subtract(self._values(piece), piece.read(), out=self.error[piece.elements])
        for piece in self._exchange.pieces(own=True):  # the rule has written to the buffer there
            if piece.is_coded:
                self.error[piece.elements] = self._next_shard_error[piece.in_shard]

    def _is_own(self, piece: Piece) -> bool:
        start: int = piece.elements.start
        return bool(self.shard.start <= start < self.shard.stop)
