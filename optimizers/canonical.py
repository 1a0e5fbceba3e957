"""One flat layout for ranks of different frameworks, which average with each other element by element.

One framework's names, order and axes are everybody's; ranks of another copy their tensors in and out with permuted
axes. A permutation costs no more than the copy that is made anyhow: both sides are views.
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
    """Where one of this rank's tensors lies in the common layout.

    Attributes:
        entry: what the common layout calls it, with its shape there.
        own: this rank's name for it.
        rule: from the common layout to this rank's.
    """

    entry: Entry
    own: str
    rule: WeightRule

    def views(self, common: Array, own: Array) -> tuple[Array, Array]:
        """Both tensors as views of one shape: ``np.copyto(a, b)`` copies in, ``np.copyto(b, a)`` out.

        Args:
            common: the entry in the common layout, in its shape there (``FlatBuffer.views``).
            own: this rank's tensor, contiguous.
        """
        permuted = self.rule.permuted(common)
        return permuted, own.reshape(permuted.shape)


def canonical_tensors(mapping: WeightMap, entries: Iterable[Entry]) -> list[CanonicalTensor]:
    """The common layout, as this rank's tensors make it up.

    Args:
        mapping: from the common names to this rank's; its order is that of the common layout, with parameters sorted
            by group and statistics behind them.
        entries: this rank's tensors, in any order.

    Returns:
        In the order of the common layout: ``build_layouts(place.entry for place in places)`` makes it.

    Raises:
        ConfigurationError: if the mapping leaves out one of them, or does not fit its shape.
    """
    own = {entry.name: entry for entry in entries}
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
    if missing := sorted(own.keys() - mapping.rules.keys()):
        raise ConfigurationError(f"the mapping leaves out tensors of this rank: {missing}")
    places = []
    for name, rule in mapping.rules.items():
        if name in own:  # a mapping may also speak of frozen tensors, which are not averaged
            entry = own[name]
            places.append(
                CanonicalTensor(
                    Entry(rule.source, rule.inverse.shape(entry.shape), entry.dtype, entry.group), name, rule
                )
            )
    return sorted(places, key=lambda place: (place.entry.group is None, place.entry.group or 0))
