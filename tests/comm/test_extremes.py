"""Floating-point numbers as integers of the same order: what minimum and maximum over ranks are made of."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lentando.comm.dtypes import bfloat16
from lentando.comm.extremes import from_ordered, needs_order, to_ordered
from lentando.comm.testing import run_ranks

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 1e-7, -1e-7, 3e4, -3e4]
DTYPES = [np.float16, bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_have_the_order_of_the_numbers(dtype: Any) -> None:
    numbers = np.array(sorted(SPECIAL, key=lambda number: (number, np.copysign(1, number)))).astype(dtype)
    ordered = to_ordered(numbers, "max").astype(np.int64)
    assert (np.diff(ordered) >= 0).all()
    back = np.empty_like(numbers)
    from_ordered(to_ordered(numbers, "max"), back)
    assert back.tobytes() == numbers.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["min", "max"])
def test_nan_of_either_sign_wins(dtype: Any, op: Any) -> None:
    numbers = np.array([np.nan, -np.nan, *SPECIAL]).astype(dtype)
    ordered = to_ordered(numbers, op)
    first = ordered.max() if op == "max" else ordered.min()
    assert (ordered[:2] == first).all()
    assert (ordered[2:] != first).all()
    found = np.empty(1, dtype)
    from_ordered(np.array([first]), found)
    assert np.isnan(found).all()


@given(st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1))
def test_the_maximum_over_ranks_is_numpys(pairs: list[tuple[float, float]]) -> None:
    values = np.array(pairs, np.float32).T
    for op, function in (("max", np.maximum), ("min", np.minimum)):
        arrays = [np.ascontiguousarray(row) for row in values]
        run_ranks(2, lambda transport, arrays=arrays, op=op: transport.allreduce(arrays[transport.rank], op))
        assert arrays[0].tobytes() == arrays[1].tobytes()
        np.testing.assert_array_equal(arrays[0], function(*values))


def test_sums_and_integers_are_left_to_the_backend() -> None:
    assert not needs_order(np.zeros(1), "sum")
    assert not needs_order(np.zeros(1, np.int64), "max")
    assert needs_order(np.zeros(1, bfloat16), "min")
