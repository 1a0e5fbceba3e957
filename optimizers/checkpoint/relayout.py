"""Converts the state of flat buffers from one layout to another: other names, order, axes and shards."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lentando.comm.dtypes import numpy_dtype
from lentando.comm.errors import CheckpointError
from lentando.comm.flat import Entry, FlatLayout
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.elements import entries_within, in_memory_order, in_shape
from lentando.optimizers.checkpoint.rank_content import RankContent, Tensors
from lentando.optimizers.checkpoint.tree import FlatNode, flat_nodes, pack, tensor
from lentando.optimizers.checkpoint.weight_map import WeightMap
from lentando.optimizers.rules.flat_state import flat_state

__all__ = ["Relayout", "parameters_of", "saved_arrays"]


class Relayout:
    """Converts what the ranks have saved into the state of this rank's buffers.

    Args:
        mapping: map from the saved tensors to those here.
        saved: layouts of the buffers when the checkpoint was saved.
        layouts: layouts of the buffers here.
        state: the replica's state here, whose arrays have the required extents.
        own: content that this rank has saved.
        read_all: function that reads the content of all ranks; called only where layouts or shards differ.
    """

    def __init__(
        self,
        mapping: WeightMap,
        saved: Sequence[FlatLayout],
        layouts: Sequence[FlatLayout],
        state: dict[str, Any],
        own: RankContent,
        read_all: Callable[[], Sequence[RankContent]],
    ) -> None:
        self._mapping = mapping
        self._saved = saved
        self._layouts = layouts
        self._wanted = flat_nodes(pack(state, layouts, "replica")[0])
        self._own = own
        self._read_all = read_all
        self._is_same = [layout.entries for layout in saved] == [layout.entries for layout in layouts]

    def flat_state(self, node: FlatNode) -> dict[str, Any]:
        """The state that ``lentando.optimizers.rules.flat_state.flat_state`` would have returned here.

        Args:
            node: node that stands for the state that this rank has saved.

        Raises:
            CheckpointError: if the checkpoint does not hold what is needed.
        """
        known = self._wanted.get(node["path"])
        wanted = self._whole(node) if known is None else known["ranges"]
        if self._is_same and wanted == node["ranges"]:
            arrays = saved_arrays(self._saved, node["path"], wanted, self._own[0])
        elif not any(node["ranges"]):  # rounding errors of messages: a rank that trained alone had none
            arrays = [extent and np.zeros(extent[1] - extent[0], numpy_dtype(extent[2])) for extent in wanted]
        else:
            values = self._by_name(node)
            arrays = [
                extent and self._laid_out(layout, node["path"], extent, values)
                for layout, extent in zip(self._layouts, wanted, strict=True)
            ]
        return flat_state(arrays, [extent[0] if extent else 0 for extent in wanted] if node["sharded"] else None)

    def _whole(self, node: FlatNode) -> list[Any]:
        """The extents here of arrays with an element for each parameter, or for each statistic as well."""
        if node["sharded"]:
            raise CheckpointError(f"{node['path']!r} was saved in shards, but the training here has no such state")
        extents = [extent for extent in node["ranges"] if extent is not None]
        dtypes = {
            layout.dtype: extent and extent[2] for layout, extent in zip(self._saved, node["ranges"], strict=True)
        }
        with_statistics = sum(stop for _, stop, _ in extents) > sum(map(parameters_of, self._saved))
        return [
            dtypes.get(layout.dtype)
            and [0, layout.size if with_statistics else parameters_of(layout), dtypes[layout.dtype]]
            for layout in self._layouts
        ]

    def _by_name(self, node: FlatNode) -> dict[str, Array]:
        """The saved state as whole tensors, in their saved shapes, by their saved names."""
        path = node["path"]
        holders = [(node, self._own[0])]
        if node["sharded"]:
            holders = [(flat_nodes(about["replica"])[path], tensors) for tensors, about in self._all]
        values: dict[str, Array] = {}
        for number, layout in enumerate(self._saved):
            extents = [(own["ranges"][number], tensors) for own, tensors in holders]
            extents = [(extent, tensors) for extent, tensors in extents if extent is not None]
            if not extents:
                continue
            full = np.empty(max(stop for (_, stop, _), _ in extents), numpy_dtype(extents[0][0][2]))
            for (start, stop, dtype), tensors in extents:
                full[start:stop] = _elements(layout, path, [start, stop, dtype], tensors)
            for entry, own, here in entries_within(layout, 0, full.size):
                if own == slice(0, entry.size):
                    values[entry.name] = in_shape(full[here], entry)
        return values

    def _laid_out(self, layout: FlatLayout, path: str, extent: Sequence[Any], values: dict[str, Array]) -> Array:
        start, stop, dtype = extent
        elements = np.empty(stop - start, numpy_dtype(dtype))
        for entry, own, here in entries_within(layout, start, stop):
            elements[here] = in_memory_order(self._value(entry, path, values), entry)[own]
        return elements

    def _value(self, entry: Entry, path: str, values: dict[str, Array]) -> Array:
        def saved(source: str) -> Array:
            if source in values:
                return values[source]
            if entry.group is None:
                # A statistic that is averaged here and was not then. Its anchor is never used, so any value will do.
                return tensor(self._own[0], f"model/{source}")
            raise CheckpointError(
                f"the checkpoint has no {path!r} of {source!r}, which is {entry.name!r} here: it was frozen when the "
                "checkpoint was saved"
            )

        return self._mapping.value(entry.name, saved)

    @cached_property
    def _all(self) -> Sequence[RankContent]:
        return self._read_all()


def saved_arrays(
    layouts: Sequence[FlatLayout], path: str, ranges: Sequence[Any], tensors: Tensors
) -> list[Array | None]:
    """The arrays that a rank has saved, one per buffer, as they were passed to ``flat_state``.

    Args:
        layouts: layouts of the buffers when the checkpoint was saved.
        path: path of the ``FlatNode``.
        ranges: ranges of the ``FlatNode``.
        tensors: the rank's tensors.
    """
    return [extent and _elements(layout, path, extent, tensors) for layout, extent in zip(layouts, ranges, strict=True)]


def parameters_of(layout: FlatLayout) -> int:
    """Number of elements of parameters: those of statistics do not count."""
    return sum(entry.size for entry in layout.entries if entry.group is not None)


def _elements(layout: FlatLayout, path: str, extent: Sequence[Any], tensors: Tensors) -> Array:
    """The saved elements of a range of a buffer."""
    start, stop, dtype = extent
    elements = np.empty(stop - start, numpy_dtype(dtype))
    for entry, own, here in entries_within(layout, start, stop):
        saved = tensor(tensors, f"{path}/{entry.name}")
        elements[here] = in_memory_order(saved, entry) if own == slice(0, entry.size) else saved
    return elements
