"""Division by a power of 2, which is done by a multiplication, is bit-identical."""

from typing import Any

import numpy as np
import pytest

from lentando.comm.division import divide

DIVISORS = [1, 2, 3, 4, 5, 0.5, 0.3, 4096]


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_it_equals_the_division_bit_identically(dtype: Any, divisor: float) -> None:
    """For values of all sizes: subnormal ones, and the largest."""
    integers = np.dtype(f"u{np.dtype(dtype).itemsize}")
    bits = np.random.default_rng(3).integers(0, np.iinfo(integers).max, 20_000, integers, endpoint=True)
    values = bits.view(dtype)
    values = values[~np.isnan(values)]
    expected = (values / divisor).view(integers)
    np.testing.assert_array_equal(divide(values, divisor).view(integers), expected)
    assert divide(values, divisor, values) is values
    np.testing.assert_array_equal(values.view(integers), expected)
