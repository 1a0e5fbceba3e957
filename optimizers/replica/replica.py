"""The order of a training step: what happens around each step of the base optimizer, and between two steps."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeAlias, get_args

from lentando.comm.agreement import Event
from lentando.comm.capabilities import VirtualTime
from lentando.comm.elastic import enlist
from lentando.comm.errors import ConfigurationError
from lentando.comm.numbering import number_of
from lentando.comm.transport import Transport
from lentando.optimizers.framework import ChangingFramework, Framework
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.evaluation import Evaluation
from lentando.optimizers.replica.gradients import AveragedLoss, Gradients, Mixing
from lentando.optimizers.replica.last_look import LastLook
from lentando.optimizers.replica.rank_comparison import RankComparison
from lentando.optimizers.replica.rollback import Rollback
from lentando.optimizers.replica.rounds import Rounds
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.state import Progress, load_state, state_of
from lentando.optimizers.replica.stopping import Stopping
from lentando.optimizers.replica.timing import Costs, Timing
from lentando.optimizers.replica.trained_parameters import TrainedParameters
from lentando.optimizers.replica.uneven_data import StepAlong, UnevenData
from lentando.optimizers.replica.weights import Weights
from lentando.optimizers.rules.algorithm_hooks import AlgorithmHooks
from lentando.optimizers.rules.non_finite import NonFinite
from lentando.optimizers.rules.period import Period, needs_loss, participant_of
from lentando.optimizers.rules.settings import Settings

__all__ = ["BaseState", "Replica"]

_log = logging.getLogger("lentando")

BaseState: TypeAlias = Literal["keep", "reset"]


class Replica:
    """One of the job's copies of the model.

    At construction the ranks check that they hold the same model and settings, and adopt rank 0's parameters. Then a
    framework adapter calls, for every optimizer step, ``average_gradients`` (if ``averages_gradients``),
    ``before_step``, its base optimizer, ``after_step``. An adapter that runs compiled graphs, which must leave the
    graph to call Python, may count steps in the graph and report several at once, with ``steps_until_due`` and
    ``after_steps``.

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
    """

    def __init__(
        self, transport: Transport, framework: Framework, settings: Settings, *, optimizers_may_differ: bool = False
    ) -> None:
        period = copy.deepcopy(settings.make_period())  # the user may give one schedule to several optimizers
        self.needs_loss = period is not None and needs_loss(period)
        setup = self.setup = Setup(transport, framework, settings, optimizers_may_differ)
        self.transport, self.framework, self.settings = transport, framework, setup.settings
        self.averages_gradients = settings.base.averages_gradients
        trains_apart = setup.outer is not None and not setup.has_common_rounds and not settings.base.communicates
        if trains_apart and transport.size > 1:
            _log.warning("%r without exact average: the %d replicas train apart", settings.base, transport.size)
        self._virtual_time = transport if isinstance(transport, VirtualTime) else None
        progress = self.progress = Progress(transport.clock, period)
        timing = self.timing = Timing(transport)
        costs = self.costs = Costs(transport, progress, timing)
        non_finite = self.non_finite = NonFinite(transport, settings.on_nonfinite)
        channel = self._channel = Channel(setup, progress)
        comparison = RankComparison(transport, setup.settings.rates_may_differ, progress)
        stopping = self.stopping = Stopping(transport, progress, channel, timing)
        uneven = self._uneven = UnevenData(setup, progress, timing)
        weights = self._weights = Weights(setup, channel, non_finite)
        channel.add(timing, comparison, stopping, uneven, weights)  # timing first: it measures the whole message
        participant = None if period is None else participant_of(period)
        if participant is not None:
            channel.add(participant)
        last_look = LastLook(transport, progress, non_finite, framework.buffers)
        trained = self._trained = TrainedParameters(setup, progress, channel, timing, last_look)
        self.gradients = Gradients(setup, progress, channel, costs, non_finite, uneven, weights)
        self._mixing = Mixing(setup, progress, channel, costs, non_finite, uneven)
        self._rounds = Rounds(setup, progress, channel, costs, non_finite, uneven, weights, trained)
        self.evaluation = Evaluation(setup, channel, timing, non_finite)
        self.rollback = Rollback(setup, progress, channel, weights, self.evaluation)
        enlist(transport, self)
        self._rounds.begin()
        last_look.begin(transport, self)

    @property
    def inner_steps(self) -> int:
        """Optimizer steps taken; on uneven data, by the rank that took most of them in each round."""
        return self.progress.inner_steps

    @property
    def rounds(self) -> int:
        """Number of outer steps taken."""
        return self.progress.rounds

    @property
    def period(self) -> int | None:
        """Inner steps of the current round, None if there are no outer steps."""
        return self.progress.steps_in_round

    @property
    def schedule(self) -> Period | None:
        """The schedule of this replica's outer steps, None if there are none."""
        return self.progress.period

    @property
    def joined(self) -> bool:
        """Whether the ranks may have unequal numbers of batches; see ``join``."""
        return self.progress.is_joined

    @property
    def base(self) -> AlgorithmHooks:
        """The hooks of the base algorithm; replaced after ranks have died, or when other parameters are trained."""
        return self.setup.base

    # --- around a step of the base optimizer --------------------------------------------------------------------------

    def record_loss(self, loss: Any, count: int = 1) -> None:
        """Add the training loss of a step.

        Args:
            loss: a float, or a framework's scalar, which is not waited for. With a ``count``, a sum of losses.
            count: number of steps that it is the sum of.
        """
        progress = self.progress
        if self.evaluation.is_open:
            self.evaluation.refuse("a step")
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
            progress.count(count, rate_sums)
            if not self.timing.is_started:
                self.timing.start(progress.inner_steps)
            if progress.is_round_over():
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
        due = None if progress.steps_in_round is None else progress.steps_in_round - progress.steps
        check = None if self.stopping.handle is None else self.stopping.steps_until_check()
        return check if due is None else due if check is None else min(due, check)

    @contextmanager
    def join(self, step_along: StepAlong) -> Iterator[None]:
        """Let ranks have unequal numbers of batches inside the block; see ``lentando.optimizers.join``.

        Args:
            step_along: takes a step with averaged gradients; called only if the base algorithm averages gradients.
        """
        progress, timing, uneven = self.progress, self.timing, self._uneven
        self.evaluation.refuse("join")
        uneven.check_joinable()
        progress.is_joined = True
        try:
            yield
            progress.has_ended = True
            timing.pause()
            if not progress.has_started:
                progress.start_clock()
                self._start()
            self._check_weights()
            uneven.take_part(self.gradients, self._mixing, self._rounds, self.stopping, step_along)
            timing.resume()
            self.framework.watch.mark()
        finally:
            progress.is_joined = progress.has_ended = False
        self.stopping.stop_if_agreed(automatic=False)

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

    # --- between two steps --------------------------------------------------------------------------------------------

    def follow_changes(self) -> None:
        """Train what the model and the optimizer now ask to be trained. Collective if that has changed.

        Called before gradients are averaged. Otherwise it happens at the next outer step, or whenever else all ranks
        communicate between steps.

        Raises:
            MismatchError: on every rank, if the changes differ between ranks.
            ConfigurationError: if nothing is left to be trained, inside ``averaged()``, or in an elastic job.
        """
        if self.evaluation.is_open and self._trained.pending() is not None:
            raise ConfigurationError(
                "parameters cannot be frozen, unfrozen, added or removed inside averaged(): do so after the block"
            )
        self._trained.follow()

    def averaged(self) -> AbstractContextManager[None]:
        """Hold the exact average of all replicas inside the block, and restore each replica's own parameters after it.

        Collective: every rank enters. Inside, the optimizer neither steps nor saves or loads.

        Raises:
            NonFiniteError: on every rank, if parameters are not finite on one of them (with ``on_nonfinite="skip"``,
                if they are finite on none).
        """
        self.evaluation.refuse("averaged()")
        self._check_weights()
        self._notice_resized_buffers()
        self.follow_changes()
        self._trained.warn_of_left_out()
        return self.evaluation.averaged()

    def consensus_distance(self) -> float:
        """Return the root mean square over ranks of the distance between a replica's parameters and the mean.

        Collective: every rank calls it.
        """
        self.evaluation.refuse("consensus_distance()")
        self.follow_changes()
        return self.evaluation.consensus_distance()

    def restart(self, base_state: BaseState = "keep") -> None:
        """Begin a new round from the present weights: their average over the ranks becomes weights and anchor.

        Collective: every rank calls it, between steps. Weights that are equal on all ranks stay exactly as they are.
        The outer momentum begins at zero, gossip at weight 1 with nothing in flight. The next outer step follows a
        whole period later; the counts of steps and rounds, and the period's schedule, continue.

        Args:
            base_state: "keep" to keep the state of the base optimizer, "reset" to reset it to that of a new one.

        Raises:
            ConfigurationError: for another ``base_state``, in the middle of a step, inside ``join`` or ``averaged()``.
            NonFiniteError: as ``averaged``.
            MismatchError: on every rank, if the ranks are not about to do the same.
        """
        progress = self.progress
        if base_state not in get_args(BaseState):
            legal = " or ".join(map(repr, get_args(BaseState)))
            raise ConfigurationError(f"base_state must be {legal}, got {base_state!r}")
        self.evaluation.refuse("restart()")
        if progress.is_in_step or progress.is_joined:
            where = "in the middle of a step" if progress.is_in_step else "inside join"
            raise ConfigurationError(f"restart() is not possible {where}: call it between steps, outside join")
        self._check_weights()
        self.follow_changes()
        self.timing.pause()
        self._weights.restart()
        if base_state == "reset":
            self.framework.reset_optimizer()
        progress.forget_losses()
        self._rounds.begin()
        self.timing.resume()

    @contextmanager
    def weights_changed_by(self, action: str) -> Iterator[None]:
        """Let the block change the weights of this rank between steps, and continue from them.

        Args:
            action: what changes them, for the error message.

        Raises:
            ConfigurationError: inside ``averaged()``, whose end restores the previous weights.
        """
        if self.evaluation.is_open:
            raise ConfigurationError(
                f"{action} is not possible inside averaged(): it changes the weights, and the end of the block "
                "restores the previous ones. Call it before the block, and the average is one of the changed weights"
            )
        self._check_weights()
        yield
        self.setup.continue_from_weights()

    def meet(self, event: Event) -> None:
        """Agree with all ranks that a checkpoint is about to be saved, or loaded, at the same step. Collective.

        Args:
            event: ``Event.SAVE`` or ``Event.LOAD``.

        Raises:
            MismatchError: on every rank, if the ranks are about to do different things.
            ConfigurationError: in the middle of a step.
        """
        action = "saves" if event is Event.SAVE else "loads"
        self.evaluation.refuse(f"to {event.name.lower()} a checkpoint")
        if self.progress.is_in_step:
            raise ConfigurationError(f"this rank {action} a checkpoint in the middle of a step: do so between steps")
        self._notice_resized_buffers()
        self.follow_changes()
        self._channel.agree(event, f"{action} a checkpoint of")

    def state_dict(self) -> dict[str, Any]:
        """Return all that decides the next step besides parameters and base optimizer, as plain values and arrays.

        Every rank has its own: anchors and slow momenta are sharded.
        """
        self._check_weights()
        if (change := self._trained.pending()) is not None:
            raise ConfigurationError(
                f"this state could not be loaded again: the model is about to change, with {change}, which the ranks "
                "do together when they next communicate. Save after the next outer step, or use lt.save"
            )
        return state_of(self.setup, self.progress)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken. Parameters and base optimizer are restored by the framework.

        Raises:
            ConfigurationError: if the state is of another version, model, method, world size or rank, and inside
                ``averaged()``.
        """
        self.evaluation.refuse("to load a state dict")
        load_state(state, self.setup, self.progress)
        self._channel.forget_start()

    def recover(self) -> None:
        """Plan again with the remaining ranks after some have died. Collective over the remaining ranks."""
        self.setup.recover()
        self.timing.forget_ranks()

    def position(self) -> str:
        """Return how far this replica is, for messages."""
        return f"after inner step {self.inner_steps} and {self.rounds} rounds"

    def _notice_resized_buffers(self) -> None:
        """Notice buffers that were resized since the ranks last communicated, for ``follow_changes`` to handle."""
        if isinstance(self.framework, ChangingFramework):
            self.framework.load()
