"""The exact average of the replicas' weights and statistics between steps, where all ranks have agreed to form it."""

from zlib import crc32

import numpy as np

from lentando.comm.array_module import to_host
from lentando.comm.collectives import plan_reduction
from lentando.comm.transport import as_bytes
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.rules.partial_average import PartialAverage, mean_over_some

__all__ = ["are_equal", "average_weights"]


def average_weights(setup: Setup, share: PartialAverage | None) -> None:
    """Replace what the buffers contain by its average over the ranks. Collective.

    What is equal on all ranks keeps its value exactly: the mean of equal numbers may differ from them by a bit.

    Args:
        setup: transport, framework and method of the replica.
        share: how this rank takes part; None if all ranks do.
    """
    if share is None and are_equal(setup):
        return
    for buffer in setup.framework.buffers:
        constants = setup.constants.within(buffer)
        reduction = plan_reduction(setup.transport, buffer.array, setup.settings.algorithm)
        if share is None:
            reduction.all_reduce(mean=True)
        else:
            mean_over_some(reduction, buffer.array, share)
        for constant in constants:
            constant.restore(buffer.array)


def are_equal(setup: Setup, statistics: bool = True) -> bool:
    """Whether the buffers of all ranks contain the same weights. Collective.

    Args:
        setup: transport and framework of the replica.
        statistics: whether to compare the statistics too.
    """
    checksum = 0
    for buffer in setup.framework.buffers:
        own = buffer.array if statistics else buffer.parameters
        checksum = crc32(as_bytes(to_host(own)).data, checksum)
    checksums = setup.transport.allgather(np.array([checksum], np.int64))
    return bool((checksums == checksums[0]).all())
