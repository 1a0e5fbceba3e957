"""Symbolic tensors of a Keras model with the order of each axis, and operations on them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from lentando.tensorflow.axis_orders import AxisOrder, map_factors, normal_factors, origins_of

__all__ = [
    "TracedTensor",
    "concatenated",
    "flattened",
    "joined",
    "joined_groups",
    "lengths_of",
    "merged",
    "order_of_channels",
    "permuted",
    "plain_tensor",
    "reduced",
    "unknown_tensor",
    "with_ones_moved",
]


@dataclass(frozen=True)
class TracedTensor:
    """A tensor of a model, compared with its counterpart in PyTorch.

    Attributes:
        axes: the order of each axis, batch axis excluded.
        layout: numbers of Keras's axes in PyTorch's order; None if that is not known. In a feature map the channels
            come first; its spatial axes are those of PyTorch's map before either framework permutes them.
        is_map: whether the tensor is a feature map, whose layouts differ by convention.
    """

    axes: tuple[AxisOrder, ...]
    layout: tuple[int, ...] | None
    is_map: bool = False

    @property
    def lengths(self) -> list[int | None]:
        """The shape, batch axis excluded."""
        return [axis.length for axis in self.axes]

    def make_same(self) -> bool:
        """Whether the tensor is identical in PyTorch. Undecided orders become plain."""
        return self.layout == tuple(range(len(self.axes))) and self.make_plain()

    def make_plain(self) -> bool:
        """Whether each axis has the same order in PyTorch. Undecided orders become plain."""
        plain = [axis.make_plain() for axis in self.axes]
        return all(plain)

    @property
    def after_features_last(self) -> tuple[int, ...] | None:
        """The layout after a layer that computes along the last axis in both frameworks."""
        same = tuple(range(len(self.axes)))
        return same if len(self.axes) == 1 or (self.layout == same and not self.is_map) else None

    @property
    def big_axes(self) -> list[int]:
        """The axes that are longer than 1."""
        return [number for number, length in enumerate(self.lengths) if length != 1]

    @property
    def channel_axis(self) -> int:
        """The axis of the channels if this is a feature map, else the last axis."""
        return self.layout[0] if self.is_map and self.layout is not None else len(self.axes) - 1


def lengths_of(tensor: Any) -> list[int | None]:
    """The shape of a Keras tensor, batch axis excluded."""
    return list(tensor.shape[1:])


def plain_tensor(lengths: Sequence[int | None]) -> TracedTensor:
    """A tensor that is identical in PyTorch."""
    return TracedTensor(tuple(map(AxisOrder.plain, lengths)), tuple(range(len(lengths))))


def unknown_tensor(tensor: Any, values: Sequence[TracedTensor] = ()) -> TracedTensor:
    """A tensor whose orders cannot be determined.

    Args:
        tensor: the Keras tensor.
        values: tensors that it was computed from without weights, so that its channels may be theirs.
    """
    origins = origins_of([value.axes[value.channel_axis] for value in values if len(value.axes) > 1])
    return TracedTensor(tuple(AxisOrder.unknown(length, origins) for length in lengths_of(tensor)), None)


def order_of_channels(order: AxisOrder, rank: int) -> AxisOrder:
    """The order of channels: plain in a map, unless channels were made from spatial positions, or the reverse.

    Channels that become spatial positions (``depth_to_space``) have a different order in PyTorch, and become unknown.
    """
    if rank == 1 or order.segments() is not None:
        return order
    lengths = [origin.length for origin in order.root.origins]
    if not lengths or order.length in (*lengths, sum(length or 0 for length in lengths)):
        return AxisOrder.plain(order.length)
    for origin in order.root.origins:
        origin.forget()
    return order


def flattened(value: TracedTensor, data_format: str = "channels_last") -> TracedTensor:
    """All axes flattened into one. Keras moves leading channels behind the other axes before it flattens."""
    rank = len(value.axes)
    order = [*range(1, rank), 0] if data_format == "channels_first" and rank > 1 else list(range(rank))
    return TracedTensor((joined(value, order),), (0,))


def joined(value: TracedTensor, order: Sequence[int]) -> AxisOrder:
    """The order of the axis that results from flattening several axes.

    Args:
        value: the tensor with the axes.
        order: numbers of the axes, in the order in which Keras flattens them.
    """
    lengths = value.lengths
    big = [axis for axis in order if lengths[axis] != 1]
    if len(big) <= 1:
        return value.axes[big[0]] if big else AxisOrder.plain(1)
    if any(lengths[axis] is None for axis in order):
        return AxisOrder.unknown(None)
    total = prod(lengths[axis] or 0 for axis in order)
    if not value.make_plain():
        return AxisOrder.unknown(total, origins_of([order for order in value.axes if not order.make_plain()]))
    if value.layout is None:  # features come last in Keras; spatial positions have the same order
        return AxisOrder.unknown(total, value.axes[-1:]) if len(value.axes) - 1 in big else AxisOrder.plain(total)
    layout = [axis for axis in value.layout if axis in order]
    if layout == list(order) or (value.layout[0] not in big and [a for a in layout if a in big] == big):
        return AxisOrder.plain(total)
    factors = map_factors(lengths, layout, order) if value.is_map and layout[0] == value.layout[0] else None
    return (
        AxisOrder.unknown(total, value.axes[-1:]) if factors is None else AxisOrder(total, (normal_factors(factors),))
    )


def merged(values: Sequence[TracedTensor], lengths: Sequence[int | None]) -> TracedTensor:
    """The result of combining tensors element by element, with broadcasting.

    Args:
        values: the tensors.
        lengths: shape of the result, batch axis excluded.
    """
    axes: list[AxisOrder] = []
    for place, length in enumerate(reversed(lengths), start=1):
        aligned = [value.axes[-place] for value in values if place <= len(value.axes)]
        aligned = [axis for axis in aligned if axis.length == length] or [AxisOrder.plain(length)]
        order = aligned[0]
        for axis in aligned[1:]:
            order = order.merged(axis)
        axes.insert(0, order)
    wide = [value for value in values if len(value.big_axes) > 1] or [v for v in values if len(v.axes) == len(lengths)]
    layouts = {value.layout if len(value.axes) == len(lengths) else None for value in wide}
    return TracedTensor(tuple(axes), layouts.pop() if len(layouts) == 1 else None, any(value.is_map for value in wide))


def joined_groups(lengths: Sequence[int | None], wanted: Sequence[int | None]) -> list[list[int]] | None:
    """Groups of adjacent axes that join to axes of the given lengths; None if an axis would have to be split."""
    groups: list[list[int]] = []
    axis = 0
    for length in wanted:
        group: list[int] = []
        product = 1
        while axis < len(lengths) and (product != length or lengths[axis] == 1):
            factor = lengths[axis]
            if factor is None:
                return None
            product *= factor
            group.append(axis)
            axis += 1
        if product != length:
            return None
        groups.append(group)
    return groups if axis == len(lengths) else None


def with_ones_moved(value: TracedTensor, big: Sequence[int], plain: tuple[AxisOrder, ...]) -> TracedTensor:
    """The same axes, with axes of length 1 in other positions."""
    moved = dict(zip(value.big_axes, big, strict=True))
    same = tuple(range(len(plain)))
    origin = {new: value.axes[old] for old, new in moved.items()}
    axes = tuple(origin.get(number, order) for number, order in enumerate(plain))
    if len(big) <= 1:
        return TracedTensor(axes, same)
    if value.layout is None or value.layout == tuple(range(len(value.axes))):
        return TracedTensor(axes, value.layout and same, value.is_map)
    layout = [moved[axis] for axis in value.layout if axis in moved]
    return TracedTensor(axes, (*layout, *(axis for axis in same if axis not in big)), value.is_map)


def permuted(value: TracedTensor, axes: Sequence[int]) -> TracedTensor:
    """The tensor with its axes in another order."""
    orders = tuple(value.axes[axis] for axis in axes)
    same = tuple(range(len(axes)))
    if not value.is_map:
        return TracedTensor(orders, same if value.layout == same else None)
    layout = None if value.layout is None else tuple(axes.index(axis) for axis in value.layout)
    return TracedTensor(orders, layout, is_map=True)


def concatenated(values: Sequence[TracedTensor], axis: int, lengths: Sequence[int | None]) -> TracedTensor:
    """Tensors concatenated along an axis, with the shape of the result."""
    if len({len(value.axes) for value in values}) > 1:
        return TracedTensor(tuple(map(AxisOrder.unknown, lengths)), None)
    others = [number for number in range(len(lengths)) if number != axis]
    alike = merged(
        [TracedTensor(tuple(value.axes[number] for number in others), None) for value in values],
        [lengths[number] for number in others],
    )
    parts = AxisOrder(lengths[axis], parts=[value.axes[axis] for value in values])
    layouts = {(value.layout, value.is_map) for value in values}
    layout, is_map = layouts.pop() if len(layouts) == 1 else (None, False)
    return TracedTensor((*alike.axes[:axis], parts, *alike.axes[axis:]), layout, is_map)


def reduced(value: TracedTensor, gone: Iterable[int], lengths: Sequence[int | None]) -> TracedTensor:
    """The tensor without some axes, or with length 1 in their place."""
    kept = [axis for axis in range(len(value.axes)) if axis not in set(gone)]
    if len(lengths) == len(value.axes):
        axes = tuple(order if n in kept else AxisOrder.plain(1) for n, order in enumerate(value.axes))
        return TracedTensor(axes, value.layout, value.is_map)
    layout = None if value.layout is None else tuple(kept.index(axis) for axis in value.layout if axis in kept)
    return TracedTensor(tuple(value.axes[axis] for axis in kept), layout if len(kept) != 1 else (0,), value.is_map)
