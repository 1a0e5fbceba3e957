"""The base optimizers of all ranks that have saved a checkpoint, merged into one."""

from typing import Any

from lentando.comm.errors import CheckpointError
from lentando.optimizers.checkpoint.average import NamedAverages, are_equal_trees, average_trees, mean_of
from lentando.optimizers.checkpoint.rank_content import RankContent, Tensors
from lentando.optimizers.checkpoint.tree import no_flat_state, pack, tensor, unpack

__all__ = ["MergedOptimizers"]


class MergedOptimizers:
    """Mean of the base optimizers of all ranks, to which ranks are added; and tensors that are not averaged."""

    def __init__(self) -> None:
        self._averages = NamedAverages()
        self._not_averaged: Tensors = {}
        self._abouts: list[Any] = []
        self._rests: list[Any] = []

    def add(self, content: RankContent) -> None:
        """Add the optimizer of one rank.

        Raises:
            CheckpointError: if its optimizer is of another class than rank 0's.
        """
        tensors, about = content
        if not self._abouts:
            names = [name for name, _, _ in about["not_averaged"]]
            self._not_averaged = {f"model/{name}": tensor(tensors, f"model/{name}") for name in names}
        else:
            kinds = [f"{each['optimizer']['kind']} of {each['framework']}" for each in (self._abouts[0], about)]
            if kinds[0] != kinds[1]:
                raise CheckpointError(f"the ranks that saved it had different base optimizers: {' and '.join(kinds)}")
        self._abouts.append(about)
        self._rests.append(unpack(about["optimizer rest"], tensors, no_flat_state))
        for key, names in about["optimizer"]["names"].items():
            for name in names:
                self._averages.add(f"optimizer/{key}/{name}", tensor(tensors, f"optimizer/{key}/{name}"))

    def are_equal(self) -> bool:
        """Whether all ranks had the same state."""
        rests_are_equal = all(are_equal_trees(rest, self._rests[0]) for rest in self._rests)
        return self._averages.are_equal(self._averages.names()) and rests_are_equal

    def merged(self) -> RankContent:
        """The mean of the states; tensors that are not averaged, and all that concerns the rank, are rank 0's."""
        described = [about["optimizer"] for about in self._abouts]
        # If other frameworks cannot read one rank's state, they cannot read the mean.
        optimizer = dict(next((each for each in described if each["reading"] is None), described[0]))
        if optimizer["reading"] is not None and optimizer["reading"]["steps"] is not None:
            steps = round(mean_of([each["reading"]["steps"] for each in described]))
            optimizer["reading"] = {**optimizer["reading"], "steps": steps}
        optimizer["is_empty"] = all(each["is_empty"] for each in described)
        keys = dict.fromkeys(key for each in described for key in each["names"])
        optimizer["names"] = {
            key: list(dict.fromkeys(name for each in described for name in each["names"].get(key, []))) for key in keys
        }
        rest, tensors = pack(average_trees(self._rests), [], "optimizer rest")
        tensors |= {name: self._averages.mean(name) for name in self._averages.names()}
        return RankContent(
            {**self._not_averaged, **tensors}, {**self._abouts[0], "optimizer": optimizer, "optimizer rest": rest}
        )
