"""A weight map to start from, as Python, for models whose layers cannot be paired."""

from collections.abc import Sequence
from dataclasses import replace

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.checkpoint.layers import Layer, Tensor
from lentando.optimizers.checkpoint.rules_of_layer import rules_of
from lentando.optimizers.checkpoint.weight_rule import WeightRule

__all__ = ["suggested"]


def suggested(first: Sequence[Layer], second: Sequence[Layer]) -> str:
    """Python for a weight map: rules for all layers that fit each other, and comments on the tensors that remain.

    Each layer is paired with the first that fits it; lines that must be checked have a comment.

    Args:
        first: layers of the first model.
        second: layers of the second model.
    """
    lines: list[str] = []
    remaining = list(second)
    mapped: tuple[set[str], set[str]] = (set(), set())
    for one in first:
        for other in remaining:
            rules = _rules(one, other)
            if rules is not None:
                remaining.remove(other)
                if one.unknown or other.unknown:
                    lines.append(f"# Right only if the input of {other.name!r} is no flattened feature map; {_PARTS}:")
                new = [rule for rule in rules if rule.source not in mapped[0] or rule.source_part is not None]
                lines += [f"{rule.as_python()}," for rule in new]
                mapped[0].update(rule.source for rule in rules)
                mapped[1].update(rule.target for rule in rules)
                break
    sources, targets = (
        {t.name: t for layer in layers for t in layer.tensors.values() if t.name not in names}
        for layers, names in zip((first, second), mapped, strict=True)
    )
    for source in list(sources.values()):
        for target in targets.values():
            rule = _guess(source, target)
            if rule is not None:
                lines.append(f"{rule.as_python()},  # a guess by shape: check it")
                del sources[source.name], targets[target.name]
                break
    lines += [f"# not yet mapped from: {t.name!r}, shape {t.shape}" for t in sources.values()]
    lines += [f"# not yet mapped to: {t.name!r}, shape {t.shape}" for t in targets.values()]
    body = "\n".join(f"    {line}" for line in lines)
    return f"Pass a map to load, starting from this one:\nmapping = lt.WeightMap([\n{body}\n])"


_PARTS = "otherwise split, axes and merge permute its axis, and source_part and target_part restrict that to a part"


def _rules(one: Layer, other: Layer) -> list[WeightRule] | None:
    if one.kind != other.kind:
        return None
    try:
        return rules_of(replace(one, unknown=""), replace(other, unknown=""))
    except ConfigurationError:
        return None


def _guess(source: Tensor, target: Tensor) -> WeightRule | None:
    """A rule between tensors of unknown axes whose shapes are equal, or reversed; None for other shapes."""
    if source.shape == target.shape:
        return WeightRule(source.name, target.name)
    if len(source.shape) == 2 and source.shape == target.shape[::-1]:
        return WeightRule(source.name, target.name, (1, 0))
    return None
