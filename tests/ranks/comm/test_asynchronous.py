"""Asynchronous operations over the real backend: any order, right values, and no work while nothing is submitted."""

import resource
import threading
import time
from typing import Any

import numpy as np
import pytest

from lentando.comm import operations
from lentando.comm.asynchronous import Handle
from lentando.comm.capabilities import Background
from lentando.comm.errors import ConfigurationError, MismatchError
from lentando.comm.operations import Average, Max, Sum
from lentando.comm.transport import Transport

TENSORS = 200


def started(kind: int, name: str, rank: int, size: int) -> tuple[Handle[Any], Any, Any]:
    """An operation of one of several kinds: its handle, its array or None, and what must become of it."""
    rng = np.random.default_rng(kind)
    by_rank = [rng.integers(-50, 50, int(rng.integers(1, 3000))) for _ in range(1)]
    base = by_rank[0]
    values = [(base + rank).astype([np.float32, np.float64, np.int32, np.float16][kind % 4]) for rank in range(size)]
    mine = values[rank].copy()
    if kind % 10 == 9:
        return (
            operations.allgather_call(mine[: rank + 1], name=name).start(),
            None,
            np.concatenate([values[other][: other + 1] for other in range(size)]),
        )
    if kind % 10 == 8:
        return operations.broadcast_call(mine, kind % size, name=name).start(), mine, values[kind % size]
    if kind % 10 == 7:
        return operations.allreduce_call(mine, Max, name=name).start(), mine, values[-1]
    return operations.allreduce_call(mine, Sum, name=name).start(), mine, sum(values[1:], values[0])


@pytest.mark.parametrize("seed", range(4))
def test_every_rank_may_submit_and_wait_in_an_order_of_its_own(transport: Transport, seed: int) -> None:
    rank, size = transport.rank, transport.size
    rng = np.random.default_rng([seed, rank])
    waiting: list[tuple[Handle[Any], Any, Any]] = []
    for kind in rng.permutation(TENSORS):
        waiting.append(started(int(kind), f"tensor {kind}", rank, size))
        if rng.random() < 0.02:
            time.sleep(float(rng.random()) * 0.003)
    for number in rng.permutation(TENSORS):
        handle, array, expected = waiting[number]
        result = handle.wait()
        np.testing.assert_array_equal(result if array is None else array, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_means_of_integers_are_rounded_towards_zero(transport: Transport, dtype: type[np.integer[Any]]) -> None:
    sign = -1 if dtype is not np.uint8 else 1
    array = np.array([sign * (transport.rank + 2)], dtype)
    operations.allreduce_call(array, Average, name="integers").start().wait()
    assert array.tolist() == [sign * (sum(range(2, transport.size + 2)) // transport.size)]


def test_blocking_calls_do_not_wait_for_asynchronous_ones(transport: Transport) -> None:
    """A rank submits before, another one after the same barrier."""
    array = np.ones(3)
    call = operations.allreduce_call(array, Sum, name="around a barrier")
    handle = call.start() if transport.rank % 2 else None
    operations.barrier()
    handle = handle or call.start()
    operations.barrier()
    handle.wait()
    assert (array == transport.size).all()


def test_sums_alone_and_together_are_bit_identical(transport: Transport) -> None:
    size = transport.size
    lengths = [1, 3, 1000, 40_000, 300_000, 700_001, 0, 17]
    values = [
        [np.random.default_rng([rank, length]).standard_normal(length) for length in lengths] for rank in range(size)
    ]
    for dtype in (np.float32, np.float16):
        together = [array.astype(dtype) for array in values[transport.rank]]
        alone = [array.copy() for array in together]
        for handle in [operations.allreduce_call(array, Average).start() for array in together]:
            handle.wait()
        for number, array in enumerate(alone):
            operations.allreduce_call(array, Average).start().wait()
            total = values[0][number].astype(dtype).astype(np.float32)
            for rank in range(1, size):
                total = total + values[rank][number].astype(dtype).astype(np.float32)
            expected = (total / np.float32(size)).astype(dtype)
            if isinstance(transport, Background):  # others are executed one by one, by the backend's own sum
                assert array.tobytes() == expected.tobytes()
            assert together[number].tobytes() == array.tobytes()


@pytest.mark.parametrize("elements", [3, 30_000, 300_000])
def test_sums_and_means_in_flight_together_are_not_mixed_up(transport: Transport, elements: int) -> None:
    """Whole numbers, which are exact in every order: gathered, packed in shared memory, and summed in place."""
    rank, size = transport.rank, transport.size
    arrays = [np.full(elements + number, 2.0 * (rank + number), np.float32) for number in range(6)]
    factors = (1.0, 0.5)
    handles = [
        operations.allreduce_call(
            array, (Sum, Average)[number % 2], postscale_factor=factors[number // 3], name=str(number)
        ).start()
        for number, array in enumerate(arrays)
    ]
    for number, (handle, array) in enumerate(zip(handles, arrays, strict=True)):
        handle.wait()
        total = sum(2.0 * (other + number) for other in range(size))
        expected = (total, np.float32(total) / np.float32(size))[number % 2] * factors[number // 3]
        np.testing.assert_array_equal(array, np.float32(expected))


def test_nothing_is_done_while_nothing_is_submitted(transport: Transport) -> None:
    if transport.name in ("horovod", "torch"):
        pytest.skip(f"a thread of {transport.name} is always at work")
    operations.allreduce_call(np.ones(1), Sum).start().wait()

    def rests() -> bool:
        time.sleep(0.05)
        before = resource.getrusage(resource.RUSAGE_SELF)
        threading.Event().wait(0.5)
        after = resource.getrusage(resource.RUSAGE_SELF)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return after.ru_nvcsw - before.ru_nvcsw <= 3 and seconds < 0.01  # the main thread's own, and MPI's

    # On a busy machine, threads take a while to come to rest.
    assert any(transport.allgather(np.array([rests()])).all() for _ in range(10))


def test_an_operation_completes_while_the_program_computes(transport: Transport) -> None:
    array = np.ones(2_000_000, np.float32)
    handle = operations.allreduce_call(array, Sum).start()
    matrix = np.ones((300, 300))
    for _ in range(20_000):
        matrix = matrix @ matrix * 1e-3
        if handle.poll():
            break
    else:
        pytest.fail("the operation made no progress")
    assert (array == transport.size).all()


@pytest.mark.parametrize("what", ["shape", "dtype", "op", "kind"])
def test_different_calls_of_one_name_are_an_error_on_every_rank(transport: Transport, what: str) -> None:
    if transport.size == 1:
        return
    odd = transport.rank == transport.size - 1
    array = np.ones(2 + (odd and what == "shape"), np.float32 if odd and what == "dtype" else np.float64)
    call = operations.allreduce_call(array, Average if odd and what == "op" else Sum, name="same")
    if odd and what == "kind":
        call = operations.broadcast_call(array, 0, name="same")
    with pytest.raises(MismatchError, match=f"rank {transport.size - 1}"):
        call.start().wait()
    array = np.ones(2)
    operations.allreduce_call(array, Sum, name="same").start().wait()
    assert (array == transport.size).all()


def test_the_same_name_twice_is_refused_where_it_happens(transport: Transport) -> None:
    if transport.size == 1:
        return
    call = operations.allreduce_call(np.ones(1), Sum, name="twice")
    if transport.rank == 0:
        first = call.start()
        with pytest.raises(ConfigurationError, match="in flight"):
            operations.allreduce_call(np.ones(1), Sum, name="twice").start()
    operations.barrier()
    (first if transport.rank == 0 else call.start()).wait()
