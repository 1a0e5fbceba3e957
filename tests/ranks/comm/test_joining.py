"""``operations.join``: ranks without data contribute zeros to the sums of the others."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lentando.comm import operations, world
from lentando.comm.errors import MismatchError
from lentando.comm.operations import Average, Max, Sum
from lentando.comm.process_sets import add_process_set, remove_process_set
from lentando.comm.transport import Transport

if world.transport().name == "horovod":
    pytest.skip("join is refused over Horovod's transport", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("error")


def check_result(last: int, first: int, size: int) -> None:
    """Every rank gets the same answer, which is not the rank that had joined before all others communicated."""
    assert operations.allgather_object(last) == [last] * size
    assert last != first or size == 1


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("first", [0, -1])
def test_a_rank_that_has_joined_contributes_zeros(transport: Transport, first: int, asynchronous: bool) -> None:
    rank, size = transport.rank, transport.size
    joined = size - 1 if first else 0
    if rank != joined:
        a, b = np.arange(5, dtype=np.float32), np.ones((2, 3), np.int64)
        calls: list[Any] = [
            operations.allreduce_call(a, Average, name="a"),
            operations.allreduce_call(b, Sum, name="b", prescale_factor=2.0),
            operations.grouped_allreduce_call([c := np.ones(2), d := np.ones(3)], Sum, name="c"),
            operations.barrier_call(),
        ]
        for handle in [call.start() for call in calls] if asynchronous else ():
            handle.wait()
        for call in () if asynchronous else calls:
            call.run()
        np.testing.assert_array_equal(a, np.arange(5, dtype=np.float32) * np.float32(size - 1) / np.float32(size))
        assert (b == 2 * (size - 1)).all()
        assert (c == size - 1).all()
        assert (d == size - 1).all()
    check_result(operations.join(), joined, size)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_calls_that_need_all_values_are_errors_where_they_are_made(transport: Transport, asynchronous: bool) -> None:
    rank, size = transport.rank, transport.size
    if size == 1:
        return
    if rank != 0:
        array = np.ones(2)
        calls: list[Any] = [
            operations.allgather_call(array, name="x"),
            operations.broadcast_call(array, 1, name="x"),
            operations.allreduce_call(array, Max, name="x"),
            operations.alltoall_call(np.ones(size), name="x"),
            operations.reducescatter_call(np.ones(size), Sum, name="x"),
        ]
        for call in calls:
            with pytest.raises(
                MismatchError, match=f"{call.operation}.* needs the values of all ranks, but rank 0 has"
            ):
                call.start().wait() if asynchronous else call.run()
        operations.allreduce_call(array, Sum).run()
        assert (array == size - 1).all()
    check_result(operations.join(), 0, size)


def test_ranks_join_one_after_the_other(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    for step in range(rank + 1):
        array = np.ones(1)
        operations.allreduce_call(array, Sum, name="gradient").start().wait()
        assert array[0] == size - step
        operations.allreduce(array, Sum, name="loss")
        assert array[0] == (size - step) ** 2
    assert operations.join() == size - 1


def test_an_earlier_operation_is_executed_after_a_rank_has_joined(transport: Transport) -> None:
    array = np.ones(2)
    handle = operations.allreduce_call(array, Sum, name="early").start()
    operations.join()
    handle.wait()
    assert (array == transport.size).all()


def test_ranks_of_a_process_set_join(transport: Transport) -> None:
    size = transport.size
    if size < 3:
        return
    some = add_process_set([0, size - 1])
    if some.included():
        if transport.rank == 0:
            array = np.ones(1)
            operations.allreduce(array, Sum, process_set=some)
            assert array[0] == 1
        last = operations.join(some)
        assert last == 0
    remove_process_set(some)


def test_another_operation_of_all_ranks_is_an_error_on_every_rank(transport: Transport) -> None:
    if transport.size == 1:
        return
    call: Callable[[], object] = operations.join if transport.rank == 0 else lambda: add_process_set([0])
    for _ in range(2):
        with pytest.raises(MismatchError, match=r"rank 0: has called join\(\); .*: calls add_process_set"):
            call()
    array = np.ones(1)
    operations.allreduce_call(array, Sum).start().wait()  # no rank has joined any more
    assert array[0] == transport.size
