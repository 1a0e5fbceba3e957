"""The outer step that ends each round: form the average, adopt it, and ask the period how long the next round is."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lentando.comm.agreement import Event, fingerprint, ranks_where
from lentando.comm.errors import MismatchError, NonFiniteError
from lentando.comm.transport import Array
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.rank_weights import RankWeights
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.timing import Costs
from lentando.optimizers.replica.trained_parameters import TrainedParameters
from lentando.optimizers.replica.uneven_data import UnevenData
from lentando.optimizers.replica.weights import Weights
from lentando.optimizers.rules.base_buffers import average
from lentando.optimizers.rules.describe import describe
from lentando.optimizers.rules.non_finite import NonFinite, first_non_finite, loss_to_send, mean_loss
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.rules.period import Decision, RoundSummary, check_steps, decides_alike
from lentando.optimizers.rules.unequal_period import unequal_of

__all__ = ["FormedAverage", "Rounds"]

_log = logging.getLogger("lentando")


@dataclass(frozen=True)
class FormedAverage:
    """What an outer step adopts.

    Attributes:
        loss: mean loss of the round over the ranks.
        rate: mean learning rate of the round over the ranks and parameter groups.
        seconds: time since the first step, by rank 0's clock.
        rates: learning rates of the outer step, one per parameter group.
        buffers: averaged buffers of the base optimizer; None if they are not averaged.
        was_finite: whether this rank's values were finite.
        weights_set_on: ranks whose weights the program has set since the last outer step.
    """

    loss: float
    rate: float
    seconds: float
    rates: Sequence[float]
    buffers: Mapping[str, Array] | None
    was_finite: bool
    weights_set_on: Sequence[int]


class Rounds:
    """Takes the outer steps that end rounds.

    Args:
        setup: transport, framework and method of the replica.
        progress: progress of the replica.
        channel: sends the control messages.
        costs: counts bytes and time.
        non_finite: policy for values that are not finite.
        uneven: shares of the ranks in averages.
        weights: weights that the program may have set.
        trained: parameters, which may have changed since the last outer step.
        rank_weights: weights of the ranks.
    """

    def __init__(
        self,
        setup: Setup,
        progress: Progress,
        channel: Channel,
        costs: Costs,
        non_finite: NonFinite,
        uneven: UnevenData,
        weights: Weights,
        trained: TrainedParameters,
        rank_weights: RankWeights,
    ) -> None:
        self._setup = setup
        self._progress = progress
        self._channel = channel
        self._costs = costs
        self._non_finite = non_finite
        self._uneven = uneven
        self._weights = weights
        self._trained = trained
        self._rank_weights = rank_weights
        self._is_prepared = False  # whether the base algorithm has prepared an average
        period = progress.period
        self._compares_periods = setup.has_common_rounds and period is not None and not decides_alike(period)

    def begin(self) -> None:
        """Begin a round, of which no step is taken. Collective with a period whose decisions may differ.

        Ranks that disagreed about the length of a round would wait for each other in different operations: some in the
        outer step, and their neighbours in gossip.

        Raises:
            MismatchError: on every rank, if the period has chosen different numbers of steps.
            ConfigurationError: on every rank, if it has chosen no positive integer.
        """
        self._progress.begin_round(len(self._setup.framework.learning_rates()))
        if self._compares_periods:
            unequal = unequal_of(self._progress.period)
            steps = self._progress.steps_in_round if unequal is None else list(unequal.steps_by_rank)
            source = "steps() has" if unequal is None else "steps_by_rank has"
            action = f"begins a round of {steps!r} inner steps, as the period's {source} returned, of"
            subject = fingerprint(["period", describe(steps)])
            self._channel.together(lambda: self._channel.agree(Event.PERIOD, action, subject=subject))
            check_steps("what steps() of the period returns", self._progress.steps_in_round, 1)

    def end(self) -> bool:
        """Take the outer step and begin the next round. Collective if there is an average.

        Returns:
            Whether there was an outer step: inside ``join`` there is none if no rank has taken a step in this round.
        """
        setup, progress = self._setup, self._progress
        if self._trained.have_changed():
            self._trained.follow()
        with self._costs.of("outer", progress.inner_steps):
            if setup.has_common_rounds or setup.settings.base_buffers == "average":
                formed = self._channel.together(self._form, self._abort)
            else:
                formed = self._form()
            if formed is None:
                return False
            self._adopt(formed)
        self._begin_next(formed)
        return True

    def _begin_next(self, formed: FormedAverage) -> None:
        """End the round after its outer step, and begin the next one."""
        progress = self._progress
        assert progress.period is not None
        progress.forget_losses()
        progress.rounds += 1
        decision = progress.period.update(
            RoundSummary(progress.rounds, progress.inner_steps, formed.loss, formed.rate, formed.seconds)
        )
        if decision is not None:
            self._record(decision)
        self.begin()
        _log.debug("outer step %d after inner step %d, loss %g", progress.rounds, progress.inner_steps, formed.loss)

    def _form(self) -> FormedAverage | None:
        """Do everything in an outer step that can fail. ``_abort`` undoes all changes.

        Returns:
            The average, or None if no rank has taken a step in this round (inside ``join``).
        """
        setup, progress = self._setup, self._progress
        rates = progress.mean_rates()
        rate, seconds = sum(rates) / len(rates), progress.seconds()
        loss = loss_to_send(float(progress.loss_sum) / progress.loss_count if progress.loss_count else None)
        share: PartialAverage | None = None
        are_weights_set = setup.framework.watch.found
        weights_set_on: Sequence[int] = [setup.transport.rank] if are_weights_set else []
        setup.framework.load()
        found = first_non_finite(setup.framework.buffers, constants=setup.constants) if self._non_finite.skips else None
        if setup.has_common_rounds:
            by_rank = self._channel.agree(
                Event.ROUND,
                f"begins outer step {progress.rounds + 1} of",
                loss=loss,
                rate=rate,
                seconds=seconds,
                is_finite=self._non_finite.is_clean(found),
                weights_set=are_weights_set,
            )
            loss, rate = mean_loss(by_rank["loss"]), float(by_rank["rate"].mean())
            seconds = float(by_rank["seconds"][0])
            weights_set_on = ranks_where(by_rank["weights_set"])
            if self._uneven.has_ended_anywhere and not self._uneven.active:
                return None
            if self._uneven.has_ended_anywhere or progress.has_unequal_rounds:
                rates = self._uneven.settle_round(rates)
                rate = sum(rates) / len(rates)
            if progress.is_joined:
                share = self._uneven.share()
            verdict = self._non_finite.judge(
                by_rank,
                f"outer step {progress.rounds + 1}",
                None if found is None else repr(found),
                is_active=self._uneven.is_active,
                is_mixed=setup.settings.base.mixes_parameters,
                look=lambda: first_non_finite(setup.framework.buffers, constants=setup.constants),
            )
            if verdict is not None:
                loss, share = verdict.loss, verdict.partial_average or share
            if self._rank_weights.is_needed:
                share = self._rank_weights.share(share)
        try:
            buffers = self._average(share)
        except (NonFiniteError, MismatchError) as error:
            self._non_finite.was_reported |= isinstance(error, NonFiniteError)
            self._abort()
            raise
        return FormedAverage(
            loss, rate, seconds, rates, buffers, was_finite=found is None, weights_set_on=weights_set_on
        )

    def _average(self, share: PartialAverage | None) -> Mapping[str, Array] | None:
        """Average the parameters, and the base optimizer's buffers if they are to be averaged: returns those."""
        setup = self._setup
        assert setup.outer is not None
        if setup.outer.communicates and not setup.is_averaged_as_it_is:
            if setup.outer.leaves_ranks_equal:
                self._is_prepared = True
                setup.base.prepare_average(share)
            else:
                setup.base.outer_average.wait_in_flight()
        setup.outer.average(share)
        if setup.settings.base_buffers != "average":
            return None
        return average(setup.transport, setup.framework.optimizer_buffers(), setup.settings.algorithm, share)

    def _abort(self) -> None:
        """Restore the state before ``_form``: the average is not adopted."""
        setup = self._setup
        assert setup.outer is not None
        setup.outer.abort_average()
        if self._is_prepared:
            self._is_prepared = False
            setup.base.outer_average.abort_average()
        setup.framework.store()

    def _adopt(self, formed: FormedAverage) -> None:
        """Apply the outer rule to the average, and continue from the result."""
        setup = self._setup
        assert setup.outer is not None
        self._is_prepared = False
        if formed.weights_set_on:
            setup.outer.adopt()
            setup.framework.watch.reset()
            self._weights.warn(formed.weights_set_on, self._progress.rounds + 1)
        else:
            setup.outer.step(formed.rates)
        if not setup.is_averaged_as_it_is:
            if setup.outer.leaves_ranks_equal:
                setup.base.outer_average.adopt_consensus()
            else:
                setup.base.outer_average.rebase_on_model()
        setup.framework.store()
        if formed.buffers is not None:
            setup.framework.store_optimizer_buffers(formed.buffers)
        elif setup.settings.base_buffers == "reset" or not formed.was_finite:
            setup.framework.reset_optimizer()

    def _record(self, decision: Decision) -> None:
        self._progress.decisions.append(decision)
        if self._setup.transport.rank == 0:
            _log.info(
                "period %d after %d, from inner step %d on (%.1f s): training loss %g, learning rate %g",
                decision.period,
                self._progress.steps,
                decision.step,
                decision.clock,
                decision.loss,
                decision.learning_rate,
            )
