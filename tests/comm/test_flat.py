"""Many tensors in one buffer: nothing is lost, nothing overlaps, and every element knows whose it is."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lentando.comm.dtypes import bfloat16, numpy_dtype
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import (
    BLOCK,
    Entry,
    FlatBuffer,
    FlatLayout,
    Range,
    all_finite,
    all_moderate,
    build_layouts,
    describe,
    first_difference,
)
from lentando.comm.transport import Array

DTYPES = ("float32", "float64", "float16", "bfloat16")

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def entries(draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32",), at_least: int = 1) -> list[Entry]:
    described = draw(
        st.lists(
            st.tuples(shapes, st.sampled_from(dtypes), st.none() | st.integers(0, 2)), min_size=at_least, max_size=12
        )
    )
    return [Entry(f"tensor {number}", *description) for number, description in enumerate(described)]


def entry(name: str, *shape: int, dtype: str = "float32", group: int | None = 0) -> Entry:
    return Entry(name, shape, dtype, group)


@given(entries())
def test_entries_written_through_their_views_come_back(described: list[Entry]) -> None:
    buffer = FlatBuffer(FlatLayout(described))
    written = [np.random.default_rng(number).random(one.shape, np.float32) for number, one in enumerate(described)]
    for view, values in zip(buffer.views, written, strict=True):
        view[...] = values
    for view, values, one in zip(buffer.views, written, described, strict=True):
        assert view.shape == one.shape
        assert np.array_equal(view, values)


@given(entries())
def test_entries_fill_the_buffer_in_their_order(described: list[Entry]) -> None:
    layout = FlatLayout(described)
    flat = np.concatenate([np.full(one.size, number) for number, one in enumerate(described)])
    assert layout.size == flat.size
    for number in range(len(described)):
        assert (layout.view(flat, number) == number).all()


@given(entries())
def test_every_element_knows_its_entry(described: list[Entry]) -> None:
    layout = FlatLayout(described)
    owners = [one.name for one in described for _ in range(one.size)]
    assert [layout.entry_at(index).name for index in range(layout.size)] == owners


@pytest.mark.parametrize("index", [-1, 6])
def test_element_outside_the_buffer_has_no_entry(index: int) -> None:
    with pytest.raises(IndexError, match=f"element {index} of a buffer of 6"):
        FlatLayout([entry("a", 2, 3)]).entry_at(index)


@pytest.mark.slow
@given(entries())
def test_ranges_cover_the_buffer_and_know_each_elements_group(described: list[Entry]) -> None:
    ranges = FlatLayout(described).ranges
    reported = [one.group for one in ranges for _ in range(one.start, one.stop)]
    assert reported == [one.group for one in described for _ in range(one.size)]
    assert all(before.stop == after.start for before, after in pairwise(ranges))


def test_neighbours_of_one_group_share_a_range() -> None:
    layout = FlatLayout([entry("a", 2), entry("b", 3), entry("c", 4, group=1), entry("mean", 1, group=None)])
    assert layout.ranges == [Range(0, 5, 0), Range(5, 9, 1), Range(9, 10, None)]


@pytest.mark.slow
@given(entries(DTYPES, at_least=0))
def test_layouts_hold_each_dtype_once_in_order_of_first_appearance(described: list[Entry]) -> None:
    layouts = build_layouts(described)
    assert [layout.entries[0].dtype for layout in layouts] == list(dict.fromkeys(one.dtype for one in described))
    for layout in layouts:
        name = layout.entries[0].dtype
        assert layout.dtype.name == name
        assert list(layout.entries) == [one for one in described if one.dtype == name]


def test_views_share_memory_with_the_buffer() -> None:
    buffer = FlatBuffer(FlatLayout([entry("weight", 2, 3), entry("bias", 3)]))
    buffer.views[0][1, 2] = 7
    buffer.array[6] = 8
    assert buffer.array.tolist() == [0, 0, 0, 0, 0, 7, 8, 0, 0]
    assert buffer.views[1].tolist() == [8, 0, 0]


def test_buffer_uses_the_memory_that_it_is_given() -> None:
    memory = np.arange(3, dtype=bfloat16)
    buffer = FlatBuffer(FlatLayout([entry("a", 3, dtype="bfloat16")]), memory)
    buffer.views[0][0] = 5
    assert memory[0] == 5


@pytest.mark.parametrize(
    "memory", [np.zeros(4, np.float32), np.zeros(3), np.zeros((3, 1), np.float32), np.zeros(6, np.float32)[::2]]
)
def test_memory_that_does_not_fit_the_layout_is_refused(memory: Array) -> None:
    with pytest.raises(ConfigurationError, match="a buffer for this layout is 3 contiguous elements of float32, got"):
        FlatBuffer(FlatLayout([entry("a", 3)]), memory)


def test_names_that_appear_twice_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"must be unique, got \['b', 'c'\] more than once"):
        FlatLayout([entry(name, 1) for name in "abcbcc"])


def test_one_layout_holds_one_dtype() -> None:
    with pytest.raises(ConfigurationError, match=r"holds one dtype, got \['float16', 'float32'\]"):
        FlatLayout([entry("a", 1), entry("b", 1, dtype="float16")])


def test_layout_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"holds one dtype, got \[\]"):
        FlatLayout([])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_entry_that_is_not_finite_is_named(bad: float, dtype: str) -> None:
    buffer = FlatBuffer(
        FlatLayout([entry("a", 4, dtype=dtype), entry("b", 0, dtype=dtype), entry("c", 2, dtype=dtype)])
    )
    assert buffer.first_non_finite() is None
    buffer.array[4:] = bad
    assert buffer.first_non_finite() == "c"
    buffer.array[3] = bad
    assert buffer.first_non_finite() == "a"


def described(*layout: Entry) -> list[list[Any]]:
    return describe([FlatLayout(layout)])


def test_description_reports_everything_that_must_be_equal() -> None:
    assert described(Entry("weight", (2, 3), "float32", 1, "F")) == [["weight", [2, 3], "float32", 1, "F"]]


def test_first_difference_names_the_tensor_and_the_ranks() -> None:
    usual = described(entry("a", 2), entry("head", 2048))
    odd = described(entry("a", 2), entry("head", 4096))
    assert first_difference([usual, odd, usual]) == (
        "tensor number 1: ranks 0 and 2: 'head' of shape [2048], float32, parameter group 0; "
        "rank 1: 'head' of shape [4096], float32, parameter group 0"
    )


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (Entry("a", (2,), "float64", 0), "'a' of shape [2], float64"),
        (Entry("a", (2,), "float32", 1), "parameter group 1"),
        (Entry("a", (2,), "float32", None), "rank 1: 'a' of shape [2], float32"),
        (Entry("a", (2,), "float32", 0, "F"), "memory order F"),
        (Entry("b", (2,), "float32", 0), "'b' of shape [2]"),
    ],
)
def test_first_difference_says_in_what_the_tensors_differ(odd: Entry, words: str) -> None:
    assert words in first_difference([described(entry("a", 2)), described(odd)])


def test_first_difference_says_when_a_rank_has_fewer() -> None:
    words = first_difference([described(entry("a", 1), entry("b", 1)), described(entry("a", 1))])
    assert words.startswith("tensor number 1, of 1 or 2 in all: rank 0: 'b' of shape [1]")
    assert words.endswith("; rank 1: nothing")


def test_no_difference_is_reported_as_well() -> None:
    assert first_difference([described(entry("a", 1))] * 3) == "none"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 9000, BLOCK + 5, -1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_found_wherever_it_is(dtype: str, place: int, bad: float) -> None:
    values = np.ones(2 * BLOCK + 11, numpy_dtype(dtype))
    assert all_finite(values)
    assert all_moderate(values)
    values[place] = bad
    assert not all_finite(values)
    assert not all_moderate(values)


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 3e38), ("float64", 1e308), ("bfloat16", 3e38)])
@pytest.mark.parametrize("place", [0, -1])
def test_values_whose_sum_overflows_are_finite_and_not_moderate(dtype: str, largest: float, place: int) -> None:
    """Values of 1e17 are moderate: even a million ranks have a finite sum."""
    values = np.full(9000, 1e17, numpy_dtype(dtype))
    assert all_moderate(values)
    values[place] = -largest
    assert all_finite(values)
    assert not all_moderate(values)


def test_largest_values_of_float16_are_moderate() -> None:
    """They are summed in float32."""
    assert all_moderate(np.full(100, 65504, np.float16))
