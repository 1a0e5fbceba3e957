"""Flat gradients: laid out as the parameters, followed by a number per parameter that says if it has a gradient.

A parameter that no rank has used stays without a gradient. A parameter that some ranks have used gets the mean over all
ranks, with zeros for those that have not used it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lentando.comm.flat import Entry, FlatBuffer, FlatLayout

__all__ = ["FlatGradients", "gradient_layouts"]

PRESENCE = "which parameters have a gradient"

SPARSE = -32768.0
"""Note of a parameter with a sparse gradient, in place of 1. Sums with the notes of other ranks remain negative."""


def gradient_layouts(layouts: Iterable[FlatLayout]) -> list[FlatLayout]:
    """Layouts for the gradients of parameters: statistics left out, and a last entry with a number per parameter.

    Args:
        layouts: layouts of parameters and statistics. A layout without parameters has no gradients, and is left out.
    """
    gradients = []
    for layout in layouts:
        trained = [entry for entry in layout.entries if entry.group is not None]
        if trained:
            gradients.append(FlatLayout([*trained, Entry(PRESENCE, (len(trained),), trained[0].dtype, None)]))
    return gradients


class FlatGradients:
    """The gradients of all parameters in flat memory, and whether each parameter has one.

    The memory consists of NumPy arrays. For a framework whose flat memory consists of tensors, a subclass overrides
    ``copy`` and ``new``.

    Args:
        layouts: layouts of the flat memory (``gradient_layouts``).
        views: memory of the gradient of each parameter, by name.
        presence: memory of the last entry of each layout.

    Attributes:
        views: as given.

    Example:
        >>> entries = [Entry("used", (2,), "float64", 0), Entry("unused", (1,), "float64", 0)]
        >>> buffer = FlatBuffer(*gradient_layouts([FlatLayout(entries)]))
        >>> gradients = FlatGradients.over([buffer])
        >>> gradients.put({"used": np.array([3.0, 4.0]), "unused": None})
        >>> buffer.array.tolist()
        [3.0, 4.0, 0.0, 1.0, 0.0]
        >>> gradients.taken()
        {'used': array([3., 4.]), 'unused': None}
    """

    def __init__(self, layouts: Iterable[FlatLayout], views: Mapping[str, Any], presence: Iterable[Any]) -> None:
        self.views = views
        names = [[entry.name for entry in layout.entries[:-1]] for layout in layouts]
        self._parts = list(zip(names, presence, strict=True))

    @classmethod
    def over(cls, buffers: Sequence[FlatBuffer]) -> "FlatGradients":
        """Gradients in flat buffers of which each part has the shape of its parameter.

        Args:
            buffers: flat buffers in host memory, laid out by ``gradient_layouts``.
        """
        views = {name: view for buffer in buffers for name, view in list(buffer.by_name.items())[:-1]}
        return cls([buffer.layout for buffer in buffers], views, [buffer.views[-1] for buffer in buffers])

    def put(
        self, gradients: Mapping[str, Any], *, are_copied: bool = False, sparse: Collection[str] = frozenset()
    ) -> None:
        """Copy gradients into the flat memory, with a note of which parameters have one.

        Args:
            gradients: gradient of each parameter by name, of the shape of its memory; None if it has none.
            are_copied: whether the flat memory already holds the gradients, so that only the note is written.
            sparse: names of the parameters whose gradients are sparse on this rank. They are noted as such, so that all
                ranks know.
        """
        for names, presence in self._parts:
            for name in names:
                if gradients[name] is None:
                    self.views[name][...] = 0
                elif not are_copied:
                    self.copy(self.views[name], gradients[name])
            notes = [SPARSE if name in sparse else float(gradients[name] is not None) for name in names]
            self.copy(presence, self.new(notes, presence))

    def taken(self) -> dict[str, Any]:
        """The memory of each gradient by name; None for a parameter that has a gradient on no rank."""
        return {
            name: self.views[name] if count > 0 else None
            for names, presence in self._parts
            for name, count in zip(names, presence.tolist(), strict=True)
        }

    def sparse(self) -> list[str]:
        """Names of the parameters whose gradients are sparse on some rank, the same on all ranks."""
        return [
            name
            for names, presence in self._parts
            for name, count in zip(names, presence.tolist(), strict=True)
            if count < 0
        ]

    def copy(self, view: Any, values: Any) -> None:
        """Copy values into a part of the flat memory.

        Args:
            view: part of the flat memory.
            values: array or tensor of the same shape.
        """
        np.copyto(view, values, casting="same_kind")

    def new(self, values: Sequence[float], like: Any) -> Any:
        """Make an array or tensor of numbers.

        Args:
            values: the numbers.
            like: part of the flat memory, whose dtype the result has.
        """
        return np.array(values, like.dtype)
