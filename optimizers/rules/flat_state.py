"""Arrays in a state dict whose elements correspond to those of the flat buffers.

They are marked, so that a checkpoint can store them by parameter name, and another framework, whose buffers have
another order, can find the elements of each of its parameters in them.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from lentando.comm.array_module import array_module, copy_into, to_host
from lentando.comm.collectives import plan_reduction
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import FlatLayout
from lentando.comm.transport import Array, Transport

__all__ = ["carried_over", "flat_state", "is_flat_state", "joined_shards", "load_shards"]


def flat_state(arrays: Sequence[Array | None], starts: Sequence[int] | None = None) -> dict[str, Any]:
    """A part of a state dict: one array per flat buffer, with a value for each of the buffer's elements.

    Args:
        arrays: one-dimensional arrays; None where a buffer has no values. Arrays on a device are copied to host memory.
        starts: elements of the buffers at which the arrays begin, if they are this rank's shards; None if each array
            covers the whole buffer, or all of its parameters.
    """
    on_host = [None if array is None else to_host(array) for array in arrays]
    return {"flat": on_host, "starts": None if starts is None else list(starts)}


def is_flat_state(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value is a result of ``flat_state``."""
    return isinstance(value, dict) and value.keys() == {"flat", "starts"}


def joined_shards(
    transport: Transport, arrays: Sequence[Array | None], starts: Sequence[int], sizes: Sequence[int]
) -> dict[str, Any]:
    """A flat state of whole buffers, on every rank, from the shards of all ranks. Collective.

    Args:
        transport: transport that connects the ranks.
        arrays: this rank's shard of each buffer; None where a buffer has no values.
        starts: elements of the buffers at which the shards begin.
        sizes: numbers of elements of the buffers.
    """
    whole: list[Array | None] = []
    for array, start, size in zip(arrays, starts, sizes, strict=True):
        elements = None
        if array is not None:
            elements = array_module(array).zeros(size, array.dtype)
            elements[start : start + array.size] = array
            plan_reduction(transport, elements, "backend").all_reduce(mean=False)  # zeros elsewhere
        whole.append(elements)
    return flat_state(whole)


def load_shards(
    subject: str,
    transport: Transport,
    arrays: Sequence[Array | None],
    state: dict[str, Any],
    starts: Sequence[int] | None = None,
) -> None:
    """Fill arrays from a flat state that was saved by the same rank.

    Args:
        subject: what the arrays are, for messages.
        transport: transport that connects the ranks.
        arrays: one array per buffer, which is filled; None where a buffer has no values.
        state: the flat state.
        starts: as in ``flat_state``.

    Raises:
        ConfigurationError: if arrays have another shape, or begin at other elements.
    """
    starts = starts or [0] * len(arrays)
    for array, saved, here, start in zip(arrays, state["flat"], starts, state["starts"] or starts, strict=True):
        if array is not None and saved is not None and here != start:
            raise ConfigurationError(
                f"{subject}: rank {transport.rank} of {transport.size} has the elements from {here} on, the state "
                f"those from {start}: the ranks were placed otherwise on their nodes. To resume in this placement, use "
                "a checkpoint (save and load)"
            )
        if (array is None) != (saved is None) or (array is not None and array.shape != saved.shape):
            found = "none" if saved is None else f"{saved.size} elements"
            wanted = "none" if array is None else f"{array.size} elements"
            raise ConfigurationError(f"{subject}: expected {wanted}, found {found} in the state")
        if array is not None:
            copy_into(array, saved)


def carried_over(saved: Any, new: Any, before: Sequence[FlatLayout], after: Sequence[FlatLayout]) -> Any:
    """Convert a state dict of buffers in one layout to another layout that has some of the same entries.

    Args:
        saved: state dict whose flat states cover the whole buffers, or all of their parameters.
        new: state dict of the same structure for the other layout, which keeps its values for entries that ``before``
            does not have.
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
