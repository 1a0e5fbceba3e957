"""What all ranks compare and share when a replica is made: methods, models, base optimizers, what is not averaged."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from lentando.comm.agreement import Event, Intent, agree, fingerprint
from lentando.comm.array_module import is_on_host
from lentando.comm.errors import MismatchError, grouped_by_rank
from lentando.comm.flat import describe, first_difference
from lentando.comm.numbering import numbers_of
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Array, Transport
from lentando.optimizers.framework import Framework
from lentando.optimizers.optimizer_description import check_same_optimizer, warn_of_other_state
from lentando.optimizers.rules.settings import Settings
from lentando.optimizers.rules.settings_comparison import check_same_settings

__all__ = ["check_equal", "check_equal_hyperparameters", "share_not_averaged"]

_log = logging.getLogger("lentando")


def check_equal(
    transport: Transport,
    framework: Framework,
    given: Settings,
    settings: Settings,
    optimizers_may_differ: bool = False,
) -> int:
    """Check that all ranks train the same model by the same method. Collective, before anything else is sent.

    Base optimizers whose state differs are a warning on rank 0.

    Args:
        transport: transport that connects the ranks that train together.
        framework: adapter of this rank's model and base optimizer.
        given: the method as the user has given it. Ranks whose settings differ are compared by it.
        settings: the method with "auto" replaced by what it stands for, which may depend on the base optimizer: ranks
            whose optimizers differ get an error about the optimizers, not about it.
        optimizers_may_differ: whether hyperparameters that differ between ranks are a warning, not an error.

    Returns:
        The fingerprint of model and method.

    Raises:
        MismatchError: on every rank, with the first difference and the ranks that have it.
    """
    agree(transport, Intent(Event.CONSTRUCT), lambda: "wraps an optimizer")
    layouts = describe(buffer.layout for buffer in framework.buffers)
    subject = fingerprint([layouts, given.description])
    on_host = all(is_on_host(buffer.array) for buffer in framework.buffers)
    description = framework.describe_optimizer()
    optimizer = description.as_plain(with_rates=not settings.rates_may_differ)
    own = [
        subject,
        on_host,
        fingerprint([framework.name, optimizer]),
        fingerprint([framework.name, description.state]),
    ]
    by_rank = transport.allgather(np.array(own, np.int64))
    if len(set(by_rank[:, 1].tolist())) > 1:
        kinds = ["host memory" if host else "the memory of a GPU" for host in by_rank[:, 1]]
        places = grouped_by_rank(kinds, numbers_of(transport))
        raise MismatchError(
            f"the ranks' transport sends models from where they are stored, and they are stored in different places. "
            f"{places}. Train on GPUs on every rank, or on none"
        )
    if (by_rank[:, 0] == subject).all():
        if (by_rank[:, 2] != own[2]).any():
            gathered = allgather_object(transport, [framework.name, optimizer, settings.description])
            try:
                check_same_optimizer([name for name, *_ in gathered], [described for _, described, _ in gathered])
            except MismatchError as error:
                if not optimizers_may_differ or len({str(described["kind"]) for _, described, _ in gathered}) > 1:
                    raise
                if transport.rank == 0:
                    _log.warning("%s. Or call broadcast_optimizer_state(optimizer, rank) before the first step", error)
            check_same_settings([described for *_, described in gathered])
        if (by_rank[:, 3] != own[3]).any():
            states = allgather_object(transport, [framework.name, description.state])
            if transport.rank == 0:
                warn_of_other_state([name for name, _ in states], [state for _, state in states])
        return fingerprint([layouts, settings.method])
    check_same_settings(allgather_object(transport, given.description))
    described = allgather_object(transport, layouts)
    raise MismatchError(
        f"the models differ between ranks. First difference: {first_difference(described)}. Build the same model, "
        "with the same parameter groups, on every rank"
    )


def check_equal_hyperparameters(transport: Transport, framework: Framework) -> None:
    """Check the hyperparameters of parameter groups, without learning rates, after groups were added. Collective.

    Raises:
        MismatchError: on every rank, with the hyperparameter and the ranks that differ in it.
    """
    optimizer = framework.describe_optimizer().as_plain(with_rates=False)
    own = fingerprint([framework.name, optimizer])
    if (transport.allgather(np.array([own], np.int64)) != own).any():
        gathered = allgather_object(transport, [framework.name, optimizer])
        check_same_optimizer([name for name, _ in gathered], [described for _, described in gathered])


def share_not_averaged(
    transport: Transport, framework: str, tensors: Mapping[str, Array], moments: Sequence[tuple[str, str]] = ()
) -> dict[str, Array]:
    """Return rank 0's tensors that training does not average: frozen parameters, counters. Collective.

    Means and variances of data become those of all ranks' data. Frameworks count different things (PyTorch the batches
    that BatchNorm has seen): ranks that use different frameworks share the tensors that all of them have.

    Args:
        transport: transport that connects the ranks that train together.
        framework: name of the framework.
        tensors: this rank's tensors, by name.
        moments: names of a mean and its variance, which each rank has measured on its own part of the data.

    Raises:
        MismatchError: on every rank, if ranks with the same framework have different tensors.
    """
    own = {name: [list(array.shape), array.dtype.name] for name, array in tensors.items()}
    gathered = allgather_object(transport, [framework, own, [list(pair) for pair in moments]])
    names = list(own)
    if len({used for used, *_ in gathered}) > 1:
        names = sorted(name for name in own if all(others.get(name) == own[name] for _, others, _ in gathered))
    elif any(others != own for _, others, _ in gathered):
        differences = grouped_by_rank([str(others) for _, others, _ in gathered], numbers_of(transport))
        raise MismatchError(
            f"the models' frozen parameters and integer buffers differ between ranks. {differences}. Build the same "
            "model, with the same parts frozen, on every rank"
        )
    shared = {name: np.array(tensors[name], order="C") for name in names}
    for array in shared.values():
        transport.broadcast(array)
    for mean, variance in moments:
        if all([mean, variance] in theirs for *_, theirs in gathered):
            shared[mean], shared[variance] = _moments_of_all(transport, tensors[mean], tensors[variance])
    return shared


def _moments_of_all(transport: Transport, mean: Array, variance: Array) -> tuple[Array, Array]:
    """Return mean and variance of all ranks' data together, to which each rank has contributed equally much.

    Moments that are equal on all ranks stay bit-identical.
    """
    means, variances = (
        transport.allgather(np.ascontiguousarray(array).reshape(-1)).astype(np.float64) for array in (mean, variance)
    )
    if (means == means[0]).all() and (variances == variances[0]).all():
        return mean, variance
    of_all = means.mean(axis=0)
    spread = (variances + (means - of_all) ** 2).mean(axis=0)
    return of_all.astype(mean.dtype).reshape(mean.shape), spread.astype(variance.dtype).reshape(variance.shape)
