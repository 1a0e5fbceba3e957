"""What a replica is set up with: base algorithm and outer step, bound to the transport and the model's buffers.

Planned again when parameters join or leave, and when ranks have died.
"""

import logging

import numpy as np

from lentando.comm.agreement import Participant, fingerprint
from lentando.comm.elastic import in_place, is_elastic
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import describe
from lentando.comm.transport import Transport
from lentando.optimizers.fixed_state import check_fixed_state
from lentando.optimizers.framework import Framework, MeasuringFramework, OverlappingFramework
from lentando.optimizers.replica.equal_start import check_equal, share_not_averaged
from lentando.optimizers.rules.algorithm_hooks import AlgorithmHooks, hooks_of
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.base_algorithm import OuterAverageHooks
from lentando.optimizers.rules.constant_statistics import Constants
from lentando.optimizers.rules.outer_step import OuterStep
from lentando.optimizers.rules.outer_stepping import OuterAlgorithm, OuterOptions, OuterStepping
from lentando.optimizers.rules.period import needs_loss, participant_of
from lentando.optimizers.rules.settings import Settings
from lentando.optimizers.rules.streamed_step import StreamedOuterStep
from lentando.optimizers.rules.unequal_period import unequal_of

__all__ = ["Setup"]

_log = logging.getLogger("lentando")


class Setup:
    """Base algorithm and outer step, bound to one transport and one framework's buffers. Made by all ranks at once.

    Args:
        transport: transport that connects the ranks that train together.
        framework: the framework adapter.
        settings: the method.
        optimizers_may_differ: whether hyperparameters that differ between ranks are a warning, not an error.

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
        is_averaged_as_it_is: whether exact averages are of the buffers as they are: the base algorithm has nothing to
            do before and after them.
        outer: the outer step; None if there are none.
        has_common_rounds: whether all ranks end their rounds together, because outer steps communicate.
        constants: statistics in which values that are not finite do no harm.
        recoveries: number of times that the ranks have planned again because some have died.
    """

    subject: int
    base: AlgorithmHooks
    base_participant: Participant | None
    is_averaged_as_it_is: bool

    def __init__(
        self, transport: Transport, framework: Framework, settings: Settings, optimizers_may_differ: bool = False
    ) -> None:
        self.transport = transport
        self.framework = framework
        description = framework.describe_optimizer()
        self.settings = settings.for_optimizer(description)
        self._given = settings
        self._optimizers_may_differ = optimizers_may_differ
        self.outer: OuterStepping | None = None
        self.has_common_rounds = False
        self.recoveries = 0
        self.constants = Constants(transport.size)
        in_place(transport, [buffer.array for buffer in framework.buffers], self._begin)
        kept_apart = settings.base_buffers == "maintain" and settings.period is not None
        if kept_apart and description.keeps_average_of_weights and transport.rank == 0 and transport.size > 1:
            _log.warning(
                "base_buffers='maintain' does not average the moving averages of the weights (use_ema=True): each rank "
                "ends training with its own. Use base_buffers='average' (or 'auto')"
            )
        trains_apart = self.outer is not None and not self.has_common_rounds and not settings.base.communicates
        if trains_apart and transport.size > 1:
            _log.warning("%r without exact average: the %d replicas train apart", settings.base, transport.size)

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

    def adopt_in_flight(self) -> None:
        """Adopt outer steps in flight now, and not when they are due. Every rank does so.

        Weights that the program has set remain as they are.
        """
        if isinstance(self.outer, StreamedOuterStep):
            self.framework.load()
            self.outer.adopt_all(keeps_own=self.framework.watch.found)
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
        if (buckets := self.base.overlap.buckets) is not None:
            buckets.complete()  # backward passes may have begun some of them, and not the same on all ranks
        self._use(self._bind())
        self._use_outer(self._bind_outer())

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
        self.subject = check_equal(transport, framework, self._given, settings, self._optimizers_may_differ)
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
        self._use_outer(self._bind_outer())

    def _use(self, base: AlgorithmHooks) -> None:
        self.base = base
        self.base_participant = base.steps if isinstance(base.steps, Participant) else None
        self.is_averaged_as_it_is = not isinstance(base.steps, OuterAverageHooks)

    def _use_outer(self, outer: OuterStepping | None) -> None:
        self.outer = outer
        self.has_common_rounds = outer is not None and outer.communicates

    def _bind_outer(self) -> OuterStepping | None:
        """Choose what takes the outer steps: an algorithm of its own, or the exact average with an outer rule."""
        transport, settings, buffers = self.transport, self.settings, self.framework.buffers
        period = settings.make_period()
        if period is None:
            return None
        options = OuterOptions(settings.exact_average, settings.algorithm, self.constants)
        if settings.streaming.is_needed:
            assert not isinstance(settings.outer, OuterAlgorithm)
            return StreamedOuterStep(
                transport,
                buffers,
                settings.outer,
                settings.streaming,
                settings.algorithm,
                self.constants,
                settings.wire_dtype,
            )
        if unequal_of(period) is not None and is_elastic(transport):
            raise ConfigurationError(
                f"{settings.period!r} is not possible in an elastic job (init(elastic=True)), because its numbers of "
                "steps belong to the ranks that began: give a number of steps as period"
            )
        if not isinstance(settings.outer, OuterAlgorithm):
            if settings.averages_movements and is_elastic(transport):
                raise ConfigurationError(
                    "wire_dtype, weighting and movement_penalty of outer steps are not possible in an elastic job "
                    "(init(elastic=True)), in which rounding errors would be lost with a rank: leave them out"
                )
            return OuterStep(
                transport,
                buffers,
                settings.outer,
                options.exact_average,
                options.algorithm,
                options.constants,
                settings.wire_dtype,
                settings.averages_movements,
            )
        outer = settings.outer.bind(transport, buffers, options)
        needs_messages = needs_loss(period) or participant_of(period) is not None
        refused = {
            "on_nonfinite='skip'": settings.on_nonfinite == "skip" and not outer.supports_skip,
            "an elastic job (init(elastic=True))": is_elastic(transport) and not outer.supports_elastic,
            "a period that depends on what other ranks report": needs_messages and not outer.communicates,
        }
        if impossible := [what for what, is_refused in refused.items() if is_refused]:
            raise ConfigurationError(f"{settings.outer!r} is not possible with {impossible[0]}: use another outer step")
        return outer

    def _bind(self) -> AlgorithmHooks:
        settings, buffers = self.settings, self.framework.buffers
        gradients = self.framework.gradients if settings.base.averages_gradients else []
        if isinstance(settings.base, AllReduce):
            fills_buckets = isinstance(self.framework, OverlappingFramework) and self.framework.fills_buckets
            base = hooks_of(settings.base.bind(self.transport, buffers, gradients, fills_buckets))
        else:
            base = hooks_of(settings.base.bind(self.transport, buffers, gradients))
        if settings.on_nonfinite == "skip" and settings.base.mixes_parameters:
            base.non_finite.allow_drop()
            if settings.period is None and any(part.group is None for b in buffers for part in b.layout.ranges):
                raise ConfigurationError(
                    "on_nonfinite='skip' cannot restore the statistics of the model (BatchNorm's) here, because gossip "
                    "does not carry them: give a period, so that outer steps restore them"
                )
        return base
