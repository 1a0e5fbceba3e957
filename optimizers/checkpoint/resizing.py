"""A checkpoint of another number of ranks, as if one replica had saved it: the mean of all.

What the ranks held in shards is put together, what they held of their own is averaged, and what is equal on all ranks
stays what it is, to the bit. Every rank here reads all parts, one after the other, and comes to the same numbers.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lentando.comm.dtypes import is_floating
from lentando.comm.errors import CheckpointError
from lentando.comm.flat import FlatLayout
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.elements import in_memory_order, in_shape
from lentando.optimizers.checkpoint.relayout import RankContent, Tensors, parameters_of, saved_arrays
from lentando.optimizers.checkpoint.tree import no_flat_state, pack, tensor, unpack
from lentando.optimizers.rules.base_algorithm import Resizable
from lentando.optimizers.rules.flat_state import flat_state

__all__ = ["Resizing"]


class Resizing:
    """Merges the parts of all ranks into one that each rank here goes on from.

    Args:
        size: how many ranks have saved.
        read: reads the part of one of them.
        layouts: of the buffers when the checkpoint was saved.
        base: the base algorithm at work here, which knows what its saved state stands for.
        rank: this rank.
        new_size: how many ranks there are now.

    Raises:
        CheckpointError: if the parts do not make up a whole.
    """

    def __init__(
        self,
        size: int,
        read: Callable[[int], RankContent],
        layouts: Sequence[FlatLayout],
        base: Resizable,
        rank: int,
        new_size: int,
    ) -> None:
        self._size, self._new_size = size, new_size
        self._layouts = layouts
        self._base = base
        self._replicas = _Average()
        self._outer = _OuterState(layouts)
        self._states: list[dict[str, Any]] = []
        self._optimizers = _Optimizers()
        self._extra: tuple[Tensors, Any] = ({}, None)
        self._gossips = False
        for saved in range(size):
            tensors, about = read(saved)
            self._add(tensors, about)
            self._optimizers.add(tensors, about)
            if saved in (0, rank):
                self._extra = {name: a for name, a in tensors.items() if _is_below("extra", name)}, about["extra"]

    def part(self) -> RankContent:
        """Tensors, and what is said about them, like those of a rank; whole where ranks hold shards."""
        model = self._model()
        state = self._state([self._flattened(layout, model)[: parameters_of(layout)] for layout in self._layouts])
        structure, tensors = pack(state, self._layouts, "replica")
        tensors |= {f"model/{name}": array for name, array in model.items()}
        own, about = self._optimizers.merged()
        return {**tensors, **own, **self._extra[0]}, {**about, "replica": structure, "extra": self._extra[1]}

    def in_words(self, with_optimizer: bool) -> str:
        """What goes on exactly, and what is approximated. Right after ``part``."""
        first = self._states[0]
        exact = [f"inner step {first['inner_steps']}, {first['rounds']} rounds and the period's schedule"]
        approximated = []
        names = {e.name: e.group is None for layout in self._layouts for e in layout.entries}
        for what, is_statistic in (("the parameters", False), ("the averaged statistics", True)):
            own = [name for name in names if names[name] == is_statistic]
            if own and self._replicas.equal(own):
                exact.append(f"{what} (equal on all ranks)")
            elif own:
                approximated.append(f"{what} (the mean of the replicas)")
        outer = "anchors and slow momenta"
        if self._outer.is_sharded:
            exact.append(f"{outer} (cut anew)")
        elif self._outer.equal() is not None:
            (exact if self._outer.equal() else approximated).append(f"{outer} (the mean of the replicas')")
        if with_optimizer and self._optimizers.equal():
            exact.append("the base optimizer's state (equal on all ranks)")
        elif with_optimizer:
            approximated.append("the base optimizer's state (the mean of the ranks')")
        if first["steps_in_round"] is not None and first["steps"] and approximated:
            taken = (
                f"{first['steps']} of its {first['steps_in_round']} steps were taken apart, by the replicas that were"
            )
            approximated.append(f"the round under way ({taken})")
            if any(_sums(state) != _sums(first) for state in self._states):
                approximated.append("its loss and learning rate so far (the mean of the ranks')")
        if self._gossips:
            approximated.append("gossip (begins anew: w = 1, nothing under way)")
        if self._extra[1] is not None:
            whose = "ranks that are new get rank 0's" if self._new_size > self._size else "that of other ranks is left"
            exact.append(f"extra (of the rank of the same number; {whose})")
        return (
            f"resumed {self._size} ranks' checkpoint on {self._new_size} ranks. Exact: {'; '.join(exact)}. "
            f"Approximated: {'; '.join(approximated) or 'nothing'}"
        )

    def _add(self, tensors: Tensors, about: Any) -> None:
        state = unpack(
            about["replica"],
            tensors,
            lambda node: flat_state(
                saved_arrays(self._layouts, node["path"], node["ranges"], tensors),
                [extent[0] if extent else 0 for extent in node["ranges"]] if node["sharded"] else None,
            ),
        )
        saved = {e.name: tensor(tensors, f"model/{e.name}") for layout in self._layouts for e in layout.entries}
        arrays = [self._flattened(layout, saved) for layout in self._layouts]
        self._gossips |= bool(state["base"])
        if state["started"]:  # before, what gossip holds may be older than the weights
            parameters = [a[: parameters_of(layout)] for layout, a in zip(self._layouts, arrays, strict=True)]
            shown = self._base.prepared_average(state["base"], parameters)
            arrays = [
                np.concatenate([own, array[own.size :].astype(own.dtype)])
                for own, array in zip(shown, arrays, strict=True)
            ]
        for layout, array in zip(self._layouts, arrays, strict=True):
            for entry, start in zip(layout.entries, layout.offsets, strict=True):
                self._replicas.add(entry.name, array[start : start + entry.size])
        for name, value in (state["outer"] or {}).items():
            self._outer.add(name, value)
        # Only rank 0's is gone on from: the others' arrays need not stay in memory.
        self._states.append(state if not self._states else {**state, "base": None, "outer": None})

    def _model(self) -> Tensors:
        return {
            entry.name: in_shape(self._replicas.mean(entry.name).astype(layout.dtype, copy=False), entry)
            for layout in self._layouts
            for entry in layout.entries
        }

    def _state(self, parameters: Sequence[Array]) -> dict[str, Any]:
        """Of a replica that holds the mean: equal on all ranks but for the number of the rank, which they know."""
        first = self._states[0]
        rates = [state["rate_sums"] for state in self._states]
        losses = [(s["loss_sum"] / s["loss_count"], s["loss_count"]) for s in self._states if s["loss_count"]]
        count = max((count for _, count in losses), default=0)
        weights_set = {"weights_set": True} if any(state.get("weights_set") for state in self._states) else {}
        return {
            **first,
            **weights_set,
            "rate_sums": [_mean(sums) for sums in zip(*rates, strict=True)],
            "loss_sum": _mean([loss for loss, _ in losses]) * count if losses else 0.0,
            "loss_count": count,
            "base": self._base.state_for_average(first["base"], parameters),
            "outer": first["outer"] and self._outer.whole(),
        }

    @staticmethod
    def _flattened(layout: FlatLayout, tensors: Tensors) -> Array:
        flat = np.empty(layout.size, layout.dtype)
        for entry, start in zip(layout.entries, layout.offsets, strict=True):
            flat[start : start + entry.size] = in_memory_order(tensors[entry.name], entry)
        return flat


class _Average:
    """Means of named arrays, one rank after the other; of equal ones, the array itself."""

    def __init__(self) -> None:
        self._first: Tensors = {}
        self._sums: Tensors = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, array: Array) -> None:
        first, count = self._first.setdefault(name, array), self._counts.get(name, 0)
        if first.shape != array.shape:
            raise CheckpointError(f"the ranks saved {name!r} in shapes {first.shape} and {array.shape}")
        if name not in self._sums and first is not array and not np.array_equal(first, array):
            self._sums[name] = first.astype(np.float64) * count
        if name in self._sums:
            self._sums[name] += array.astype(np.float64)
        self._counts[name] = count + 1

    def mean(self, name: str) -> Array:
        first = self._first[name]
        if name not in self._sums:
            return first
        return (self._sums[name] / self._counts[name]).astype(first.dtype)

    def equal(self, names: Iterable[str]) -> bool:
        """Whether all ranks that have them have the same."""
        return not any(name in self._sums for name in names)

    def names(self) -> list[str]:
        return list(self._first)


class _OuterState:
    """Anchors and slow momenta: of shards the whole, of each replica's own the mean."""

    def __init__(self, layouts: Sequence[FlatLayout]) -> None:
        self._layouts = layouts
        self._shards: dict[str, list[list[tuple[int, Array]]]] = {}
        self._own = _Average()
        self._names: dict[str, list[bool]] = {}

    @property
    def is_sharded(self) -> bool:
        return any(pieces for by_buffer in self._shards.values() for pieces in by_buffer)

    def add(self, name: str, state: dict[str, Any]) -> None:
        self._names.setdefault(name, [array is not None for array in state["flat"]])
        starts = state["starts"]
        for number, array in enumerate(state["flat"]):
            if array is None:
                continue
            if starts is None:
                self._own.add(f"{name} {number}", array)
            else:
                by_buffer = self._shards.setdefault(name, [[] for _ in self._layouts])
                by_buffer[number].append((starts[number], array))

    def equal(self) -> bool | None:
        """Whether each replica's own were equal; None if there were none."""
        return self._own.equal(self._own.names()) if self._own.names() else None

    def whole(self) -> dict[str, Any]:
        """As a rank that has all of it would have saved it."""
        found: dict[str, Any] = {}
        for name, there in self._names.items():
            if name in self._shards:
                pieces = zip(there, self._shards[name], self._layouts, strict=True)
                arrays = [_joined(name, own, layout) if is_there else None for is_there, own, layout in pieces]
                found[name] = flat_state(arrays, [0] * len(arrays))
            else:
                found[name] = flat_state(
                    [self._own.mean(f"{name} {number}") if is_there else None for number, is_there in enumerate(there)]
                )
        return found


