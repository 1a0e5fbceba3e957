"""The order of the elements along one axis of a Keras model's tensors, compared with their order in PyTorch."""

from collections.abc import Sequence
from math import prod
from typing import Any

from lentando.optimizers.checkpoint.layers import Factors

__all__ = ["AxisOrder", "map_factors", "map_layout", "normal_factors", "origins_of", "plain_segments"]

PLACES = "dhw"


class AxisOrder:
    """The meaning of the elements along one axis, in Keras's order.

    Axes that are combined element by element share one order.

    Args:
        length: length of the axis; None if it varies.
        segments: factors of each consecutive range of the axis, as they were flattened. None while undecided: the
            output features of a dense layer take the order of whatever they are combined with or reshaped to.
        parts: orders that are concatenated along the axis, in place of ``segments``.
        is_known: False for an order that cannot be determined.
        origins: for an order that is not known, the orders of the channels that it may have been made from.
    """

    def __init__(
        self,
        length: int | None,
        segments: tuple[Factors, ...] | None = None,
        parts: Sequence["AxisOrder"] = (),
        *,
        is_known: bool = True,
        origins: Sequence["AxisOrder"] = (),
    ) -> None:
        self.length = length
        self.decided = segments
        self.parts = tuple(parts)
        self.is_known = is_known
        self.origins = tuple(origins)
        self.same_as: AxisOrder | None = None

    @classmethod
    def plain(cls, length: int | None) -> "AxisOrder":
        """An order that is the same in both frameworks."""
        return cls(length, plain_segments(length))

    @classmethod
    def unknown(cls, length: int | None, origins: Sequence["AxisOrder"] = ()) -> "AxisOrder":
        """An order that cannot be determined in the other framework."""
        return cls(length, is_known=False, origins=origins)

    @property
    def root(self) -> "AxisOrder":
        """The object that represents this order and all that it is merged with."""
        order = self
        while order.same_as is not None:
            order = order.same_as
        return order

    @property
    def is_undecided(self) -> bool:
        """Whether nothing has constrained the order yet."""
        order = self.root
        return order.is_known and not order.parts and order.decided is None

    def segments(self) -> tuple[Factors, ...] | None:
        """The factors of each range of the axis; None if they are not known. An undecided order counts as plain."""
        order = self.root
        if not order.is_known:
            return None
        if order.parts:
            by_part = [part.segments() for part in order.parts]
            return None if None in by_part else tuple(factors for part in by_part if part for factors in part)
        return order.decided or plain_segments(order.length)

    def make_plain(self) -> bool:
        """Whether the order is the same in both frameworks. An undecided order becomes plain."""
        segments = self.segments()
        if segments is None or any(len(factors) > 1 for factors in segments):
            return False
        order = self.root
        for part in order.parts:
            part.make_plain()
        if order.is_undecided:
            order.decided = plain_segments(order.length)
        return True

    def constrain(self, factors: Factors) -> bool:
        """Require the order of an axis that is reshaped into several. If it differs: False, and unknown from now on."""
        order, wanted = self.root, (normal_factors(factors),)
        if order.is_undecided:
            order.decided = wanted
        elif order.segments() != wanted and not (len(wanted[0]) == 1 and order.make_plain()):
            order.forget()
        return order.is_known

    def merged(self, other: "AxisOrder") -> "AxisOrder":
        """The common order of two axes that are combined element by element."""
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
        return AxisOrder.unknown(self.length, origins_of((one, two)))

    def forget(self) -> None:
        """Make the order unknown from now on."""
        order = self.root
        order.is_known = False
        for part in order.parts:
            part.forget()


def origins_of(orders: Sequence[AxisOrder]) -> list[AxisOrder]:
    """The known orders, and for each unknown one the orders that it was made from."""
    roots = [order.root for order in orders]
    return [origin for order in roots for origin in ([order] if order.is_known else order.origins)]


def map_layout(rank: int, data_format: str) -> tuple[int, ...]:
    """PyTorch's order of the axes of a feature map, batch axis excluded."""
    return tuple(range(rank)) if data_format == "channels_first" else (rank - 1, *range(rank - 1))


def map_factors(lengths: Sequence[Any], layout: Sequence[int], order: Sequence[int]) -> Factors | None:
    """The factors of the axis that results from flattening axes of a feature map.

    Args:
        lengths: lengths of the map's axes.
        layout: the axes in PyTorch's order.
        order: the axes in the order in which Keras flattens them.

    Returns:
        One labelled factor per axis; None if this order cannot be expressed so.
    """
    channels, *places = layout
    if len(places) > len(PLACES) or [axis for axis in order if axis != channels] != places or None in lengths:
        return None
    labels = dict(zip(places, PLACES[len(PLACES) - len(places) :], strict=True)) | {channels: "c"}
    return tuple((labels[axis], lengths[axis]) for axis in order)


def plain_segments(length: int | None) -> tuple[Factors, ...]:
    """The segments of an axis that was not flattened from several."""
    return ((("n", length or 0),),)


def normal_factors(factors: Factors) -> Factors:
    """The factors, replaced by a single one if PyTorch flattens to the same order."""
    moved = [factor for factor in factors if factor[1] != 1]
    if moved == sorted(moved, key=lambda factor: factor[0] != "c"):
        return (("n", prod(length for _, length in factors)),)
    return factors
