"""Where gradients are averaged: laid out like the parameters, with one more number each: is there a gradient at all?

A parameter that no rank used stays without gradient; one that some ranks used gets the mean, zeros counted.
"""

from collections.abc import Iterable

from lentando.comm.flat import Entry, FlatLayout

__all__ = ["gradient_layouts"]

PRESENCE = "which parameters have a gradient"


def gradient_layouts(layouts: Iterable[FlatLayout]) -> list[FlatLayout]:
    """Layouts for the gradients of parameters: statistics left out, and a last entry with a number per parameter.

    Args:
        layouts: of parameters and statistics. One without parameters has no gradients, and is left out.
    """
    found = []
    for layout in layouts:
        trained = [entry for entry in layout.entries if entry.group is not None]
        if trained:
            found.append(FlatLayout([*trained, Entry(PRESENCE, (len(trained),), trained[0].dtype, None)]))
    return found
