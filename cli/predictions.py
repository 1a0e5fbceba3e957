"""What ``lentando plan`` predicts: the time per step of each algorithm, and the period to begin with."""

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
    """One row.

    Attributes:
        algorithm: its name.
        period: inner steps between averages, None without.
        seconds_per_step: expected time of an inner step of every rank.
        speed_up: over synchronous SGD.
        communication_share: of that time, what is not the slowest rank's own computation.
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
    """The period to begin with, and why. ``period`` is None if none serves."""

    period: int | None
    rule: str
    reason: str


def predict(
    compute: Compute, size: int, delays: Delays, periods: Sequence[int], staleness: int, gossip_is_known: bool = True
) -> list[Prediction]:
    """All rows, synchronous SGD first."""
    synchronous = all_reduce_seconds(compute, size, delays)
    slowest = max(mean_seconds(compute, rank) for rank in range(size))

    def row(algorithm: str, period: int | None, seconds: float | None, known: str) -> Prediction:
        if seconds is None:
            return Prediction(algorithm, period, None, None, None, "unknown")
        gained = synchronous / seconds if seconds else 1.0
        return Prediction(algorithm, period, seconds, gained, 1 - slowest / seconds if seconds else 0.0, known)

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
        met = period is not None
        return gossip_rate(compute, graphs, delays, staleness=staleness, period=period, slow_momentum=met).seconds

    monte_carlo = "exact" if compute.distribution == "constant" and not compute.stragglers else "Monte Carlo"
    longest = max(periods)
    rows.append(row("SGP", None, gossip(0, None), monte_carlo))
    rows.append(row("SlowMo over SGP", longest, gossip(0, longest), monte_carlo))
    rows.append(row(f"OSGP, staleness {staleness}", None, gossip(staleness, None), monte_carlo))
    return rows


def recommend(compute: Compute, size: int, delays: Delays, overhead: float, problem: Problem | None) -> Recommendation:
    """AdaComm's initial period: tau* if the constants of the loss are given, else the smallest that is cheap."""
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
        reason = f"even at a period of 1024 they would cost more than {share} of the slowest rank's computation"
        return Recommendation(None, "cheap", reason)
    other = ""
    if period > 1:
        other = f" (at {200 * overhead:g} %: {cheap_period(compute, size, delays, 2 * overhead)})"
    reason = (
        f"the smallest period at which {cost} {share} of the slowest rank's computation{other}. A longer one would "
        "save next to no time and cost accuracy. tau* itself needs the constants of the loss: give --loss-gap, "
        "--lipschitz, --variance, --learning-rate and --time"
    )
    return Recommendation(period, "cheap", reason)
