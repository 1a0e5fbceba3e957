"""What belongs to a model and is not averaged while it trains: frozen parameters, counters, measured moments of data.

All ranks begin with rank 0's, except that moments which the ranks have measured on parts of the data are put together.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lentando.comm.errors import MismatchError, grouped_by_rank
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Array, Transport

__all__ = ["take_over"]


def take_over(
    transport: Transport, framework: str, tensors: Mapping[str, Array], moments: Sequence[tuple[str, str]] = ()
) -> dict[str, Array]:
    """Collective: rank 0's tensors, on every rank. Means and variances of data become those of all ranks' data.

    Frameworks count different things (PyTorch the batches that BatchNorm has seen): where ranks use several, they share
    what all of them have.

    Args:
        transport: ranks that train together.
        framework: its name.
        tensors: this rank's, by name.
        moments: names of a mean and its variance, which each rank has measured on its own part of the data.

    Raises:
        MismatchError: on every rank, if ranks of one framework have different ones.
    """
    own = {name: [list(array.shape), array.dtype.name] for name, array in tensors.items()}
    everyone = allgather_object(transport, [framework, own, [list(pair) for pair in moments]])
    names = list(own)
    if len({used for used, *_ in everyone}) > 1:
        names = sorted(name for name in own if all(others.get(name) == own[name] for _, others, _ in everyone))
    elif any(others != own for _, others, _ in everyone):
        found = grouped_by_rank([str(others) for _, others, _ in everyone])
        raise MismatchError(
            f"the models' frozen parameters and integer buffers differ between ranks. {found}. Build the same model, "
            "with the same parts frozen, on every rank"
        )
    shared = {name: np.array(tensors[name], order="C") for name in names}
    for array in shared.values():
        transport.broadcast(array)
    for mean, variance in moments:
        if all([mean, variance] in theirs for *_, theirs in everyone):
            together = _moments_of_all(transport, tensors[mean], tensors[variance])
            shared[mean], shared[variance] = together
    return shared


def _moments_of_all(transport: Transport, mean: Array, variance: Array) -> tuple[Array, Array]:
    """The mean and the variance of all ranks' data together, to which each rank has contributed equally much.

    Equal moments stay as they are, to the last bit.
    """
    means, variances = (
        transport.allgather(np.ascontiguousarray(array).reshape(-1)).astype(np.float64) for array in (mean, variance)
    )
    if (means == means[0]).all() and (variances == variances[0]).all():
        return mean, variance
    of_all = means.mean(axis=0)
    spread = (variances + (means - of_all) ** 2).mean(axis=0)
    return of_all.astype(mean.dtype).reshape(mean.shape), spread.astype(variance.dtype).reshape(variance.shape)
