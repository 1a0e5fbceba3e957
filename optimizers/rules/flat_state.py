"""Arrays in a state dict that lie like the flat buffers.

They are marked, so that a checkpoint can store them by parameter name, and another framework, which lays its buffers
out in another order, can find in them what belongs to each of its parameters.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from lentando.comm.array_module import to_host
from lentando.comm.flat import FlatLayout
from lentando.comm.transport import Array

__all__ = ["carried_over", "flat_state", "is_flat_state"]


def flat_state(arrays: Sequence[Array | None], starts: Sequence[int] | None = None) -> dict[str, Any]:
    """A part of a state dict: one array per flat buffer, which holds what the buffer's elements have.

    Args:
        arrays: one-dimensional; None where there is nothing to hold. Those of a device are copied into host memory.
        starts: for arrays that are this rank's shards: the buffers' elements at which they begin. None says that this
            rank has the whole buffer's, or all parameters', as its own.
    """
    on_host = [None if array is None else to_host(array) for array in arrays]
    return {"flat": on_host, "starts": None if starts is None else list(starts)}


def is_flat_state(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether ``flat_state`` has made this."""
    return isinstance(value, dict) and value.keys() == {"flat", "starts"}


def carried_over(saved: Any, new: Any, before: Sequence[FlatLayout], after: Sequence[FlatLayout]) -> Any:
    """A state dict of buffers in one layout, for buffers in another one that has some of the same entries.

    Args:
        saved: the state dict, whose flat states hold the whole buffers, or all their parameters.
        new: a state dict of the same kind for the other layout. What it holds for entries that ``before`` does not
            have is kept.
        before: layouts of the buffers of ``saved``.
        after: layouts of the buffers of ``new``.
    """
    if is_flat_state(saved) and is_flat_state(new):
        return _carried_over_flat(saved, new, before, after)
    if isinstance(saved, dict) and isinstance(new, dict):
        return {key: carried_over(value, new.get(key), before, after) for key, value in saved.items()}
    return saved


def _carried_over_flat(
    saved: dict[str, Any], new: dict[str, Any], before: Sequence[FlatLayout], after: Sequence[FlatLayout]
) -> dict[str, Any]:
    places = {
        (entry.name, entry.size): (number, offset)
        for number, layout in enumerate(before)
        for entry, offset in zip(layout.entries, layout.offsets, strict=True)
    }
    arrays: list[Array | None] = []
    for number, (layout, array) in enumerate(zip(after, new["flat"], strict=True)):
        if array is None:
            arrays.append(None)
            continue
        carried = np.array(array)
        start = 0 if new["starts"] is None else new["starts"][number]
        for entry, offset in zip(layout.entries, layout.offsets, strict=True):
            first, last = max(offset, start), min(offset + entry.size, start + carried.size)
            if first < last and (entry.name, entry.size) in places:
                source, place = places[entry.name, entry.size]
                shift = place - offset
                carried[first - start : last - start] = saved["flat"][source][first + shift : last + shift]
        arrays.append(carried)
    return flat_state(arrays, new["starts"])
