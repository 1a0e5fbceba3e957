"""What a model consists of, said so that two frameworks' models can be compared layer by layer."""

from collections.abc import Mapping as Dictionary
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.checkpoint.mapping import Rule

__all__ = ["Layer", "Tensor", "pair"]

KINDS = ("dense", "convolution", "batch norm", "embedding")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a layer.

    Attributes:
        name: what the flat buffers and checkpoints call it.
        axes: what each axis counts, a letter each: "o" output features, "i" input features, "d", "h", "w" places, "n"
            rows of an embedding. The same letters in both frameworks, in each one's order.
        shape: its shape.
    """

    name: str
    axes: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One layer that has tensors.

    Attributes:
        name: for messages.
        kind: "dense", "convolution", "batch norm" or "embedding"; any other kind cannot be paired.
        tensors: by role, the same in both frameworks: "weight", "bias", "mean", "variance".
        flattened: if its input features are a flattened map, and the framework knows it: what each axis of the map
            counts and how long it is, in the order in which it was flattened, such as (("h", 4), ("w", 4), ("c", 32)).
        channels_first: the order in which the framework flattens maps, where it does not know of the map.
    """

    name: str
    kind: str
    tensors: Dictionary[str, Tensor]
    flattened: tuple[tuple[str, int], ...] | None = None
    channels_first: bool = field(default=False)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "name": self.name,
            "kind": self.kind,
            "tensors": {role: [t.name, t.axes, list(t.shape)] for role, t in self.tensors.items()},
            "flattened": None if self.flattened is None else [list(axis) for axis in self.flattened],
            "channels_first": self.channels_first,
        }

    @classmethod
    def from_json(cls, json: Dictionary[str, Any]) -> "Layer":
        """The inverse of ``as_json``."""
        tensors = {role: Tensor(name, axes, tuple(shape)) for role, (name, axes, shape) in json["tensors"].items()}
        flattened = None if json["flattened"] is None else tuple((axis, length) for axis, length in json["flattened"])
        return cls(json["name"], json["kind"], tensors, flattened, json["channels_first"])


def pair(first: Sequence[Layer], second: Sequence[Layer]) -> list[Rule]:
    """The rules from one model to another whose layers are the same, in the same order. ``Mapping.between`` asks.

    Raises:
        ConfigurationError: at the first layer that differs, or is of a kind that is not known.
    """
    for number in range(max(len(first), len(second))):
        here = [layers[number] if number < len(layers) else None for layers in (first, second)]
        if here[0] is None or here[1] is None or here[0].kind != here[1].kind:
            said = " but ".join("nothing" if layer is None else f"{layer.kind} {layer.name!r}" for layer in here)
            raise ConfigurationError(f"the models differ at layer {number}: {said}. Give a mapping instead")
    rules: dict[str, Rule] = {}
    for one, other in zip(first, second, strict=True):
        for rule in _pair(one, other):
            if rules.setdefault(rule.source, rule) != rule:  # a tied parameter belongs to several layers
                raise ConfigurationError(
                    f"{rule.source!r} belongs to several layers of one model, but {rules[rule.source].target!r} and "
                    f"{rule.target!r} are two tensors of the other"
                )
    return list(rules.values())


def _pair(one: Layer, other: Layer) -> list[Rule]:
    if one.kind not in KINDS:
        raise ConfigurationError(
            f"{one.name!r} is a {one.kind}: only {', '.join(KINDS)} can be paired between frameworks. Give a mapping"
        )
    if one.tensors.keys() != other.tensors.keys():
        raise ConfigurationError(
            f"{one.name!r} has {', '.join(one.tensors) or 'nothing'}, but {other.name!r} has "
            f"{', '.join(other.tensors) or 'nothing'}"
        )
    parts = _parts(one, other)
    rules = []
    for role, source in one.tensors.items():
        target = other.tensors[role]
        rule = _rule(source, target, parts)
        if rule.shape(source.shape) != target.shape:
            raise ConfigurationError(
                f"{source.name!r} has shape {source.shape} (axes {source.axes}), but {target.name!r} has "
                f"{target.shape} (axes {target.axes}): not the same {one.kind}"
            )
        rules.append(rule)
    return rules


Flattened = tuple[tuple[str, int], ...]


def _parts(one: Layer, other: Layer) -> tuple[Flattened, Flattened] | None:
    """What the input features stand for, in each layer's order, if that matters."""
    known = one.flattened or other.flattened
    if known is None:
        return None
    both = [layer.flattened or _reordered(known, layer.channels_first) for layer in (one, other)]
    if sorted(both[0]) != sorted(both[1]):
        raise ConfigurationError(f"{one.name!r} follows a map of {both[0]}, but {other.name!r} one of {both[1]}")
    return None if both[0] == both[1] else (both[0], both[1])


def _reordered(flattened: Flattened, channels_first: bool) -> Flattened:
    channels = tuple(axis for axis in flattened if axis[0] == "c")
    places = tuple(axis for axis in flattened if axis[0] != "c")
    return channels + places if channels_first else places + channels


def _rule(source: Tensor, target: Tensor, parts: tuple[Flattened, Flattened] | None) -> Rule:
    if sorted(source.axes) != sorted(target.axes):
        raise ConfigurationError(f"{source.name!r} has axes {source.axes}, but {target.name!r} has {target.axes}")
    if parts is None or "i" not in source.axes:
        axes = tuple(source.axes.index(axis) for axis in target.axes)
        return Rule(source.name, target.name, None if axes == tuple(range(len(axes))) else axes)
    before, after = parts
    lengths = dict(zip(source.axes, source.shape, strict=True))
    apart = {axis: [(axis, lengths[axis])] for axis in source.axes if axis != "i"}
    split = [apart.get(axis, before) for axis in source.axes]
    joined = [apart.get(axis, after) for axis in target.axes]
    order = [axis for group in split for axis, _ in group]
    return Rule(
        source.name,
        target.name,
        tuple(order.index(axis) for group in joined for axis, _ in group),
        tuple(tuple(length for _, length in group) for group in split),
        tuple(len(group) for group in joined),
    )
