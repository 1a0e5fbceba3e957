"""The order of things around a step: what a replica does itself, and when it asks which of its parts."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeAlias, get_args

from lentando.comm.capabilities import VirtualTime
from lentando.comm.control import Agreement, Event
from lentando.comm.elastic import enlist
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Transport
from lentando.optimizers.framework import ChangingFramework, Framework
from lentando.optimizers.replica.costs import Costs
from lentando.optimizers.replica.evaluation import Evaluation
from lentando.optimizers.replica.gradients import Gradients
from lentando.optimizers.replica.last_look import LastLook
from lentando.optimizers.replica.messages import Messages
from lentando.optimizers.replica.mixing import Mixing
from lentando.optimizers.replica.plan import Plan
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.resume import check_state, load_state, state_of
from lentando.optimizers.replica.rounds import Rounds
from lentando.optimizers.replica.stopping import SaveOnSignal
from lentando.optimizers.replica.taking_part import TakingPart
from lentando.optimizers.replica.timing import Timing
from lentando.optimizers.replica.trained_parameters import TrainedParameters
from lentando.optimizers.replica.uneven import Uneven
from lentando.optimizers.replica.weights import Weights
from lentando.optimizers.rules.algorithm_hooks import AlgorithmHooks
from lentando.optimizers.rules.non_finite import NonFinite
from lentando.optimizers.rules.partial_average import StepAlong
from lentando.optimizers.rules.period import needs_loss
from lentando.optimizers.rules.settings import Settings

__all__ = ["BaseState", "Replica"]

_log = logging.getLogger("lentando")

BaseState: TypeAlias = Literal["keep", "reset"]


class Replica:
    """One of the job's copies of the model.

    At construction the ranks check that they hold the same model and settings, and take over rank 0's parameters. Then
    a framework adapter calls, for every optimizer step, ``average_gradients`` (if ``averages_gradients``),
    ``before_step``, its base optimizer, ``after_step``. One that runs compiled graphs, which leave Python to be called
    back, may count steps in the graph and report several at once: ``steps_until_due``, ``after_steps``.

    Args:
        transport: ranks that train together.
        framework: the adapter.
        settings: the method.

    Raises:
        MismatchError: on every rank, if models or settings differ between ranks.

    Attributes:
        averages_gradients: whether each step must begin with ``average_gradients``.
        needs_loss: whether the loss of each step must be recorded, since the period goes by it.
    """

    def __init__(self, transport: Transport, framework: Framework, settings: Settings) -> None:
        self.averages_gradients = settings.base.averages_gradients
        period = copy.deepcopy(settings.make_period())  # the user may give one schedule to several optimizers
        self.needs_loss = period is not None and needs_loss(period)
        plan = self._plan = Plan(transport, framework, settings)
        if plan.outer and not settings.exact_average and not settings.base.communicates and transport.size > 1:
            _log.warning("%r without exact average: the %d replicas train apart", settings.base, transport.size)
        self._virtual_time = transport if isinstance(transport, VirtualTime) else None
        progress = self._progress = Progress(transport.clock)
        timing = self._timing = Timing(transport)
        non_finite = self._non_finite = NonFinite(transport, settings.on_nonfinite)
        messages = self._messages = Messages(plan, progress, timing, non_finite)
        costs = self._costs = Costs(transport, progress, timing)
        shared = (plan, progress, messages, costs, non_finite, Uneven(plan, progress, timing))
        weights = self._weights = Weights(plan, messages, non_finite)
        self._gradients = Gradients(*shared, weights)
        self._mixing = Mixing(*shared)
        last_look = LastLook(transport, progress, non_finite, framework.buffers)
        self._trained = TrainedParameters(plan, progress, messages, timing, last_look)
        self._rounds = Rounds(*shared, self._trained, weights, period)
        self._taking_part = TakingPart(plan, progress, timing, messages, self._gradients, self._mixing, self._rounds)
        self._evaluation = Evaluation(plan, messages, timing, non_finite)
        self._rounds.begin()
        enlist(transport, self)
        last_look.begin(transport, self)

    @property
    def inner_steps(self) -> int:
        """Optimizer steps taken; on uneven data, by the rank that took most of them in each round."""
        return self._progress.inner_steps

    @property
    def rounds(self) -> int:
        """Outer steps taken."""
        return self._progress.rounds

    @property
    def period(self) -> int | None:
        """Inner steps of the current round, None if there are no outer steps."""
        return self._progress.steps_in_round

    @property
    def joined(self) -> bool:
        """Whether the ranks may have unequal numbers of batches; see ``join``."""
        return self._progress.is_joined

    @property
    def parts(self) -> tuple[Transport, Framework, Settings]:
        """What it was made of."""
        return self._plan.transport, self._plan.framework, self._plan.settings

    @property
    def base(self) -> AlgorithmHooks:
        """The hooks of the base algorithm at work."""
        return self._plan.base

    def record_loss(self, loss: Any, count: int = 1) -> None:
        """Add the training loss of a step: a float, or a framework's scalar, which is not waited for.

        With a ``count``, the sum of the losses of so many steps.
        """
        self._check_not_averaged("a step")
        self._progress.loss_sum = self._progress.loss_sum + loss
        self._progress.loss_count += count

    def average_gradients(
        self, loss: float | None = None, flag: bool = False, *, is_scaled: bool = False, defer: bool = False
    ) -> Agreement:
        """Average the framework's gradient buffers over all ranks, in place.

        Args:
            loss: the training loss that these gradients belong to, to be averaged with them.
            flag: these gradients have overflowed, and no rank will use them.
            is_scaled: the base optimizer looks for overflow in the average itself, by which it scales the loss.
            defer: do not yet raise ``NonFiniteError``, but keep it for ``settle_deferred``, and average all the same.

        Returns:
            The ranks' mean loss, and the ranks that raised the flag.

        Raises:
            MismatchError: on every rank, if the ranks are not at the same step.
            NonFiniteError: on every rank, if gradients or losses are not finite.
        """
        self._begin_step()
        return self._gradients.average(loss, flag, is_scaled, defer)

    def settle_deferred(self, expected: bool) -> bool:
        """Raise the error that ``average_gradients`` was asked to keep, if there is one, or forget an expected one.

        Returns:
            Whether there was an expected one, on every rank: the averaged gradients are not finite.

        Raises:
            NonFiniteError: on every rank. The step is not taken.
        """
        return self._gradients.settle_deferred(expected)

    def before_step(self) -> None:
        """Call right before the base optimizer steps."""
        self._begin_step()

    def after_step(self) -> None:
        """Call right after the base optimizer has stepped. Takes the outer step when it is due.

        Raises:
            MismatchError: on every rank, if the ranks are not at the same outer step.
            NonFiniteError: on every rank, if the average is not finite.
            ConfigurationError: if the period goes by the loss, and this step's was not recorded.
        """
        self.after_steps(1, self._plan.framework.learning_rates())

    def steps_until_due(self) -> int | None:
        """How many steps from now the replica must be told of at the latest, by ``after_step`` or ``after_steps``.

        None if it never has anything to do after a step.
        """
        if self._plan.settings.base.mixes_parameters:
            return 1
        progress = self._progress
        due = [] if progress.steps_in_round is None else [progress.steps_in_round - progress.steps]
        if (every := self._steps_between_looks()) is not None:
            due.append(every - progress.inner_steps % every)
        return min(due, default=None)

    def after_steps(self, count: int, rate_sums: Sequence[float]) -> None:
        """As ``after_step``, for several steps of the base optimizer at once.

        Args:
            count: steps taken since the replica was last told, ``steps_until_due()`` at most.
            rate_sums: learning rates that they were taken with, added up, per parameter group.

        Raises:
            MismatchError, NonFiniteError: as ``after_step``.
        """
        plan, progress, timing = self._plan, self._progress, self._timing
        due = self.steps_until_due()
        if count < 1 or (due is not None and count > due):
            raise ConfigurationError(f"told of {count} steps at once, expected at least 1 and at most {due}")
        if self.needs_loss and progress.loss_count != progress.steps + count:
            raise ConfigurationError(
                f"inner step {progress.inner_steps + 1} on rank {plan.transport.rank} came without its training loss, "
                f"by which {plan.settings.period!r} decides: give the loss with every step (loss=)"
            )
        self._begin_step(has_stepped=True)
        try:
            if self._virtual_time is not None:
                for _ in range(count - 1):
                    self._virtual_time.compute()
            if plan.settings.base.mixes_parameters:
                self._mixing.mix()
            progress.is_in_step = False
            progress.count(count, rate_sums)
            if not timing.is_started:
                timing.start(progress.inner_steps)
            if progress.is_round_over():
                self._rounds.end()
            elif plan.settings.base.mixes_parameters and (plan.outer is None or not plan.settings.exact_average):
                self._trained.follow()
        finally:
            plan.framework.watch.mark()
        every = self._steps_between_looks()
        if every is not None and progress.inner_steps % every == 0:
            timing.pause()
            self._messages.look_for_stop("looks whether a rank was told to stop training")
            timing.resume()

    def expect_stop(self, stop: SaveOnSignal) -> None:
        """Ask in every control message from now on whether a rank was told to stop. Collective."""
        self._messages.look_for_stop("prepares to save on signals")
        self._messages.stop = stop

    def expect_no_stop(self) -> None:
        """No longer ask: all ranks call it at the same step."""
        self._messages.stop = None

    def stop_if_agreed(self, automatic: bool = True) -> None:
        """Between steps: do what the ranks have agreed to when one was told to stop.

        Args:
            automatic: nobody has asked to do so here.
        """
        self._messages.stop_if_agreed(automatic)

    @contextmanager
    def join(self, step_along: StepAlong) -> Iterator[None]:
        """Let ranks have unequal numbers of batches inside the block; see ``rules.partial_average.join``.

        Args:
            step_along: called where the base algorithm averages gradients, when these have been averaged.
        """
        progress, timing = self._progress, self._timing
        self._check_not_averaged("join")
        self._taking_part.check_joinable()
        progress.is_joined = True
        try:
            yield
            progress.has_ended = True
            timing.pause()
            if not progress.has_started:
                progress.start_clock()
                self._start()
            self._look()
            self._taking_part.until_all_have_ended(step_along)
            timing.resume()
            self._plan.framework.watch.mark()
        finally:
            progress.is_joined = progress.has_ended = False
        self.stop_if_agreed(automatic=False)

    def _look_at_buffers(self) -> None:
        """Notice buffers that were resized since the ranks last communicated, for ``follow_changes`` to follow."""
        framework = self._plan.framework
        if isinstance(framework, ChangingFramework):
            framework.load()

    def follow_changes(self) -> None:
        """Train what the model and the optimizer now ask to be trained. Collective if that has changed.

        Called before gradients are averaged; otherwise it happens by itself at the next outer step, or whenever else
        all ranks communicate between steps.

        Raises:
            MismatchError: on every rank, if it has not changed alike on all ranks.
            ConfigurationError: if nothing is left to be trained, inside ``averaged()``, or in an elastic job.
        """
        if self._evaluation.is_open and self._trained.pending() is not None:
            raise ConfigurationError(
                "parameters cannot be frozen, unfrozen, added or removed inside averaged(): do so after the block"
            )
        self._trained.follow()

    def averaged(self) -> AbstractContextManager[None]:
        """Hold the exact average of all replicas inside the block, each replica's own parameters again after it.

        Collective: every rank enters. Inside, the optimizer neither steps nor saves or loads.

        Raises:
            NonFiniteError: on every rank, if parameters are not finite on one of them (with ``on_nonfinite="skip"``,
                if they are on none).
        """
        self._check_not_averaged("averaged()")
        self._look()
        self._look_at_buffers()
        self.follow_changes()
        self._trained.warn_of_left_out()
        return self._evaluation.averaged()

    def consensus_distance(self) -> float:
        """How far the replicas are apart: the root mean square over ranks of their parameters' distance from the mean.

        Collective: every rank calls it.
        """
        self._check_not_averaged("consensus_distance()")
        self.follow_changes()
        return self._evaluation.consensus_distance()

    def check_finite(self, what: str) -> None:
        """Training has ended, at least for now: see whether this rank's parameters are finite, which it may not learn.

        Args:
            what: has ended.

        Raises:
            NonFiniteError: on this rank alone, if they are not, unless such a rank is to be restored.
        """
        if not self._evaluation.is_open:
            self._evaluation.check_finite(what)

    def restart(self, base_state: BaseState = "keep") -> None:
        """Begin a new round from the present weights: their average over the ranks becomes weights and anchor.

        Collective: every rank calls it, between steps. Weights that are equal on all ranks stay exactly as they are.
        The outer momentum begins at zero, gossip at weight 1 with nothing in flight. The next outer step follows a
        whole period later; the counts of steps and rounds, and the period's schedule, continue.

        Args:
            base_state: of the base optimizer: "keep" it, or "reset" it to that of a new one.

        Raises:
            ConfigurationError: for another ``base_state``, in the middle of a step, inside ``join`` or ``averaged()``.
            NonFiniteError: as ``averaged``.
            MismatchError: on every rank, if the ranks are not about to do the same.
        """
        progress = self._progress
        if base_state not in get_args(BaseState):
            legal = " or ".join(map(repr, get_args(BaseState)))
            raise ConfigurationError(f"base_state must be {legal}, got {base_state!r}")
        self._check_not_averaged("restart()")
        if progress.is_in_step or progress.is_joined:
            where = "in the middle of a step" if progress.is_in_step else "inside join"
            raise ConfigurationError(f"restart() is not possible {where}: call it between steps, outside join")
        self._look()
        self.follow_changes()
        self._timing.pause()
        self._weights.restart()
        if base_state == "reset":
            self._plan.framework.reset_optimizer()
        progress.forget_losses()
        self._rounds.begin()
        self._timing.resume()

    @contextmanager
    def weights_changed_by(self, what: str) -> Iterator[None]:
        """Let the block change the weights of this rank between steps, and continue from them.

        Args:
            what: changes them; for the error message.

        Raises:
            ConfigurationError: inside ``averaged()``, whose end restores the weights of before.
        """
        if self._evaluation.is_open:
            raise ConfigurationError(
                f"{what} is not possible inside averaged(): it changes the weights, and the end of the block restores "
                "those of before. Call it before the block, and the average is one of the changed weights"
            )
        self._look()
        yield
        self._plan.continue_from_weights()

    def wait_in_flight(self) -> None:
        """Bring home what gossip has under way, so that the parameters stand for all that has been sent."""
        self._plan.wait_in_flight()

    def report(self) -> dict[str, Any]:
        """Plain numbers about this rank so far.

        ``period`` (inner steps of the current round, or None), ``rounds``, ``inner_steps``, ``size``, ``model_bytes``,
        and by gradients, gossip and outer steps, not by evaluation: ``bytes_sent``, ``messages`` (point-to-point and
        collective) and ``communication_seconds`` (waiting for other ranks included). ``left_out``: how often this
        rank's values were left out of an average because they were not finite. ``decisions`` of a period that
        adapts: dicts with the keys of ``lentando.optimizers.rules.period.Decision``, oldest first. Beside them what
        ``lentando.optimizers.replica.timing.Timing.report`` tells of computing, delays, stragglers and the time saved.
        """
        transport, framework, settings = self.parts
        return {
            "period": self.period,
            "rounds": self.rounds,
            "inner_steps": self.inner_steps,
            "size": transport.size,
            "model_bytes": sum(buffer.array.nbytes for buffer in framework.buffers),
            "bytes_sent": self._costs.bytes_sent,
            "messages": self._costs.messages,
            "communication_seconds": self._timing.communication_seconds,
            "decisions": [dict(vars(decision)) for decision in self._rounds.decisions],
            "left_out": self._non_finite.left_out,
            **self._timing.report(settings.base, self.period),
        }

    def meet(self, event: Event) -> None:
        """Collective: every rank is about to save, or to load, at the same step.

        Raises:
            MismatchError: on every rank, if the ranks are about to do different things.
            ConfigurationError: in the middle of a step.
        """
        doing = "saves" if event is Event.SAVE else "loads"
        self._check_not_averaged(f"to {event.name.lower()} a checkpoint")
        if self._progress.is_in_step:
            raise ConfigurationError(f"this rank {doing} a checkpoint in the middle of a step: do so between steps")
        self._look_at_buffers()
        self.follow_changes()
        self._messages.agree(event, f"{doing} a checkpoint of")

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next step beside parameters and base optimizer: numbers, strings, lists, dicts, arrays.

        Every rank has its own: anchors and slow momenta are sharded.
        """
        self._look()
        if (change := self._trained.pending()) is not None:
            raise ConfigurationError(
                f"this state could not be loaded again: the model is about to change, with {change}, which the ranks "
                "do together when they next communicate. Save after the next outer step, or use lt.save"
            )
        return state_of(self._plan, self._progress, self._rounds)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Check that ``load_state_dict`` can continue from a state. Changes nothing.

        Raises:
            ConfigurationError: if the state is of another version, model, method, world size or rank.
        """
        check_state(state, self._plan)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken. Parameters and base optimizer are restored by the framework.

        Raises:
            ConfigurationError: if the state is of another version, model, method, world size or rank, and inside
                ``averaged()``.
        """
        self._check_not_averaged("to load a state dict")
        load_state(state, self._plan, self._progress, self._rounds)
        self._messages.forget_start()

    def recover(self) -> None:
        """Ranks have died: plan anew what was planned with them. Collective over those that live."""
        self._plan.recover()
        self._timing.forget_ranks()

    def position(self) -> str:
        """Where it is, in words."""
        return f"after inner step {self.inner_steps} and {self.rounds} rounds"

    def _begin_step(self, has_stepped: bool = False) -> None:
        """The gradients of a step are there.

        Args:
            has_stepped: the base optimizer has used them already.
        """
        progress = self._progress
        if progress.is_in_step:
            return
        self._check_not_averaged("a step")
        self._look(has_stepped)
        progress.is_in_step = True
        if not progress.has_started:
            progress.start_clock()
        if self._virtual_time is not None:
            self._virtual_time.compute()
        if not progress.has_started:
            self._start()

    def _look(self, has_stepped: bool = False) -> None:
        """Whether the program has set weights. Those of before the first step are what training begins from."""
        if self._progress.has_started and not self._progress.is_in_step:
            self._weights.look(has_stepped)

    def _check_not_averaged(self, what: str) -> None:
        if self._evaluation.is_open:
            raise ConfigurationError(
                f"{what} is not possible inside averaged(): there the model is the average of all ranks, and the end "
                "of the block restores this rank's own weights, so that it would be lost. Leave the block first"
            )

    def _start(self) -> None:
        """The very first step."""
        self._progress.has_started = True
        self._trained.follow()
        self._trained.warn_of_left_out()
        self._plan.start()
        self._plan.framework.watch.look()
        self._plan.framework.watch.reset()
        self._messages.expect_start()

    def _steps_between_looks(self) -> int | None:
        """How often a message asks nothing but whether to stop. Inside ``join``, ranks are at unequal steps."""
        stop = self._messages.stop
        return None if stop is None or self._progress.is_joined else stop.every
