"""Flat buffers that hold the gradients of a Keras model while they are averaged."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lentando.comm.flat import FlatBuffer
from lentando.comm.transport import Array
from lentando.optimizers.rules.gradient_layout import FlatGradients

__all__ = ["KerasGradients"]

T = TypeVar("T")


class KerasGradients(FlatGradients):
    """Flat gradients, with a flag for each variable that states whether it has a gradient.

    Args:
        buffers: flat buffers of the gradients.
        views: views of the gradient of each variable, with axes in the order of this model, by the name in the buffers.
        shapes: shapes of the variables by the same names, in the order in which gradients are passed.
    """

    def __init__(self, buffers: Sequence[FlatBuffer], views: Mapping[str, Array], shapes: Mapping[str, Any]) -> None:
        super().__init__([buffer.layout for buffer in buffers], views, [buffer.views[-1] for buffer in buffers])
        self.buffers = buffers
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}

    def gather(self, gradients: Sequence[Array | None]) -> None:
        """Copy the gradients of all variables into the flat buffers; None for a variable without gradient."""
        given = zip(self._shapes, gradients, strict=True)
        self.put({name: g if g is None else g.reshape(self.views[name].shape) for name, g in given})

    def scatter(self, copied: Callable[[Array, Any], T]) -> list[T | None]:
        """Copies of the averaged gradients; None for a variable that has none on any rank.

        Args:
            copied: function of a view and a shape that returns a copy: ``as_tensor`` or ``copy_for_graph``.
        """
        taken = self.taken()
        views = [(taken[name], shape) for name, shape in self._shapes.items()]
        return [None if view is None else copied(view, shape) for view, shape in views]
