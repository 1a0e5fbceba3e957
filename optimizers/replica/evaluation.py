"""Evaluating the mean of all replicas: to hold it for a while, and how far the replicas are from it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt

import numpy as np

from lentando.comm.array_module import copy_into
from lentando.comm.collectives import plan_reduction
from lentando.comm.control import Event
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.transport import Array
from lentando.optimizers.replica.messages import Messages
from lentando.optimizers.replica.plan import Plan
from lentando.optimizers.replica.timing import Timing
from lentando.optimizers.rules.non_finite import ADVICE, NonFinite, first_non_finite
from lentando.optimizers.rules.partial_average import mean_over_some

__all__ = ["Evaluation"]

_log = logging.getLogger("lentando")


@dataclass
class Evaluation:
    """What is done between steps, and is no training.

    Args:
        plan: what the replica is made of.
        messages: precede what is averaged.
        timing: does not count it.
        non_finite: what is done about values that are not finite.

    Attributes:
        is_open: whether the model holds the average now.
    """

    plan: Plan
    messages: Messages
    timing: Timing
    non_finite: NonFinite
    is_open: bool = field(default=False, init=False)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See ``Replica.averaged``."""
        plan = self.plan
        self.timing.pause()
        buffers = plan.framework.buffers
        own: list[Array] = []

        def attempt() -> None:
            plan.framework.load()
            found = first_non_finite(buffers, constants=plan.constants)
            agreement = self.messages.agree(Event.EVALUATE, "evaluates the average of", found=found)
            verdict = self.non_finite.judge(
                agreement,
                "evaluation of the average",
                None if found is None else repr(found),
                gossips=plan.settings.base.mixes_parameters,
            )
            share = None if verdict is None else verdict.partial_average
            plan.wait_in_flight()
            own.extend(buffer.array.copy() for buffer in buffers)
            plan.base.prepare_average(share)
            for buffer in buffers:
                constants = plan.constants.within(buffer)
                reduction = plan_reduction(plan.transport, buffer.array, plan.settings.algorithm)
                if share is None:
                    reduction.all_reduce(mean=True)
                else:
                    mean_over_some(reduction, buffer.array, share)
                for constant in constants:
                    constant.restore(buffer.array)

        def put_back() -> None:
            for buffer, array in zip(buffers, own, strict=bool(own)):
                copy_into(buffer.array, array)
            own.clear()

        self.messages.together(attempt, put_back)
        plan.framework.store()
        recoveries = plan.recoveries
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False
            put_back()
            if plan.recoveries != recoveries:  # which took the average for this replica's parameters
                plan.base.outer_average.rebase_on_model()
            plan.framework.store()
            plan.framework.watch.mark()
            self.timing.resume()

    def check_finite(self, what: str) -> None:
        """See ``Replica.check_finite``."""
        plan = self.plan
        plan.framework.load()
        found = first_non_finite(plan.framework.buffers, constants=plan.constants)
        if found is None:
            return
        text = f"{what} has ended on rank {plan.transport.rank} with {found!r} not finite"
        if not self.non_finite.skips:
            raise self.non_finite.error(f"{text}. {ADVICE}")
        _log.warning("%s: the next outer step restores it from the other ranks", text)

    def consensus_distance(self) -> float:
        """See ``Replica.consensus_distance``."""
        self.timing.pause()
        distance = self.messages.together(self._measure_distance)
        self.timing.resume()
        return distance

    def _measure_distance(self) -> float:
        plan = self.plan
        self.messages.agree(Event.EVALUATE, "measures the consensus distance of")
        plan.framework.load()
        squared = 0.0
        for buffer in plan.framework.buffers:
            own = buffer.parameters.astype(accumulator_dtype(buffer.array.dtype))
            reference = own.copy()
            plan.transport.broadcast(reference)
            own -= reference  # replicas that are equal have no distance, however the mean of equal numbers is rounded
            mean = own.copy()
            plan_reduction(plan.transport, mean, plan.settings.algorithm).all_reduce(mean=True)
            squared += float(np.square(own - mean, dtype=np.float64).sum())
        return sqrt(float(plan.transport.allgather(np.array([squared])).mean()))
