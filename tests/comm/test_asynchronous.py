"""Asynchronous operations on ranks that are threads: matched by name, in any order, with an error on every rank."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lentando.comm import operations
from lentando.comm.asynchronous import Handle, close_operations, open_operations
from lentando.comm.errors import ConfigurationError, MismatchError, TransportError
from lentando.comm.operations import Average, Max, Sum
from lentando.comm.process_sets import add_process_set
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transports.single import SingleTransport
from lentando.comm.world import simulated_rank

LIMIT_SECONDS = 60.0


def on_ranks(size: int, program: Callable[[ThreadTransport], Any], *, threads: bool = True) -> list[Any]:
    """Results of ``program`` by rank; without ``threads`` as over a backend that admits one thread only."""

    def run(transport: ThreadTransport) -> Any:
        with simulated_rank(transport):
            if threads:
                open_operations(transport)
            result = program(transport)
            transport.barrier()  # as shutdown() does, all ranks agree before they leave
            close_operations(transport)
            return result

    return run_ranks(size, run)


def start_sum(values: Any, name: str | None, op: Any = Sum) -> tuple[Handle[None], np.ndarray]:
    array = np.array(values, np.float32)
    return operations.allreduce_call(array, op, name=name).start(), array


def error_of(handle: Handle[Any]) -> str:
    with pytest.raises(MismatchError) as found:
        handle.wait()
    return str(found.value)


@pytest.mark.parametrize("threads", [True, False])
def test_ranks_submit_in_different_orders(threads: bool) -> None:
    def program(transport: ThreadTransport) -> None:
        names = [f"tensor {number}" for number in range(60)]
        np.random.default_rng(transport.rank).shuffle(names)
        started = {name: start_sum([int(name.split()[1]), transport.rank], name) for name in names}
        for name, (handle, array) in reversed(started.items()):
            handle.wait()
            assert array.tolist() == [3 * int(name.split()[1]), 3]

    on_ranks(3, program, threads=threads)


@pytest.mark.parametrize("threads", [True, False])
def test_calls_without_a_name_are_matched_by_their_number(threads: bool) -> None:
    def program(transport: ThreadTransport) -> None:
        first, array = start_sum([1.0], None)
        second = operations.allgather_call(np.full((transport.rank + 1, 2), transport.rank)).start()
        third = operations.broadcast_call(np.array([transport.rank]), 1).start()
        assert second.wait()[:, 0].tolist() == [0, 1, 1]
        third.wait()
        first.wait()
        assert array.tolist() == [2.0]

    on_ranks(2, program, threads=threads)


def test_poll_becomes_true_without_a_wait() -> None:
    def program(transport: ThreadTransport) -> None:
        if transport.rank == 1:
            time.sleep(0.05)
        handle, array = start_sum([1.0], "x")
        while not handle.poll():
            time.sleep(0.001)
        assert array.tolist() == [2.0]
        assert handle.wait() is None

    on_ranks(2, program)


def test_poll_ends_without_threads_too() -> None:
    def program(transport: ThreadTransport) -> None:
        handle, array = start_sum([1.0], "x")
        assert not handle.poll()
        while not handle.poll():
            pass
        assert array.tolist() == [2.0]

    on_ranks(2, program, threads=False)


@pytest.mark.parametrize("threads", [True, False])
def test_different_calls_of_one_name_are_an_error_on_every_rank(threads: bool) -> None:
    def program(transport: ThreadTransport) -> list[str]:
        odd = transport.rank == 1
        handles = [
            start_sum([1.0] * (2 + odd), "shape")[0],
            start_sum([1.0], "op", Average if odd else Sum)[0],
            operations.allreduce_call(np.ones(1, np.int32 if odd else np.int64), Sum, name="dtype").start(),
        ]
        texts = [error_of(handle) for handle in handles]
        handle, array = start_sum([1.0], "op")  # the name is free again
        handle.wait()
        assert array.tolist() == [3.0]
        return texts

    for shape, op, dtype in on_ranks(3, program, threads=threads):
        assert "under the name 'allreduce.shape'" in shape
        assert "ranks 0 and 2: allreduce([2], float32, sum); rank 1: allreduce([3], float32, sum)" in shape
        assert "ranks 0 and 2: allreduce([1], float32, sum); rank 1: allreduce([1], float32, average)" in op
        assert "ranks 0 and 2: allreduce([1], int64, sum); rank 1: allreduce([1], int32, sum)" in dtype


@pytest.mark.parametrize("threads", [True, False])
def test_a_name_in_flight_is_refused_on_this_rank_alone(threads: bool) -> None:
    def program(transport: ThreadTransport) -> None:
        handle, array = start_sum([1.0], "x")
        if transport.rank == 0:
            with pytest.raises(ConfigurationError, match=r"rank 0 submits an operation named 'allreduce.x' while an e"):
                start_sum([1.0], "x")
        handle.wait()
        assert array.tolist() == [2.0]

    on_ranks(2, program, threads=threads)


@pytest.mark.parametrize("threads", [True, False])
def test_ranks_that_wait_for_different_names_get_an_error_that_lists_them(threads: bool) -> None:
    def program(transport: ThreadTransport) -> str:
        handle, _ = start_sum([1.0], "y" if transport.rank == 2 else "x")
        text = error_of(handle)
        handle, array = start_sum([1.0], "x")
        handle.wait()
        assert array.tolist() == [3.0]
        return text

    for text in on_ranks(3, program, threads=threads):
        assert "ranks 0 and 1: waits for 'allreduce.x' (not submitted by rank 2)" in text
        assert "rank 2: waits for 'allreduce.y' (not submitted by ranks 0 and 1)" in text


def test_a_rank_whose_other_thread_still_works_is_not_in_a_deadlock() -> None:
    def program(transport: ThreadTransport) -> None:
        first, second = ("x", "y") if transport.rank == 0 else ("y", "x")
        ready = threading.Event()

        def later() -> None:
            start_later, _ = start_sum([1.0], f"z{transport.rank}")  # makes this thread known
            ready.set()
            time.sleep(0.8)  # longer than it takes to find a deadlock
            handles.append(start_sum([2.0], second)[0])
            del start_later

        handles: list[Handle[None]] = []

        def in_rank() -> None:
            with simulated_rank(transport):
                later()

        thread = threading.Thread(target=in_rank)
        thread.start()
        ready.wait()
        handle, array = start_sum([2.0], first)
        handle.wait()
        assert array.tolist() == [4.0]
        thread.join()
        handles[0].wait()

    on_ranks(2, program)


def test_several_threads_wait_for_one_handle() -> None:
    def program(transport: ThreadTransport) -> None:
        if transport.rank == 1:
            time.sleep(0.1)
        handle = operations.allgather_call(np.array([transport.rank]), name="x").start()
        results: list[Any] = []
        threads = [threading.Thread(target=lambda: results.append(handle.wait().tolist())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_SECONDS)
        assert results == [[0, 1]] * 4

    on_ranks(2, program)


def test_an_operation_is_executed_without_its_handle() -> None:
    def program(transport: ThreadTransport) -> None:
        _, array = start_sum([1.0], "x")
        for _ in range(1000):
            if array[0] == 2.0:
                return
            time.sleep(0.005)
        pytest.fail("the operation was not executed")

    on_ranks(2, program)


def test_operations_that_a_rank_never_submits_fail_when_the_job_ends() -> None:
    handles = run_ranks(2, submit_on_rank_0_and_leave)
    assert "was not executed: the job has ended" in error_of(handles[0])


def submit_on_rank_0_and_leave(transport: ThreadTransport) -> Handle[None] | None:
    with simulated_rank(transport):
        open_operations(transport)
        handle = start_sum([1.0], "x")[0] if transport.rank == 0 else None
        transport.barrier()
        close_operations(transport)
    return handle


def test_sums_do_not_depend_on_what_is_summed_together() -> None:
    rng = np.random.default_rng(3)
    sizes = [1, 7, 100, 5000, 20_000, 300_000, 3, 0]
    values = [[rng.standard_normal(size).astype(np.float32) for size in sizes] for _ in range(3)]
    half = [[array.astype(np.float16) for array in arrays] for arrays in values]

    def program(transport: ThreadTransport) -> tuple[list[bytes], list[bytes]]:
        mine = [*values[transport.rank], *half[transport.rank]]
        together, alone = [array.copy() for array in mine], [array.copy() for array in mine]
        calls = [operations.allreduce_call(array, Average, name=str(n)) for n, array in enumerate(together)]
        for handle in [call.start() for call in calls]:
            handle.wait()
        for array in alone:
            operations.allreduce_call(array, Average, name="alone").start().wait()
        return [array.tobytes() for array in together], [array.tobytes() for array in alone]

    results = on_ranks(3, program)
    for number, wide in enumerate([*map(list, zip(*values, strict=True)), *map(list, zip(*half, strict=True))]):
        first, second, third = (array.astype(np.float32) for array in wide)
        expected = (((first + second) + third) / np.float32(3)).astype(wide[0].dtype)
        for together, alone in results:
            assert together[number] == expected.tobytes()
            assert alone[number] == expected.tobytes()


def test_factors_and_other_ops_are_applied_as_by_the_blocking_call() -> None:
    def program(transport: ThreadTransport) -> None:
        arrays = [np.array([3, 5], dtype) * (transport.rank + 1) for dtype in (np.int32, np.float16, np.complex64)]
        blocking = [array.copy() for array in arrays]
        options = {"prescale_factor": 0.5, "postscale_factor": 3.0}
        for handle in [operations.allreduce_call(array, Sum, **options).start() for array in arrays]:
            handle.wait()
        for array, expected in zip(arrays, blocking, strict=True):
            operations.allreduce(expected, Sum, **options)
            assert array.tobytes() == expected.tobytes()
        largest = np.array([transport.rank])
        operations.allreduce_call(largest, Max).start().wait()
        assert largest.tolist() == [1]

    on_ranks(2, program)


def test_a_process_set_negotiates_apart_from_the_others() -> None:
    def program(transport: ThreadTransport) -> None:
        odd = add_process_set([1, 2])
        handle, array = start_sum([1.0], "x")
        if odd.included():
            inside = np.array([1.0])
            operations.allreduce_call(inside, Sum, name="x", process_set=odd).start().wait()
            assert inside.tolist() == [2.0]
        handle.wait()
        assert array.tolist() == [3.0]

    on_ranks(3, program)


def test_a_single_rank_executes_at_once() -> None:
    with simulated_rank(SingleTransport()):
        handle, array = start_sum([2.0], "x", Average)
        assert handle.poll()
        assert handle.wait() is None
        assert array.tolist() == [2.0]


def test_submissions_after_the_end_are_refused() -> None:
    def program(transport: ThreadTransport) -> None:
        with simulated_rank(transport):
            open_operations(transport)
            call = operations.allreduce_call(np.ones(1), Sum)
            found = call.start()
            found.wait()
            from lentando.comm.asynchronous import operations_of

            mine = operations_of(transport)
            transport.barrier()
            close_operations(transport)
            with pytest.raises(TransportError, match="the job has ended"):
                mine.submit(call)

    run_ranks(2, program)
