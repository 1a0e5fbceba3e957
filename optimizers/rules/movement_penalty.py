"""Weights of the ranks in an outer average, and what keeps the movement of one bad rank from spoiling it."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from lentando.comm.checks import check_choice, check_integer, is_number
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array

__all__ = ["MovementPenalty", "NormHistory", "Weighting", "normalized_factors", "rank_factors"]

Weighting: TypeAlias = Literal["equal", "steps", "samples", "normalized"]
"""By what an outer average weights the movements of the ranks."""
NormWeights: TypeAlias = Literal["inverse", "softmax"]

LEAST_DEVIATION = 0.01
"""Standard deviation of norms, as a fraction of their mean, below which no movement is an outlier for being unusual."""


@dataclass(frozen=True)
class MovementPenalty:
    """Reduces the influence of ranks whose parameters have moved too far in a round, in the average that ends it.

    The three parts of the pseudo gradient penalty of EDiT (Cheng et al., ICLR 2025, arXiv 2412.07210), each an option.
    G_i = |x_i - a| is the Euclidean norm of rank i's movement since the anchor, over all parameters (EDiT computes it
    for each layer). The norms travel with the control message: no message is added. Each round needs one more pass over
    the parameters, and takes the memory of ``weighting`` (``Settings``), with the whole anchor on every rank.

    Args:
        clip_norm: bound of G_i, > 0: a longer movement is multiplied by clip_norm / G_i. The average does not move
            farther, either, unless ``weighting="normalized"`` multiplies it afterwards. (EDiT bounds the norm
            of the average, which leaves its direction to the longest movement.)
        norm_weights: weights by the norms: "softmax", EDiT's exp(-G_i) / sum_j exp(-G_j), which depends on the scale of
            the parameters; or "inverse", 1 / G_i, with which every rank moves the average equally far. They multiply
            those of ``weighting``.
        outlier_threshold: number of standard deviations, > 0, by which G_i may exceed the mean of this rank's former
            norms. Beyond, the rank's movement is left out, and the rank continues from the average of the others. EDiT
            uses 3. If that would leave out all ranks, none is, because then it is not a single rank that differs.
        smoothing: weight of the newest norm in the exponentially moving mean and variance, > 0 and <= 1. The first
            norms count equally. Norms that are left out do not count.
        warmup_rounds: number of rounds, >= 2, in which norms are only collected.

    Raises:
        ConfigurationError: for values out of these ranges, and if nothing is chosen.

    Example:
        >>> MovementPenalty(clip_norm=10.0, outlier_threshold=3.0)
        MovementPenalty(clip_norm=10.0, norm_weights=None, outlier_threshold=3.0, smoothing=0.02, warmup_rounds=10)
        >>> rank_factors(np.ones(3), np.array([1.0, 1.0, 100.0]), MovementPenalty(clip_norm=1.0)).tolist()
        [1.0, 1.0, 0.01]
    """

    clip_norm: float | None = None
    norm_weights: NormWeights | None = None
    outlier_threshold: float | None = None
    smoothing: float = 0.02
    warmup_rounds: int = 10

    def __post_init__(self) -> None:
        for name in ("clip_norm", "outlier_threshold"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise ConfigurationError(f"{name} must be a number > 0, got {value!r}")
        if not (is_number(self.smoothing) and 0 < self.smoothing <= 1):
            raise ConfigurationError(f"smoothing must be a number > 0 and <= 1, got {self.smoothing!r}")
        if self.norm_weights is not None:
            check_choice("norm_weights", self.norm_weights, get_args(NormWeights))
        check_integer("warmup_rounds", self.warmup_rounds, 2, "rounds without outliers")
        if self.clip_norm is None and self.norm_weights is None and self.outlier_threshold is None:
            raise ConfigurationError(
                "MovementPenalty needs clip_norm, norm_weights or outlier_threshold: without one it does nothing"
            )


class NormHistory:
    """Moving mean and variance of the norms of each rank. All ranks hold the same, from their control messages.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        self._mean = np.zeros(size)
        self._variance = np.zeros(size)
        self._count = np.zeros(size)

    def outliers(self, norms: Array, counting: Array, threshold: float, smoothing: float, warmup_rounds: int) -> Array:
        """The ranks that are left out of a round, as a boolean array; notes the norms of the others.

        Args:
            norms: norm of each rank's movement.
            counting: whether each rank's movement counts otherwise.
            threshold: number of standard deviations above the mean that are usual.
            smoothing: least weight of a new norm.
            warmup_rounds: number of norms without which no rank is left out.
        """
        deviation = np.maximum(np.sqrt(self._variance), LEAST_DEVIATION * self._mean)
        is_known = self._count >= warmup_rounds
        beyond = norms - self._mean > threshold * deviation
        found = counting & is_known & beyond
        if (found == counting).all():
            found = np.zeros_like(found)
        noted = counting & ~found & np.isfinite(norms)
        self._count += noted
        weight = np.where(noted, np.maximum(smoothing, 1 / np.maximum(self._count, 1)), 0)
        difference = np.where(noted, norms - self._mean, 0)
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)
        return found

    def state_dict(self) -> dict[str, list[float]]:
        """Means, variances and numbers of norms, by rank."""
        return {"mean": self._mean.tolist(), "variance": self._variance.tolist(), "count": self._count.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; with another number of ranks, the history begins again."""
        if len(state["count"]) == self._count.size:
            self._mean, self._variance, self._count = (
                np.array(state[name], np.float64) for name in ("mean", "variance", "count")
            )


def normalized_factors(steps: Array) -> Array:
    """Factor of each rank's movement with which every gradient counts the same, and none is lost to slow ranks.

    A rank that has taken s_i steps has moved by the sum of s_i gradients. The mean over ranks of s_max / mean(s) times
    their movements is s_max times the mean of all gradients: the average moves as far as the rank with the most steps.
    This is FedNova's normalized average (Wang et al., NeurIPS 2020, arXiv 2007.07481) with weights p_i by steps, and
    s_max as effective number of steps.

    Args:
        steps: steps of each rank in the round; 0 for a rank that does not count. At least one is > 0.

    Example:
        >>> normalized_factors(np.array([12, 12, 12, 4])).tolist()
        [1.2, 1.2, 1.2, 1.2]
    """
    counting = steps > 0
    factors: Array = np.where(counting, steps.max() / steps[counting].mean(), 0.0)
    return factors


def rank_factors(work: Array, norms: Array | None, penalty: MovementPenalty | None) -> Array:
    """Factor of each rank's movement in the average; without clipping, the mean of those > 0 is 1.

    Args:
        work: weight of each rank before any penalty; 0 for a rank that does not count. At least one is > 0.
        norms: norm of each rank's movement; None without a penalty.
        penalty: penalty by the norms, or None.
    """
    counting = work > 0
    weights = np.where(counting, work, 0.0)
    unclipped: Array = weights * (counting.sum() / weights.sum())
    if penalty is None or norms is None or not np.isfinite(norms[counting]).all():  # the average will not be finite
        return unclipped
    norms = np.where(counting, norms, 0.0)  # a rank that is left out may have NaN, and 0 * NaN is NaN
    if penalty.norm_weights == "softmax":
        weights = weights * np.exp(np.minimum(norms[counting].min() - norms, 0))
    elif penalty.norm_weights == "inverse":
        moved = norms[counting & (norms > 0)]
        weights = weights / np.maximum(norms, moved.min()) if moved.size else weights
    factors: Array = weights * (counting.sum() / weights.sum())
    if penalty.clip_norm is not None:
        factors *= penalty.clip_norm / np.maximum(norms, penalty.clip_norm)
    return factors
