"""Which tensor of one model is which of another, and how the axes of one become those of the other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array

if TYPE_CHECKING:
    from lentando.optimizers.checkpoint.layers import Layer

__all__ = ["Mapping", "Rule"]


@dataclass(frozen=True)
class Rule:
    """One tensor.

    Most need a permutation of axes at most. A dense layer that follows a flattened map needs more: one of its axes
    stands for several, which the other framework flattens in another order. ``split`` takes such axes apart, ``axes``
    permutes the parts, ``merge`` joins neighbours again:

        Rule("out.weight", "out/kernel", split=((10,), (32, 4, 4)), axes=(2, 3, 1, 0), merge=(3, 1))

    turns (10, 512), channels first, into (512, 10), channels last.

    Args:
        source: name in the file, or in general in the first model.
        target: name in the model, or in general in the second.
        axes: axis k of the target is axis ``axes[k]`` of the source, both taken apart; None leaves them as they are.
        split: for each axis of the source, the lengths that it is taken apart into; None takes nothing apart.
        merge: for each axis of the target, how many parts are joined to it; None joins nothing.

    Raises:
        ConfigurationError: if that is not a permutation.
    """

    source: str
    target: str
    axes: tuple[int, ...] | None = None
    split: tuple[tuple[int, ...], ...] | None = None
    merge: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        parts = None if self.split is None else sum(map(len, self.split))
        if self.axes is not None and sorted(self.axes) != list(range(len(self.axes))):
            raise ConfigurationError(f"axes of {self.source!r} must be a permutation of 0, 1, ..., got {self.axes}")
        if parts is not None and self.axes is not None and parts != len(self.axes):
            raise ConfigurationError(
                f"{self.source!r} is taken apart into {parts} axes {self.split}, but axes {self.axes} permutes "
                f"{len(self.axes)}"
            )
        if self.merge is not None and (self.split is None or sum(self.merge) != parts or 0 in self.merge):
            raise ConfigurationError(
                f"merge of {self.source!r} must count each part of split once, got {self.merge} for {self.split}"
            )

    @property
    def inverse(self) -> "Rule":
        """From the target to the source."""
        axes = None if self.axes is None else tuple(int(axis) for axis in np.argsort(self.axes))
        if self.split is None:
            return Rule(self.target, self.source, axes)
        return Rule(self.target, self.source, axes, self._target_split(), tuple(map(len, self.split)))

    def shape(self, source_shape: Sequence[int]) -> tuple[int, ...]:
        """The target's shape.

        Raises:
            ConfigurationError: if the rule does not fit the source's.
        """
        parts = self.parts(source_shape)
        permuted = parts if self.axes is None else tuple(parts[axis] for axis in self.axes)
        return permuted if self.split is None else tuple(map(prod, self._target_split()))

    def parts(self, source_shape: Sequence[int]) -> tuple[int, ...]:
        """The source's shape, taken apart.

        Raises:
            ConfigurationError: if the rule does not fit.
        """
        shape = tuple(source_shape)
        if self.split is not None:
            if tuple(map(prod, self.split)) != shape:
                raise ConfigurationError(f"{self.source!r} has shape {shape}, which cannot be split as {self.split}")
            return tuple(length for axis in self.split for length in axis)
        if self.axes is not None and len(self.axes) != len(shape):
            raise ConfigurationError(f"{self.source!r} has shape {shape}, to which axes {self.axes} do not fit")
        return shape

    def apply(self, array: Array) -> Array:
        """The source's values as the target. Shares memory where it can."""
        return self.permuted(array).reshape(self.shape(array.shape))

    def permuted(self, array: Array) -> Array:
        """The same before parts are joined: always a view, if ``array`` is contiguous."""
        parts = array.reshape(self.parts(array.shape))
        return parts if self.axes is None else parts.transpose(self.axes)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "source": self.source,
            "target": self.target,
            "axes": None if self.axes is None else list(self.axes),
            "split": None if self.split is None else [list(axis) for axis in self.split],
            "merge": None if self.merge is None else list(self.merge),
        }

    @classmethod
    def from_json(cls, json: dict[str, Any]) -> "Rule":
        """The inverse of ``as_json``."""
        axes, split, merge = json["axes"], json["split"], json["merge"]
        return cls(
            json["source"],
            json["target"],
            None if axes is None else tuple(axes),
            None if split is None else tuple(map(tuple, split)),
            None if merge is None else tuple(merge),
        )

    def _target_split(self) -> tuple[tuple[int, ...], ...]:
        assert self.split is not None
        parts = [length for axis in self.split for length in axis]
        permuted = parts if self.axes is None else [parts[axis] for axis in self.axes]
        counts = (1,) * len(permuted) if self.merge is None else self.merge
        starts = [sum(counts[:number]) for number in range(len(counts))]
        return tuple(tuple(permuted[start : start + count]) for start, count in zip(starts, counts, strict=True))


