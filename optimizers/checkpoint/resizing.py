"""A checkpoint of another number of ranks, as if one replica had saved it: the mean of all.

What the ranks held in shards is joined, what each held whole is averaged, and what is equal on all ranks stays exactly
what it is. Every rank here reads the files of all ranks, one after the other, and computes the same numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lentando.comm.errors import CheckpointError
from lentando.comm.flat import FlatLayout
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.average import NamedAverages, mean_of
from lentando.optimizers.checkpoint.elements import in_memory_order, in_shape
from lentando.optimizers.checkpoint.merged_optimizers import MergedOptimizers
from lentando.optimizers.checkpoint.rank_content import RankContent, Tensors
from lentando.optimizers.checkpoint.relayout import parameters_of, saved_arrays
from lentando.optimizers.checkpoint.tree import pack, tensor, unpack
from lentando.optimizers.rules.base_algorithm import Resizable
from lentando.optimizers.rules.flat_state import flat_state

__all__ = ["MergedRanks", "merge_ranks"]


def merge_ranks(
    size: int, read: Callable[[int], RankContent], layouts: Sequence[FlatLayout], base: Resizable, rank: int
) -> "MergedRanks":
    """Merge the content of all ranks that have saved a checkpoint.

    Args:
        size: number of ranks that have saved it.
        read: returns the content of one of them, by its number.
        layouts: layouts of the flat buffers when the checkpoint was saved.
        base: the resizing hooks of the base algorithm here, which interpret its saved state.
        rank: this rank's number, whose ``extra`` is taken if a rank of this number has saved one, and else rank 0's.

    Raises:
        CheckpointError: if the ranks' shards do not make up the whole, or their optimizers differ in class.
    """
    replicas = _Replicas(layouts, base)
    optimizers = MergedOptimizers()
    extra: tuple[Tensors, Any] = ({}, None)
    for number in range(size):
        content = read(number)
        replicas.add(content)
        optimizers.add(content)
        if number in (0, rank):
            tensors = {name: a for name, a in content.tensors.items() if name == "extra" or name.startswith("extra/")}
            extra = tensors, content.about["extra"]
    model = replicas.merged_model()
    structure, state = pack(replicas.merged_state(model), layouts, "replica")
    model_tensors = {f"model/{name}": array for name, array in model.items()}
    optimizer = optimizers.merged()
    merged = RankContent(
        {**state, **model_tensors, **optimizer.tensors, **extra[0]},
        {**optimizer.about, "replica": structure, "extra": extra[1]},
    )
    return MergedRanks(merged, size, replicas, optimizers)


@dataclass(frozen=True)
class MergedRanks:
    """The content of one rank that stands for all that have saved a checkpoint.

    Attributes:
        content: tensors and their description, like those of a rank; whole where ranks held shards.
        size: number of ranks that have saved the checkpoint.
        replicas: state of all replicas.
        optimizers: base optimizers of all ranks.
    """

    content: RankContent
    size: int
    replicas: "_Replicas"
    optimizers: MergedOptimizers

    def report(self, new_size: int, *, with_optimizer: bool) -> str:
        """What resumes exactly on another number of ranks, and what is approximated, as a sentence for the log.

        Args:
            new_size: number of ranks here.
            with_optimizer: whether the base optimizer's state is loaded.
        """
        replicas, first = self.replicas, self.replicas.first
        exact = [f"inner step {first['inner_steps']}, {first['rounds']} rounds and the period's schedule"]
        approximated = []
        for text, names in (
            ("the parameters", replicas.parameters()),
            ("the averaged statistics", replicas.statistics()),
        ):
            if names and replicas.model.are_equal(names):
                exact.append(f"{text} (equal on all ranks)")
            elif names:
                approximated.append(f"{text} (the mean of the replicas)")
        outer = "anchors and slow momenta"
        if replicas.outer.is_sharded:
            exact.append(f"{outer} (sharded again)")
        elif replicas.outer.has_whole_arrays:
            (exact if replicas.outer.are_equal() else approximated).append(f"{outer} (the mean of the replicas')")
        if with_optimizer and self.optimizers.are_equal():
            exact.append("the base optimizer's state (equal on all ranks)")
        elif with_optimizer:
            approximated.append("the base optimizer's state (the mean of the ranks')")
        if first["steps_in_round"] is not None and first["steps"] and approximated:
            steps = (
                f"{first['steps']} of its {first['steps_in_round']} steps were taken by the replicas that were saved"
            )
            approximated.append(f"the round in progress ({steps})")
            if not replicas.have_equal_sums():
                approximated.append("its loss and learning rate so far (the mean of the ranks')")
        if replicas.has_gossip:
            approximated.append("gossip (begins again: w = 1, nothing in flight)")
        if self.content.about["extra"] is not None:
            rest = "new ranks get rank 0's" if new_size > self.size else "that of other ranks is not used"
            exact.append(f"extra (of the rank of the same number; {rest})")
        return (
            f"resumed {self.size} ranks' checkpoint on {new_size} ranks. Exact: {'; '.join(exact)}. "
            f"Approximated: {'; '.join(approximated) or 'nothing'}"
        )


class _Replicas:
    """The models, outer steps and counts of all ranks, to which ranks are added one after the other.

    Args:
        layouts: layouts of the flat buffers when the checkpoint was saved.
        base: the resizing hooks of the base algorithm here.

    Attributes:
        model: averages of the model's tensors, flat.
        outer: anchors and slow momenta.
        first: the state of rank 0.
        has_gossip: whether the base algorithm had state.
    """

    first: dict[str, Any]

    def __init__(self, layouts: Sequence[FlatLayout], base: Resizable) -> None:
        self._layouts = layouts
        self._base = base
        self.model = NamedAverages()
        self.outer = _OuterState(layouts)
        self.has_gossip = False
        self._sums: list[dict[str, Any]] = []

    def add(self, content: RankContent) -> None:
        """Add the state of one rank."""
        tensors = content.tensors
        state = unpack(
            content.about["replica"],
            tensors,
            lambda node: flat_state(
                saved_arrays(self._layouts, node["path"], node["ranges"], tensors),
                [extent[0] if extent else 0 for extent in node["ranges"]] if node["sharded"] else None,
            ),
        )
        saved = {e.name: tensor(tensors, f"model/{e.name}") for layout in self._layouts for e in layout.entries}
        arrays = [_flattened(layout, saved) for layout in self._layouts]
        self.has_gossip |= bool(state["base"])
        if state["started"]:  # before, the state of gossip may be older than the weights
            prepared = self._base.prepared_average(state["base"], self._parameters_of(arrays))
            arrays = [
                np.concatenate([parameters, array[parameters.size :].astype(parameters.dtype)])
                for parameters, array in zip(prepared, arrays, strict=True)
            ]
        for layout, array in zip(self._layouts, arrays, strict=True):
            for entry, start in zip(layout.entries, layout.offsets, strict=True):
                self.model.add(entry.name, array[start : start + entry.size])
        for name, value in (state["outer"] or {}).items():
            self.outer.add(name, value)
        if not self._sums:
            self.first = state
        sums = {key: state[key] for key in ("rate_sums", "loss_sum", "loss_count")}
        self._sums.append({**sums, "weights_set": state.get("weights_set", False)})

    def parameters(self) -> list[str]:
        """Names of the parameters that are trained."""
        return [entry.name for layout in self._layouts for entry in layout.entries if entry.group is not None]

    def statistics(self) -> list[str]:
        """Names of the averaged statistics."""
        return [entry.name for layout in self._layouts for entry in layout.entries if entry.group is None]

    def have_equal_sums(self) -> bool:
        """Whether all ranks had the same sums of losses and learning rates in the round; NaN equals NaN."""
        return len({repr({**sums, "weights_set": None}) for sums in self._sums}) == 1

    def merged_model(self) -> Tensors:
        """The mean of the replicas' tensors, in their shapes."""
        return {
            entry.name: in_shape(self.model.mean(entry.name).astype(layout.dtype, copy=False), entry)
            for layout in self._layouts
            for entry in layout.entries
        }

    def merged_state(self, model: Tensors) -> dict[str, Any]:
        """State of a replica that holds the mean: equal on all ranks but for the rank's number, which is set later.

        Args:
            model: what ``merged_model`` returned.
        """
        losses = [(s["loss_sum"] / s["loss_count"], s["loss_count"]) for s in self._sums if s["loss_count"]]
        count = max((count for _, count in losses), default=0)
        weights_set = {"weights_set": True} if any(sums["weights_set"] for sums in self._sums) else {}
        parameters = self._parameters_of([_flattened(layout, model) for layout in self._layouts])
        return {
            **self.first,
            **weights_set,
            "rate_sums": [mean_of(sums) for sums in zip(*(s["rate_sums"] for s in self._sums), strict=True)],
            "loss_sum": mean_of([loss for loss, _ in losses]) * count if losses else 0.0,
            "loss_count": count,
            "base": self._base.state_for_average(self.first["base"], parameters),
            "outer": self.first["outer"] and self.outer.joined(),
        }

    def _parameters_of(self, arrays: Sequence[Array]) -> list[Array]:
        return [array[: parameters_of(layout)] for layout, array in zip(self._layouts, arrays, strict=True)]


