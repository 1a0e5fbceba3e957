"""Pairs the layers of two models: by their order, or by kind and shape where the order differs."""

from collections import Counter
from collections.abc import Sequence
from math import isclose
from typing import TypeAlias

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.checkpoint.layers import Layer
from lentando.optimizers.checkpoint.rules_of_layer import rules_of
from lentando.optimizers.checkpoint.suggestion import suggested
from lentando.optimizers.checkpoint.weight_rule import Ranges, WeightRule

__all__ = ["differing_settings", "pair", "pairs_of"]

Pair: TypeAlias = tuple[Layer, Layer]
NAMED = 20
"""Largest number of pairs of layers that a note names."""


def pair(first: Sequence[Layer], second: Sequence[Layer]) -> tuple[list[WeightRule], list[str]]:
    """The rules that turn the tensors of one model into those of another that has the same layers.

    Args:
        first: layers of the first model.
        second: layers of the second model.

    Returns:
        The rules, in the order of the first model's layers, and notes for the user.

    Raises:
        ConfigurationError: at the first layer that differs, cannot be distinguished from others, or is of an unknown
            kind; the message ends with a map to start from, as Python.
    """
    try:
        aligned, notes = _aligned(first, second)
        rules = _rules(aligned)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}. {suggested(first, second)}") from error
    for one, other in aligned:
        if one.tensors.keys() != other.tensors.keys():
            notes.append(
                f"one of {one.name!r} and {other.name!r} has two biases where the other has one, their sum: the base "
                "optimizer's state of the two is averaged, or that of the one copied"
            )
    return rules, [*notes, *differing_settings(aligned)]


def _rules(aligned: Sequence[Pair]) -> list[WeightRule]:
    rules: dict[tuple[str, Ranges | None, bool], WeightRule] = {}
    for one, other in aligned:
        for rule in rules_of(one, other):
            key = rule.source, rule.source_part, rule.use == "zero"
            if rules.setdefault(key, rule) != rule:  # a tied parameter belongs to several layers
                raise ConfigurationError(
                    f"{rule.source!r} belongs to several layers of one model, but {rules[key].target!r} and "
                    f"{rule.target!r} are two tensors of the other"
                )
    return list(rules.values())


def pairs_of(rules: Sequence[WeightRule], first: Sequence[Layer], second: Sequence[Layer]) -> list[Pair]:
    """The pairs of layers between whose weights at least one of these rules leads."""
    by_name = [{t.name: layer for layer in layers for t in layer.tensors.values()} for layers in (first, second)]
    pairs: dict[tuple[int, int], Pair] = {}
    for rule in rules:
        one, other = by_name[0].get(rule.source), by_name[1].get(rule.target)
        if one is not None and other is not None and one.kind == other.kind:
            pairs[id(one), id(other)] = one, other
    return list(pairs.values())


def differing_settings(pairs: Sequence[Pair]) -> list[str]:
    """Notes on settings that are not weights and differ between the layers of a pair."""
    differing: dict[tuple[str, str, object, object], list[Pair]] = {}
    for one, other in pairs:
        for setting in one.settings.keys() & other.settings.keys():
            values = one.settings[setting], other.settings[setting]
            if not _equal(*values):
                differing.setdefault((one.kind, setting, *values), []).append((one, other))
    notes = []
    for (kind, setting, value, other_value), layers in sorted(differing.items(), key=lambda item: item[0][:2]):
        one, other = layers[0]
        more = f", and so in {len(layers) - 1} more" if len(layers) > 1 else ""
        convention = ", as PyTorch counts it (Keras's is 1 minus that)" if setting == "momentum" else ""
        notes.append(f"{setting} of {kind}: {value} in {one.name!r}, {other_value} in {other.name!r}{convention}{more}")
    return notes


def _equal(one: object, other: object) -> bool:
    if isinstance(one, float | int) and isinstance(other, float | int):
        return isclose(one, other, rel_tol=1e-6)
    return one == other


def _aligned(first: Sequence[Layer], second: Sequence[Layer]) -> tuple[list[Pair], list[str]]:
    """Pairs of layers, in the order of the first model, and notes for the user."""
    if len(first) != len(second):
        first, second = _without_repeated(first), _without_repeated(second)
    signatures = [[layer.signature for layer in layers] for layers in (first, second)]
    if signatures[0] != signatures[1] and Counter(signatures[0]) == Counter(signatures[1]):
        return _aligned_by_kind(first, second)
    for number in range(max(len(first), len(second))):
        here = [layers[number] if number < len(layers) else None for layers in (first, second)]
        if here[0] is None or here[1] is None or here[0].kind != here[1].kind:
            kinds = " but ".join("nothing" if layer is None else f"{layer.kind} {layer.name!r}" for layer in here)
            raise ConfigurationError(f"the models differ at layer {number}: {kinds}")
    pairs = list(zip(first, second, strict=True))
    parallel = [(one, other) for one, other in pairs if one.is_parallel or other.is_parallel]
    return pairs, _guesses(parallel, "neither of which comes before the other in the model")


def _aligned_by_kind(first: Sequence[Layer], second: Sequence[Layer]) -> tuple[list[Pair], list[str]]:
    """Pairs of the layers of models that have the same layers in another order."""
    pairs: list[Pair] = []
    guessed: list[Pair] = []
    for kind in dict.fromkeys(layer.kind for layer in first):
        ones, others = ([layer for layer in layers if layer.kind == kind] for layers in (first, second))
        same_order = [layer.signature for layer in ones] == [layer.signature for layer in others]
        for signature in dict.fromkeys(layer.signature for layer in ones):
            equal = [[layer for layer in layers if layer.signature == signature] for layers in (ones, others)]
            equal_pairs = list(zip(*equal, strict=True))
            if len(equal_pairs) > 1 and not same_order:
                names = [", ".join(repr(layer.name) for layer in layers) for layers in equal]
                raise ConfigurationError(
                    f"the layers of the models come in another order, and it is not known which of {names[0]} is "
                    f"which of {names[1]}: each is a {kind} of the same shape"
                )
            pairs += equal_pairs
            guessed += equal_pairs if len(equal_pairs) > 1 else []
    position = {id(layer): number for number, layer in enumerate(first)}
    pairs.sort(key=lambda layers: position[id(layers[0])])
    return pairs, _guesses(guessed, "while the layers of the models come in another order")


def _guesses(pairs: Sequence[Pair], why: str) -> list[str]:
    """A note on pairs of layers that only their order among layers of the same kind and shape distinguishes."""
    names = [f"{one.name!r} and {other.name!r}" for one, other in pairs[:NAMED]]
    more = f"; and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    listed = "; ".join(names) + more
    note = (
        f"layers of the same kind and shape, {why}, were paired in the order in which they were created, so check that "
        f"these are the same: {listed}"
    )
    return [note] if pairs else []


def _without_repeated(layers: Sequence[Layer]) -> list[Layer]:
    """The layers without those that have no tensor of their own: all of theirs belong to layers before them."""
    known: set[str] = set()
    distinct = []
    for layer in layers:
        names = {tensor.name for tensor in layer.tensors.values()}
        if not names or names - known:
            distinct.append(layer)
        known |= names
    return distinct
