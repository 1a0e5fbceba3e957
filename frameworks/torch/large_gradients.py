"""Large gradients that are reduced where the backward pass has put them: copying them would take as long as the sum."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from lentando.comm.transport import Array
from lentando.optimizers.rules.base_algorithm import LARGE_ELEMENTS
from lentando.torch.convert import as_array, is_plain
from lentando.torch.flat_memory import FlatMemory
from lentando.torch.local_tensors import address, place

__all__ = ["LargeGradients"]


class LargeGradients:
    """The large gradients of a model. Gradients are counted through all flat memories.

    Args:
        memory: flat memory of the gradients, one for each dtype.
        homes: the part of the flat memory for each gradient.
        parameters: flat memory of the parameters.
    """

    def __init__(
        self, memory: Sequence[FlatMemory], homes: Sequence[torch.Tensor], parameters: Sequence[FlatMemory]
    ) -> None:
        self._memory = memory
        self._homes = homes
        self._taken = [place(each.flat) for each in (*memory, *parameters)]
        self._large = [number for number, home in enumerate(homes) if home.numel() >= LARGE_ELEMENTS]

    def found_in(self, given: Sequence[torch.Tensor | None]) -> dict[int, Array]:
        """Return the large gradients that need not be copied, by number, as one-dimensional arrays in their memory.

        Args:
            given: gradients of all parameters; None for a parameter that has none.
        """
        found: dict[int, Array] = {}
        places = []
        for number in self._large:
            gradient = given[number]
            if gradient is not None and _may_stay(gradient, self._homes[number]):
                start, end = place(gradient)
                if any(start < taken_end and taken_start < end for taken_start, taken_end in self._taken):
                    continue  # what a program has put there has another use, too
                found[number] = as_array(gradient).reshape(-1)
                places.append((start, end))
        places.sort()
        if any(end > start for (_, end), (start, _) in pairwise(places)):
            return {}  # parameters share a gradient, which must not be reduced twice
        return found

    def parts(self, in_place: Mapping[int, Array]) -> list[list[Array]]:
        """Return arrays that hold the gradients one after the other, for each flat memory.

        Args:
            in_place: large gradients that are not in the flat memory, by number.
        """
        parts, first = [], 0
        for memory in self._memory:
            array, offsets, begin = memory.buffer.array, memory.layout.offsets, 0
            of_memory: list[Array] = []
            for number, gradient in in_place.items():
                if first <= number < first + len(offsets) - 1:
                    start = offsets[number - first]
                    of_memory += [array[begin:start]] if start > begin else []
                    of_memory.append(gradient)
                    begin = start + gradient.size
            parts.append([*of_memory, array[begin:]])
            first += len(offsets) - 1
        return parts


def _may_stay(gradient: torch.Tensor, home: torch.Tensor) -> bool:
    """Return whether a gradient can take the place of its part of the flat memory, and may be changed there."""
    return (
        is_plain(gradient)
        and not gradient.requires_grad
        and gradient.dtype == home.dtype
        and not gradient.is_complex()
        and gradient.stride() == home.stride()
        and address(gradient) != 0
    )
