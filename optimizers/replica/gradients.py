"""The average of gradients before each step, and what is left out of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import nan

from lentando.comm.control import Agreement, Event
from lentando.comm.elastic import in_place
from lentando.comm.errors import NonFiniteError
from lentando.comm.transport import Array
from lentando.optimizers.replica.part import Part
from lentando.optimizers.replica.weights import Weights
from lentando.optimizers.rules.non_finite import Verdict, first_non_finite, told_loss
from lentando.optimizers.rules.overlap import BucketCoverage
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = ["Gradients"]

_DOING = "averages the gradients of"


@dataclass
class Gradients(Part):
    """Averages gradients: of a step of this rank, or without a batch of its own those of the others.

    Args:
        weights: that the program may have set.
    """

    weights: Weights
    _deferred_error: NonFiniteError | None = None
    _copies: list[Array] = field(default_factory=list)  # in an elastic job

    def average(self, loss: float | None, flag: bool, is_scaled: bool, defer: bool) -> Agreement:
        """See ``Replica.average_gradients``. The step has begun."""
        plan = self.plan
        step = self.progress.inner_steps + 1
        found = None if flag or is_scaled else first_non_finite(plan.framework.gradients)
        told = nan if flag or is_scaled else told_loss(loss)

        def attempt() -> tuple[Agreement, Verdict | None]:
            agreement = self.messages.agree(Event.GRADIENTS, _DOING, told, flag, found=found)
            plan.base.overlap.finish_buckets(BucketCoverage(agreement.early))
            self.weights.compare(agreement.weights_set)
            verdict = self._deferred_error = None
            try:
                verdict = self._judge(agreement, step, found)
            except NonFiniteError as error:
                if not defer:
                    raise
                self._deferred_error = error
            if not self.uneven.is_everybodys(agreement):
                self.uneven.rates_of_active()
            plan.base.steps.average_gradients(self._share(agreement, verdict))
            return agreement, verdict

        with self.costs.of("gradients", step):
            gradients = [buffer.array for buffer in plan.framework.gradients]
            try:
                agreement, verdict = in_place(plan.transport, gradients, attempt, self._copies)
            except NonFiniteError:
                self.progress.is_in_step = False  # it is not taken, so that a checkpoint may be loaded here
                raise
        self.messages.forget_start()
        return agreement if verdict is None else replace(agreement, loss=verdict.loss)

    def average_of_others(self) -> tuple[Sequence[float], bool] | None:
        """Take part without a batch. Returns learning rates of the step, and whether its gradients overflowed.

        None if no rank has a batch left.
        """
        with self.costs.of("gradients", self.progress.inner_steps):
            agreement = self.messages.agree(Event.GRADIENTS, _DOING)
            if not agreement.weight:
                return None
            self.weights.compare(agreement.weights_set)
            verdict = self._judge(agreement, self.progress.inner_steps + 1)
            rates = self.uneven.rates_of_active()
            self.plan.framework.load()  # on a device, what follows is then in order with the framework
            self.plan.base.steps.average_gradients(self._share(agreement, verdict))
        return rates, bool(agreement.flagged)

    def settle_deferred(self, expected: bool) -> bool:
        """See ``Replica.settle_deferred``."""
        error, self._deferred_error = self._deferred_error, None
        if error is not None and not expected:
            self.progress.is_in_step = False
            raise error
        return error is not None

    def _judge(self, agreement: Agreement, step: int, found: str | None = None) -> Verdict | None:
        """What is left out. Gradients that have overflowed are their scaler's affair."""
        if agreement.flagged:
            return None
        plan, lasting = self.plan, None
        if found is not None and self.non_finite.skips and plan.outer is None:
            plan.framework.load()
            lasting = first_non_finite(plan.framework.buffers, constants=plan.constants)
        words = f"the gradient of {found!r}" if lasting is None else repr(lasting)
        return self.non_finite.judge(
            agreement,
            f"average of gradients of inner step {step}",
            None if found is None else words,
            is_active=not self.progress.has_ended,
            is_lasting=lasting is not None,
        )

    def _share(self, agreement: Agreement, verdict: Verdict | None) -> PartialAverage | None:
        if verdict is not None and verdict.partial_average is not None:
            return verdict.partial_average
        return None if self.uneven.is_everybodys(agreement) else self.uneven.share(agreement)
