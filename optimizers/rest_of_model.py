"""What belongs to a model and is never averaged: frozen parameters, counters. All ranks begin with rank 0's."""

from collections.abc import Mapping

import numpy as np

from lentando.comm.errors import MismatchError, grouped_by_rank
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Array, Transport

__all__ = ["take_over"]


def take_over(transport: Transport, framework: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Collective: rank 0's tensors, on every rank.

    Frameworks count different things (PyTorch the batches that BatchNorm has seen): where ranks use several, they share
    what all of them have.

    Args:
        transport: ranks that train together.
        framework: its name.
        tensors: this rank's, by name.

    Raises:
        MismatchError: on every rank, if ranks of one framework have different ones.
    """
    own = {name: [list(array.shape), array.dtype.name] for name, array in tensors.items()}
    everyone = allgather_object(transport, [framework, own])
    names = list(own)
    if len({used for used, _ in everyone}) > 1:
        names = sorted(name for name in own if all(others.get(name) == own[name] for _, others in everyone))
    elif any(others != own for _, others in everyone):
        found = grouped_by_rank([str(others) for _, others in everyone])
        raise MismatchError(
            f"the models' frozen parameters and integer buffers differ between ranks. {found}. Build the same model, "
            "with the same parts frozen, on every rank"
        )
    shared = {name: np.array(tensors[name], order="C") for name in names}
    for array in shared.values():
        transport.broadcast(array)
    return shared
