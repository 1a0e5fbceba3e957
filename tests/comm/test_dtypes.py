from typing import Any

import numpy as np
import pytest

from lentando.comm.dtypes import accumulator_dtype, bfloat16, is_floating, numpy_dtype
from lentando.comm.errors import ConfigurationError


@pytest.mark.parametrize(
    ("dtype", "summed_in"),
    [
        (np.float16, np.float32),
        (bfloat16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.int64, np.int64),
        (np.uint8, np.uint8),
    ],
)
def test_sums_are_formed_in_float32_at_least(dtype: Any, summed_in: Any) -> None:
    assert accumulator_dtype(np.dtype(dtype)) == summed_in


@pytest.mark.parametrize("dtype", [complex, bool, object, "U3"])
def test_dtypes_without_a_sum_are_refused(dtype: Any) -> None:
    with pytest.raises(ConfigurationError, match="cannot reduce arrays of"):
        accumulator_dtype(np.dtype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float32, np.float64])
def test_floating_dtypes_are_floating(dtype: Any) -> None:
    assert is_floating(np.dtype(dtype))


@pytest.mark.parametrize("dtype", [np.int64, bool, complex, object])
def test_other_dtypes_are_not_floating(dtype: Any) -> None:
    assert not is_floating(np.dtype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float32, np.float64, np.int64, np.bool_])
def test_dtype_is_found_by_its_name(dtype: Any) -> None:
    assert numpy_dtype(np.dtype(dtype).name) == dtype
