"""The users' collectives are those of NumPy, on all ranks and within process sets of some of them."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from backends import needs_process_sets
from operation_checks import AMONG_MEMBERS, ON_ALL_RANKS

from lentando.comm import operations
from lentando.comm.process_sets import ProcessSet, add_process_set, global_process_set, remove_process_set
from lentando.comm.world import rank, size


@pytest.mark.parametrize("check", AMONG_MEMBERS, ids=lambda check: check.__name__)
def test_operation_on_all_ranks(check: Callable[..., None]) -> None:
    check(range(size()))


@pytest.mark.parametrize("check", ON_ALL_RANKS, ids=lambda check: check.__name__)
def test_operation_of_the_whole_job(check: Callable[[int], None]) -> None:
    check(size())


@pytest.fixture(scope="module")
def disjoint_sets() -> Iterator[list[ProcessSet]]:
    """Two process sets, which are used at the same time."""
    both = [add_process_set(range(first, size(), 2)) for first in (0, 1)]
    yield both
    assert all(remove_process_set(each) for each in both)


@needs_process_sets
def test_a_removed_set_leaves_no_thread() -> None:
    before = threading.active_count()
    for _ in range(5):
        last = add_process_set(range(size() - 1)) if size() > 1 else global_process_set
        if last.included():
            array = np.ones(3)
            operations.allreduce_call(array, operations.Sum, process_set=last).start().wait()
            assert (array == len(last.ranks)).all()
        assert remove_process_set(last) == (size() > 1)
    gc.collect()
    for _ in range(500):  # threads that have been asked to end
        if threading.active_count() <= before + 1:
            break
        time.sleep(0.01)
    assert threading.active_count() <= before + 1  # of all ranks


@needs_process_sets
@pytest.mark.skipif(size() < 2, reason="one rank has no two sets")
@pytest.mark.parametrize("check", AMONG_MEMBERS, ids=lambda check: check.__name__)
def test_operation_in_a_process_set(disjoint_sets: list[ProcessSet], check: Callable[..., Any]) -> None:
    mine = disjoint_sets[rank() % 2]
    check(mine.ranks, mine)
