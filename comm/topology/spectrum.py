"""What a mixing matrix says about itself: which of its sums are 1, and how fast it forgets disagreement."""

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stochasticity", "second_modulus", "stochasticity"]

Stochasticity: TypeAlias = Literal["doubly", "column", "row", "none"]
"""Which sums of a non-negative matrix are 1: those of its columns (push-sum's need), of its rows, of both, or
neither.
"""

SUM_TOLERANCE = 1e-6
"""How far from 1 a sum may be: matrices are often written in float32, or by hand."""


def stochasticity(matrix: NDArray[Any]) -> Stochasticity:
    """Which sums of a square, non-negative matrix are 1, to ``SUM_TOLERANCE``."""
    columns = bool(np.all(np.abs(matrix.sum(axis=0) - 1) <= SUM_TOLERANCE))
    rows = bool(np.all(np.abs(matrix.sum(axis=1) - 1) <= SUM_TOLERANCE))
    if columns:
        return "doubly" if rows else "column"
    return "row" if rows else "none"


def second_modulus(matrix: NDArray[Any]) -> float:
    """Modulus of the second largest eigenvalue of a column-stochastic matrix; the largest is 1.

    It is the factor by which disagreement shrinks with each application, in the long run. 0 for a matrix that
    averages exactly, at once (its columns are equal up to rounding) or after a few applications.
    """
    # Columns sum to 1, so that vectors that sum to 0 stay among themselves. There, this does what the matrix does;
    # the eigenvalue 1 is gone.
    disagreement: NDArray[np.float64] = matrix - matrix.mean(axis=1, keepdims=True)
    if np.abs(disagreement).max() <= 8 * np.finfo(np.float64).eps:
        return 0.0
    # Asked of a nilpotent matrix, an eigenvalue solver answers with a root of the rounding error. Powers of dyadic
    # shares, which most are, are exact: if one is 0, so are the eigenvalues.
    if not np.linalg.matrix_power(disagreement, 8).any():
        return 0.0
    return float(np.abs(np.linalg.eigvals(disagreement)).max())
