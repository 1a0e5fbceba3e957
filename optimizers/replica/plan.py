"""What the ranks have planned together: at the start, and anew with those that live when some have died."""

import logging

import numpy as np

from lentando.comm.control import fingerprint
from lentando.comm.elastic import in_place
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import describe
from lentando.comm.transport import Transport
from lentando.optimizers.fixed_state import check_fixed_state
from lentando.optimizers.framework import Framework, MeasuringFramework
from lentando.optimizers.replica.rest_of_model import take_over
from lentando.optimizers.replica.same_model import check_equal
from lentando.optimizers.rules.algorithm_hooks import AlgorithmHooks, hooks_of
from lentando.optimizers.rules.constant_statistics import Constants
from lentando.optimizers.rules.outer_step import OuterStep
from lentando.optimizers.rules.settings import Settings

__all__ = ["Plan"]

_log = logging.getLogger("lentando")


class Plan:
    """Base algorithm and outer step at work, over one transport, on one framework's buffers. Made by all ranks at once.

    Args:
        transport: ranks that train together.
        framework: the adapter.
        settings: the method.

    Raises:
        MismatchError: on every rank, if models or settings differ between ranks.
        ConfigurationError: on every rank, if the method needs a learning rate, and the base optimizer has none.

    Attributes:
        transport: as given, like the next two.
        framework: as given.
        settings: as given, with what "auto" stands for.
        subject: fingerprint of model and method, the same on all ranks.
        base: the base algorithm at work; another one after a recovery.
        outer: the outer step, None if there are none.
        constants: statistics that are not finite without harm.
        recoveries: how often all was planned anew.
    """

    subject: int
    base: AlgorithmHooks

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
                "base_buffers='maintain' leaves the moving averages of the weights (use_ema=True) apart: each rank "
                "ends training with its own. Use base_buffers='average' (or 'auto')"
            )

    def start(self) -> None:
        """Before the very first step: weights may have been loaded since construction, so these are x_{0,0}."""
        self.framework.load()
        self.base.outer_average.adopt_consensus()
        if self.outer is not None:
            self.outer.reset_anchor()

    def wait_in_flight(self) -> None:
        """Bring home what gossip has under way, so that the parameters stand for all that has been sent."""
        self.framework.load()
        self.base.outer_average.wait_in_flight()
        self.framework.store()

    def continue_from_weights(self) -> None:
        """The weights of this rank were changed between steps: gossip continues from what they are now."""
        self.framework.load()
        self.base.outer_average.rebase_on_model()
        self.framework.store()
        self.framework.watch.mark()

    def plan_again(self) -> None:
        """Plan what is sent from now on for the buffers that there are now, whose layout was changed. Collective."""
        framework, settings = self.framework, self.settings
        self.subject = fingerprint([describe(b.layout for b in framework.buffers), settings.method])
        self.base = self._bind()
        if settings.period is not None:
            self.outer = self._outer_step()

    def recover(self) -> None:
        """Ranks have died: plan anew what was planned with them. Collective over those that live.

        Each takes what it has for its estimate of the average, and gossip begins anew from there, with the step after
        the last that any rank has begun to exchange: those that are behind take the steps until there by themselves.
        """
        begun_exchanges = self.base.recovery.begun_exchanges
        most_begun = int(self.transport.allgather(np.array([begun_exchanges], np.int64)).max())
        self.framework.load()
        base = self._bind()
        base.recovery.resume_after_failure(begun_exchanges, most_begun)
        self.base = base
        if self.outer is not None:
            self.outer.replan()
        self.recoveries += 1

    def _begin(self) -> None:
        """Check that all ranks have the same, take over rank 0's model, plan what is sent from now on. Collective."""
        transport, framework, settings = self.transport, self.framework, self.settings
        self.subject = check_equal(transport, framework, self._given, settings)
        settings.check_learning_rates(framework.learning_rates())
        framework.load()
        for buffer in framework.buffers:
            transport.broadcast(buffer.array)
        self.constants.note(framework.buffers)
        framework.store()
        moments = framework.moments() if isinstance(framework, MeasuringFramework) else ()
        framework.store_not_averaged(take_over(transport, framework.name, framework.not_averaged(), moments))
        check_fixed_state(transport, framework)
        self.base = self._bind()
        if settings.period is not None:
            self.outer = self._outer_step()

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
                    "on_nonfinite='skip' cannot restore the statistics of the model (BatchNorm's) here, for gossip "
                    "does not carry them: give a period, so that outer steps do"
                )
        return base
