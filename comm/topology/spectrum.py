"""Properties of a mixing matrix: which of its sums are 1, and how fast it reduces disagreement."""

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stochasticity", "second_modulus", "stochasticity"]

Stochasticity: TypeAlias = Literal["doubly", "column", "row", "none"]
"""Which sums of a non-negative matrix are 1: those of its columns (which push-sum needs), its rows, both or neither."""

SUM_TOLERANCE = 1e-6
"""Tolerance for sums, because matrices are often given in float32, or written by hand."""


def stochasticity(matrix: NDArray[Any]) -> Stochasticity:
    """Return which sums of a square, non-negative matrix are 1, to ``SUM_TOLERANCE``.

    Args:
        matrix: mixing matrix, shape ``(n, n)``.

    Example:
        >>> import numpy as np
        >>> stochasticity(np.array([[0.5, 0.25], [0.5, 0.75]]))
        'column'
        >>> stochasticity(np.array([[0.5, 0.5], [0.5, 0.5]]))
        'doubly'
    """
    columns = bool(np.all(np.abs(matrix.sum(axis=0) - 1) <= SUM_TOLERANCE))
    rows = bool(np.all(np.abs(matrix.sum(axis=1) - 1) <= SUM_TOLERANCE))
    if columns:
        return "doubly" if rows else "column"
    return "row" if rows else "none"


def second_modulus(matrix: NDArray[Any]) -> float:
    """Return the modulus of the second largest eigenvalue of a column-stochastic matrix. The largest is 1.

    It is the asymptotic factor by which disagreement shrinks with each application. It is 0 for a matrix that averages
    exactly, at once (its columns are equal up to rounding) or after a few applications.

    Args:
        matrix: mixing matrix, shape ``(n, n)``.

    Example:
        >>> import numpy as np
        >>> round(second_modulus(np.array([[0.75, 0.25], [0.25, 0.75]])), 12)
        0.5
    """
    # Columns sum to 1, so vectors that sum to 0 are mapped to such vectors. On them, this difference equals the matrix,
    # and the eigenvalue 1 is removed.
    disagreement: NDArray[np.float64] = matrix - matrix.mean(axis=1, keepdims=True)
    if np.abs(disagreement).max() <= 8 * np.finfo(np.float64).eps:
        return 0.0
    # For a nilpotent matrix, an eigenvalue solver returns a root of the rounding error. Powers of dyadic shares, which
    # most shares are, are exact: if one is 0, so are the eigenvalues.
    if not np.linalg.matrix_power(disagreement, 8).any():
        return 0.0
    return float(np.abs(np.linalg.eigvals(disagreement)).max())
