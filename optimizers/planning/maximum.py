"""Expected compute time of the slowest rank: the maximum over ranks of the mean time of some steps.

With Y_{i,k} the compute time of rank i in step k, independent between steps, synchronous SGD waits for max_i Y_{i,k} in
every step, and Local SGD with period tau only for max_i Ybar_i with Ybar_i = (Y_{i,1} + ... + Y_{i,tau}) / tau, whose
variance is tau times smaller: averaging less often also mitigates stragglers (Wang and Joshi, MLSys 2019, arXiv
1810.08313, section 3: E[Y_{m:m}] and E[Ybar_{m:m}]).
"""

from collections import Counter
from functools import lru_cache
from math import erfc, exp, floor, inf, log1p, sqrt

import numpy as np
from numpy.typing import NDArray

from lentando.comm.cluster import Compute
from lentando.comm.errors import ConfigurationError

__all__ = ["deviation_seconds", "expected_maximum_seconds", "harmonic_number", "mean_seconds"]

CELLS = 2**16
"""Cells of the grid that represents a distribution: relative errors stay below 1e-3 for variations up to 1."""
DEVIATIONS = 12.0
"""Width of the grid to each side, in standard deviations of the sum; the probability outside is below 1e-30."""
NEGLIGIBLE = 1e-9
"""Ratio of standard deviation to mean below which a time counts as constant."""

Floats = NDArray[np.float64]


def harmonic_number(count: int) -> float:
    """Return H_m = 1 + 1/2 + ... + 1/m, the expected maximum of m exponential variables of mean 1. Exact.

    Example:
        >>> round(harmonic_number(3), 4)
        1.8333
    """
    return float((1.0 / np.arange(1, count + 1)).sum())


def mean_seconds(compute: Compute, rank: int = 0) -> float:
    """Return E[Y_i], the mean compute time of a step of ``rank``. Exact.

    Example:
        >>> from lentando.comm.cluster import Compute
        >>> mean_seconds(Compute(0.1, stragglers={1: 2.0}), rank=1)
        0.2
    """
    base = float(np.mean(compute.trace)) if compute.distribution == "trace" else compute.mean_seconds
    return base * compute.stragglers.get(rank, 1.0)


def deviation_seconds(compute: Compute, rank: int = 0) -> float:
    """Return the standard deviation of the compute time of a step of ``rank``. Exact.

    Example:
        >>> from lentando.comm.cluster import Compute
        >>> deviation_seconds(Compute(0.1, "exponential"))
        0.1
    """
    return mean_seconds(compute, rank) * _variation(compute)


def expected_maximum_seconds(compute: Compute, size: int, steps: int = 1) -> float:
    """Return E[max_i Ybar_i] over ``size`` ranks in seconds, Ybar_i the mean of ``steps`` steps of rank i.

    E[max] = integral of 1 - prod_i F(x / f_i) dx, with F the distribution function of the mean of ``steps`` steps and
    f_i the factor of a straggler. For one step of equal ranks with exponential times that is mean * H_m, in closed
    form; with constant times it is the slowest rank's time. Otherwise F is computed on a grid, as a power of the
    Fourier transform of the distribution of one step: exact up to the grid, for every distribution. (For exponential
    times F is a Gamma distribution of shape ``steps``; a mean of lognormal variables has no closed form.)

    The steps of a ``"trace"`` are treated as independent draws. The simulator replays them in order, which gives other
    results where slow steps follow each other.

    Args:
        compute: distribution of compute times.
        size: number of ranks (m), >= 1.
        steps: number of averaged steps (tau), >= 1.

    Example:
        >>> from lentando.comm.cluster import Compute
        >>> compute = Compute(0.1, "exponential")
        >>> [round(expected_maximum_seconds(compute, 16, steps), 3) for steps in (1, 4, 16)]
        [0.338, 0.206, 0.149]
    """
    if size < 1 or steps < 1:
        raise ConfigurationError(f"size and steps must be >= 1, got size={size}, steps={steps}")
    factors = Counter(compute.stragglers.get(rank, 1.0) for rank in range(size))
    base = mean_seconds(Compute(compute.mean_seconds, compute.distribution, trace=compute.trace))
    slowest = max(factors)
    if base == 0 or _variation(compute) < NEGLIGIBLE or size == 1:
        return base * slowest
    if compute.distribution == "exponential" and steps == 1 and len(factors) == 1:
        return base * slowest * harmonic_number(size)
    x, below = _distribution(compute.distribution, compute.variation, tuple(compute.trace), steps)
    if len(factors) > 1:
        highest = max(float(factor) for factor in factors) * x[-1]
        grid = np.linspace(0.0, highest, CELLS)
        product = np.ones(CELLS)
        for factor, count in factors.items():
            product *= (np.interp(grid / factor, x, below) if factor else 1.0) ** count
    else:
        grid, product = x * slowest, below**size
    above = 1.0 - product
    return base * float(grid[0] + ((above[1:] + above[:-1]) * np.diff(grid)).sum() / 2)


