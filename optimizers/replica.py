"""The replica: counts inner steps and runs base algorithm, period and outer step in order, for every framework."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from math import nan, sqrt
from typing import Any, TypeVar
from zlib import crc32

import numpy as np

from lentando.comm.array_module import copy_into, to_host
from lentando.comm.collectives import plan_reduction
from lentando.comm.control import Agreement, Control, Event, agree, fingerprint
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.elastic import enlist, in_place, is_elastic, transaction, without_vote
from lentando.comm.errors import ConfigurationError, MismatchError, NonFiniteError
from lentando.comm.stall import watched
from lentando.comm.transport import Array, Transport, VirtualTime, as_bytes
from lentando.optimizers.base_algorithms import InnerSteps
from lentando.optimizers.base_buffers import average
from lentando.optimizers.framework import Framework
from lentando.optimizers.join import Share, StepAlong
from lentando.optimizers.non_finite import NonFinite, Verdict, first_non_finite, told_loss
from lentando.optimizers.outer_step import OuterStep
from lentando.optimizers.period import Decision, RoundSummary, needs_loss
from lentando.optimizers.rest_of_model import take_over
from lentando.optimizers.same_model import check_equal
from lentando.optimizers.settings import Settings
from lentando.optimizers.stopping import SaveOnSignal
from lentando.optimizers.timing import Kind, Timing

__all__ = ["Replica"]

_log = logging.getLogger("lentando")

T = TypeVar("T")

_WAITS: dict[Kind, str] = {
    "gradients": "the average of gradients of inner step",
    "gossip": "the gossip of inner step",
    "outer": "the outer step after inner step",
}

STATE_VERSION = 2
JOINED = fingerprint("inside a join block")
"""Makes the subject of a message another one, so that ranks inside the block and outside it do not mistake theirs."""


@dataclass(frozen=True)
class _Average:
    """What an outer step adopts.

    Attributes:
        loss: of the round, the mean over ranks.
        rate: learning rate of the round, the mean over ranks and parameter groups.
        clock: rank 0's.
        rates: learning rates that it steps with, by parameter group.
        buffers: of the base optimizer, averaged, if they are to be.
        was_finite: whether this rank's part in it was.
    """

    loss: float
    rate: float
    clock: float
    rates: Sequence[float]
    buffers: Mapping[str, Array] | None
    was_finite: bool


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
        inner_steps: optimizer steps taken; on uneven data, by the rank that took most of them in each round.
        rounds: outer steps taken.
        joined: whether the ranks may have unequal numbers of batches; see ``join``.
    """

    def __init__(self, transport: Transport, framework: Framework, settings: Settings) -> None:
        self._transport = transport
        self._framework = framework
        self._settings = settings
        self.averages_gradients = settings.base.averages_gradients
        self.inner_steps = 0
        self.rounds = 0
        self._bytes, self._messages = 0, 0
        self._timing = Timing(transport)
        self._non_finite = NonFinite(transport, settings.on_nonfinite)
        self._deferred_error: NonFiniteError | None = None
        self._period = copy.deepcopy(settings.make_period())  # the user may give one schedule to several optimizers
        self.needs_loss = self._period is not None and needs_loss(self._period)
        self._decisions: list[Decision] = []
        self._stop: SaveOnSignal | None = None
        self._subject: int
        self._base: InnerSteps
        self._outer: OuterStep | None = None
        in_place(transport, [buffer.array for buffer in framework.buffers], self._begin_together)
        enlist(transport, self)
        if self._outer and not settings.exact_average and not settings.base.communicates and transport.size > 1:
            _log.warning("%r without exact average: the %d replicas train apart", settings.base, transport.size)
        self._virtual_time = transport if isinstance(transport, VirtualTime) else None
        self._in_step = False
        self.joined = False
        self._ended = False
        self._started = False
        self._clock_origin = transport.clock()
        self._start_checksum = 0
        self._is_exposed = False
        self._recoveries = 0
        self._gradient_copies: list[Array] = []  # in an elastic job
        self._steps_in_round: int | None
        self._loss_sum: Any = 0.0
        self._loss_count = 0
        self._begin_round()

    @property
    def period(self) -> int | None:
        """Inner steps of the current round, None if there are no outer steps."""
        return self._steps_in_round

    def record_loss(self, loss: Any, count: int = 1) -> None:
        """Add the training loss of a step: a float, or a framework's scalar, which is not waited for.

        With a ``count``, the sum of the losses of so many steps.
        """
        self._loss_sum = self._loss_sum + loss
        self._loss_count += count

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
        step = self.inner_steps + 1
        found = None if flag or is_scaled else first_non_finite(self._framework.gradients)
        told = nan if flag or is_scaled else told_loss(loss)

        def attempt() -> tuple[Agreement, Verdict | None]:
            agreement = self._agree(Event.GRADIENTS, "averages the gradients of", told, flag, found=found)
            self._base.settle(agreement.early)
            verdict = self._deferred_error = None
            try:
                verdict = self._judge_gradients(agreement, step, found)
            except NonFiniteError as error:
                if not defer:
                    raise
                self._deferred_error = error
            if not self._is_everybodys(agreement):
                self._rates_of_active()
            self._base.average_gradients(self._share_of_gradients(agreement, verdict))
            return agreement, verdict

        with self._communication("gradients", step):
            gradients = [buffer.array for buffer in self._framework.gradients]
            try:
                agreement, verdict = in_place(self._transport, gradients, attempt, self._gradient_copies)
            except NonFiniteError:
                self._in_step = False  # it is not taken, so that a checkpoint may be loaded here
                raise
        self._start_checksum = 0  # has been compared
        return agreement if verdict is None else replace(agreement, loss=verdict.loss)

    def settle_deferred(self, expected: bool) -> None:
        """Raise the error that ``average_gradients`` was asked to keep, if there is one, or forget an expected one.

        Raises:
            NonFiniteError: on every rank. The step is not taken.
        """
        error, self._deferred_error = self._deferred_error, None
        if error is not None and not expected:
            self._in_step = False
            raise error

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
        self.after_steps(1, self._framework.learning_rates())

    def steps_until_due(self) -> int | None:
        """How many steps from now the replica must be told of at the latest, by ``after_step`` or ``after_steps``.

        None if it never has anything to do after a step.
        """
        if self._settings.base.mixes_parameters:
            return 1
        due = [] if self._steps_in_round is None else [self._steps_in_round - self._steps]
        if (every := self._steps_between_looks()) is not None:
            due.append(every - self.inner_steps % every)
        return min(due, default=None)

    def after_steps(self, count: int, rate_sums: Sequence[float]) -> None:
        """As ``after_step``, for several steps of the base optimizer at once.

        Args:
            count: steps taken since the replica was last told, ``steps_until_due()`` at most.
            rate_sums: learning rates that they were taken with, added up, per parameter group.

        Raises:
            MismatchError, NonFiniteError: as ``after_step``.
        """
        due = self.steps_until_due()
        if count < 1 or (due is not None and count > due):
            raise ConfigurationError(f"told of {count} steps at once, expected at least 1 and at most {due}")
        if self.needs_loss and self._loss_count != self._steps + count:
            raise ConfigurationError(
                f"inner step {self.inner_steps + 1} on rank {self._transport.rank} came without its training loss, by "
                f"which {self._settings.period!r} decides: give the loss with every step (loss=)"
            )
        self._begin_step()
        if self._virtual_time is not None:
            for _ in range(count - 1):
                self._virtual_time.compute()
        if self._settings.base.mixes_parameters:
            with self._communication("gossip", self.inner_steps + 1):
                if self.joined and not self.averages_gradients:
                    agreement = self._agree(Event.STEP, "gossips about")
                    if not self._is_everybodys(agreement):
                        self._rates_of_active()
                self._gossip()
        self._in_step = False
        self._count(count, rate_sums)
        if not self._timing.is_started:
            self._timing.start(self.inner_steps)
        if self._steps == self._steps_in_round:
            self._outer_step()
        every = self._steps_between_looks()
        if every is not None and self.inner_steps % every == 0:
            self._timing.pause()
            looks = "looks whether a rank was told to stop training"
            transaction(self._transport, lambda: self._agree(Event.STOP, looks))
            self._timing.resume()

    def expect_stop(self, stop: SaveOnSignal) -> None:
        """Ask in every control message from now on whether a rank was told to stop. Collective."""
        transaction(self._transport, lambda: self._agree(Event.STOP, "prepares to save on signals"))
        self._stop = stop

    def expect_no_stop(self) -> None:
        """No longer ask: all ranks call it at the same step."""
        self._stop = None

    def stop_if_agreed(self, automatic: bool = True) -> None:
        """Between steps: do what the ranks have agreed to when one was told to stop.

        Args:
            automatic: nobody has asked to do so here.
        """
        if self._stop is not None and (self._stop.automatic or not automatic):
            self._stop.check()

    @contextmanager
    def join(self, step_along: StepAlong) -> Iterator[None]:
        """Let ranks have unequal numbers of batches inside the block; see ``lentando.optimizers.join.join``.

        Args:
            step_along: called where the base algorithm averages gradients, when these have been averaged.
        """
        if is_elastic(self._transport):
            raise ConfigurationError(
                "join is not possible in an elastic job (init(elastic=True)) yet: give all ranks equally many batches"
            )
        if self.joined:
            raise ConfigurationError("join blocks of one optimizer cannot be nested: leave one before the next")
        if not self._settings.exact_average and not self._settings.base.communicates:
            raise ConfigurationError(
                f"{self._settings.base!r} with exact_average=False sends nothing, so that no rank waits for another: "
                "leave join out"
            )
        self.joined = True
        try:
            yield
            self._ended = True
            self._timing.pause()
            if not self._started:
                self._clock_origin = self._transport.clock()
                self._start()
            self._take_part(step_along)
            self._timing.resume()
        finally:
            self.joined = self._ended = False
        self.stop_if_agreed(automatic=False)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the exact average of all replicas inside the block, each replica's own parameters again after it.

        Collective: every rank enters.
        """
        self._timing.pause()
        buffers = self._framework.buffers
        own: list[Array] = []

        def attempt() -> None:
            self._agree(Event.EVALUATE, "evaluates the average of")
            self.drain()
            own.extend(buffer.array.copy() for buffer in buffers)
            self._base.expose()
            for buffer in buffers:
                plan_reduction(self._transport, buffer.array, self._settings.algorithm).all_reduce(mean=True)

        def put_back() -> None:
            for buffer, array in zip(buffers, own, strict=bool(own)):
                copy_into(buffer.array, array)
            own.clear()

        self._together(attempt, put_back)
        self._framework.store()
        recoveries = self._recoveries
        try:
            yield
        finally:
            put_back()
            if self._recoveries != recoveries:  # which took the average for this replica's parameters
                self._base.follow()
            self._framework.store()
            self._timing.resume()

    def drain(self) -> None:
        """Bring home what gossip has under way, so that the parameters stand for all that has been sent."""
        self._framework.load()
        self._base.drain()
        self._framework.store()

    def consensus_distance(self) -> float:
        """How far the replicas are apart: the root mean square over ranks of their parameters' distance from the mean.

        Collective: every rank calls it.
        """
        self._timing.pause()
        distance = self._together(self._measure_distance)
        self._timing.resume()
        return distance

    def report(self) -> dict[str, Any]:
        """Plain numbers about this rank so far.

        ``period`` (inner steps of the current round, or None), ``rounds``, ``inner_steps``, ``size``, ``model_bytes``,
        and by gradients, gossip and outer steps, not by evaluation: ``bytes_sent``, ``messages`` (point-to-point and
        collective) and ``communication_seconds`` (waiting for other ranks included). ``left_out``: how often this
        rank's values were left out of an average because they were not finite. ``decisions`` of a period that
        adapts: dicts with the keys of ``lentando.optimizers.period.Decision``, oldest first. Beside them what
        ``lentando.optimizers.timing.Timing.report`` tells of computing, delays, stragglers and the time saved.
        """
        return {
            "period": self.period,
            "rounds": self.rounds,
            "inner_steps": self.inner_steps,
            "size": self._transport.size,
            "model_bytes": sum(buffer.array.nbytes for buffer in self._framework.buffers),
            "bytes_sent": self._bytes,
            "messages": self._messages,
            "communication_seconds": self._timing.communication_seconds,
            "decisions": [dict(vars(decision)) for decision in self._decisions],
            "left_out": self._non_finite.left_out,
            **self._timing.report(self._settings.base, self.period),
        }

    @property
    def parts(self) -> tuple[Transport, Framework, Settings]:
        """What it was made of."""
        return self._transport, self._framework, self._settings

    @property
    def base(self) -> InnerSteps:
        """The base algorithm at work."""
        return self._base

    def meet(self, event: Event) -> None:
        """Collective: every rank is about to save, or to load, at the same step.

        Raises:
            MismatchError: on every rank, if the ranks are about to do different things.
            ConfigurationError: in the middle of a step.
        """
        doing = "saves" if event is Event.SAVE else "loads"
        if self._in_step:
            raise ConfigurationError(f"this rank {doing} a checkpoint in the middle of a step: do so between steps")
        self._agree(event, f"{doing} a checkpoint of")

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next step beside parameters and base optimizer: numbers, strings, lists, dicts, arrays.

        Every rank has its own: anchors and slow momenta are sharded.
        """
        return {
            "version": STATE_VERSION,
            "subject": self._subject,
            "rank": self._transport.rank,
            "size": self._transport.size,
            "started": self._started,
            "clock": self._clock(),
            "decisions": [list(astuple(decision)) for decision in self._decisions],
            "inner_steps": self.inner_steps,
            "rounds": self.rounds,
            "steps": self._steps,
            "steps_in_round": self._steps_in_round,
            "rate_sums": list(self._rate_sums),
            "loss_sum": float(self._loss_sum),
            "loss_count": self._loss_count,
            "base": self._base_state(),
            "period": None if self._period is None else self._period.state_dict(),
            "outer": None if self._outer is None else self._outer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken. Parameters and base optimizer are restored by the framework.

        Raises:
            ConfigurationError: if the state is of another version, model, method, world size or rank.
        """
        mine = {
            "version": (STATE_VERSION, "the format of the state"),
            "size": (self._transport.size, "the world size (to change it, use lt.save and lt.load)"),
            "rank": (self._transport.rank, "the rank (each rank must load the state that it saved itself)"),
            "subject": (self._subject, "the fingerprint of model and settings"),
        }
        for key, (wanted, what) in mine.items():
            if state[key] != wanted:
                raise ConfigurationError(f"cannot resume: {what} is {wanted} here, but {state[key]} in the saved state")
        self._started = state["started"]
        self._start_checksum = 0
        self._clock_origin = self._transport.clock() - state["clock"]
        self._decisions = [Decision(*decision) for decision in state["decisions"]]
        self.inner_steps, self.rounds = state["inner_steps"], state["rounds"]
        self._steps, self._steps_in_round = state["steps"], state["steps_in_round"]
        self._rate_sums = list(state["rate_sums"])
        self._loss_sum, self._loss_count = state["loss_sum"], state["loss_count"]
        self._base.load_state_dict(state["base"])
        if self._period is not None:
            self._period.load_state_dict(state["period"])
        if self._outer is not None:
            self._outer.load_state_dict(state["outer"])

    def recover(self) -> None:
        """Ranks have died: plan anew what was planned with them. Collective over those that live.

        Each takes what it has for its estimate of the average, and gossip begins anew from there, with the step after
        the last that any rank has begun to exchange: those that are behind take the steps until there by themselves.
        """
        begun = self._base.begun
        furthest = int(self._transport.allgather(np.array([begun], np.int64)).max())
        self._framework.load()
        base = self._bind()
        base.go_on(begun, furthest)
        self._base = base
        if self._outer is not None:
            self._outer.replan()
        self._timing.forget_ranks()
        self._recoveries += 1

    def place(self) -> str:
        """Where it is, in words."""
        return f"after inner step {self.inner_steps} and {self.rounds} rounds"

    def _begin_together(self) -> None:
        """Check that all ranks have the same, take over rank 0's model, plan what is sent from now on. Collective."""
        transport, framework, settings = self._transport, self._framework, self._settings
        self._subject = check_equal(transport, framework, settings)
        framework.load()
        for buffer in framework.buffers:
            transport.broadcast(buffer.array)
        framework.store()
        framework.store_not_averaged(take_over(transport, framework.name, framework.not_averaged()))
        self._base = self._bind()
        if self._period is not None:
            self._outer = OuterStep(
                transport, framework.buffers, settings.outer, settings.exact_average, settings.algorithm
            )

    def _bind(self) -> InnerSteps:
        settings, buffers = self._settings, self._framework.buffers
        base = settings.base.bind(
            self._transport, buffers, self._framework.gradients if self.averages_gradients else []
        )
        if self._non_finite.skips and settings.base.mixes_parameters:
            base.expect_losses()
            if settings.period is None and any(part.group is None for b in buffers for part in b.layout.ranges):
                raise ConfigurationError(
                    "on_nonfinite='skip' cannot restore the statistics of the model (BatchNorm's) here, for gossip "
                    "does not carry them: give a period, so that outer steps do"
                )
        return base

    def _together(self, attempt: Callable[[], T], undo: Callable[[], object] | None = None) -> T:
        """Do something with all ranks; see ``lentando.comm.elastic.transaction``."""
        result = transaction(self._transport, attempt, undo)
        self._start_checksum = 0  # has been compared
        return result

    def _measure_distance(self) -> float:
        self._agree(Event.EVALUATE, "measures the consensus distance of")
        self._framework.load()
        squared = 0.0
        for buffer in self._framework.buffers:
            own = buffer.parameters.astype(accumulator_dtype(buffer.array.dtype))
            mean = own.copy()
            plan_reduction(self._transport, mean, self._settings.algorithm).all_reduce(mean=True)
            squared += float(np.square(own - mean, dtype=np.float64).sum())
        return sqrt(float(self._transport.allgather(np.array([squared])).mean()))

    def _base_state(self) -> dict[str, Any]:
        """The base algorithm's, which may wait for messages."""
        state: dict[str, Any] = {}
        while not without_vote(self._transport, lambda: state.update(self._base.state_dict())):
            pass
        return state

    def _begin_step(self) -> None:
        """The gradients of a step are there."""
        if self._in_step:
            return
        self._in_step = True
        if not self._started:
            self._clock_origin = self._transport.clock()
        if self._virtual_time is not None:
            self._virtual_time.compute()
        if not self._started:
            self._start()

    def _start(self) -> None:
        """Before the very first step: weights may have been loaded since construction, so these are x_{0,0}."""
        self._started = True
        self._framework.load()
        self._base.restart()
        if self._outer is not None:
            self._outer.restart()
        # Statistics have already moved in the forward pass; parameters must be equal, which the first message checks.
        for buffer in self._framework.buffers:
            for part in buffer.layout.ranges:
                if part.group is not None:
                    elements = to_host(buffer.array[part.start : part.stop])
                    self._start_checksum = crc32(as_bytes(elements).data, self._start_checksum)

    def _steps_between_looks(self) -> int | None:
        """How often a message asks nothing but whether to stop. Inside ``join``, ranks are at unequal steps."""
        return None if self._stop is None or self.joined else self._stop.every

    def _gossip(self) -> None:
        self._framework.load()
        found = first_non_finite(self._framework.buffers, statistics=False) if self._non_finite.skips else None
        if found is not None:
            self._non_finite.lose(found)
            self._base.lose()
        if without_vote(self._transport, self._base.after_step):
            self._framework.store()
        if found is not None:
            self._framework.reset_optimizer()

    def _count(self, steps: int, rate_sums: Sequence[float]) -> None:
        self.inner_steps += steps
        self._steps += steps
        sums = self._rate_sums
        for group, rate in enumerate(rate_sums):
            sums[group] += rate

    def _take_part(self, step_along: StepAlong) -> None:
        """This rank has run out of batches: do what the others need of it, until all have."""
        base = self._settings.base
        if base.averages_gradients or base.mixes_parameters:
            while self._step_with_others(step_along):
                if self._steps == self._steps_in_round:
                    self._outer_step()
                self.stop_if_agreed(automatic=False)
            if self._outer is not None and self._settings.exact_average and self._steps:
                self._outer_step()
            self.drain()
        else:
            while self._outer_step():
                self.stop_if_agreed(automatic=False)

    def _step_with_others(self, step_along: StepAlong) -> bool:
        """Take part in a step of the others. Tells whether there was one."""
        if self.averages_gradients:
            with self._communication("gradients", self.inner_steps):
                agreement = self._agree(Event.GRADIENTS, "averages the gradients of")
                if not agreement.weight:
                    return False
                verdict = self._judge_gradients(agreement, self.inner_steps + 1)
                rates = self._rates_of_active()
                self._framework.load()  # on a device, what follows is then in order with the framework
                self._base.average_gradients(self._share_of_gradients(agreement, verdict))
            if not step_along(rates, bool(agreement.flagged)):
                return True
        if self._settings.base.mixes_parameters:
            with self._communication("gossip", self.inner_steps):
                if not self.averages_gradients:
                    agreement = self._agree(Event.STEP, "gossips about")
                    if not agreement.weight:
                        return False
                    rates = self._rates_of_active()
                self._gossip()
        self._count(1, rates)
        self._steps_along += 1
        self._timing.skip(1)
        return True

    def _is_everybodys(self, agreement: Agreement) -> bool:
        return agreement.weight == self._transport.size

    def _share(self, agreement: Agreement, is_active: bool | None = None) -> Share:
        """This rank's share in an average over some of the ranks."""
        is_active = not self._ended if is_active is None else is_active
        gossips = self._settings.base.mixes_parameters
        return Share(is_active, round(agreement.weight), self._transport.size, gossips)

    def _judge_gradients(self, agreement: Agreement, step: int, found: str | None = None) -> Verdict | None:
        """What is left out of an average of gradients. Those that have overflowed are their scaler's affair."""
        if agreement.flagged:
            return None
        lasting = None
        if found is not None and self._non_finite.skips and self._outer is None:
            self._framework.load()
            lasting = first_non_finite(self._framework.buffers)
        words = f"the gradient of {found!r}" if lasting is None else repr(lasting)
        return self._non_finite.judge(
            agreement,
            f"average of gradients of inner step {step}",
            None if found is None else words,
            is_active=not self._ended,
            is_lasting=lasting is not None,
        )

    def _share_of_gradients(self, agreement: Agreement, verdict: Verdict | None) -> Share | None:
        if verdict is not None and verdict.share is not None:
            return verdict.share
        return None if self._is_everybodys(agreement) else self._share(agreement)

    def _rates_of_active(self) -> list[float]:
        """The learning rates of this step on the first rank that takes it. Collective."""
        own = [float(not self._ended), *self._framework.learning_rates()]
        by_rank = self._transport.allgather(np.array(own, np.float64))
        rates: list[float] = by_rank[int(by_rank[:, 0].argmax()), 1:].tolist()
        return rates

    def _settle_uneven_round(self, rates: Sequence[float]) -> list[float]:
        """Count the round's steps as the rank did that took most, by whose learning rates all step outward. Collective.

        A rank with more steps has seen more of a learning rate that changes; where one took them all, gamma is what it
        would be on even data.
        """
        own = [self._steps - self._steps_along, self._steps, *rates]
        by_rank = self._transport.allgather(np.array(own, np.float64))
        missed = int(by_rank[:, 1].max()) - self._steps
        self.inner_steps += missed
        self._timing.skip(missed)
        leading: list[float] = by_rank[int(by_rank[:, 0].argmax()), 2:].tolist()
        return leading

    def _begin_round(self) -> None:
        self._steps = 0
        self._steps_along = 0
        self._steps_in_round = None if self._period is None else self._period.steps()
        self._rate_sums = [0.0] * len(self._framework.learning_rates())

    def _outer_step(self) -> bool:
        """Take it; unless this is inside ``join``, and no rank has taken a step in this round. Tells whether it did."""
        assert self._outer is not None and self._period is not None
        with self._communication("outer", self.inner_steps):
            if self._settings.exact_average or self._settings.base_buffers == "average":
                average = self._together(self._form_average, self._retract)
            else:
                average = self._form_average()
            if average is None:
                return False
            self._adopt(average)
        self._loss_sum, self._loss_count = 0.0, 0
        self.rounds += 1
        decision = self._period.update(
            RoundSummary(self.rounds, self.inner_steps, average.loss, average.rate, average.clock)
        )
        if decision is not None:
            self._record(decision)
        self._begin_round()
        _log.debug("outer step %d after inner step %d, loss %g", self.rounds, self.inner_steps, average.loss)
        return True

    def _form_average(self) -> "_Average | None":
        """All of an outer step that can fail. Changes nothing that ``_retract`` does not put back.

        None if this is inside ``join``, and no rank has taken a step in this round.
        """
        assert self._outer is not None
        rates = [total / max(self._steps, 1) for total in self._rate_sums]
        rate, loss, clock = sum(rates) / len(rates), self._mean_loss(), self._clock()
        share: Share | None = None
        self._framework.load()
        found = first_non_finite(self._framework.buffers) if self._non_finite.skips else None
        if self._settings.exact_average:
            is_active = self._steps > self._steps_along
            agreement = self._agree(
                Event.ROUND,
                f"begins outer step {self.rounds + 1} of",
                loss,
                flag=self._ended,
                learning_rate=rate,
                is_active=is_active,
                found=found,
            )
            loss, rate, clock = agreement.loss, agreement.learning_rate, agreement.clock
            if agreement.flagged:
                if not agreement.weight:
                    return None
                rates = self._settle_uneven_round(rates)
                rate = sum(rates) / len(rates)
            if not self._is_everybodys(agreement):
                share = self._share(agreement, is_active)
            verdict = self._non_finite.judge(
                agreement,
                f"outer step {self.rounds + 1}",
                None if found is None else repr(found),
                is_active=is_active,
                gossips=self._settings.base.mixes_parameters,
                look=lambda: first_non_finite(self._framework.buffers),
            )
            if verdict is not None:
                loss, share = verdict.loss, verdict.share or share
        buffers: Mapping[str, Array] | None = None
        try:
            if self._settings.exact_average:
                self._is_exposed = True
                self._base.drain() if share is not None and share.of_estimates else self._base.expose()
            self._outer.average(share)
            if self._settings.base_buffers == "average":
                own = self._framework.optimizer_buffers()
                buffers = average(self._transport, own, self._settings.algorithm, share)
        except (NonFiniteError, MismatchError):
            self._retract()
            raise
        return _Average(loss, rate, clock, rates, buffers, was_finite=found is None)

    def _retract(self) -> None:
        """The average is not adopted."""
        assert self._outer is not None
        self._outer.retract()
        if self._is_exposed:
            self._is_exposed = False
            self._base.retract()
        self._framework.store()

    def _adopt(self, average: "_Average") -> None:
        """Step outward through the average."""
        assert self._outer is not None
        self._is_exposed = False
        self._outer.step(average.rates)
        if self._settings.exact_average:
            self._base.restart()
        else:
            self._base.follow()
        self._framework.store()
        if average.buffers is not None:
            self._framework.store_optimizer_buffers(average.buffers)
        elif self._settings.base_buffers == "reset" or not average.was_finite:
            self._framework.reset_optimizer()

    def _record(self, decision: Decision) -> None:
        self._decisions.append(decision)
        if self._transport.rank == 0:
            _log.info(
                "period %d after %d, from inner step %d on (%.1f s): training loss %g, learning rate %g",
                decision.period,
                self._steps,
                decision.step,
                decision.clock,
                decision.loss,
                decision.learning_rate,
            )

    def _clock(self) -> float:
        """Seconds since the first step; goes on where it was when a run is resumed."""
        return self._transport.clock() - self._clock_origin

    def _agree(
        self,
        event: Event,
        doing: str,
        loss: float = nan,
        flag: bool = False,
        learning_rate: float = 0.0,
        is_active: bool | None = None,
        found: str | None = None,
    ) -> Agreement:
        """Send a control message.

        Args:
            event: see ``Control``, like every argument that is not listed here.
            doing: that in words.
            loss: see there.
            flag: see there.
            learning_rate: see there.
            is_active: whether this rank counts; by default, unless it has no batch left.
            found: its values that are not finite.
        """
        about, checksum = self._subject ^ self._start_checksum, self._start_checksum
        if not is_elastic(self._transport):  # where the message may be repeated, with ranks that have not sent it yet
            self._start_checksum = 0
        step = self.inner_steps
        if self.joined:
            about ^= JOINED
            if event is Event.ROUND:
                step -= self._steps  # where the round began: ranks may have taken unequally many steps in it
        started = self._transport.clock()
        control = Control(
            event,
            self.rounds,
            step,
            about,
            loss,
            weight=float(not self._ended if is_active is None else is_active),
            learning_rate=learning_rate,
            flag=flag,
            clock=self._clock(),
            finite=self._non_finite.is_clean(found),
            stopping=self._stop is not None and self._stop.told,
            early=self._base.early,
            **self._timing.shares(),
        )

        def words() -> str:
            since = f"started from parameters with checksum {checksum:08x}" if checksum else f"{self.rounds} rounds"
            where = " inside join" if self.joined else ""
            where = " with the others, having run out of its own batches," if self._ended else where
            return f"{doing} its model{where}, after {self.inner_steps} steps and {since}"

        agreement = agree(self._transport, control, words)
        if self._stop is not None:
            self._stop.agree(agreement.stopping)
        self._timing.heard(agreement, self._transport.clock() - started)
        return agreement

    def _mean_loss(self) -> float:
        """Of the round so far."""
        return told_loss(float(self._loss_sum) / self._loss_count if self._loss_count else None)

    @contextmanager
    def _communication(self, kind: Kind, step: int) -> Iterator[None]:
        """Counts what the block costs; see ``Timing.begin``."""
        before = self._transport.traffic.copy()
        if not self._ended:
            self._timing.begin(kind, step)
        try:
            with watched(self._transport, f"{_WAITS[kind]} {step}"):
                yield
        finally:
            after = self._transport.traffic
            if not self._ended:
                self._timing.end()
            self._bytes += after.bytes_sent - before.bytes_sent
            self._messages += after.messages + after.collectives - before.messages - before.collectives