class _OuterState:
    """Anchors and slow momenta: shards are joined, whole arrays of each replica are averaged.

    Args:
        layouts: layouts of the flat buffers when the checkpoint was saved.
    """

    def __init__(self, layouts: Sequence[FlatLayout]) -> None:
        self._layouts = layouts
        self._shards: dict[str, list[list[tuple[int, Array]]]] = {}
        self._whole = NamedAverages()
        self._present: dict[str, list[bool]] = {}

    @property
    def is_sharded(self) -> bool:
        """Whether ranks held shards."""
        return any(pieces for by_buffer in self._shards.values() for pieces in by_buffer)

    @property
    def has_whole_arrays(self) -> bool:
        """Whether ranks held whole arrays."""
        return bool(self._whole.names())

    def are_equal(self) -> bool:
        """Whether the whole arrays were equal on all ranks."""
        return self._whole.are_equal(self._whole.names())

    def add(self, name: str, state: dict[str, Any]) -> None:
        """Add one rank's ``flat_state`` of this name."""
        self._present.setdefault(name, [array is not None for array in state["flat"]])
        starts = state["starts"]
        for number, array in enumerate(state["flat"]):
            if array is None:
                continue
            if starts is None:
                self._whole.add(f"{name} {number}", array)
            else:
                by_buffer = self._shards.setdefault(name, [[] for _ in self._layouts])
                by_buffer[number].append((starts[number], array))

    def joined(self) -> dict[str, Any]:
        """The state as a rank that holds all of it would have saved it.

        Raises:
            CheckpointError: if the shards leave a gap, or overlap.
        """
        found: dict[str, Any] = {}
        for name, present in self._present.items():
            if name in self._shards:
                pieces = zip(present, self._shards[name], self._layouts, strict=True)
                arrays = [_joined(name, shards, layout) if there else None for there, shards, layout in pieces]
                found[name] = flat_state(arrays, [0] * len(arrays))
            else:
                found[name] = flat_state(
                    [self._whole.mean(f"{name} {number}") if there else None for number, there in enumerate(present)]
                )
        return found


def _flattened(layout: FlatLayout, tensors: Tensors) -> Array:
    flat = np.empty(layout.size, layout.dtype)
    for entry, start in zip(layout.entries, layout.offsets, strict=True):
        flat[start : start + entry.size] = in_memory_order(tensors[entry.name], entry)
    return flat


def _joined(name: str, pieces: Sequence[tuple[int, Array]], layout: FlatLayout) -> Array:
    """The shards of all ranks as one array, whatever the partition."""
    ordered = sorted((piece for piece in pieces if piece[1].size), key=lambda piece: piece[0])
    ends = [0, *(start + array.size for start, array in ordered)]
    if [start for start, _ in ordered] != ends[:-1] or ends[-1] != layout.size:
        raise CheckpointError(f"the ranks' shards of {name} do not make up the whole of {layout.size} elements")
    return np.concatenate([array for _, array in ordered] or [pieces[0][1]])
