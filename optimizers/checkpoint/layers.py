"""Descriptions of layers, by which the models of two frameworks are compared layer by layer."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

from lentando.optimizers.checkpoint.weight_rule import Ranges, extent

__all__ = ["OPTIONAL", "Factors", "Layer", "Segment", "Tensor", "layers_from_json"]

OPTIONAL = {"recurrent bias": "bias"}
"""Roles of tensors that one framework may have added to the tensor of another role."""

Factors: TypeAlias = tuple[tuple[str, int], ...]
"""Axes that were flattened into one, each with its letter and length, such as (("h", 4), ("c", 32))."""
Segment: TypeAlias = tuple[str, Factors]
"""A range of an axis: a key that identifies the same range in the other framework, and the axes flattened into it."""

Setting: TypeAlias = float | str | bool | None


@dataclass(frozen=True)
class Tensor:
    """One tensor of a layer, or a part of one.

    Attributes:
        name: name in the flat buffers and in checkpoints.
        axes: a letter for what each axis counts, in the order of the framework; the letters are the same in all
            frameworks: "o" output features, "i" input features, "d", "h", "w" places, "n" rows of an embedding, "u"
            units of all gates. An axis that counts several things has its letters in parentheses: "(pe)i". Empty if
            the axes are not known.
        shape: shape of the whole tensor.
        part: part of the tensor that has these axes; None if all of it has.
    """

    name: str
    axes: str
    shape: tuple[int, ...]
    part: Ranges | None = None

    @property
    def groups(self) -> list[str]:
        """The letters of each axis, as one string per axis."""
        return list(_groups(self.axes))

    def lengths(self, known: Mapping[str, int]) -> dict[str, int] | None:
        """The length of each letter's axis; None if it is not known, or does not fit the shape.

        Args:
            known: lengths of the letters that share an axis with others.
        """
        shape = self.shape if self.part is None else extent(self.part)
        if len(self.groups) != len(shape) or (shape and not self.axes):
            return None
        lengths: dict[str, int] = {}
        for letters, length in zip(self.groups, shape, strict=True):
            if len(letters) == 1:
                lengths[letters] = length
                continue
            if prod(known.get(letter, 0) for letter in letters) != length:
                return None
            lengths |= {letter: known[letter] for letter in letters}
        return lengths


@dataclass(frozen=True)
class Layer:
    """One layer that has tensors.

    Attributes:
        name: name of the layer, for messages.
        kind: kind of the layer, one of ``rules_of_layer.KINDS``. Layers of any other kind cannot be paired.
        tensors: tensors by their roles ("weight", "bias", "mean", "variance", ...), which are the same in all
            frameworks.
        flattened: axes of the feature map, if the input features are one flattened feature map and the framework knows
            it: letter and length of each axis, in the order in which the map was flattened, such as
            (("h", 4), ("w", 4), ("c", 32)). Equivalent to ``orders`` with this one segment for "i".
        channels_first: whether the framework flattens feature maps channels first, where the map itself is not known.
        orders: segments of axes whose elements have another order in another framework, in this framework's order, by
            the letter of the axis. Segments of flattened axes differ between frameworks in the order of the factors;
            segments whose keys are not their positions (gates) differ in their own order as well.
        lengths: lengths of the letters that share an axis with others.
        structure: values that must be equal for both layers to compute the same (number of heads, groups).
        settings: numbers that are not weights, and should be equal (epsilon, momentum).
        unknown: reason why the order of the input or output features is not known; empty if it is known.
        is_parallel: whether the model has a layer of the same kind and shape that comes neither before nor after this
            one, so that only the order in which the layers were created distinguishes them.
    """

    name: str
    kind: str
    tensors: Mapping[str, Tensor]
    flattened: Factors | None = None
    channels_first: bool = field(default=False)
    orders: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    structure: Mapping[str, Setting] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    unknown: str = ""
    is_parallel: bool = False

    @property
    def signature(self) -> tuple[object, ...]:
        """Kind, roles and lengths of axes, which are equal for two layers that can be paired."""
        roles = []
        for role, tensor in sorted(self.tensors.items()):
            if role not in OPTIONAL:
                lengths = tensor.lengths(self.lengths) or {}
                roles.append((role, tuple(sorted(item for item in lengths.items() if item[1] != 1))))
        return (self.kind, *roles)

    @property
    def segments(self) -> dict[str, tuple[Segment, ...]]:
        """``orders``, completed by ``flattened``."""
        inputs = {} if self.flattened is None else {"i": (("0", self.flattened),)}
        return {**inputs, **self.orders}

    def as_json(self) -> dict[str, Any]:
        """The description as JSON, for a manifest."""
        return {
            "name": self.name,
            "kind": self.kind,
            "tensors": {
                role: [t.name, t.axes, list(t.shape), *([] if t.part is None else [[list(axis) for axis in t.part]])]
                for role, t in self.tensors.items()
            },
            "flattened": None if self.flattened is None else [list(axis) for axis in self.flattened],
            "channels_first": self.channels_first,
            "orders": {
                letter: [[key, [list(factor) for factor in factors]] for key, factors in segments]
                for letter, segments in self.orders.items()
            },
            "lengths": dict(self.lengths),
            "structure": dict(self.structure),
            "settings": dict(self.settings),
            "unknown": self.unknown,
            "is_parallel": self.is_parallel,
        }

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "Layer":
        """The layer that ``as_json`` has described."""
        return cls(
            json["name"],
            json["kind"],
            {role: _tensor(*described) for role, described in json["tensors"].items()},
            None if json["flattened"] is None else _factors(json["flattened"]),
            json["channels_first"],
            {
                letter: tuple((key, _factors(factors)) for key, factors in segments)
                for letter, segments in json.get("orders", {}).items()
            },
            json.get("lengths", {}),
            json.get("structure", {}),
            json.get("settings", {}),
            json.get("unknown", ""),
            json.get("is_parallel", False),
        )


def layers_from_json(json: Iterable[Mapping[str, Any]]) -> list[Layer]:
    """The layers that a manifest describes.

    Older checkpoints, which do not describe concatenated features, state that a dense layer follows no feature map even
    where that was not known. Such a layer is taken to follow none only if it has as many input features as the layer
    before it has output features.

    Args:
        json: descriptions made by ``Layer.as_json``.
    """
    layers: list[Layer] = []
    features: int | None = None
    has_maps = False
    for described in json:
        layer = Layer.from_json(described)
        weight: dict[str, int] = {}
        if "weight" in layer.tensors:
            weight = layer.tensors["weight"].lengths(layer.lengths) or {}
        is_old = "orders" not in described and not layer.channels_first
        is_doubtful = is_old and has_maps and layer.flattened is None and layer.kind in ("dense", "batch norm")
        if is_doubtful and weight.get("i") != features:
            reason = (
                f"this checkpoint was written by an earlier version, which did not record where the {weight.get('i')} "
                f"input features of {layer.name!r} come from"
            )
            layer = Layer.from_json({**described, "unknown": reason})
        has_maps |= layer.kind not in ("dense", "batch norm", "embedding")
        features = weight.get("o", weight.get("i"))
        layers.append(layer)
    return layers


def _groups(axes: str) -> Iterator[str]:
    letters = iter(axes)
    for letter in letters:
        if letter != "(":
            yield letter
            continue
        group = ""
        while (letter := next(letters)) != ")":
            group += letter
        yield group


def _tensor(name: str, axes: str, shape: Iterable[int], part: Iterable[Iterable[int]] | None = None) -> Tensor:
    ranges: Any = None if part is None else tuple(tuple(axis) for axis in part)
    return Tensor(name, axes, tuple(shape), ranges)


def _factors(json: Iterable[Any]) -> Factors:
    return tuple((label, length) for label, length in json)
