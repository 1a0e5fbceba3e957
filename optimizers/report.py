"""What a replica reports about communication and time, with what the delay model predicts from its measurements."""

from collections.abc import Sequence
from math import isnan
from typing import Any

from lentando.optimizers.planning import (
    Delays,
    all_reduce_seconds,
    as_compute,
    expected_maximum_seconds,
    local_sgd_seconds,
    stragglers,
)
from lentando.optimizers.replica import Replica
from lentando.optimizers.replica.timing import Kind, Timing
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.rules.streamed_step import StreamedOuterStep
from lentando.optimizers.rules.unequal_period import equalising_steps, unequal_of

__all__ = ["report_of"]


def report_of(replica: Replica) -> dict[str, Any]:
    """Return plain numbers about this rank so far; None for a number that is not known, or not known yet.

    - ``period``: inner steps of the current round, None if there are no outer steps.
    - ``delay``, ``fragments``: as in the settings; a delay "auto" is the number that was chosen, None before.
      ``average_seconds``: time in which the last average was formed, hidden or not, None unless outer steps have a
      delay, fragments or a blend. ``is_overlapped``: whether averages are formed while the inner steps
      continue, or those of gradients during the backward pass (``AllReduce(overlap=...)``); None without a delay and
      without averages of gradients; False where the backend admits one thread only.
    - ``rounds``, ``inner_steps``, ``size``, ``model_bytes``.
    - ``bytes_sent``, ``messages`` (point-to-point and collective) and ``communication_seconds`` (waiting for other
      ranks included): of averages of gradients, gossip and outer steps; evaluation is not counted.
    - ``decisions`` of a period that adapts: dicts with the keys of ``lentando.optimizers.rules.period.Decision``,
      oldest first.
    - ``left_out``: how often this rank's values were left out of an average because they were not finite.
    - ``outlier_rounds``: how often they were left out of an outer average by ``movement_penalty``. ``movement_norm``:
      norm of what this rank moved in the last round with such a penalty.

    The times are measured from the second step on, without evaluations:

    - ``compute_seconds``, ``compute_deviation_seconds``: mean and standard deviation of the compute time of a step on
      this rank (Y).
    - ``compute_seconds_by_rank``, ``compute_deviation_seconds_by_rank``: the same of all ranks, as of the last control
      message.
    - ``stragglers``: ranks that are slower permanently. ``equalising_steps``: inner steps of each rank with which a
      round with as many steps in total would end on all ranks at the same time, for ``StepsByRank``; None for gossip
      and averages of gradients.
    - ``delay_seconds``: duration of an outer step, or without those of an average of gradients, once all ranks have
      reached it (D); with ``delay``, of the part of it that is not hidden. ``delay_ratio``: D / Y.
      ``latency_seconds``: duration of a control message.
    - ``exchange_seconds``: duration of a gossip step, waiting included.
    - ``waiting_seconds``: total time spent waiting for slower ranks, as far as control messages show it.
    - ``seconds_per_step``: duration of a step, everything included. ``predicted_seconds_per_step``: the same by the
      delay model; None for gossip, whose delay cannot be separated from waiting, and for unequal rounds.
    - ``seconds_saved``: time saved so far compared with synchronous SGD, by the delay model.
    """
    timing, base = replica.timing, replica.settings.base
    delay = _delay_seconds(timing, "outer" if replica.period is not None else "gradients")
    compute_seconds = timing.compute.mean_seconds
    by_rank = list(timing.compute_by_rank) or None
    if by_rank is not None and any(map(isnan, by_rank)):
        by_rank = None
    steps = timing.steps
    measured = timing.step_seconds / steps if steps else None
    predicted = saved = slow = equalising = None
    if by_rank is not None:
        slow = stragglers(by_rank, timing.deviation_by_rank, round(timing.compute.steps))
        if not replica.progress.has_unequal_rounds:
            predicted = _predicted_seconds(timing, by_rank, base, replica.period)
        if replica.period is not None and not base.communicates and min(by_rank) > 0:
            equalising = equalising_steps(by_rank, _steps_in_total(replica))
        synchronous = _synchronous_seconds(timing, by_rank)
        if synchronous is not None and measured is not None:
            saved = 0.0 if base.averages_gradients else (synchronous - measured) * steps
    return {
        "period": replica.period,
        "delay": _delay_of(replica),
        "average_seconds": _average_seconds(replica),
        "fragments": replica.settings.fragments,
        "is_overlapped": _is_overlapped(replica),
        "rounds": replica.rounds,
        "inner_steps": replica.inner_steps,
        "size": replica.transport.size,
        "model_bytes": sum(buffer.array.nbytes for buffer in replica.framework.buffers),
        "bytes_sent": replica.costs.bytes_sent,
        "messages": replica.costs.messages,
        "communication_seconds": timing.communication_seconds,
        "decisions": [dict(vars(decision)) for decision in replica.progress.decisions],
        "left_out": replica.non_finite.left_out,
        "outlier_rounds": replica.rank_weights.left_out,
        "movement_norm": _known(replica.rank_weights.norm),
        "compute_seconds": _known(compute_seconds),
        "compute_deviation_seconds": _known(timing.compute.deviation_seconds),
        "compute_seconds_by_rank": by_rank,
        "compute_deviation_seconds_by_rank": list(map(_known, timing.deviation_by_rank)) if by_rank else None,
        "stragglers": slow,
        "equalising_steps": equalising,
        "delay_seconds": delay,
        "latency_seconds": _known(timing.message.seconds),
        "delay_ratio": delay / compute_seconds if delay and compute_seconds > 0 else None,
        "exchange_seconds": _delay_seconds(timing, "gossip", with_message=False),
        "waiting_seconds": timing.waiting_seconds,
        "seconds_per_step": measured,
        "predicted_seconds_per_step": predicted,
        "seconds_saved": saved,
    }


