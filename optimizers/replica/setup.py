"""What a replica is set up with: the ranks check that their models are equal, share rank 0's, and plan their messages.

Planned again when parameters join or leave, and when ranks have died.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from lentando.comm.agreement import Event, Intent, Participant, agree, fingerprint
from lentando.comm.array_module import is_on_host
from lentando.comm.elastic import in_place
from lentando.comm.errors import ConfigurationError, MismatchError, grouped_by_rank
from lentando.comm.flat import describe, first_difference
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Array, Transport
from lentando.optimizers.fixed_state import check_fixed_state
from lentando.optimizers.framework import Framework, MeasuringFramework
from lentando.optimizers.optimizer_description import check_same_optimizer, warn_of_other_state
from lentando.optimizers.rules.algorithm_hooks import AlgorithmHooks, hooks_of
from lentando.optimizers.rules.constant_statistics import Constants
from lentando.optimizers.rules.outer_step import OuterStep
from lentando.optimizers.rules.settings import Settings, check_same_settings

__all__ = ["Setup", "check_equal_hyperparameters", "share_not_averaged"]

_log = logging.getLogger("lentando")


class Setup:
    """Base algorithm and outer step, bound to one transport and one framework's buffers. Made by all ranks at once.

    Args:
        transport: transport that connects the ranks that train together.
        framework: the framework adapter.
        settings: the method.

    Raises:
        MismatchError: on every rank, if models or settings differ between ranks.
        ConfigurationError: on every rank, if the method needs a learning rate and the base optimizer has none.

    Attributes:
        transport: as given.
        framework: as given.
        settings: as given, with "auto" replaced by what it stands for.
        subject: fingerprint of model and method, equal on all ranks.
        base: hooks of the bound base algorithm; replaced when the ranks plan again.
        base_participant: the base algorithm, if it takes part in control messages, else None.
        outer: the outer step; None if there are none.
        constants: statistics in which values that are not finite do no harm.
        recoveries: number of times that the ranks have planned again because some have died.
    """

    subject: int
    base: AlgorithmHooks
    base_participant: Participant | None

    def __init__(self, transport: Transport, framework: Framework, settings: Settings) -> None:
        self.transport = transport
        self.framework = framework
        description = framework.describe_optimizer()
        self.settings = settings.for_optimizer(description)
        self._given = settings
        self.outer: OuterStep | None = None
        self.recoveries = 0
        self.constants = Constants(transport.size)
        in_place(transport, [buffer.array for buffer in framework.buffers], self._begin)
        kept_apart = settings.base_buffers == "maintain" and settings.period is not None
        if kept_apart and description.keeps_average_of_weights and transport.rank == 0 and transport.size > 1:
            _log.warning(
                "base_buffers='maintain' does not average the moving averages of the weights (use_ema=True): each rank "
                "ends training with its own. Use base_buffers='average' (or 'auto')"
            )

    def start(self) -> None:
        """Begin the very first step: weights may have been loaded since construction, so these are x_{0,0}."""
        self.framework.load()
        self.base.outer_average.adopt_consensus()
        if self.outer is not None:
            self.outer.reset_anchor()

    def wait_in_flight(self) -> None:
        """Wait for gossip messages in flight and apply them, so that the parameters contain all that was sent."""
        self.framework.load()
        self.base.outer_average.wait_in_flight()
        self.framework.store()

    def continue_from_weights(self) -> None:
        """Let gossip continue from weights of this rank that were changed between steps."""
        self.framework.load()
        self.base.outer_average.rebase_on_model()
        self.framework.store()
        self.framework.watch.mark()

    def plan_again(self) -> None:
        """Plan the messages for buffers whose layout has changed. Collective."""
        framework, settings = self.framework, self.settings
        self.subject = fingerprint([describe(b.layout for b in framework.buffers), settings.method])
        self._use(self._bind())
        if settings.period is not None:
            self.outer = self._outer_step()

    def recover(self) -> None:
        """Plan again with the remaining ranks after some have died. Collective over the remaining ranks.

        Each rank takes its parameters for its estimate of the average, and gossip begins again from there, with the
        step after the last one that any rank has begun to exchange: ranks that are behind take the steps until there
        without exchanging messages.
        """
        begun_exchanges = self.base.recovery.begun_exchanges
        most_begun = int(self.transport.allgather(np.array([begun_exchanges], np.int64)).max())
        self.framework.load()
        base = self._bind()
        base.recovery.resume_after_failure(begun_exchanges, most_begun)
        self._use(base)
        if self.outer is not None:
            self.outer.replan()
        self.recoveries += 1

    def _begin(self) -> None:
        """Check that the ranks' models and methods are equal, adopt rank 0's model, plan the messages. Collective."""
        transport, framework, settings = self.transport, self.framework, self.settings
        self.subject = _check_equal(transport, framework, self._given, settings)
        settings.check_learning_rates(framework.learning_rates())
        framework.load()
        for buffer in framework.buffers:
            transport.broadcast(buffer.array)
        self.constants.note(framework.buffers)
        framework.store()
        moments = framework.moments() if isinstance(framework, MeasuringFramework) else ()
        framework.store_not_averaged(share_not_averaged(transport, framework.name, framework.not_averaged(), moments))
        check_fixed_state(transport, framework)
        self._use(self._bind())
        if settings.period is not None:
            self.outer = self._outer_step()

    def _use(self, base: AlgorithmHooks) -> None:
        self.base = base
        self.base_participant = base.steps if isinstance(base.steps, Participant) else None

    def _outer_step(self) -> OuterStep:
        settings, buffers = self.settings, self.framework.buffers
        return OuterStep(
            self.transport, buffers, settings.outer, settings.exact_average, settings.algorithm, self.constants
        )

    def _bind(self) -> AlgorithmHooks:
        settings, buffers = self.settings, self.framework.buffers
        gradients = self.framework.gradients if settings.base.averages_gradients else []
        base = hooks_of(settings.base.bind(self.transport, buffers, gradients))
        if settings.on_nonfinite == "skip" and settings.base.mixes_parameters:
            base.non_finite.allow_drop()
            if settings.period is None and any(part.group is None for b in buffers for part in b.layout.ranges):
                raise ConfigurationError(
                    "on_nonfinite='skip' cannot restore the statistics of the model (BatchNorm's) here, because gossip "
                    "does not carry them: give a period, so that outer steps restore them"
                )
        return base


def _check_equal(transport: Transport, framework: Framework, given: Settings, settings: Settings) -> int:
    """Check that all ranks train the same model by the same method. Collective, before anything else is sent.

    Base optimizers whose state differs are a warning on rank 0.

    Args:
        transport: transport that connects the ranks that train together.
        framework: adapter of this rank's model and base optimizer.
        given: the method as the user has given it. Ranks whose settings differ are compared by it.
        settings: the method with "auto" replaced by what it stands for, which may depend on the base optimizer: ranks
            whose optimizers differ get an error about the optimizers, not about it.

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
        places = grouped_by_rank(["host memory" if host else "the memory of a GPU" for host in by_rank[:, 1]])
        raise MismatchError(
            f"the ranks' transport sends models from where they are stored, and they are stored in different places. "
            f"{places}. Train on GPUs on every rank, or on none"
        )
    if (by_rank[:, 0] == subject).all():
        if (by_rank[:, 2] != own[2]).any():
            gathered = allgather_object(transport, [framework.name, optimizer, settings.description])
            check_same_optimizer([name for name, *_ in gathered], [described for _, described, _ in gathered])
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
        differences = grouped_by_rank([str(others) for _, others, _ in gathered])
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
