"""The compute model of a job, from measured times of its steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np

from lentando.comm.cluster.compute import Compute
from lentando.comm.errors import ConfigurationError

__all__ = ["ComputeEstimate", "as_compute", "estimate_compute", "stragglers"]

STRAGGLES_FROM = 1.2
"""A rank straggles if its mean step is so many times the median rank's, and that is no accident."""
STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class ComputeEstimate:
    """How long a step computes on one rank.

    Attributes:
        mean_seconds: of a step (Y).
        deviation_seconds: standard deviation of a single step, or NaN if there is but one sample.
        tail_seconds: what one sample in twenty exceeds: of single steps if they were measured, else of means over the
            steps of a sample, which scatter less.
        steps: that were measured.
    """

    mean_seconds: float
    deviation_seconds: float
    tail_seconds: float
    steps: int


def estimate_compute(seconds: Sequence[float], steps: Sequence[int] | None = None) -> ComputeEstimate:
    """Mean, variance and tail of the compute time of a step, from samples that each lasted one step or several.

    With x_r the mean over the n_r steps of sample r: Y = sum n_r x_r / sum n_r, and s^2 = sum n_r (x_r - Y)^2 / (R - 1)
    because Var(x_r) = s^2 / n_r. Both are unbiased for independent steps.

    Args:
        seconds: that each sample took, all its steps together.
        steps: of each sample; 1 each by default.
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
    """The compute model with the ranks' measured means, and the ranks' mean variation (deviation over mean).

    Lognormal: step times are positive and skewed, and Var and mean are all that is known of them.
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
    """The ranks that are slower for good: means above 1.2 times the median rank's, by 3 standard errors.

    Args:
        mean_seconds_by_rank: of a step.
        deviation_seconds_by_rank: of a step; NaN counts as 0.
        steps: that each mean was taken over.
    """
    line = STRAGGLES_FROM * median_low(mean_seconds_by_rank)
    found = []
    for rank, (mean, deviation) in enumerate(zip(mean_seconds_by_rank, deviation_seconds_by_rank, strict=True)):
        error = 0.0 if np.isnan(deviation) else deviation / max(steps, 1) ** 0.5
        if mean - STANDARD_ERRORS * error > line:
            found.append(rank)
    return found
