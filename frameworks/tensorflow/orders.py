"""The order of features along an axis of a Keras model, compared with PyTorch's."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from lentando.optimizers.checkpoint.layers import Factors

__all__ = ["Order", "Value", "flattened", "joined", "map_factors", "map_layout", "merged", "origins_of", "plain_value"]

PLACES = "dhw"


class Order:
    """What the elements of one axis are, in Keras's order; orders of axes that are combined element by element are one.

    Args:
        length: of the axis; None if it varies.
        segments: what its ranges were flattened of, one after the other; None if that is not decided yet: output
            features of a dense layer have the order of what they are combined with, or reshaped to.
        parts: instead, the orders that are concatenated along the axis.
        is_known: whether anything is known.
        origins: of an order that is not known, the orders of the channels that it may have been made of.
    """

    def __init__(
        self,
        length: int | None,
        segments: tuple[Factors, ...] | None = None,
        parts: Sequence["Order"] = (),
        *,
        is_known: bool = True,
        origins: Sequence["Order"] = (),
    ) -> None:
        self.length = length
        self.decided = segments
        self.parts = tuple(parts)
        self.is_known = is_known
        self.origins = tuple(origins)
        self.same_as: Order | None = None

    @classmethod
    def plain(cls, length: int | None) -> "Order":
        """The same order in both frameworks."""
        return cls(length, _plain(length))

    @classmethod
    def unknown(cls, length: int | None, origins: Sequence["Order"] = ()) -> "Order":
        """It cannot be determined what the order is in the other framework."""
        return cls(length, is_known=False, origins=origins)

    @property
    def root(self) -> "Order":
        """The object that holds what is known of this order."""
        order = self
        while order.same_as is not None:
            order = order.same_as
        return order

    @property
    def is_undecided(self) -> bool:
        """Whether it can still be any."""
        order = self.root
        return order.is_known and not order.parts and order.decided is None

    def segments(self) -> tuple[Factors, ...] | None:
        """What the ranges of the axis were flattened of; None if that is not known. Undecided orders are plain."""
        order = self.root
        if not order.is_known:
            return None
        if order.parts:
            found = [part.segments() for part in order.parts]
            return None if None in found else tuple(factors for own in found if own for factors in own)
        return order.decided or _plain(order.length)

    def make_plain(self) -> bool:
        """Whether the order is the same in both frameworks. Undecided orders become so."""
        segments = self.segments()
        if segments is None or any(len(factors) > 1 for factors in segments):
            return False
        order = self.root
        for part in order.parts:
            part.make_plain()
        if order.is_undecided:
            order.decided = _plain(order.length)
        return True

    def constrain(self, factors: Factors) -> bool:
        """The axis is reshaped into several. Its order becomes unknown, and False is returned, if it is another one."""
        order, wanted = self.root, (_normal(factors),)
        if order.is_undecided:
            order.decided = wanted
        elif order.segments() != wanted and not (len(wanted[0]) == 1 and order.make_plain()):
            order.forget()
        return order.is_known

    def merged(self, other: "Order") -> "Order":
        """The order of both, which are combined element by element."""
        one, two = self.root, other.root
        if one is two:
            return one
        for free, fixed in ((one, two), (two, one)):
            if free.is_undecided:
                free.same_as = fixed
                return fixed
        segments = one.segments()
        if segments is not None and segments == two.segments():
            return one
        if one.make_plain() and two.make_plain():
            return one
        return Order.unknown(self.length, origins_of((one, two)))

    def forget(self) -> None:
        """It can no longer be determined."""
        order = self.root
        order.is_known = False
        for part in order.parts:
            part.forget()


@dataclass(frozen=True)
class Value:
    """A tensor of a model.

    Attributes:
        axes: the order of each axis but the batch's.
        layout: PyTorch's order of the axes, as numbers of Keras's; None if that is not known. Of a feature map the
            channels come first; its places are those of PyTorch's map before either framework permutes them.
        is_map: whether it is a feature map, so that the layouts differ by convention.
    """

    axes: tuple[Order, ...]
    layout: tuple[int, ...] | None
    is_map: bool = False

    @property
    def lengths(self) -> list[int | None]:
        """The shape without the batch."""
        return [axis.length for axis in self.axes]

    def make_same(self) -> bool:
        """Whether the tensor is the same in PyTorch. Undecided orders become plain."""
        return self.layout == tuple(range(len(self.axes))) and self.make_plain()

    def make_plain(self) -> bool:
        """Whether each axis has the same order in PyTorch. Undecided orders become plain."""
        plain = [axis.make_plain() for axis in self.axes]
        return all(plain)

    @property
    def after_features_last(self) -> tuple[int, ...] | None:
        """The layout after a layer that computes along the last axis, in PyTorch too."""
        same = tuple(range(len(self.axes)))
        return same if len(self.axes) == 1 or (self.layout == same and not self.is_map) else None

    @property
    def big_axes(self) -> list[int]:
        """The axes that are longer than 1."""
        return [number for number, length in enumerate(self.lengths) if length != 1]


def origins_of(orders: Sequence[Order]) -> list[Order]:
    """The orders that are not known are represented by those that they were made of."""
    roots = [order.root for order in orders]
    return [origin for order in roots for origin in ([order] if order.is_known else order.origins)]


def plain_value(lengths: Sequence[int | None]) -> Value:
    """A tensor that is the same in PyTorch."""
    return Value(tuple(map(Order.plain, lengths)), tuple(range(len(lengths))))


def map_layout(rank: int, data_format: str) -> tuple[int, ...]:
    """PyTorch's order of the axes of a feature map, without the batch."""
    return tuple(range(rank)) if data_format == "channels_first" else (rank - 1, *range(rank - 1))