class _Optimizers:
    """The base optimizers of all ranks, and what is said of the rest."""

    def __init__(self) -> None:
        self._average = _Average()
        self._first: Tensors = {}
        self._abouts: list[Any] = []
        self._rests: list[Any] = []

    def add(self, tensors: Tensors, about: Any) -> None:
        if not self._abouts:
            self._first = {f"model/{name}": tensor(tensors, f"model/{name}") for name, _, _ in about["not_averaged"]}
        else:
            kinds = [f"{one['optimizer']['kind']} of {one['framework']}" for one in (self._abouts[0], about)]
            if kinds[0] != kinds[1]:
                raise CheckpointError(f"the ranks that saved it had different base optimizers: {' and '.join(kinds)}")
        self._abouts.append(about)
        self._rests.append(unpack(about["optimizer rest"], tensors, no_flat_state))
        for key, names in about["optimizer"]["names"].items():
            for name in names:
                self._average.add(f"optimizer/{key}/{name}", tensor(tensors, f"optimizer/{key}/{name}"))

    def equal(self) -> bool:
        return self._average.equal(self._average.names()) and all(_same(rest, self._rests[0]) for rest in self._rests)

    def merged(self) -> RankContent:
        own = [about["optimizer"] for about in self._abouts]
        # A rank whose state says that others cannot read it speaks for all.
        about = dict(next((one for one in own if one["reading"] is None), own[0]))
        if about["reading"] is not None and about["reading"]["steps"] is not None:
            about["reading"] = {**about["reading"], "steps": round(_mean([one["reading"]["steps"] for one in own]))}
        about["is_empty"] = all(one["is_empty"] for one in own)
        keys = dict.fromkeys(key for one in own for key in one["names"])
        about["names"] = {key: list(dict.fromkeys(n for one in own for n in one["names"].get(key, []))) for key in keys}
        rest, tensors = pack(_merged(self._rests), [], "optimizer rest")
        tensors |= {name: self._average.mean(name) for name in self._average.names()}
        return {**self._first, **tensors}, {**self._abouts[0], "optimizer": about, "optimizer rest": rest}


