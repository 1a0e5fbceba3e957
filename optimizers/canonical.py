"""One flat layout for ranks of different frameworks, which average with each other element by element.

All ranks use the names, order and axes of one framework; ranks of another copy their tensors in and out with permuted
axes. A permutation costs no more than the copy, which is made in any case: both sides are views.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Entry
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.weight_map import WeightMap, WeightRule

__all__ = ["CanonicalTensor", "canonical_tensors"]


@dataclass(frozen=True)
class CanonicalTensor:
    """One of this rank's tensors and its place in the common layout.

    Attributes:
        entry: entry of the common layout, with its name and shape there.
        own: this rank's name of the tensor.
        rule: rule from the common layout to this rank's.
    """

    entry: Entry
    own: str
    rule: WeightRule

    def views(self, common: Array, own: Array) -> tuple[Array, Array]:
        """Both tensors as views of one shape: ``np.copyto(a, b)`` copies in, ``np.copyto(b, a)`` out.

        Args:
            common: the entry's array in the common layout, in its shape there (``FlatBuffer.views``).
            own: this rank's tensor, contiguous.
        """
        permuted = self.rule.permuted(common)
        return permuted, own.reshape(permuted.shape)


def canonical_tensors(mapping: WeightMap, entries: Iterable[Entry]) -> list[CanonicalTensor]:
    """This rank's tensors in the order of the common layout, which ``build_layouts`` makes from their entries.

    Args:
        mapping: map from the common tensors to this rank's; its order is that of the common layout, with parameters
            sorted by group and followed by statistics.
        entries: this rank's tensors, in any order.

    Raises:
        ConfigurationError: if the map omits one of the tensors, makes one of parts, or does not fit a shape.
    """
    by_name = {entry.name: entry for entry in entries}
    if not mapping.whole:
        partial = sorted(
            {
                rule.target
                for rule in mapping.rules.values()
                if rule.source_part or rule.target_part or rule.use != "copied"
            }
        )
        raise ConfigurationError(
            f"the mapping makes tensors of parts of others: {partial}. A checkpoint can be loaded by such a mapping, "
            "but ranks of different frameworks cannot average with each other by it: train in one framework at a time"
        )
    if missing := sorted(by_name.keys() - mapping.rules.keys()):
        raise ConfigurationError(f"the mapping leaves out tensors of this rank: {missing}")
    tensors = []
    for name, rule in mapping.rules.items():
        if name in by_name:  # a map may also contain frozen tensors, which are not averaged
            entry = by_name[name]
            tensors.append(
                CanonicalTensor(
                    Entry(rule.source, rule.inverse.shape(entry.shape), entry.dtype, entry.group), name, rule
                )
            )
    return sorted(tensors, key=lambda tensor: (tensor.entry.group is None, tensor.entry.group or 0))
