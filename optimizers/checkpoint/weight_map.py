"""Which tensor of one model is which of another, and how the axes of one become those of the other."""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.weight_rule import Ranges, WeightRule, extent, part_in_words, slices

if TYPE_CHECKING:
    from lentando.optimizers.checkpoint.layers import Layer

__all__ = ["WeightMap", "WeightRule"]


class WeightMap:
    """From the tensors of one model to those of another, each once.

    Args:
        rules: one for each tensor, or several for the parts of one; the order is that of the second model's flat
            buffers where that matters.
        notes: what a user should know of how the rules were found.

    Raises:
        ConfigurationError: if a name, or a part of a tensor, occurs twice.

    Attributes:
        rules: by what each makes: the name of the target, or for a part of it ``WeightRule.key``.
        by_target: the rules that make each target.
        notes: as given.
    """

    def __init__(self, rules: Iterable[WeightRule], notes: Sequence[str] = ()) -> None:
        listed = list(rules)
        for side, unused in (("source", "zero"), ("target", "added")):
            found: dict[str, list[Ranges | None]] = {}
            for rule in listed:
                if rule.use != unused:
                    found.setdefault(getattr(rule, side), []).append(getattr(rule, f"{side}_part"))
            twice = sorted(name for name, parts in found.items() if _overlap(parts))
            if twice:
                raise ConfigurationError(f"a mapping must name each {side} once, but these occur more often: {twice}")
        self.rules = {rule.key: rule for rule in listed}
        self.by_target: dict[str, list[WeightRule]] = {}
        for rule in listed:
            self.by_target.setdefault(rule.target, []).append(rule)
        self.notes = tuple(notes)

    @classmethod
    def between(cls, first: "Sequence[Layer]", second: "Sequence[Layer]") -> "WeightMap":
        """From one model to another that has the same layers, by what each says about itself.

        Layers are paired in their order; where that differs, by their kinds and shapes. ``notes`` names the layers of
        which settings that are not weights differ (the epsilon of a normalization, ...), and those that were paired by
        their order among layers of the same kind and shape.

        Args:
            first: ``layers(model)`` of a framework's package.
            second: the same of the other model.

        Raises:
            ConfigurationError: at the first layer that differs, cannot be told from others, or is of a kind that is not
                known; with a mapping to start from, as Python.
        """
        from lentando.optimizers.checkpoint.pairing import pair

        return cls(*pair(first, second))

    @property
    def inverse(self) -> "WeightMap":
        """From the second model to the first."""
        return WeightMap((rule.inverse for rule in self.rules.values()), self.notes)

    @property
    def whole(self) -> bool:
        """Whether every rule makes one whole tensor of one whole tensor."""
        return all(
            rule.source_part is None and rule.target_part is None and rule.use == "copied"
            for rule in self.rules.values()
        )

    def value(self, target: str, source: Callable[[str], Array], *, of_gradients: bool = False) -> Array:
        """The values of a tensor of the second model. Shares memory with the first's where it can.

        Args:
            target: its name.
            source: gives the values of the tensor of this name of the first model.
            of_gradients: the values are sums or means of gradients, as a base optimizer keeps them, not parameters.
        """
        rules = self.by_target[target]
        (first, *more) = rules
        array = source(first.source)
        if not more and first.use == "copied" and first.target_part is None:
            return first.apply(array)
        stops = [rule.target_part or tuple((0, n) for n in rule.shape(source(rule.source).shape)) for rule in rules]
        made = np.zeros([max(stop for _, stop in axis) for axis in zip(*stops, strict=True)], array.dtype)
        counts = np.zeros(made.shape, np.uint8) if of_gradients else None
        for rule, part in zip(rules, stops, strict=True):
            if rule.use != "zero" or of_gradients:
                made[slices(part)] += rule.apply(source(rule.source))
            if counts is not None:
                counts[slices(part)] += 1
        return made if counts is None else made / np.maximum(counts, 1).astype(made.dtype)

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
        for side, known, used in ((names[0], sources, mapped), (names[1], targets, set(self.by_target))):
            if missing := sorted(known.keys() - used):
                raise ConfigurationError(f"the mapping leaves out tensors of {side}: {_few(missing)}")
            if unknown := sorted(used - known.keys()):
                raise ConfigurationError(f"the mapping names tensors that {side} does not have: {_few(unknown)}")
        counts = [{name: prod(shape) for name, shape in side.items()} for side in (sources, targets)]
        for rule in self.rules.values():
            shape = rule.shape(sources[rule.source])
            part = rule.target_part
            place = targets[rule.target]
            if shape != (place if part is None else extent(part)) or (
                part and (len(part) != len(place) or any(stop > n for (_, stop), n in zip(part, place, strict=True)))
            ):
                made = rule.target + part_in_words(part)
                raise ConfigurationError(
                    f"{rule.source + part_in_words(rule.source_part)!r} of {names[0]}, shape {sources[rule.source]}, "
                    f"becomes {shape} by the mapping, but {made!r} of {names[1]} has shape {place}"
                )
            for side_counts, name, unused in ((counts[0], rule.source, "zero"), (counts[1], rule.target, "added")):
                side_counts[name] -= prod(shape) if rule.use != unused else 0
        for side, left in zip(names, counts, strict=True):
            if partly := sorted(name for name, count in left.items() if count):
                raise ConfigurationError(f"the mapping leaves out parts of tensors of {side}: {_few(partly)}")

    def as_json(self) -> list[dict[str, Any]]:
        """For a file."""
        return [rule.as_json() for rule in self.rules.values()]

    @classmethod
    def from_json(cls, json: Iterable[dict[str, Any]]) -> "WeightMap":
        """The inverse of ``as_json``."""
        return cls(map(WeightRule.from_json, json))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WeightMap) and self.rules == other.rules

    def __hash__(self) -> int:
        return hash(tuple(self.rules.values()))

    def __repr__(self) -> str:
        return f"WeightMap({list(self.rules.values())})"


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _overlap(parts: Sequence[Ranges | None]) -> bool:
    """Whether any two of these parts of one tensor have an element in common; None is the whole tensor."""
    return any(
        one is None or other is None or all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in zip(one, other, strict=False))
        for one, other in combinations(parts, 2)
    )
