"""The rules from the tensors of one layer to those of the same layer in another framework."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.checkpoint.layers import OPTIONAL, Factors, Layer, Segment, Tensor
from lentando.optimizers.checkpoint.weight_rule import Ranges, WeightRule

__all__ = ["KINDS", "rules_of", "tensor_rules"]

KINDS = (
    "dense", "convolution", "depthwise convolution", "transposed convolution", "batch norm", "layer norm", "group norm",
    "rms norm", "embedding", "prelu", "attention", "lstm", "gru", "simple rnn",
)  # fmt: skip


def rules_of(one: Layer, other: Layer) -> list[WeightRule]:
    """The rules that turn the tensors of one layer into those of another.

    Args:
        one: layer of the first model.
        other: layer of the second model.

    Raises:
        ConfigurationError: if the layers differ, or their kind is not known.
    """
    if one.kind not in KINDS:
        raise ConfigurationError(f"{one.name!r} is of the kind {one.kind}: only {', '.join(KINDS)} can be paired")
    for layer in (one, other):
        if layer.unknown and one.channels_first != other.channels_first:
            raise ConfigurationError(layer.unknown)
    if one.tensors.keys() - OPTIONAL.keys() != other.tensors.keys() - OPTIONAL.keys():
        raise ConfigurationError(
            f"{one.name!r} has {', '.join(one.tensors) or 'nothing'}, but {other.name!r} has "
            f"{', '.join(other.tensors) or 'nothing'}"
        )
    for setting in one.structure.keys() & other.structure.keys():
        if one.structure[setting] != other.structure[setting]:
            raise ConfigurationError(
                f"{setting} of {one.name!r} is {one.structure[setting]}, but that of {other.name!r} is "
                f"{other.structure[setting]}"
            )
    rules: list[WeightRule] = []
    for role, tensor in one.tensors.items():
        if role in other.tensors:
            rules += tensor_rules(tensor, other.tensors[role], one, other)
        else:
            added = tensor_rules(tensor, other.tensors[OPTIONAL[role]], one, other)
            rules += [replace(rule, use="added") for rule in added]
    for role in other.tensors.keys() - one.tensors.keys():
        zero = tensor_rules(one.tensors[OPTIONAL[role]], other.tensors[role], one, other)
        rules += [replace(rule, use="zero") for rule in zero]
    return rules


@dataclass(frozen=True)
class _Range:
    """A range of an axis in both frameworks.

    Attributes:
        letter: letter of the axis.
        starts: first index of the range, in each framework.
        length: number of elements.
        factors: axes that were flattened into the range, in the order of each framework.
    """

    letter: str
    starts: tuple[int, int]
    length: int
    factors: tuple[Factors, Factors]


def tensor_rules(source: Tensor, target: Tensor, one: Layer, other: Layer) -> list[WeightRule]:
    """The rules that turn a tensor of one layer into that of another: one, or one per part with its own permutation.

    Args:
        source: tensor of the first layer.
        target: tensor of the second layer.
        one: first layer.
        other: second layer.

    Raises:
        ConfigurationError: if the tensors differ.
    """
    known = {**one.lengths, **other.lengths}
    lengths, target_lengths = source.lengths(known), target.lengths(known)
    if lengths is None or target_lengths is None or not _fit(lengths, target_lengths):
        raise ConfigurationError(
            f"{source.name!r} has shape {source.shape} (axes {source.axes}), but {target.name!r} has "
            f"{target.shape} (axes {target.axes}): not the same {one.kind}"
        )
    shared = lengths.keys() & target_lengths.keys()
    alternatives: list[list[_Range]] = []
    for letter in sorted(shared & (one.segments.keys() | other.segments.keys())):
        ranges = _ranges(letter, one, other)
        total = sum(part.length for part in ranges)
        if total != lengths[letter]:
            raise ConfigurationError(
                f"{source.name!r} has {lengths[letter]} features where {one.name!r} or {other.name!r} has {total}"
            )
        if len(ranges) > 1 or ranges[0].factors[0] != ranges[0].factors[1]:
            alternatives.append(ranges)
    return [_rule(source, target, shared, lengths, chosen) for chosen in product(*alternatives)]


def _fit(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    letters = one.keys() | other.keys()
    return all(one.get(letter, 1) == other.get(letter, 1) for letter in letters)


def _rule(
    source: Tensor, target: Tensor, letters: set[str], lengths: Mapping[str, int], chosen: Sequence[_Range]
) -> WeightRule:
    by_letter = {part.letter: part for part in chosen}

    def pieces(tensor: Tensor, side: int) -> list[list[tuple[str, int]]]:
        """The pieces of each axis, with their labels and lengths."""
        axes = []
        for group in tensor.groups:
            labelled: list[tuple[str, int]] = []
            for letter in group:
                if letter in by_letter:
                    labelled += [(letter + label, length) for label, length in by_letter[letter].factors[side]]
                elif letter in letters:  # otherwise it is of length 1, and the other framework has no such axis
                    labelled.append((letter, lengths[letter]))
            axes.append(labelled)
        return axes

    split, joined = pieces(source, 0), pieces(target, 1)
    order = [label for group in split for label, _ in group]
    axes: tuple[int, ...] | None = tuple(order.index(label) for group in joined for label, _ in group)
    parts = [_part(tensor, side, by_letter) for side, tensor in enumerate((source, target))]
    if all(len(group) == 1 for group in (*split, *joined)):
        axes = None if axes == tuple(range(len(order))) else axes
        return WeightRule(source.name, target.name, axes, source_part=parts[0], target_part=parts[1])
    return WeightRule(
        source.name,
        target.name,
        axes,
        tuple(tuple(length for _, length in group) for group in split),
        tuple(len(group) for group in joined),
        parts[0],
        parts[1],
    )


def _part(tensor: Tensor, side: int, by_letter: Mapping[str, _Range]) -> Ranges | None:
    """The part of a tensor that the chosen ranges select; None if it is the whole tensor."""
    whole = tuple((0, length) for length in tensor.shape)
    ranges = []
    for letters, (start, stop) in zip(tensor.groups, tensor.part or whole, strict=True):
        part = by_letter.get(letters)
        ranges.append((start, stop) if part is None else _within(start, part, side))
    return None if tuple(ranges) == whole else tuple(ranges)


def _within(start: int, part: _Range, side: int) -> tuple[int, int]:
    return start + part.starts[side], start + part.starts[side] + part.length


def _ranges(letter: str, one: Layer, other: Layer) -> list[_Range]:
    """The ranges of an axis, each of which has one permutation; neighbours without a permutation are joined."""
    both = _both(letter, one, other)
    starts = [_starts(segments) for segments in both]
    by_key = dict(both[1])
    found: list[_Range] = []
    for key, segment in both[0]:
        factors, there = segment, by_key[key]
        length = _length(segment)
        if _moved(factors) == _moved(there):
            factors = there = (("", length),)
        begin = starts[0][key], starts[1][key]
        last = found[-1] if found else None
        if (
            last is not None
            and factors == there
            and last.factors[0] == last.factors[1]
            and all(start + last.length == now for start, now in zip(last.starts, begin, strict=True))
        ):
            length += last.length
            found[-1] = _Range(letter, last.starts, length, ((("", length),), (("", length),)))
        else:
            found.append(_Range(letter, begin, length, (factors, there)))
    return found


def _both(letter: str, one: Layer, other: Layer) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """The segments of an axis in the order of each layer, or of its framework if the layer does not know them."""
    known = one.segments.get(letter) or other.segments[letter]
    first, second = (
        layer.segments.get(letter) or tuple((key, _reordered(factors, layer.channels_first)) for key, factors in known)
        for layer in (one, other)
    )
    if {key: sorted(factors) for key, factors in first} != {key: sorted(factors) for key, factors in second}:
        raise ConfigurationError(f"{one.name!r} has features of {first}, but {other.name!r} of {second}")
    return first, second


def _starts(segments: Sequence[Segment]) -> dict[str, int]:
    starts, start = {}, 0
    for key, factors in segments:
        starts[key] = start
        start += _length(factors)
    return starts


def _length(factors: Factors) -> int:
    length = 1
    for _, factor in factors:
        length *= factor
    return length


def _moved(factors: Factors) -> Factors:
    """The factors without axes of length 1, whose position does not matter."""
    return tuple(factor for factor in factors if factor[1] != 1)


def _reordered(factors: Factors, channels_first: bool) -> Factors:
    channels = tuple(axis for axis in factors if axis[0] == "c")
    places = tuple(axis for axis in factors if axis[0] != "c")
    return channels + places if channels_first else places + channels
