"""Maps from the tensors of one model to those of another, with their axes permuted."""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.weight_rule import Ranges, WeightRule, extent, part_in_words, slices

if TYPE_CHECKING:
    from lentando.optimizers.checkpoint.layers import Layer

__all__ = ["WeightMap", "WeightRule"]


class WeightMap:
    """A map from the tensors of one model to those of another, each of which occurs once.

    Args:
        rules: rules, one for each tensor, or several for the parts of one. Their order is that of the second model's
            flat buffers where that matters.
        notes: notes for the user on how the rules were found.

    Raises:
        ConfigurationError: if a name, or a part of a tensor, occurs twice.

    Attributes:
        rules: rules by their ``key``: the name of the target, or of a part of it.
        by_target: the rules that make each target.
        notes: as given.

    Example:
        >>> import numpy as np
        >>> from lentando.optimizers.checkpoint.weight_map import WeightMap, WeightRule
        >>> to_keras = WeightMap([
        ...     WeightRule("fc.weight", "fc/kernel", axes=(1, 0)),
        ...     WeightRule("fc.bias", "fc/bias"),
        ... ])
        >>> saved = {"fc.weight": np.zeros((10, 32)), "fc.bias": np.zeros(10)}
        >>> to_keras.value("fc/kernel", saved.get).shape
        (32, 10)
        >>> to_keras.inverse.rules["fc.weight"].axes
        (1, 0)
    """

    def __init__(self, rules: Iterable[WeightRule], notes: Sequence[str] = ()) -> None:
        listed = list(rules)
        for side, unused in (("source", "zero"), ("target", "added")):
            parts_by_name: dict[str, list[Ranges | None]] = {}
            for rule in listed:
                if rule.use != unused:
                    parts_by_name.setdefault(getattr(rule, side), []).append(getattr(rule, f"{side}_part"))
            twice = sorted(name for name, parts in parts_by_name.items() if _overlap(parts))
            if twice:
                raise ConfigurationError(f"a mapping must name each {side} once, but these occur more often: {twice}")
        self.rules = {rule.key: rule for rule in listed}
        self.by_target: dict[str, list[WeightRule]] = {}
        for rule in listed:
            self.by_target.setdefault(rule.target, []).append(rule)
        self.notes = tuple(notes)

    @classmethod
    def between(cls, first: "Sequence[Layer]", second: "Sequence[Layer]") -> "WeightMap":
        """The map from one model to another that has the same layers, found by the descriptions of the layers.

        Layers are paired in their order; where that differs, by their kinds and shapes. ``notes`` names the layers
        whose settings that are not weights differ (the epsilon of a normalization, ...), and those that were paired by
        their order among layers of the same kind and shape.

        Args:
            first: descriptions of the first model's layers, as ``layers(model)`` of a framework's package returns them.
            second: descriptions of the second model's layers.

        Raises:
            ConfigurationError: at the first layer that differs, cannot be distinguished from others, or is of an
                unknown kind; the message ends with a map to start from, as Python.
        """
        from lentando.optimizers.checkpoint.pairing import pair

        return cls(*pair(first, second))

    @property
    def inverse(self) -> "WeightMap":
        """The map from the second model to the first."""
        return WeightMap((rule.inverse for rule in self.rules.values()), self.notes)

    @property
    def whole(self) -> bool:
        """Whether every rule makes one whole tensor of one whole tensor."""
        return all(
            rule.source_part is None and rule.target_part is None and rule.use == "copied"
            for rule in self.rules.values()
        )

    def value(self, target: str, source: Callable[[str], Array], *, of_gradients: bool = False) -> Array:
        """The values of a tensor of the second model, which share memory with those of the first where possible.

        Args:
            target: name of the tensor in the second model.
            source: function that returns a tensor of the first model by its name.
            of_gradients: whether the values are sums or means of gradients, as a base optimizer keeps them, and not
                parameters.
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
        """Check that the map leads from all tensors of one model to all of another.

        Args:
            sources: shapes of the first model's tensors, by name.
            targets: shapes of the second model's tensors, by name.
            names: names of the two models, for messages.

        Raises:
            ConfigurationError: with the tensors that are missing or unknown, or whose shapes do not fit.
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
        for side, remaining in zip(names, counts, strict=True):
            if partly := sorted(name for name, count in remaining.items() if count):
                raise ConfigurationError(f"the mapping leaves out parts of tensors of {side}: {_few(partly)}")

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
