"""The outer step that ends each round: form the average, adopt it, ask the period how long the next round is."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lentando.comm.control import Event
from lentando.comm.errors import MismatchError, NonFiniteError
from lentando.comm.transport import Array
from lentando.optimizers.replica.part import Part
from lentando.optimizers.replica.trained_parameters import TrainedParameters
from lentando.optimizers.replica.weights import Weights
from lentando.optimizers.rules.base_buffers import average
from lentando.optimizers.rules.non_finite import first_non_finite
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.rules.period import Decision, Period, RoundSummary

__all__ = ["Rounds"]

_log = logging.getLogger("lentando")


@dataclass(frozen=True)
class _Average:
    """What an outer step adopts.

    Attributes:
        loss: of the round, the mean over ranks.
        rate: learning rate of the round, the mean over ranks and parameter groups.
        seconds: since the first step, by rank 0's clock.
        rates: learning rates that it steps with, by parameter group.
        buffers: of the base optimizer, averaged, if they are to be.
        was_finite: whether this rank's part in it was.
        weights_set: ranks whose weights the program has set since the last outer step.
    """

    loss: float
    rate: float
    seconds: float
    rates: Sequence[float]
    buffers: Mapping[str, Array] | None
    was_finite: bool
    weights_set: Sequence[int]


@dataclass
class Rounds(Part):
    """Rounds of local steps, and the outer steps that end them.

    Args:
        trained: parameters, which may have changed since the last outer step.
        weights: that the program may have set.
        period: how long rounds are; None for a single one without end.

    Attributes:
        decisions: of the period, oldest first.
    """

    trained: TrainedParameters
    weights: Weights
    period: Period | None
    decisions: list[Decision] = field(default_factory=list)
    _is_prepared: bool = False

    def begin(self) -> None:
        """A round begins."""
        steps = None if self.period is None else self.period.steps()
        self.progress.begin_round(steps, len(self.plan.framework.learning_rates()))

    def end(self) -> bool:
        """Take the outer step; unless this is inside ``join``, and no rank has taken a step. Tells whether it did."""
        assert self.period is not None
        settings, progress = self.plan.settings, self.progress
        self.trained.follow()
        with self.costs.of("outer", progress.inner_steps):
            if settings.exact_average or settings.base_buffers == "average":
                formed = self.messages.together(self._form, self._retract)
            else:
                formed = self._form()
            if formed is None:
                return False
            self._adopt(formed)
        progress.forget_losses()
        progress.rounds += 1
        decision = self.period.update(
            RoundSummary(progress.rounds, progress.inner_steps, formed.loss, formed.rate, formed.seconds)
        )
        if decision is not None:
            self._record(decision)
        self.begin()
        _log.debug("outer step %d after inner step %d, loss %g", progress.rounds, progress.inner_steps, formed.loss)
        return True

    def _form(self) -> _Average | None:
        """All of an outer step that can fail. Changes nothing that ``_retract`` does not put back.

        None if this is inside ``join``, and no rank has taken a step in this round.
        """
        plan, progress = self.plan, self.progress
        assert plan.outer is not None
        rates = progress.mean_rates()
        rate, loss, seconds = sum(rates) / len(rates), progress.mean_loss(), progress.seconds()
        share: PartialAverage | None = None
        weights_set: Sequence[int] = [plan.transport.rank] if plan.framework.watch.found else []
        plan.framework.load()
        found = first_non_finite(plan.framework.buffers, constants=plan.constants) if self.non_finite.skips else None
        if plan.settings.exact_average:
            is_active = progress.steps > progress.steps_along
            agreement = self.messages.agree(
                Event.ROUND,
                f"begins outer step {progress.rounds + 1} of",
                loss,
                flag=progress.has_ended,
                rates=rates,
                is_active=is_active,
                found=found,
            )
            loss, rate, seconds = agreement.loss, agreement.learning_rate, agreement.clock
            weights_set = agreement.weights_set
            if agreement.flagged:
                if not agreement.weight:
                    return None
                rates = self.uneven.settle_round(rates)
                rate = sum(rates) / len(rates)
            if not self.uneven.is_everybodys(agreement):
                share = self.uneven.share(agreement, is_active)
            verdict = self.non_finite.judge(
                agreement,
                f"outer step {progress.rounds + 1}",
                None if found is None else repr(found),
                is_active=is_active,
                gossips=plan.settings.base.mixes_parameters,
                look=lambda: first_non_finite(plan.framework.buffers, constants=plan.constants),
            )
            if verdict is not None:
                loss, share = verdict.loss, verdict.partial_average or share
        try:
            buffers = self._average(share)
        except (NonFiniteError, MismatchError) as error:
            self.non_finite.was_reported |= isinstance(error, NonFiniteError)
            self._retract()
            raise
        return _Average(loss, rate, seconds, rates, buffers, was_finite=found is None, weights_set=weights_set)

    def _average(self, share: PartialAverage | None) -> Mapping[str, Array] | None:
        """Average parameters, and the base optimizer's buffers if they are to be: returns those."""
        plan = self.plan
        assert plan.outer is not None
        if plan.settings.exact_average:
            self._is_prepared = True
            plan.base.prepare_average(share)
        plan.outer.average(share)
        if plan.settings.base_buffers != "average":
            return None
        return average(plan.transport, plan.framework.optimizer_buffers(), plan.settings.algorithm, share)

    def _retract(self) -> None:
        """The average is not adopted."""
        plan = self.plan
        assert plan.outer is not None
        plan.outer.abort_average()
        if self._is_prepared:
            self._is_prepared = False
            plan.base.outer_average.abort_average()
        plan.framework.store()

    def _adopt(self, formed: _Average) -> None:
        """Step outward through the average."""
        plan = self.plan
        assert plan.outer is not None
        self._is_prepared = False
        if formed.weights_set:
            plan.outer.adopt()
            plan.framework.watch.reset()
            self.weights.warn(formed.weights_set, self.progress.rounds + 1)
        else:
            plan.outer.step(formed.rates)
        if plan.settings.exact_average:
            plan.base.outer_average.adopt_consensus()
        else:
            plan.base.outer_average.rebase_on_model()
        plan.framework.store()
        if formed.buffers is not None:
            plan.framework.store_optimizer_buffers(formed.buffers)
        elif plan.settings.base_buffers == "reset" or not formed.was_finite:
            plan.framework.reset_optimizer()

    def _record(self, decision: Decision) -> None:
        self.decisions.append(decision)
        if self.plan.transport.rank == 0:
            _log.info(
                "period %d after %d, from inner step %d on (%.1f s): training loss %g, learning rate %g",
                decision.period,
                self.progress.steps,
                decision.step,
                decision.clock,
                decision.loss,
                decision.learning_rate,
            )
