"""Sparse gradients (of embeddings), averaged by gathering the rows that the ranks have."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from lentando.comm.elastic import transaction
from lentando.comm.errors import ConfigurationError, NonFiniteError
from lentando.comm.operations import Sum
from lentando.comm.transport import Transport
from lentando.optimizers.replica import Replica
from lentando.torch.convert import as_array, as_tensor
from lentando.torch.local_tensors import set_gradient

__all__ = ["average_sparse", "gather_rows"]


def average_sparse(
    replica: Replica, parameters: Mapping[str, torch.Tensor], names: Sequence[str], averaged_in_place: Collection[str]
) -> None:
    """Replace sparse gradients by their mean over all ranks, or by their sum if the base algorithm forms sums.

    Collective. A rank where a parameter has no gradient counts as zeros, and a dense one is converted.

    Args:
        replica: replica that the model belongs to.
        parameters: parameters by name.
        names: names of the parameters whose gradients are sparse on some rank, the same on all ranks.
        averaged_in_place: names of the parameters whose gradients on this rank are dense, and were averaged already
            where the backward pass has put them.

    Raises:
        ConfigurationError: on every rank, if one of them is among ``averaged_in_place`` on some rank; inside ``join``,
            and with ``on_nonfinite="skip"``, which are not possible with sparse gradients.
        NonFiniteError: on every rank, if the average is not finite.
    """
    settings, transport = replica.settings, replica.transport
    if replica.joined or settings.on_nonfinite == "skip":
        raise ConfigurationError(
            f"parameter {names[0]!r} has a sparse gradient, which is averaged over all ranks only: use "
            "sparse_as_dense=True, or leave out join and on_nonfinite='skip'"
        )
    with replica.costs.of("gradients", replica.inner_steps + 1):
        given = {name: parameters[name] for name in names}
        averaged = transaction(transport, lambda: _gathered(transport, given, averaged_in_place))
    divisor = 1 if getattr(settings.base, "op", None) is Sum else transport.size  # of the ranks that live
    for name, gradient in zip(names, averaged, strict=True):
        if not gradient.values().isfinite().all():
            raise NonFiniteError(f"the average of the sparse gradient of {name!r} is not finite")
        set_gradient(parameters[name], gradient / divisor)


def gather_rows(transport: Transport, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Concatenate tensors of all ranks along their first axis, in which they may differ in length. Collective.

    Args:
        transport: transport that connects the ranks.
        rows: tensors, equal on all ranks in dtype and all axes but the first.
    """
    lengths = transport.allgather(np.array([len(part) for part in rows], np.int64))
    gathered = []
    for number, part in enumerate(rows):
        longest = int(lengths[:, number].max())
        padded = torch.zeros(longest, *part.shape[1:], dtype=part.dtype)
        padded[: len(part)] = part
        by_rank = as_tensor(transport.allgather(as_array(padded)))
        parts = [by_rank[rank, :length] for rank, length in enumerate(lengths[:, number].tolist())]
        gathered.append(torch.cat(parts).to(part.device))
    return gathered


def _gathered(
    transport: Transport, parameters: Mapping[str, torch.Tensor], averaged_in_place: Collection[str]
) -> list[torch.Tensor]:
    """The sums over all ranks of the parameters' gradients, as sparse tensors."""
    own_axes = [0 if p.grad is None or not p.grad.is_sparse else p.grad.sparse_dim() for p in parameters.values()]
    are_lost = [name in averaged_in_place for name in parameters]
    axes, lost = transport.allgather(np.array([own_axes, are_lost], np.int64)).max(axis=0).tolist()
    for name, is_lost in zip(parameters, lost, strict=True):
        if is_lost:
            raise ConfigurationError(
                f"the gradient of parameter {name!r} is sparse on some ranks and dense on others: use "
                "sparse_as_dense=True"
            )
    rows: list[torch.Tensor] = []
    for parameter, sparse_axes in zip(parameters.values(), axes, strict=True):
        gradient = parameter.grad
        if gradient is None:
            rows.append(torch.zeros(0, sparse_axes, dtype=torch.int64, device=parameter.device))
            rows.append(torch.zeros(0, *parameter.shape[sparse_axes:], dtype=parameter.dtype, device=parameter.device))
            continue
        if not gradient.is_sparse:
            gradient = gradient.to_sparse(sparse_axes)
        gradient = gradient.coalesce()
        rows += [gradient.indices().t().contiguous(), gradient.values()]
    parts = gather_rows(transport, rows)
    return [
        torch.sparse_coo_tensor(indices.t(), values, parameter.shape, check_invariants=False).coalesce()
        for parameter, indices, values in zip(parameters.values(), parts[::2], parts[1::2], strict=True)
    ]
