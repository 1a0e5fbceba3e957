"""The biased parameters of push-sum on a rank: where they are kept, and how they are mixed in one pass over memory."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lentando.comm.array_module import array_module, copy_into, is_on_host
from lentando.comm.division import divide
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.flat import BLOCK, blocks
from lentando.comm.transport import Array
from lentando.optimizers.rules.gossip_exchanges import Outgoing
from lentando.optimizers.rules.gossip_message import GossipMessage
from lentando.optimizers.rules.wire import Wire

__all__ = ["BiasedParameters", "moved_with_model"]


class BiasedParameters:
    """The biased parameters x of one rank, whose model holds z = x / w.

    While w is 1, x is what the model holds, and is not written anywhere else. What x is multiplied by when shares of it
    have left is deferred to the next pass, unless the model has to show the result.

    Args:
        model: parameters z of the model, one one-dimensional array per buffer.
        wire: coding of the shares.

    Attributes:
        memory: memory for x, one array per z, in float32 at least. It holds x after ``settle``.
    """

    def __init__(self, model: Sequence[Array], wire: Wire) -> None:
        self._model = model
        self._is_exact = wire.is_exact
        self.memory = [array_module(z).empty(z.size, accumulator_dtype(z.dtype)) for z in model]
        # New memory for each block would cost as much as the arithmetic. On a device a block is a whole buffer.
        longest = {x.dtype: min(BLOCK, max(x.size for x in self.memory)) for x in self.memory if is_on_host(x)}
        self._scratch: dict[Any, Array] = {dtype: np.empty(size, dtype) for dtype, size in longest.items()}
        self._is_in_model = False  # whether the model holds x where it has the same dtype, because w is 1
        self._factor = 1.0  # by which x has yet to be multiplied

    def settle(self) -> Sequence[Array]:
        """Write x to its own memory, multiplied by all that was deferred. Returns ``memory``."""
        for x, now in zip(self.memory, self._values(), strict=True):
            if now is not x:
                array_module(x).copyto(x, now)
            if self._factor != 1:
                np.multiply(x, self._factor, out=x)
        self._is_in_model, self._factor = False, 1.0
        return self.memory

    def current(self) -> Sequence[Array]:
        """Values of x, to be read only: in the model, or in memory of its own."""
        return self._values() if self._factor == 1 else self.settle()

    def take_from_model(self, weight: float) -> None:
        """Set x = w z, because the model has been changed."""
        self._is_in_model, self._factor = weight == 1, 1.0
        for x, now, z in zip(self.memory, self._values(), self._model, strict=True):
            if now is not z:
                np.multiply(z, weight, out=x)

    def load(self, saved: Sequence[Array]) -> None:
        """Set x to the values of a saved state, in memory of its own."""
        for x, values in zip(self.memory, saved, strict=True):
            copy_into(x, values)
        self._is_in_model, self._factor = False, 1.0

    def mix(
        self,
        before: float,
        after: float,
        moved: bool,
        arrived: Sequence[GossipMessage],
        restored: float,
        outgoing: Outgoing | None,
        show: bool,
    ) -> None:
        """Do everything between two waits, in one pass over memory.

        Args:
            before: push-sum weight w before this pass.
            after: push-sum weight w after it.
            moved: whether the base optimizer has moved z. x is moved as far: its step has the plain learning rate.
            arrived: messages to add to x.
            restored: factor by which x is then multiplied.
            outgoing: messages to fill with shares of x, which leave this rank.
            show: whether to put z = x / w into the model.
        """
        if moved and (self._factor != 1 or (self._is_in_model and before != 1)):
            self.settle()  # an error came between the passes of a step, or the weight was set
        shares, kept, copies = {}, 1.0, Counter[float]()
        if outgoing is not None:
            shares, kept = outgoing.messages, outgoing.peers.self_weight
            copies = Counter(share for _, share in outgoing.peers.out_neighbors)
        factor = self._factor
        is_deferred = outgoing is not None and self._is_exact and not show
        self._factor = kept if is_deferred else 1.0
        in_model = self._is_in_model if not moved else before == 1
        if show:
            self._is_in_model = after == 1
        elif arrived or factor != 1 or restored != 1 or (outgoing is not None and not is_deferred):
            self._is_in_model = False
        else:
            self._is_in_model = in_model
        for number, (whole_x, whole_z) in enumerate(zip(self.memory, self._model, strict=True)):
            is_same = whole_x.dtype == whole_z.dtype
            for block in blocks(whole_x):
                x, z = whole_x[block], whole_z[block]
                target = z if is_same and show and self._is_in_model else x
                now = z if is_same and in_model else x
                if moved:
                    now = moved_with_model(x, z, before, self._scratch.get(x.dtype))
                if factor != 1:
                    now = np.multiply(now, factor, out=target)
                for message in arrived:
                    now = np.add(now, message.shares[number].read(block), out=target)
                if restored != 1:
                    now = np.multiply(now, restored, out=target)
                if shares and not self._is_exact:
                    sent = [
                        message.shares[number].write(block, now, share) * copies[share]
                        for share, message in shares.items()
                    ]
                    now = np.subtract(now, sum(sent[1:], start=sent[0]), out=target)
                elif outgoing is not None:
                    for share, message in shares.items():
                        message.shares[number].write(block, now, share)
                    if not is_deferred:
                        now = np.multiply(now, kept, out=target)
                if show:
                    if now is not target:
                        array_module(x).copyto(target, now)
                    if target is x:
                        _show(x, z, after)

    def _values(self) -> list[Array]:
        """Values of x, not yet multiplied by the factor."""
        return [
            z if self._is_in_model and x.dtype == z.dtype else x for x, z in zip(self.memory, self._model, strict=True)
        ]


def moved_with_model(x: Array, z: Array, weight: float, scratch: Array | None = None) -> Array:
    """Return x, moved as far as the base optimizer has moved z. May write to x.

    Args:
        x: biased parameters.
        z: parameters of the model, which were x / w before the base optimizer's step.
        weight: push-sum weight w.
        scratch: memory of the dtype of x and at least its size; new memory by default.
    """
    if weight == 1 and x.dtype == z.dtype:
        return z
    before = divide(x, weight, None if scratch is None else scratch[: x.size])
    before = before.astype(z.dtype, copy=False)  # exactly what ``_show`` has put there
    if x.dtype == z.dtype:
        np.add(x, np.subtract(z, before, out=before), out=x)
    else:
        np.add(x, z.astype(x.dtype) - before.astype(x.dtype), out=x)
    return x


def _show(x: Array, z: Array, weight: float) -> None:
    """Put z = x / w into the model."""
    if weight == 1:
        array_module(z).copyto(z, x, casting="same_kind")
    elif x.dtype == z.dtype:
        divide(x, weight, z)
    else:
        array_module(z).copyto(z, x / weight, casting="same_kind")