def map_factors(lengths: Sequence[Any], layout: Sequence[int], order: Sequence[int]) -> Factors | None:
    """What an axis counts that several axes of a map are flattened into.

    Args:
        lengths: of the map's axes.
        layout: PyTorch's order of them.
        order: the order in which Keras flattens them.

    Returns:
        None if that order cannot be described.
    """
    channels, *places = layout
    if len(places) > len(PLACES) or [axis for axis in order if axis != channels] != places or None in lengths:
        return None
    labels = dict(zip(places, PLACES[len(PLACES) - len(places) :], strict=True)) | {channels: "c"}
    return tuple((labels[axis], lengths[axis]) for axis in order)


def flattened(value: Value, data_format: str = "channels_last") -> Value:
    """One axis of all. Keras moves channels that come first behind the others."""
    rank = len(value.axes)
    order = [*range(1, rank), 0] if data_format == "channels_first" and rank > 1 else list(range(rank))
    return Value((joined(value, order),), (0,))


def joined(value: Value, order: Sequence[int]) -> Order:
    """The order of an axis that several axes are flattened into.

    Args:
        value: the tensor with the axes.
        order: which axes, in the order in which Keras flattens them.
    """
    lengths = value.lengths
    big = [axis for axis in order if lengths[axis] != 1]
    if len(big) <= 1:
        return value.axes[big[0]] if big else Order.plain(1)
    if any(lengths[axis] is None for axis in order):
        return Order.unknown(None)
    total = prod(lengths[axis] or 0 for axis in order)
    if not value.make_plain():
        return Order.unknown(total, origins_of([order for order in value.axes if not order.make_plain()]))
    if value.layout is None:  # features come last in Keras, places are in the same order
        return Order.unknown(total, value.axes[-1:]) if len(value.axes) - 1 in big else Order.plain(total)
    layout = [axis for axis in value.layout if axis in order]
    if layout == list(order) or (value.layout[0] not in big and [a for a in layout if a in big] == big):
        return Order.plain(total)
    factors = map_factors(lengths, layout, order) if value.is_map and layout[0] == value.layout[0] else None
    return Order.unknown(total, value.axes[-1:]) if factors is None else Order(total, (_normal(factors),))


def merged(values: Sequence[Value], lengths: Sequence[int | None]) -> Value:
    """What comes of tensors that are combined element by element, and broadcast.

    Args:
        values: the tensors.
        lengths: shape of the result, without the batch.
    """
    axes: list[Order] = []
    for place, length in enumerate(reversed(lengths), start=1):
        own = [value.axes[-place] for value in values if place <= len(value.axes)]
        own = [axis for axis in own if axis.length == length] or [Order.plain(length)]
        order = own[0]
        for other in own[1:]:
            order = order.merged(other)
        axes.insert(0, order)
    wide = [value for value in values if len(value.big_axes) > 1] or [v for v in values if len(v.axes) == len(lengths)]
    layouts = {value.layout if len(value.axes) == len(lengths) else None for value in wide}
    return Value(tuple(axes), layouts.pop() if len(layouts) == 1 else None, any(value.is_map for value in wide))


def _plain(length: int | None) -> tuple[Factors, ...]:
    return ((("n", length or 0),),)


def _normal(factors: Factors) -> Factors:
    """As one factor, if PyTorch's order is the same."""
    moved = [factor for factor in factors if factor[1] != 1]
    if moved == sorted(moved, key=lambda factor: factor[0] != "c"):
        return (("n", prod(length for _, length in factors)),)
    return factors
