"""Layout of flat gradients: that of the parameters, followed by a number per parameter that says if it has a gradient.

A parameter that no rank has used stays without a gradient. A parameter that some ranks have used gets the mean over all
ranks, with zeros for those that have not used it.
"""

from collections.abc import Iterable

from lentando.comm.flat import Entry, FlatLayout

__all__ = ["gradient_layouts"]

PRESENCE = "which parameters have a gradient"


def gradient_layouts(layouts: Iterable[FlatLayout]) -> list[FlatLayout]:
    """Layouts for the gradients of parameters: statistics left out, and a last entry with a number per parameter.

    Args:
        layouts: layouts of parameters and statistics. A layout without parameters has no gradients, and is left out.
    """
    gradients = []
    for layout in layouts:
        trained = [entry for entry in layout.entries if entry.group is not None]
        if trained:
            gradients.append(FlatLayout([*trained, Entry(PRESENCE, (len(trained),), trained[0].dtype, None)]))
    return gradients
