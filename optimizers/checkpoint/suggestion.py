"""A mapping to start from, as Python, for models that cannot be paired."""

from collections.abc import Sequence
from dataclasses import replace

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.checkpoint.layers import Layer, Tensor
from lentando.optimizers.checkpoint.rules_of_layer import rules_of
from lentando.optimizers.checkpoint.weight_rule import WeightRule

__all__ = ["suggested"]


def suggested(first: Sequence[Layer], second: Sequence[Layer]) -> str:
    """What to write in a program instead: rules for all layers that fit each other, and what is left over.

    Layers are taken in their order among those that fit; lines that need a look say so.
    """
    lines: list[str] = []
    left = list(second)
    mapped: tuple[set[str], set[str]] = (set(), set())
    for one in first:
        for other in left:
            rules = _rules(one, other)
            if rules is not None:
                left.remove(other)
                doubt = one.unknown or other.unknown
                if doubt:
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
    return f"Give a mapping to load, beginning with this one:\nmapping = lt.WeightMap([\n{body}\n])"


_PARTS = "otherwise split, axes and merge permute its axis, and source_part and target_part restrict that to a part"


def _rules(one: Layer, other: Layer) -> list[WeightRule] | None:
    if one.kind != other.kind:
        return None
    try:
        return rules_of(replace(one, unknown=""), replace(other, unknown=""))
    except ConfigurationError:
        return None


def _guess(source: Tensor, target: Tensor) -> WeightRule | None:
    """A rule between tensors of unknown axes of which the shapes are equal, or reversed."""
    if source.shape == target.shape:
        return WeightRule(source.name, target.name)
    if len(source.shape) == 2 and source.shape == target.shape[::-1]:
        return WeightRule(source.name, target.name, (1, 0))
    return None
