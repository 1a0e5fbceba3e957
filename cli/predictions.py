"""The predictions of ``lentando plan``: time per step of each algorithm, and an initial period."""

from collections.abc import Sequence
from dataclasses import dataclass

from lentando.comm.cluster import Compute
from lentando.comm.topology import OnePeerExponential
from lentando.optimizers.planning import (
    Delays,
    Problem,
    all_reduce_seconds,
    best_period,
    cheap_period,
    gossip_rate,
    local_sgd_seconds,
    mean_seconds,
    real_best_period,
)

__all__ = ["Prediction", "Recommendation", "predict", "recommend"]


@dataclass(frozen=True)
class Prediction:
    """Predicted time per step of one algorithm.

    Attributes:
        algorithm: name of the algorithm.
        period: inner steps between averages, None without averages.
        seconds_per_step: expected time of an inner step of every rank.
        speed_up: factor over synchronous SGD.
        communication_share: share of that time in which the slowest rank does not compute.
        known: "exact" under the model, "Monte Carlo" or "unknown" (seconds_per_step is then None).
    """

    algorithm: str
    period: int | None
    seconds_per_step: float | None
    speed_up: float | None
    communication_share: float | None
    known: str


@dataclass(frozen=True)
class Recommendation:
    """The initial period, the rule that it follows, and the reason. ``period`` is None if no period is worthwhile."""

    period: int | None
    rule: str
    reason: str


def predict(
    compute: Compute, size: int, delays: Delays, periods: Sequence[int], staleness: int, gossip_is_known: bool = True
) -> list[Prediction]:
    """Predict the time per step of every algorithm, synchronous SGD first.

    Args:
        compute: distribution of compute times.
        size: number of ranks.
        delays: delays of the operations.
        periods: periods to predict Local SGD and SlowMo for, in inner steps.
        staleness: staleness of OSGP in steps.
        gossip_is_known: whether ``delays`` include those of gossip; else its rows are "unknown".
    """
    synchronous = all_reduce_seconds(compute, size, delays)
    slowest = max(mean_seconds(compute, rank) for rank in range(size))

    def row(algorithm: str, period: int | None, seconds: float | None, known: str) -> Prediction:
        if seconds is None:
            return Prediction(algorithm, period, None, None, None, "unknown")
        speed_up = synchronous / seconds if seconds else 1.0
        return Prediction(algorithm, period, seconds, speed_up, 1 - slowest / seconds if seconds else 0.0, known)

    rows = [row("AllReduce", None, synchronous, "exact")]
    rows += [row("Local SGD", p, local_sgd_seconds(compute, size, delays, p), "exact") for p in periods]
    for period in periods:
        rows.append(
            row("SlowMo", period, local_sgd_seconds(compute, size, delays, period, slow_momentum=True), "exact")
        )

    def gossip(staleness: int, period: int | None) -> float | None:
        if size == 1:
            return mean_seconds(compute)
        if not gossip_is_known:
            return None
        graphs = OnePeerExponential().for_size(size)
        is_slowmo = period is not None
        return gossip_rate(compute, graphs, delays, staleness=staleness, period=period, slow_momentum=is_slowmo).seconds

    monte_carlo = "exact" if compute.distribution == "constant" and not compute.stragglers else "Monte Carlo"
    longest = max(periods)
    rows.append(row("SGP", None, gossip(0, None), monte_carlo))
    rows.append(row("SlowMo over SGP", longest, gossip(0, longest), monte_carlo))
    rows.append(row(f"OSGP, staleness {staleness}", None, gossip(staleness, None), monte_carlo))
    return rows


def recommend(compute: Compute, size: int, delays: Delays, overhead: float, problem: Problem | None) -> Recommendation:
    """Return an initial period for AdaComm: tau* if its constants are given, else the smallest cheap period."""
    if problem is not None:
        best = best_period(problem, delays.outer_step)
        reason = (
            f"tau* = {real_best_period(problem, delays.outer_step):.3g} minimises the error bound after "
            f"{problem.time_seconds:g} s (Wang and Joshi, Theorem 2)"
        )
        if not problem.allows(best):
            reason += "; but the bound is proved only where eta L + eta^2 L^2 tau (tau - 1) <= 1, which it is not here"
        return Recommendation(best, "tau*", reason)
    period = cheap_period(compute, size, delays, overhead)
    share = f"{100 * overhead:g} %"
    cost = "communication and waiting for random stragglers cost at most"
    if period is None:
        reason = f"even at a period of 1024 the cost would be above {share} of the slowest rank's computation"
        return Recommendation(None, "cheap", reason)
    alternative = ""
    if period > 1:
        alternative = f" (at {200 * overhead:g} %: {cheap_period(compute, size, delays, 2 * overhead)})"
    reason = (
        f"the smallest period at which {cost} {share} of the slowest rank's computation{alternative}. A longer one "
        "would save next to no time and cost accuracy. tau* itself needs the constants of the loss: give --loss-gap, "
        "--lipschitz, --variance, --learning-rate and --time"
    )
    return Recommendation(period, "cheap", reason)
