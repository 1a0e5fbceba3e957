"""The users' collectives among thread ranks and virtual ranks. ``tests/ranks/comm/test_operations.py`` uses MPI."""

from collections.abc import Callable
from typing import Any

import operation_checks as checks
import pytest

from lentando.comm.process_sets import add_process_set
from lentando.comm.simulation import simulate
from lentando.comm.testing import run_ranks
from lentando.comm.world import rank, simulated_rank, size

AMONG_MEMBERS = [
    checks.adasum_follows_its_definition,
    checks.allgather_concatenates_rows,
    checks.allreduce_is_numpys,
    checks.alltoall_sends_rows,
    checks.broadcasts_come_from_the_root,
    checks.groups_equal_single_calls,
    checks.reducescatter_divides_rows,
]


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
        checks.adasum_adds_orthogonal_and_averages_parallel_gradients(size())
        checks.arrays_that_are_not_changed_may_have_any_layout(size())
        checks.averages_of_short_integers_do_not_overflow(size())
        checks.booleans_are_combined_by_min_and_max(size())
        checks.differing_calls_are_errors_on_every_rank(size())
        checks.factors_scale_before_and_after(size())
        checks.groups_may_be_generators(size())
        checks.numbers_are_combined_exactly(size())
        checks.wrong_arguments_are_errors(size())

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
