"""Converts state dicts to JSON and named tensors, and back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lentando.comm.containers import children, mapped, rebuilt
from lentando.comm.dtypes import bfloat16, numpy_dtype
from lentando.comm.errors import CheckpointError
from lentando.comm.flat import FlatLayout
from lentando.comm.objects import can_travel, from_json, to_json
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.elements import entries_within, in_shape
from lentando.optimizers.rules.flat_state import is_flat_state

__all__ = ["FlatNode", "flat_nodes", "no_flat_state", "pack", "tensor", "unpack"]

FlatNode = dict[str, Any]
"""A dict that stands for a ``flat_state``. ``path``: beginning of the names of its tensors, ``path/NAME OF PARAMETER``;
``ranges``: start, stop and dtype of this rank's array of each buffer, or None; ``sharded``: whether it is a shard."""

MARK = "lentando"
"""Key of a dict that stands for something that JSON lacks."""


def pack(tree: Any, layouts: Sequence[FlatLayout], path: str) -> tuple[Any, dict[str, Array]]:
    """A state dict as JSON and tensors.

    Args:
        tree: None, numbers, strings, lists, tuples, dicts, arrays and ``flat_state``.
        layouts: layouts of the flat buffers.
        path: beginning of the names of all tensors.

    Raises:
        ConfigurationError: for an object of any other kind; the message names its place.
    """
    tensors: dict[str, Array] = {}

    def convert(value: Any, where: str) -> Any:
        if is_flat_state(value):
            return {MARK: "flat", **_pack_flat(value, layouts, where, tensors)}
        if isinstance(value, np.ndarray | np.generic) and can_travel(value.dtype):
            while where in tensors:  # keys may be written alike: 1 and "1"
                where += "'"
            array, about = _as_stored(np.asarray(value))
            tensors[where] = array
            return {MARK: "array" if isinstance(value, np.ndarray) else "scalar", "path": where, **about}
        if type(value) in (set, frozenset):
            return value
        if isinstance(value, dict) and children(value) is not None:
            content = rebuilt(value, [convert(item, f"{where}/{key}") for key, item in value.items()])
            return {MARK: "dict", "content": content} if MARK in value else content
        if children(value) is not None:
            return rebuilt(value, [convert(item, f"{where}/{number}") for number, item in enumerate(value)])
        return value

    mapped(tree, lambda value, _: value, path)  # raises if a container contains itself
    return to_json(convert(tree, path), path), tensors


def _as_stored(array: Array) -> tuple[Array, dict[str, str]]:
    """The array in a dtype that safetensors knows, and what must be noted to convert it back."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)  # the file does not record the byte order
    is_widely_known = array.dtype.kind in "biuf" and array.dtype.isbuiltin == 1 and array.dtype.itemsize <= 8
    if is_widely_known or array.dtype == bfloat16:
        return array, {}
    memory = np.ascontiguousarray(array).reshape(*array.shape, 1).view(np.uint8)
    return memory, {"dtype": array.dtype.name}


def _as_packed(array: Array, node: Mapping[str, Any]) -> Array:
    if "dtype" not in node:
        return array
    packed: Array = np.ascontiguousarray(array).view(numpy_dtype(node["dtype"]))[..., 0]
    return packed


def unpack(structure: Any, tensors: Mapping[str, Array], flat: Callable[[FlatNode], dict[str, Any]]) -> Any:
    """The state dict that ``pack`` was given.

    Args:
        structure: JSON that ``pack`` returned.
        tensors: tensors by name.
        flat: function that makes a ``flat_state`` from the node that stands for it.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            if value.get(MARK) == "flat":
                return flat(value)
            if value.get(MARK) == "dict":
                return rebuilt(value["content"], [convert(item) for item in value["content"].values()])
            if MARK in value:
                array = _as_packed(tensor(tensors, value["path"]), value)
                return array if value[MARK] == "array" else array[()]
            return rebuilt(value, [convert(item) for item in value.values()])
        if isinstance(value, list | tuple):
            return type(value)([convert(item) for item in value])
        return value

    return convert(from_json(structure))


def flat_nodes(structure: Any) -> dict[str, FlatNode]:
    """All nodes of a packed state dict that stand for a ``flat_state``, by path."""

    def walk(value: Any) -> Iterator[FlatNode]:
        if isinstance(value, dict):
            if value.get(MARK) == "flat":
                yield value
            else:
                for item in value.values():
                    yield from walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                yield from walk(item)

    return {node["path"]: node for node in walk(from_json(structure))}


def no_flat_state(node: FlatNode) -> dict[str, Any]:
    """Refuses a ``flat_state``, for ``unpack`` where none is expected.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(f"the state of flat buffers is not expected at {node['path']!r}")


def tensor(tensors: Mapping[str, Array], name: str) -> Array:
    """A tensor of a checkpoint.

    Raises:
        CheckpointError: if no tensor has this name.
    """
    if name not in tensors:
        raise CheckpointError(f"the checkpoint has no tensor {name!r}, which its description mentions")
    return tensors[name]


def _pack_flat(state: dict[str, Any], layouts: Sequence[FlatLayout], path: str, tensors: dict[str, Array]) -> FlatNode:
    sharded = state["starts"] is not None
    starts = state["starts"] if sharded else [0] * len(layouts)
    ranges: list[list[Any] | None] = []
    for layout, array, start in zip(layouts, state["flat"], starts, strict=True):
        if array is None:
            ranges.append(None)
            continue
        ranges.append([start, start + array.size, array.dtype.name])
        for entry, own, here in entries_within(layout, start, start + array.size):
            whole = own == slice(0, entry.size)
            tensors[f"{path}/{entry.name}"] = in_shape(array[here], entry) if whole else array[here]
    return {"path": path, "ranges": ranges, "sharded": sharded}
