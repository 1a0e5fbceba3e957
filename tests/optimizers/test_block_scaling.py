"""Quantization in blocks: how far values are from what was sent, and values of unusual sizes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from quantized_reference import LEVELS, quantized

from lentando.comm.transport import Array
from lentando.optimizers.rules.wire import SentShare, WireDtype, wire_of

BITS: dict[WireDtype, int] = {"int8": 8, "int4": 4}


def share_of(name: WireDtype, x: Array) -> tuple[Array, SentShare]:
    message = np.zeros(wire_of(name).size_bytes(x), np.uint8)
    return message, wire_of(name).share_in(message, x)


def sent(name: WireDtype, x: Array) -> Array:
    _, share = share_of(name, x)
    found = share.write(slice(None), x, 1.0)
    assert_array_equal(share.read(slice(None)), found)
    return found


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(size=st.integers(1, 1200), seed=st.integers(0, 2**16), spread=st.floats(0, 12))
def test_integers_are_the_nearest_and_equal_an_independent_reference(
    name: WireDtype, dtype: Any, size: int, seed: int, spread: float
) -> None:
    random = np.random.default_rng(seed)
    x = (random.normal(size=size) * np.exp(spread * random.normal(size=size))).astype(dtype)
    found = sent(name, x)
    for start in range(0, size, 256):
        block = slice(start, start + 256)
        largest = abs(x[block]).max().astype(np.float64)
        assert abs(found[block].astype(np.float64) - x[block]).max() <= largest / LEVELS[name] / 2 * (1 + 2**-14)
    assert_array_equal(found, quantized(x, LEVELS[name]))


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(size=st.integers(1, 1000), seed=st.integers(0, 2**16), exponent=st.integers(-36, 36))
def test_what_was_read_is_coded_to_the_same_bytes(
    name: WireDtype, dtype: Any, size: int, seed: int, exponent: int
) -> None:
    x = (np.random.default_rng(seed).normal(size=size) * 10.0**exponent).astype(dtype)
    message, share = share_of(name, x)
    found = share.write(slice(None), x, 1.0)
    again, restored = share_of(name, x)
    restored.restore(found)
    assert_array_equal(again, message)


@pytest.mark.parametrize("name", LEVELS)
def test_ranges_of_whole_blocks_are_coded_as_the_whole(name: WireDtype) -> None:
    x = np.random.default_rng(0).normal(size=256 * 9 + 77)
    message, share = share_of(name, x)
    whole = share.write(slice(None), 0.25 * x, 1.0)
    again, parts = share_of(name, x)
    for start in range(0, x.size, 512):
        elements = slice(start, min(start + 512, x.size))
        assert_array_equal(parts.write(elements, x[elements], 0.25), whole[elements])
        assert_array_equal(parts.read(elements), whole[elements])
    assert_array_equal(again, message)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 1000])
def test_bytes_of_a_message(name: WireDtype, size: int) -> None:
    for dtype in (np.float32, np.float64):
        x: Array = np.zeros(size, dtype)
        scales, integers = -(-size // 256), -(-size * BITS[name] // 8)
        assert wire_of(name).size_bytes(x) == -(-(scales * x.itemsize + integers) // x.itemsize) * x.itemsize


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_largest_and_smallest_numbers(name: WireDtype, dtype: Any) -> None:
    """The largest stay finite; blocks that are smaller than all scales become zeros."""
    limits = np.finfo(dtype)
    assert np.isfinite(sent(name, np.array([limits.max, limits.min, 1.0], dtype))).all()
    assert_array_equal(sent(name, np.zeros(300, dtype)), np.zeros(300))
    for smallest in (limits.smallest_subnormal, limits.tiny, LEVELS[name] * limits.tiny * 0.99):
        assert_array_equal(sent(name, np.array([smallest, -smallest, 0], dtype)), np.zeros(3))
    normal = dtype(LEVELS[name]) * limits.tiny
    assert_array_equal(sent(name, np.array([normal, 0], dtype)), [normal, 0])


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_block_with_a_value_that_is_not_finite_is_not_finite_and_harms_no_other(name: WireDtype, bad: float) -> None:
    x: Array = np.ones(600, np.float32)
    x[300] = bad
    found = sent(name, x)
    assert np.isnan(found[256:512]).all()
    assert_array_equal(found[:256], sent(name, x[:256]))
    assert_array_equal(found[512:], sent(name, x[512:]))


@pytest.mark.parametrize("name", LEVELS)
def test_memory_of_zero_bytes_holds_zeros(name: WireDtype) -> None:
    _, share = share_of(name, np.ones(300, np.float32))
    assert_array_equal(share.read(slice(None)), np.zeros(300))
