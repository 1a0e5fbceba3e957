"""Averages of what several ranks have saved: of arrays by name, and of trees of numbers and arrays.

Values that are equal on all ranks stay exactly what they are.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lentando.comm.dtypes import is_floating
from lentando.comm.errors import CheckpointError
from lentando.comm.transport import Array

__all__ = ["NamedAverages", "are_equal_trees", "average_trees", "mean_of"]


class NamedAverages:
    """Means of named arrays, to which ranks are added one after the other."""

    def __init__(self) -> None:
        self._first: dict[str, Array] = {}
        self._sums: dict[str, Array] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, array: Array) -> None:
        """Add one rank's array. Sums are formed in float64, and only once two ranks differ.

        Raises:
            CheckpointError: if an earlier rank's array of this name has another shape.
        """
        first, count = self._first.setdefault(name, array), self._counts.get(name, 0)
        if first.shape != array.shape:
            raise CheckpointError(f"the ranks saved {name!r} in shapes {first.shape} and {array.shape}")
        if name not in self._sums and first is not array and not np.array_equal(first, array):
            self._sums[name] = first.astype(np.float64) * count
        if name in self._sums:
            self._sums[name] += array.astype(np.float64)
        self._counts[name] = count + 1

    def mean(self, name: str) -> Array:
        """The mean over the ranks that have added this name, in the dtype of the first."""
        first = self._first[name]
        if name not in self._sums:
            return first
        return (self._sums[name] / self._counts[name]).astype(first.dtype)

    def are_equal(self, names: Iterable[str]) -> bool:
        """Whether the arrays of each of these names were equal on all ranks that have added it."""
        return not any(name in self._sums for name in names)

    def names(self) -> list[str]:
        """All names, in the order in which they were first added."""
        return list(self._first)


def mean_of(numbers: Sequence[float]) -> float:
    """The mean; of equal numbers, the number itself."""
    return numbers[0] if len(set(numbers)) == 1 else sum(numbers) / len(numbers)


def average_trees(trees: Sequence[Any]) -> Any:
    """Trees of the same kind as one: floating-point numbers and arrays are averaged, all else is the first tree's."""
    first = trees[0]
    if isinstance(first, dict):
        same = [tree for tree in trees if isinstance(tree, dict)]
        keys = dict.fromkeys(key for tree in same for key in tree)
        return {key: average_trees([tree[key] for tree in same if key in tree]) for key in keys}
    if isinstance(first, list | tuple):
        lists = [tree for tree in trees if isinstance(tree, list | tuple) and len(tree) == len(first)]
        return type(first)([average_trees(items) for items in zip(*lists, strict=True)])
    if isinstance(first, float):
        return mean_of([tree for tree in trees if isinstance(tree, float)])
    if isinstance(first, np.ndarray | np.generic) and is_floating(first.dtype):
        averages = NamedAverages()
        for tree in trees:
            if isinstance(tree, type(first)) and tree.shape == first.shape:
                averages.add("", np.asarray(tree))
        mean = averages.mean("")
        return mean if isinstance(first, np.ndarray) else mean[()]
    return first


def are_equal_trees(first: Any, second: Any) -> bool:
    """Whether two trees hold equal numbers in equal places."""
    if isinstance(first, np.ndarray | np.generic) or isinstance(second, np.ndarray | np.generic):
        return np.array_equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(are_equal_trees(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(are_equal_trees, first, second))
    return bool(first == second)
