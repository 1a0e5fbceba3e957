"""The order of a training step: what happens around each step of the base optimizer."""

import copy
from collections.abc import Sequence
from typing import Any

from lentando.comm.capabilities import VirtualTime
from lentando.comm.elastic import enlist
from lentando.comm.errors import ConfigurationError
from lentando.comm.numbering import number_of
from lentando.comm.transport import Transport
from lentando.optimizers.framework import Framework
from lentando.optimizers.replica.between_steps import BetweenSteps
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.delay_agreement import DelayAgreement
from lentando.optimizers.replica.evaluation import Evaluation
from lentando.optimizers.replica.gradients import AveragedLoss, Gradients
from lentando.optimizers.replica.last_look import LastLook
from lentando.optimizers.replica.mixing import Mixing
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.rank_comparison import RankComparison
from lentando.optimizers.replica.rank_weights import RankWeights
from lentando.optimizers.replica.rollback import Rollback
from lentando.optimizers.replica.rounds import Rounds
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.stopping import Stopping
from lentando.optimizers.replica.streamed_rounds import StreamedRounds
from lentando.optimizers.replica.timing import Costs, Timing
from lentando.optimizers.replica.trained_parameters import TrainedParameters
from lentando.optimizers.replica.uneven_data import UnevenData
from lentando.optimizers.replica.weights import Weights
from lentando.optimizers.rules.movement_penalty import NormHistory
from lentando.optimizers.rules.non_finite import NonFinite
from lentando.optimizers.rules.period import needs_loss, participant_of
from lentando.optimizers.rules.settings import Settings
from lentando.optimizers.rules.streamed_step import StreamedOuterStep
from lentando.optimizers.rules.unequal_period import unequal_of

__all__ = ["Replica"]


