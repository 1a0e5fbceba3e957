"""Estimates of compute time and variation from measured steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np

from lentando.comm.cluster import Compute
from lentando.comm.errors import ConfigurationError

__all__ = ["ComputeEstimate", "as_compute", "estimate_compute", "stragglers"]

STRAGGLES_FROM = 1.2
"""A rank straggles if its mean step exceeds the median rank's by this factor, significantly."""
STANDARD_ERRORS = 3.0
"""Standard errors by which a mean must exceed that bound to be significant."""


@dataclass(frozen=True)
class ComputeEstimate:
    """Compute time of a step on one rank.

    Attributes:
        mean_seconds: mean time of a step (Y).
        deviation_seconds: standard deviation of a single step, or NaN if there is only one sample.
        tail_seconds: 95th percentile of the samples. If a sample spans several steps, it is that of their means, which
            vary less.
        steps: number of measured steps.
    """

    mean_seconds: float
    deviation_seconds: float
    tail_seconds: float
    steps: int


def estimate_compute(seconds: Sequence[float], steps: Sequence[int] | None = None) -> ComputeEstimate:
    """Estimate mean, deviation and tail of a step's compute time from samples of one or several steps each.

    With x_r the mean over the n_r steps of sample r: Y = sum n_r x_r / sum n_r, and s^2 = sum n_r (x_r - Y)^2 / (R - 1)
    because Var(x_r) = s^2 / n_r. Both are unbiased for independent steps.

    Args:
        seconds: duration of each sample, over all its steps.
        steps: number of steps of each sample; 1 each by default.

    Example:
        >>> estimate_compute([0.25, 0.5, 0.75], steps=[1, 2, 1]).mean_seconds
        0.375
    """
    counts = np.ones(len(seconds)) if steps is None else np.asarray(steps, np.float64)
    times = np.asarray(seconds, np.float64)
    if not times.size or times.size != counts.size or not (counts >= 1).all():
        raise ConfigurationError(f"expected samples of at least one step each, got {seconds} seconds of {steps} steps")
    means = times / counts
    mean = float(times.sum() / counts.sum())
    deviation = float("nan")
    if times.size > 1:
        deviation = float(np.sqrt((counts * (means - mean) ** 2).sum() / (times.size - 1)))
    return ComputeEstimate(mean, deviation, float(np.quantile(means, 0.95)), int(counts.sum()))


def as_compute(mean_seconds_by_rank: Sequence[float], deviation_seconds_by_rank: Sequence[float]) -> Compute:
    """Return the compute model with each rank's measured mean and one variation (deviation over mean) for all ranks.

    The distribution is lognormal, because step times are positive and skewed, and only mean and variance are measured.

    Args:
        mean_seconds_by_rank: mean time of a step of each rank.
        deviation_seconds_by_rank: standard deviation of a step of each rank; NaN where unknown.

    Example:
        >>> as_compute([0.5, 0.75], [0.0, 0.0]).stragglers
        {1: 1.5}
    """
    means = np.asarray(mean_seconds_by_rank, np.float64)
    base = float(means.min())
    if base <= 0:
        return Compute(float(means.mean()))
    variations = np.asarray(deviation_seconds_by_rank, np.float64) / means
    known = variations[np.isfinite(variations)]
    factors: Mapping[int, float] = {rank: float(mean / base) for rank, mean in enumerate(means) if mean > base}
    variation = float(np.sqrt(np.mean(known**2))) if known.size else 0.0
    if not variation:
        return Compute(base, stragglers=factors)
    return Compute(base, "lognormal", variation=variation, stragglers=factors)


def stragglers(
    mean_seconds_by_rank: Sequence[float], deviation_seconds_by_rank: Sequence[float], steps: int
) -> list[int]:
    """Return the permanently slower ranks: means above 1.2 times the median rank's, by 3 standard errors.

    Args:
        mean_seconds_by_rank: mean time of a step of each rank.
        deviation_seconds_by_rank: standard deviation of a step of each rank; NaN counts as 0.
        steps: number of steps that each mean was taken over.

    Example:
        >>> stragglers([0.1, 0.1, 0.2], [0.01, 0.01, 0.01], steps=100)
        [2]
    """
    bound = STRAGGLES_FROM * median_low(mean_seconds_by_rank)
    slow = []
    for rank, (mean, deviation) in enumerate(zip(mean_seconds_by_rank, deviation_seconds_by_rank, strict=True)):
        error = 0.0 if np.isnan(deviation) else deviation / max(steps, 1) ** 0.5
        if mean - STANDARD_ERRORS * error > bound:
            slow.append(rank)
    return slow