def _steps_in_total(replica: Replica) -> int:
    """Steps of all ranks in a round."""
    period = unequal_of(replica.progress.period)
    return (replica.period or 1) * replica.transport.size if period is None else sum(period.steps_by_rank)


def _delay_of(replica: Replica) -> int | None:
    outer = replica.setup.outer
    return outer.timetable.delay if isinstance(outer, StreamedOuterStep) else 0


def _average_seconds(replica: Replica) -> float | None:
    outer = replica.setup.outer
    return _known(outer.average_seconds) if isinstance(outer, StreamedOuterStep) else None


def _is_overlapped(replica: Replica) -> bool | None:
    outer = replica.setup.outer
    if isinstance(outer, StreamedOuterStep) and replica.settings.delay:
        return outer.is_overlapped
    return replica.base.overlap.buckets is not None if replica.averages_gradients else None


def _predicted_seconds(
    timing: Timing, by_rank: Sequence[float], base: BaseAlgorithm, period: int | None
) -> float | None:
    """Return the delay model's time per step of this method; None for gossip, whose delay includes waiting."""
    gradients, outer = _delay_seconds(timing, "gradients"), _delay_seconds(timing, "outer")
    if base.mixes_parameters or (base.averages_gradients and gradients is None) or (period and outer is None):
        return None
    compute, size = as_compute(by_rank, timing.deviation_by_rank), len(by_rank)
    delays = Delays(gradients or 0.0, outer or 0.0)
    if not base.averages_gradients:
        return local_sgd_seconds(compute, size, delays, period) if period else None
    return all_reduce_seconds(compute, size, delays) + (delays.outer_step / period if period else 0.0)


def _synchronous_seconds(timing: Timing, by_rank: Sequence[float]) -> float | None:
    """Return the time of a step of synchronous SGD, which is an estimate where no gradients are averaged.

    Their average is then assumed to take as long as an outer step without its control message. For small models that is
    too long: with the backend's all-reduce, reduce-scatter and all-gather together take longer than one all-reduce.
    """
    delay = _delay_seconds(timing, "gradients")
    if delay is None:
        delay = _delay_seconds(timing, "outer", with_message=False)
    if delay is None:
        return None
    return expected_maximum_seconds(as_compute(by_rank, timing.deviation_by_rank), len(by_rank)) + delay


def _delay_seconds(timing: Timing, kind: Kind, *, with_message: bool = True) -> float | None:
    """How long a communication takes once all ranks have reached it, None if that is not known yet.

    Args:
        timing: measured times.
        kind: purpose of the communication.
        with_message: whether to include its control message.
    """
    message = timing.message.seconds
    return _known(timing.delays[kind].seconds + (message if with_message and not isnan(message) else 0.0))


def _known(seconds: float) -> float | None:
    """A time, None in place of NaN."""
    return None if isnan(seconds) else seconds
