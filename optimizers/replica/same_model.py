"""Do all ranks train the same model in the same way? Asked once, before anything else is sent."""

import numpy as np

from lentando.comm.array_module import is_on_host
from lentando.comm.control import Control, Event, agree, fingerprint
from lentando.comm.errors import MismatchError, grouped_by_rank
from lentando.comm.flat import describe, first_difference
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Transport
from lentando.optimizers.framework import Framework
from lentando.optimizers.optimizer_description import check_same_optimizer, warn_of_other_state
from lentando.optimizers.rules.settings import Settings, check_same_settings

__all__ = ["check_equal", "check_equal_hyperparameters"]


def check_equal(transport: Transport, framework: Framework, given: Settings, settings: Settings) -> int:
    """Collective: every rank calls it with what it has. Returns the fingerprint of model and method that all share.

    Args:
        transport: ranks that train together.
        framework: this rank's model and base optimizer.
        given: the method in the user's words.
        settings: the same, with what "auto" stands for: ranks whose optimizers differ should hear of these, not of it.

    Base optimizers whose state differs are a warning on rank 0.

    Raises:
        MismatchError: on every rank, with the first difference and the ranks that have it.
    """
    agree(transport, Control(Event.CONSTRUCT), lambda: "wraps an optimizer")
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
        found = grouped_by_rank(["host memory" if host else "the memory of a GPU" for host in by_rank[:, 1]])
        raise MismatchError(
            f"the ranks' transport takes models where they are, and they are in different places. {found}. Train on "
            "GPUs on every rank, or on none"
        )
    if (by_rank[:, 0] == subject).all():
        if (by_rank[:, 2] != own[2]).any():
            everyone = allgather_object(transport, [framework.name, optimizer, settings.description])
            check_same_optimizer([name for name, *_ in everyone], [described for _, described, _ in everyone])
            check_same_settings([described for *_, described in everyone])
        if (by_rank[:, 3] != own[3]).any():
            begun = allgather_object(transport, [framework.name, description.state])
            if transport.rank == 0:
                warn_of_other_state([name for name, _ in begun], [state for _, state in begun])
        return fingerprint([layouts, settings.method])
    check_same_settings(allgather_object(transport, given.description))
    described = allgather_object(transport, layouts)
    raise MismatchError(
        f"the models differ between ranks. First difference: {first_difference(described)}. Build the same model, "
        "with the same parameter groups, on every rank"
    )


def check_equal_hyperparameters(transport: Transport, framework: Framework) -> None:
    """Collective, when parameter groups have been added: their hyperparameters, without learning rates.

    Raises:
        MismatchError: on every rank, with the hyperparameter and the ranks that differ in it.
    """
    optimizer = framework.describe_optimizer().as_plain(with_rates=False)
    own = fingerprint([framework.name, optimizer])
    if (transport.allgather(np.array([own], np.int64)) != own).any():
        everyone = allgather_object(transport, [framework.name, optimizer])
        check_same_optimizer([name for name, _ in everyone], [described for _, described in everyone])