def _joined(name: str, pieces: Sequence[tuple[int, Array]], layout: FlatLayout) -> Array:
    """The shards of all ranks, however the reduction has cut them."""
    ordered = sorted((piece for piece in pieces if piece[1].size), key=lambda piece: piece[0])
    ends = [0, *(start + array.size for start, array in ordered)]
    if [start for start, _ in ordered] != ends[:-1] or ends[-1] != layout.size:
        raise CheckpointError(f"the ranks' shards of {name} do not make up the whole of {layout.size} elements")
    return np.concatenate([array for _, array in ordered] or [pieces[0][1]])


def _merged(trees: Sequence[Any]) -> Any:
    """Trees of the same kind as one: floating-point numbers and arrays averaged, all else the first's."""
    first = trees[0]
    if isinstance(first, dict):
        same = [tree for tree in trees if isinstance(tree, dict)]
        keys = dict.fromkeys(key for tree in same for key in tree)
        return {key: _merged([tree[key] for tree in same if key in tree]) for key in keys}
    if isinstance(first, list | tuple):
        lists = [tree for tree in trees if isinstance(tree, list | tuple) and len(tree) == len(first)]
        return type(first)([_merged(items) for items in zip(*lists, strict=True)])
    if isinstance(first, float):
        return _mean([tree for tree in trees if isinstance(tree, float)])
    if isinstance(first, np.ndarray | np.generic) and is_floating(first.dtype):
        average = _Average()
        for tree in trees:
            if isinstance(tree, type(first)) and tree.shape == first.shape:
                average.add("", np.asarray(tree))
        mean = average.mean("")
        return mean if isinstance(first, np.ndarray) else mean[()]
    return first


def _same(one: Any, other: Any) -> bool:
    """Whether two trees hold equal numbers in equal places."""
    if isinstance(one, np.ndarray | np.generic) or isinstance(other, np.ndarray | np.generic):
        return np.array_equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _sums(state: dict[str, Any]) -> list[str]:
    """What a rank has added up in the round under way; as text, in which NaN equals NaN."""
    return [repr(state[key]) for key in ("rate_sums", "loss_sum", "loss_count")]


def _mean(numbers: Sequence[float]) -> float:
    """Of equal numbers, the number itself."""
    return numbers[0] if len(set(numbers)) == 1 else sum(numbers) / len(numbers)


def _is_below(path: str, name: str) -> bool:
    return name == path or name.startswith(f"{path}/")
