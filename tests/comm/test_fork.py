"""Forked children: what they write into memory that ranks share stays their own."""

import os

import numpy as np
import pytest
from forking import succeeds_in_child

from lentando.comm.shared_memory import export_handle, import_handle, shared_zeros

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no anonymous files"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

FLOAT = np.dtype(np.float32)
ELEMENTS = 5000  # several pages


def test_a_child_reads_its_parents_values_and_its_writes_stay_its_own() -> None:
    arrays = [shared_zeros(ELEMENTS, FLOAT) for _ in range(3)]
    part = arrays[2][1000:3000]
    for number, array in enumerate(arrays):
        array[:] = number + 1

    def write() -> None:
        for number, array in enumerate(arrays):
            assert (array == number + 1).all()
        arrays[0][:] = -1
        part[:] = -2
        assert (arrays[0] == -1).all()
        assert arrays[2].min() == -2
        assert arrays[2].max() == 3
        assert export_handle(arrays[0]) is None  # no other process could see what is written here

    assert succeeds_in_child(write)
    for number, array in enumerate(arrays):
        assert (array == number + 1).all()


def test_a_child_of_a_child_has_what_the_child_has_written() -> None:
    array = shared_zeros(ELEMENTS, FLOAT)

    def write() -> None:
        array[:10] = 7

        def look() -> None:
            assert (array[:10] == 7).all()
            array[:10] = 8

        assert succeeds_in_child(look)
        assert (array[:10] == 7).all()

    assert succeeds_in_child(write)
    assert not array.any()


def test_the_parent_and_its_neighbors_still_share_after_a_fork() -> None:
    array = shared_zeros(ELEMENTS, FLOAT)
    offered = export_handle(array)
    assert offered is not None

    def write() -> None:
        array[:] = 1

    assert succeeds_in_child(write)
    opened = import_handle(offered, ELEMENTS, FLOAT)
    assert opened is not None
    opened[3] = 5
    assert array[3] == 5
    assert array.sum() == 5


def test_memory_made_by_a_child_can_be_offered() -> None:
    array = shared_zeros(ELEMENTS, FLOAT)

    def make() -> None:
        own = shared_zeros(ELEMENTS, FLOAT)
        own[:] = 2
        assert export_handle(own) is not None

        def write() -> None:
            own[:] = 3

        assert succeeds_in_child(write)
        assert (own == 2).all()

    assert succeeds_in_child(make)
    assert not array.any()
