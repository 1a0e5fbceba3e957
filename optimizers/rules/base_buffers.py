"""Average of the base optimizer's buffers (momentum, ...) over ranks."""

from collections.abc import Mapping

import numpy as np

from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.errors import MismatchError
from lentando.comm.flat import Entry, FlatBuffer, build_layouts, describe, first_difference
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.partial_average import PartialAverage, mean_over_some

__all__ = ["average"]


def average(
    transport: Transport,
    arrays: Mapping[str, Array],
    algorithm: Algorithm = "auto",
    partial_average: PartialAverage | None = None,
) -> dict[str, Array]:
    """The mean over ranks of named arrays, formed in one reduction per dtype. Collective.

    Args:
        transport: transport that connects the ranks.
        arrays: arrays of this rank, by name.
        algorithm: algorithm of the reductions.
        partial_average: how this rank takes part in an average over some of the ranks; None for the mean over all.

    Returns:
        The mean of each array, by name.

    Raises:
        MismatchError: on every rank, if names, shapes or dtypes differ.
    """
    layouts = build_layouts(Entry(name, a.shape, a.dtype.name, None) for name, a in sorted(arrays.items()))
    described = allgather_object(transport, describe(layouts))
    if any(other != described[0] for other in described):
        raise MismatchError(
            "base_buffers='average' needs the same optimizer state on every rank, but it differs. First: "
            f"{first_difference(described)}. A parameter without a gradient on some rank has no state there: use "
            "base_buffers='reset' or 'maintain'"
        )
    averaged: dict[str, Array] = {}
    for layout in layouts:
        flat = FlatBuffer(layout)
        for entry, view in zip(layout.entries, flat.views, strict=True):
            np.copyto(view, arrays[entry.name])
        reduction = plan_reduction(transport, flat.array, algorithm)
        if partial_average is None:
            reduction.all_reduce(mean=True)
        else:
            mean_over_some(reduction, flat.array, partial_average)
        averaged |= {entry.name: view for entry, view in zip(layout.entries, flat.views, strict=True)}
    return averaged
