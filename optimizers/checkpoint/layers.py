"""What a model consists of, described so that two frameworks' models can be compared layer by layer."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

from lentando.optimizers.checkpoint.weight_rule import Ranges, extent

__all__ = ["OPTIONAL", "Factors", "Layer", "Segment", "Tensor", "layers_from_json"]

OPTIONAL = {"recurrent bias": "bias"}
"""Roles that one framework may add up with another one."""

Factors: TypeAlias = tuple[tuple[str, int], ...]
"""What several axes that were flattened into one counted and how long they were, such as (("h", 4), ("c", 32))."""
Segment: TypeAlias = tuple[str, Factors]
"""A range of an axis: a key that says which range of the other framework's axis it is, and what its elements are."""

Setting: TypeAlias = float | str | bool | None


@dataclass(frozen=True)
class Tensor:
    """One tensor of a layer, or a part of one.

    Attributes:
        name: what the flat buffers and checkpoints call it.
        axes: what each axis counts, a letter each, the same letters in both frameworks, in each one's order: "o" output
            features, "i" input features, "d", "h", "w" places, "n" rows of an embedding, "u" units of all gates. An
            axis that counts several things has its letters in parentheses: "(pe)i". Empty if that is not known.
        shape: the shape of the whole tensor.
        part: the part of it that has these axes; None if all of it has.
    """

    name: str
    axes: str
    shape: tuple[int, ...]
    part: Ranges | None = None

    @property
    def groups(self) -> list[str]:
        """The letters of each axis."""
        return list(_groups(self.axes))

    def lengths(self, known: Mapping[str, int]) -> dict[str, int] | None:
        """How long each letter's axis is; None if that is not known, or does not fit the shape.

        Args:
            known: lengths of the letters that share an axis.
        """
        shape = self.shape if self.part is None else extent(self.part)
        if len(self.groups) != len(shape) or (shape and not self.axes):
            return None
        found: dict[str, int] = {}
        for letters, length in zip(self.groups, shape, strict=True):
            if len(letters) == 1:
                found[letters] = length
                continue
            if prod(known.get(letter, 0) for letter in letters) != length:
                return None
            found |= {letter: known[letter] for letter in letters}
        return found


@dataclass(frozen=True)
class Layer:
    """One layer that has tensors.

    Attributes:
        name: for messages.
        kind: "dense", "convolution", ...; see ``pairing.KINDS``. Layers of any other kind cannot be paired.
        tensors: by role, the same in both frameworks: "weight", "bias", "mean", "variance", ...
        flattened: if its input features are one flattened feature map, and the framework knows it: what each axis of
            the map counts and how long it is, in the order in which it was flattened, such as
            (("h", 4), ("w", 4), ("c", 32)). The same as ``orders`` with this one segment for "i".
        channels_first: the order in which the framework flattens feature maps, where it does not know of the map.
        orders: for letters of axes whose elements come in another order in another framework: the segments of the axis,
            in this framework's order. Segments of several axes that were flattened into one differ in the order of the
            factors; segments with other keys than their positions (gates) also in their own order.
        lengths: of the letters that share an axis.
        structure: what must be equal for both layers to compute the same (number of heads, groups).
        settings: numbers that are not weights, and should be equal (epsilon, momentum).
        unknown: why the order of its input or output features is not known; empty if it is known.
        is_parallel: whether there is a layer of the same kind and shape that comes neither before nor after it, so that
            only the order in which layers were made tells which is which.
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
        """What two layers that can be paired have in common: kind, roles, and lengths of axes."""
        roles = []
        for role, tensor in sorted(self.tensors.items()):
            if role not in OPTIONAL:
                lengths = tensor.lengths(self.lengths) or {}
                roles.append((role, tuple(sorted(item for item in lengths.items() if item[1] != 1))))
        return (self.kind, *roles)

    @property
    def segments(self) -> dict[str, tuple[Segment, ...]]:
        """``orders``, with that of ``flattened``."""
        own = {} if self.flattened is None else {"i": (("0", self.flattened),)}
        return {**own, **self.orders}

    def as_json(self) -> dict[str, Any]:
        """For a file."""
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
        """The inverse of ``as_json``."""
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
    """The layers that a checkpoint describes.

    Checkpoints written before concatenated features were described say of a dense layer that it follows no feature map
    where that was not known. Such a layer is taken to follow none only if its input features are as many as the output
    features of the layer before it.
    """
    found: list[Layer] = []
    features: int | None = None
    has_maps = False
    for described in json:
        layer = Layer.from_json(described)
        own = {role: tensor.lengths(layer.lengths) or {} for role, tensor in layer.tensors.items()}
        weight = own.get("weight", {})
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
        found.append(layer)
    return found


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