class Replica(BetweenSteps):
    """One of the job's copies of the model.

    At construction the ranks check that they hold the same model and settings, and adopt rank 0's parameters. Then a
    framework adapter calls, for every optimizer step, ``average_gradients`` (if ``averages_gradients``),
    ``before_step``, its base optimizer, ``record_loss`` (if the loss is known), ``after_step``. An adapter that runs
    compiled graphs, which must leave the graph to call Python, may count steps in the graph and report several at once,
    with ``steps_until_due`` and ``after_steps``.

    Args:
        transport: transport that connects the ranks that train together.
        framework: the framework adapter.
        settings: the method.
        optimizers_may_differ: whether hyperparameters of the base optimizer that differ between ranks are a warning,
            not an error, because the program makes them equal later.

    Raises:
        MismatchError: on every rank, if models or settings differ between ranks.

    Attributes:
        transport: as given.
        framework: as given.
        settings: as given, with "auto" replaced by what it stands for.
        averages_gradients: whether each step must begin with ``average_gradients``.
        needs_loss: whether the loss of each step must be recorded because the period depends on it.
        setup: base algorithm and outer step.
        progress: counts of steps and rounds.
        timing: times of computing and communication.
        costs: bytes and messages sent.
        non_finite: policy for values that are not finite.
        gradients: averages gradients.
        evaluation: evaluates the average.
        stopping: the ranks' agreement to stop on a signal.
        rollback: return to an earlier step after ranks have died.
        rank_weights: weights of the ranks in outer averages.
    """

    def __init__(
        self, transport: Transport, framework: Framework, settings: Settings, *, optimizers_may_differ: bool = False
    ) -> None:
        period = copy.deepcopy(settings.make_period())  # the user may give one schedule to several optimizers
        self.needs_loss = period is not None and needs_loss(period)
        setup = self.setup = Setup(transport, framework, settings, optimizers_may_differ)
        self.transport, self.framework, self.settings = transport, framework, setup.settings
        self.averages_gradients = settings.base.averages_gradients
        self._virtual_time = transport if isinstance(transport, VirtualTime) else None
        unequal = unequal_of(period)
        if unequal is not None:
            unequal.bind(transport.rank, transport.size)
        progress = self.progress = Progress(
            transport.clock, period, unequal is not None, norms=NormHistory(transport.size)
        )
        timing = self.timing = Timing(transport, shares_latest=unequal is not None)
        costs = self.costs = Costs(transport, progress, timing)
        non_finite = self.non_finite = NonFinite(transport, settings.on_nonfinite)
        channel = self._channel = Channel(setup, progress)
        stopping = self.stopping = Stopping(transport, progress, channel, timing)
        uneven = self._uneven = UnevenData(setup, progress, channel, timing)
        weights = self._weights = Weights(setup, channel, non_finite)
        rank_weights = self.rank_weights = RankWeights(setup, progress)
        channel.add(timing)  # the first: it measures the whole message
        channel.add(stopping, uneven, waiting=True)
        comparison = RankComparison(transport, setup.settings.rates_may_differ, progress)
        channel.add(comparison, waiting=transport.size == 1)
        if rank_weights.is_needed:
            channel.add(rank_weights)
        if settings.delay == "auto":
            channel.add(DelayAgreement(setup, progress))
        participant = None if period is None else participant_of(period)
        if participant is not None:
            channel.add(participant)
        last_look = LastLook(transport, progress, non_finite, framework.buffers)
        trained = self._trained = TrainedParameters(setup, progress, channel, timing, last_look)
        self.gradients = Gradients(setup, progress, channel, costs, non_finite, uneven, weights)
        self._mixing = Mixing(setup, progress, channel, costs, non_finite, uneven)
        rounds = StreamedRounds if isinstance(setup.outer, StreamedOuterStep) else Rounds
        self._rounds = rounds(setup, progress, channel, costs, non_finite, uneven, weights, trained, rank_weights)
        self.evaluation = Evaluation(setup, channel, timing, non_finite)
        self.rollback = Rollback(setup, progress, channel, weights, self.evaluation)
        enlist(transport, self)
        self._rounds.begin()
        last_look.begin(transport, self)

    def record_loss(self, loss: Any, count: int = 1) -> None:
        """Add the training loss of a step. Call after the base optimizer has stepped, and before ``after_step``.

        The loss of a step that failed before must not be added: the next step would then have two.

        Args:
            loss: a float, or a framework's scalar, which is not waited for. With a ``count``, a sum of losses.
            count: number of steps that it is the sum of.
        """
        progress = self.progress
        progress.loss_sum = progress.loss_sum + loss
        progress.loss_count += count

    def average_gradients(
        self, loss: float | None = None, has_overflowed: bool = False, *, is_scaled: bool = False, defer: bool = False
    ) -> AveragedLoss:
        """Average the framework's gradient buffers over all ranks, in place. Collective.

        Args:
            loss: training loss of this step, to be averaged as well.
            has_overflowed: whether these gradients have overflowed, so that no rank will use the average.
            is_scaled: whether the base optimizer scales the loss, and looks for overflow in the average itself.
            defer: whether to defer a ``NonFiniteError`` until ``gradients.settle_deferred``, and average all the same.

        Returns:
            The mean loss, and the ranks whose gradients have overflowed.

        Raises:
            MismatchError: on every rank, if the ranks are not at the same step.
            NonFiniteError: on every rank, if gradients or losses are not finite.
        """
        self.before_step()
        return self.gradients.average(loss, has_overflowed, is_scaled, defer)

    def before_step(self, has_stepped: bool = False) -> None:
        """Begin a step, unless it has begun. Call right before the base optimizer steps.

        Args:
            has_stepped: whether the base optimizer has stepped already.
        """
        progress = self.progress
        if progress.is_in_step:
            return
        if self.evaluation.is_open:
            self.evaluation.refuse("a step")
        self._check_weights(has_stepped)
        progress.is_in_step = True
        if not progress.has_started:
            progress.start_clock()
        if self._virtual_time is not None:
            self._virtual_time.compute()
        if not progress.has_started:
            self._start()

    def after_step(self, rates: Sequence[float] | None = None) -> None:
        """End a step, and take the outer step if it is due. Call right after the base optimizer has stepped.

        Saves and exits at the end if the ranks have agreed to stop on a signal.

        Args:
            rates: learning rates of the step, one per parameter group; by default the present ones.

        Raises:
            MismatchError: on every rank, if the ranks are not at the same outer step.
            NonFiniteError: on every rank, if the average is not finite.
            ConfigurationError: if the period depends on the loss, and this step's was not recorded.
            SystemExit: if the ranks have agreed to stop.
        """
        self.after_steps(1, self.framework.learning_rates() if rates is None else rates)
        if self.stopping.handle is not None:
            self.stopping.stop_if_agreed()

    def after_steps(self, count: int, rate_sums: Sequence[float]) -> None:
        """End one or several steps that the base optimizer has taken, and take the outer step if it is due.

        Args:
            count: number of steps since the last call, ``steps_until_due()`` at most.
            rate_sums: sums of their learning rates, one per parameter group.

        Raises:
            MismatchError, NonFiniteError, ConfigurationError: as ``after_step``.
        """
        setup, progress, settings = self.setup, self.progress, self.settings
        due = self.steps_until_due()
        if count < 1 or (due is not None and count > due):
            raise ConfigurationError(f"{count} steps were reported at once, expected at least 1 and at most {due}")
        if self.needs_loss and progress.loss_count != progress.steps + count:
            raise ConfigurationError(
                f"inner step {progress.inner_steps + 1} on rank {number_of(self.transport)} came without its training "
                f"loss, on which {settings.period!r} depends: give the loss with every step (loss=)"
            )
        self.before_step(has_stepped=True)
        try:
            if self._virtual_time is not None:
                for _ in range(count - 1):
                    self._virtual_time.compute()
            if settings.base.mixes_parameters:
                self._mixing.mix()
            progress.is_in_step = False
            self._count(count, rate_sums)
            if not self.timing.is_started:
                self.timing.start(progress.inner_steps)
            if progress.steps == progress.due:
                self._rounds.end()
            elif settings.base.mixes_parameters and not setup.has_common_rounds:
                self._trained.follow()
        finally:
            self.framework.watch.mark()
        if self.stopping.handle is not None:
            self.stopping.check_if_due()

    def steps_until_due(self) -> int | None:
        """Return after how many steps ``after_step`` or ``after_steps`` must be called at the latest.

        None if nothing has to be done after any step.
        """
        if self.settings.base.mixes_parameters:
            return 1
        progress = self.progress
        due = None if progress.due is None else progress.due - progress.steps
        check = None if self.stopping.handle is None else self.stopping.steps_until_check()
        return check if due is None else due if check is None else min(due, check)

    def _count(self, steps: int, rate_sums: Sequence[float]) -> None:
        """Count steps that were taken, with the sums of their learning rates, one per parameter group."""
        progress = self.progress
        if len(rate_sums) != len(progress.rate_sums):
            rate_sums = progress.for_earlier_groups(steps, rate_sums)
        progress.inner_steps += steps
        progress.steps += steps
        progress.latest_rates = tuple(rate_sums) if steps == 1 else [total / steps for total in rate_sums]
        sums = progress.rate_sums
        for group, rate in enumerate(rate_sums):
            sums[group] += rate

    def _start(self) -> None:
        """Begin the very first step."""
        self.progress.has_started = True
        self._trained.follow()
        self._trained.warn_of_left_out()
        self.setup.start()
        self.framework.watch.look()
        self.framework.watch.reset()
        self._channel.expect_start()

    def _check_weights(self, has_stepped: bool = False) -> None:
        """Check whether the program has set weights. Those before the first step are what training begins from.

        Args:
            has_stepped: whether the base optimizer has stepped, so that there is nothing to compare the weights with.
        """
        if not self.progress.has_started or self.progress.is_in_step:
            return
        if not has_stepped:
            self.framework.watch.look()
        if self.settings.base.mixes_parameters:
            self._weights.continue_gossip_if_set()
