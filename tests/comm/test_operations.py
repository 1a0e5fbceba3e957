"""The users' collectives among thread ranks and virtual ranks. ``tests/ranks/comm/test_operations.py`` uses MPI."""

from collections.abc import Callable
from typing import Any

import pytest
from operation_checks import AMONG_MEMBERS, ON_ALL_RANKS

from lentando.comm.process_sets import add_process_set
from lentando.comm.simulation import simulate
from lentando.comm.testing import run_ranks
from lentando.comm.world import rank, simulated_rank, size


def on_thread_ranks(count: int, program: Callable[[], Any]) -> list[Any]:
    def run(transport: Any) -> Any:
        with simulated_rank(transport):
            return program()

    return run_ranks(count, run)


@pytest.mark.parametrize("count", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_operations_of_thread_ranks(count: int) -> None:
    def program() -> None:
        for check in AMONG_MEMBERS:
            check(range(size()))
        for check_all in ON_ALL_RANKS:
            check_all(size())

    on_thread_ranks(count, program)


@pytest.mark.slow
def test_operations_in_two_process_sets_of_thread_ranks_and_of_virtual_ranks() -> None:
    def program() -> None:
        sets = [add_process_set([0, 2, 3]), add_process_set([4, 1])]
        mine = sets[0] if rank() in (0, 2, 3) else sets[1]
        for check in AMONG_MEMBERS:
            check(mine.ranks, mine)

    on_thread_ranks(5, program)
    simulate(program, 5, local_size=2)