def _variation(compute: Compute) -> float:
    """Return the ratio of standard deviation to mean."""
    if compute.distribution == "exponential":
        return 1.0
    if compute.distribution == "lognormal":
        return compute.variation
    if compute.distribution == "trace":
        mean = float(np.mean(compute.trace))
        return float(np.std(compute.trace)) / mean if mean else 0.0
    return 0.0


@lru_cache(maxsize=256)
def _distribution(distribution: str, variation: float, trace: tuple[float, ...], steps: int) -> tuple[Floats, Floats]:
    """Return the distribution of the mean of ``steps`` steps, in units of the mean of one step.

    The distribution of the deviation from the mean is put on a periodic grid that is wide enough for the tails of the
    sum not to overlap. So the grid need not hold the sum itself, which is wide for many ``steps``.

    Returns:
        Points, and the probability to lie below each point.
    """
    values = np.asarray(trace) / np.mean(trace) if distribution == "trace" else None
    deviation = _deviation_of(distribution, variation, values)
    spread = DEVIATIONS * deviation * sqrt(steps)
    shortest, longest = _range(distribution, variation, values)
    lowest, highest = shortest - 1.0 - spread, longest - 1.0 + spread
    width = (highest - lowest) / CELLS
    cells = np.arange(CELLS) + floor(lowest / width)  # numbers of the cells, 0 at the mean
    mass = _mass(cells, width, distribution, variation, values)
    mass /= mass.sum()
    shift = float((mass * cells).sum()) * width  # the mean on the grid, which should be 0
    circle = np.zeros(CELLS)
    circle[cells % CELLS] = mass
    total = np.fft.irfft(np.fft.rfft(circle) ** steps, CELLS)[cells % CELLS]
    below = np.clip(np.cumsum(np.clip(total, 0.0, None)), 0.0, 1.0)
    # A cell's mass lies within half a width of its middle: below its upper end lies all of it.
    points = 1.0 + ((cells + 0.5) * width) / steps - shift
    return points, below


def _deviation_of(distribution: str, variation: float, values: Floats | None) -> float:
    if values is not None:
        return float(np.std(values))
    return 1.0 if distribution == "exponential" else variation


def _range(distribution: str, variation: float, values: Floats | None) -> tuple[float, float]:
    """Return the bounds that a single step exceeds with probability 1e-13 to each side, in units of the mean."""
    if values is not None:
        return float(values.min()), float(values.max())
    if distribution == "exponential":
        return 0.0, 30.0
    variance = log1p(variation**2)
    return exp(-7.4 * sqrt(variance) - variance / 2), exp(7.4 * sqrt(variance) - variance / 2)


def _mass(cells: NDArray[np.int64], width: float, distribution: str, variation: float, values: Floats | None) -> Floats:
    """Return the probability of each cell for one step."""
    if values is not None:  # each value is split between the two nearest cells, which preserves the mean
        place = (values - 1.0) / width - cells[0]
        left = np.floor(place).astype(np.int64)
        mass = np.zeros(CELLS)
        np.add.at(mass, left, 1.0 - (place - left))
        np.add.at(mass, np.minimum(left + 1, CELLS - 1), place - left)
        return mass
    ends = 1.0 + (np.append(cells, cells[-1] + 1) - 0.5) * width
    if distribution == "exponential":
        above = np.exp(-np.maximum(ends, 0.0))
    else:
        variance = log1p(variation**2)
        logs = np.log(ends, out=np.full(ends.size, -inf), where=ends > 0)
        scores = (logs + variance / 2) / sqrt(2 * variance)
        above = 0.5 * np.fromiter(map(erfc, scores), np.float64, scores.size)
    return above[:-1] - above[1:]