class Mapping:
    """From the tensors of one model to those of another, each once.

    Args:
        rules: one for each tensor; the order is that of the second model's flat buffers where that matters.

    Raises:
        ConfigurationError: if a name occurs twice.

    Attributes:
        rules: by target.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        listed = list(rules)
        for side in ("source", "target"):
            names = [getattr(rule, side) for rule in listed]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ConfigurationError(f"a mapping must name each {side} once, but these occur more often: {twice}")
        self.rules = {rule.target: rule for rule in listed}

    @classmethod
    def between(cls, first: "Sequence[Layer]", second: "Sequence[Layer]") -> "Mapping":
        """From one model to another that has the same layers in the same order, by what each says about itself.

        Args:
            first: ``layers(model)`` of a framework's package.
            second: the same of the other model.

        Raises:
            ConfigurationError: at the first layer that differs, or is of a kind that is not known.
        """
        from lentando.optimizers.checkpoint.layers import pair

        return cls(pair(first, second))

    @property
    def inverse(self) -> "Mapping":
        """From the second model to the first."""
        return Mapping(rule.inverse for rule in self.rules.values())

    def check(
        self,
        sources: "dict[str, tuple[int, ...]]",
        targets: "dict[str, tuple[int, ...]]",
        names: tuple[str, str] = ("the checkpoint", "the model"),
    ) -> None:
        """Check that it leads from all these tensors to all those, given by name and shape.

        Raises:
            ConfigurationError: with what is missing, what is not known, or whose shape is wrong.
        """
        mapped = {rule.source for rule in self.rules.values()}
        for side, known, used in ((names[0], sources, mapped), (names[1], targets, set(self.rules))):
            if missing := sorted(known.keys() - used):
                raise ConfigurationError(f"the mapping leaves out tensors of {side}: {_few(missing)}")
            if unknown := sorted(used - known.keys()):
                raise ConfigurationError(f"the mapping names tensors that {side} does not have: {_few(unknown)}")
        for rule in self.rules.values():
            shape = rule.shape(sources[rule.source])
            if shape != targets[rule.target]:
                raise ConfigurationError(
                    f"{rule.source!r} of {names[0]}, shape {sources[rule.source]}, becomes {shape} by the mapping, but "
                    f"{rule.target!r} of {names[1]} has shape {targets[rule.target]}"
                )

    def as_json(self) -> list[dict[str, Any]]:
        """For a file."""
        return [rule.as_json() for rule in self.rules.values()]

    @classmethod
    def from_json(cls, json: Iterable[dict[str, Any]]) -> "Mapping":
        """The inverse of ``as_json``."""
        return cls(map(Rule.from_json, json))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self.rules == other.rules

    def __hash__(self) -> int:
        return hash(tuple(self.rules.values()))

    def __repr__(self) -> str:
        return f"Mapping({list(self.rules.values())})"


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
