"""A rank that has run out of batches (``join``) does what the others need of it, until all have."""

from collections.abc import Sequence
from dataclasses import dataclass

from lentando.comm.elastic import is_elastic
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.replica.gradients import Gradients
from lentando.optimizers.replica.messages import Messages
from lentando.optimizers.replica.mixing import Mixing
from lentando.optimizers.replica.plan import Plan
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.rounds import Rounds
from lentando.optimizers.replica.timing import Timing
from lentando.optimizers.rules.partial_average import StepAlong

__all__ = ["TakingPart"]


@dataclass
class TakingPart:
    """Takes part in the steps and rounds of the others.

    Args:
        plan: what the replica is made of.
        progress: how far it is.
        timing: is told of steps that were counted and not taken.
        messages: tell whether to stop.
        gradients: may be averaged.
        mixing: of the parameters, which may be done.
        rounds: may be ended.
    """

    plan: Plan
    progress: Progress
    timing: Timing
    messages: Messages
    gradients: Gradients
    mixing: Mixing
    rounds: Rounds

    def check_joinable(self) -> None:
        """Before ranks may have unequal numbers of batches.

        Raises:
            ConfigurationError: if they may not.
        """
        settings = self.plan.settings
        if is_elastic(self.plan.transport):
            raise ConfigurationError(
                "join is not possible in an elastic job (init(elastic=True)) yet: give all ranks equally many batches"
            )
        if self.progress.is_joined:
            raise ConfigurationError("join blocks of one optimizer cannot be nested: leave one before the next")
        if not settings.exact_average and not settings.base.communicates:
            raise ConfigurationError(
                f"{settings.base!r} with exact_average=False sends nothing, so that no rank waits for another: "
                "leave join out"
            )

    def until_all_have_ended(self, step_along: StepAlong) -> None:
        """This rank has no batch left. Collective.

        Args:
            step_along: called where the base algorithm averages gradients, when these have been averaged.
        """
        settings = self.plan.settings
        if settings.base.averages_gradients or settings.base.mixes_parameters:
            while self._step(step_along):
                if self.progress.is_round_over():
                    self.rounds.end()
                self.messages.stop_if_agreed(automatic=False)
            if settings.period is not None and settings.exact_average and self.progress.steps:
                self.rounds.end()
            self.plan.wait_in_flight()
        else:
            while self.rounds.end():
                self.messages.stop_if_agreed(automatic=False)

    def _step(self, step_along: StepAlong) -> bool:
        """Take part in a step of the others. Tells whether there was one."""
        base = self.plan.settings.base
        rates: Sequence[float] | None = None
        if base.averages_gradients:
            averaged = self.gradients.average_of_others()
            if averaged is None:
                return False
            rates, has_overflowed = averaged
            if not step_along(rates, has_overflowed):
                return True
            self.plan.framework.watch.mark()
        if base.mixes_parameters:
            rates = self.mixing.mix_with_others(rates)
        if rates is None:
            return False
        self.progress.count(1, rates)
        self.progress.steps_along += 1
        self.timing.skip(1)
        return True
