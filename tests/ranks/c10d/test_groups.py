"""Groups of some of the ranks, and the works that operations return."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed import DistBackendError, ReduceOp

from lentando.comm.closed import is_closed


def test_two_groups_work_at_the_same_time() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    halves = [dist.new_group(list(range(start, size, 2))) for start in range(min(2, size))]
    own = halves[rank % 2]
    members = list(range(rank % 2, size, 2))
    assert dist.get_process_group_ranks(own) == members
    tensor = torch.tensor([float(rank)])
    work = dist.all_reduce(tensor, group=own, async_op=True)
    everyone = torch.ones(1)
    dist.all_reduce(everyone)
    assert work is not None
    work.wait()
    assert tensor.item() == sum(members)
    assert everyone.item() == size
    dist.broadcast(tensor, src=members[-1], group=own)
    dist.destroy_process_group(own)


def test_group_that_only_its_members_make() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == size - 1 and size > 1:
        return
    members = list(range(max(1, size - 1)))
    group = dist.new_group(members, use_local_synchronization=True)
    tensor = torch.ones(1)
    dist.all_reduce(tensor, group=group)
    assert tensor.item() == len(members)


def test_work_has_a_future_of_the_tensors() -> None:
    size = dist.get_world_size()
    tensor = torch.ones(3)
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    future = work.get_future().then(lambda done: done.value()[0] * 2)
    assert torch.equal(future.wait(), torch.full((3,), 2.0 * size))
    assert work.is_completed()
    assert work.is_success()
    assert work.exception() is None
    assert work.get_future().done()
    assert torch.equal(work.result()[0], torch.full((3,), float(size)))


def test_function_attached_to_a_future_may_wait_for_another_operation() -> None:
    """PowerSGD does."""
    size = dist.get_world_size()
    first, second = torch.ones(2), torch.full((1,), 2.0)

    def reduce_again(_: Any) -> torch.Tensor:
        work = dist.all_reduce(second, async_op=True)
        assert work is not None
        result: torch.Tensor = work.get_future().wait()[0]
        return result

    work = dist.all_reduce(first, async_op=True)
    assert work is not None
    assert work.get_future().then(reduce_again).wait().item() == 2.0 * size


def test_operations_complete_in_the_order_of_their_submission() -> None:
    size = dist.get_world_size()
    tensors = [torch.full((100_000 if number % 3 == 0 else 1,), float(number)) for number in range(12)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    dist.barrier()
    assert all(work is not None and work.is_completed() for work in works)
    assert all((tensor == number * size).all() for number, tensor in enumerate(tensors))


def test_different_calls_are_an_error_on_every_rank() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group(list(range(size)), timeout=timedelta(seconds=20))
    if size == 1:
        return
    call = dist.all_reduce if rank < size - 1 else lambda tensor, group: dist.broadcast(tensor, 0, group=group)
    with pytest.raises(DistBackendError, match="not about to do the same thing") as error:
        call(torch.ones(4), group=group)
    assert f"rank {size - 1}: broadcast(0, 4 x float32)" in str(error.value)
    with pytest.raises(DistBackendError, match="not possible any more"):
        dist.barrier(group=group)


def test_other_lengths_are_an_error_on_every_rank() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group(list(range(size)), timeout=timedelta(seconds=20))
    if size == 1:
        return
    with pytest.raises(DistBackendError, match=r"5 x float32.*4 x float32|4 x float32.*5 x float32"):
        dist.all_reduce(torch.ones(5 if rank == 0 else 4), group=group)


def test_splits_that_do_not_fit_are_an_error_on_every_rank() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group(list(range(size)), timeout=timedelta(seconds=20))
    if size == 1:
        return
    sends = [2] * size if rank == 0 else [1] * size
    with pytest.raises(DistBackendError, match="rank 0 sends 2 elements to rank 0, which expects 1"):
        dist.all_to_all_single(torch.empty(size), torch.ones(sum(sends)), [1] * size, sends, group=group)


def test_operation_that_others_do_not_call_times_out() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group(list(range(size)), timeout=timedelta(seconds=4))  # which ranks may take to make it
    if rank == 0 and size > 1:
        with pytest.raises(DistBackendError, match=r"barrier\(\) on rank 0 of \d+ has reached its timeout of 4 s"):
            dist.barrier(group=group)
    received = torch.empty(1)
    if rank == 0 and size > 1:
        work = dist.irecv(received, 1, group=group)
        assert work is not None
        with pytest.raises(DistBackendError, match="recv from rank 1 on rank 0 of .* has reached its timeout of 0.5 s"):
            work.wait(timedelta(seconds=0.5))
    dist.barrier()


def test_what_is_not_supported_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"ReduceOp.BAND needs integers or booleans, got float32"):
        dist.all_reduce(torch.ones(1), ReduceOp.BAND)
    with pytest.raises(RuntimeError, match=r'new_group\(backend="nccl"\)'):
        dist.group.WORLD.allreduce([torch.ones(1, device="meta")])


def test_monitored_barrier_names_the_ranks_that_are_missing() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group(list(range(size)))
    group.monitored_barrier(timedelta(seconds=20))
    if size > 2 and rank == 0:
        missing = ", ".join(map(str, range(2, size)))
        with pytest.raises(DistBackendError, match=rf"Ranks? {missing} failed to pass monitoredBarrier in 5 s"):
            group.monitored_barrier(timedelta(seconds=5), wait_all_ranks=True)
    elif size > 2 and rank == 1:
        with pytest.raises(DistBackendError, match="Rank 1 successfully reached monitoredBarrier"):
            group.monitored_barrier(timedelta(seconds=5))
    dist.barrier()


def test_group_that_is_destroyed_releases_its_communicators() -> None:
    """MPICH has some 2000, and each group needs several."""
    for number in range(20):
        group = dist.new_group(list(range(dist.get_world_size())))
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=group)
        assert tensor.item() == dist.get_world_size(), number
        members = group._members
        dist.destroy_process_group(group)
        assert dist.get_world_size() == 1 or (is_closed(members.messages) and is_closed(members.collectives))


def _ones(length: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(length, dtype=dtype)


def _options(of: Any, group: Any) -> Any:
    options = of()
    options.rootRank = group.rank()  # each rank is the root of a call of its own, which is refused before it begins
    return options


CALLS: dict[str, Callable[[Any, torch.dtype, torch.dtype], Any]] = {
    "allgather": lambda group, read, filled: group.allgather(
        [[_ones(2, filled) for _ in range(group.size())]], [_ones(2, read)]
    ),
    "all_gather_single": lambda group, read, filled: group.all_gather_single(
        _ones(2 * group.size(), filled), _ones(2, read)
    ),
    "reduce_scatter": lambda group, read, filled: group.reduce_scatter(
        [_ones(2, filled)], [[_ones(2, read) for _ in range(group.size())]]
    ),
    "reduce_scatter_single": lambda group, read, filled: group.reduce_scatter_single(
        _ones(2, filled), _ones(2 * group.size(), read)
    ),
    "alltoall": lambda group, read, filled: group.alltoall(
        [_ones(2, filled) for _ in range(group.size())], [_ones(2, read) for _ in range(group.size())]
    ),
    "all_to_all_single": lambda group, read, filled: group.all_to_all_single(
        _ones(group.size(), filled), _ones(group.size(), read), [], []
    ),
    "gather": lambda group, read, filled: group.gather(
        [[_ones(2, filled) for _ in range(group.size())]], [_ones(2, read)], _options(dist.GatherOptions, group)
    ),
    "scatter": lambda group, read, filled: group.scatter(
        [_ones(2, filled)], [[_ones(2, read) for _ in range(group.size())]], _options(dist.ScatterOptions, group)
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_inputs_and_outputs_of_different_dtypes_are_refused(call: str) -> None:
    """Before anything is sent: the next call succeeds."""
    for read, filled in ((torch.bfloat16, torch.float32), (torch.float64, torch.int64)):
        for dtypes in ((read, filled), (filled, read)):
            with pytest.raises(ValueError, match=f"{call}: expected inputs and outputs of one dtype"):
                CALLS[call](dist.group.WORLD, *dtypes).wait()
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert tensor.item() == dist.get_world_size()


def test_other_dtypes_of_one_size_are_an_error_on_every_rank() -> None:
    """MPI would not notice."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if size == 1:
        return
    dtype = torch.float32 if rank == 0 else torch.int32
    for call in [name for name in CALLS if name not in {"gather", "scatter"}]:
        group = dist.new_group(list(range(size)), timeout=timedelta(seconds=20))
        with pytest.raises(DistBackendError, match="not about to do the same thing"):
            CALLS[call](group, dtype, dtype).wait()


def test_lists_with_a_tensor_too_few_are_refused_before_the_call() -> None:
    size = dist.get_world_size()
    full, short = ([torch.ones(1) for _ in range(number)] for number in (size, size - 1))
    with pytest.raises(ValueError, match=f"alltoall: expected {size} inputs, got {size - 1}"):
        dist.group.WORLD.alltoall(full, short).wait()
    with pytest.raises(ValueError, match=f"alltoall: expected {size} outputs, got {size - 1}"):
        dist.group.WORLD.alltoall(short, full).wait()
    with pytest.raises(ValueError, match="gather: expected 1 inputs, got 0"):
        dist.group.WORLD.gather([full], [], _options(dist.GatherOptions, dist.group.WORLD)).wait()
    dist.barrier()


@pytest.mark.parametrize("has_thread", [True, False])
def test_calls_after_the_group_was_destroyed_fail_at_once(has_thread: bool) -> None:
    group: Any = dist.new_group(list(range(dist.get_world_size())))
    if has_thread:
        group.allreduce([torch.ones(1)]).wait()
    dist.destroy_process_group(group)
    options = dist.AllreduceOptions()
    options.asyncOp = False
    calls: list[Callable[[], Any]] = [
        lambda: group.allreduce([torch.ones(1)]),
        lambda: group.allreduce([torch.ones(1)], options),
        lambda: group.recv_anysource([torch.ones(1)], 0),
    ]
    for call in calls:
        work = call()
        assert work.is_completed()
        with pytest.raises(DistBackendError, match="not possible any more: this rank has left the group"):
            work.wait()
        with pytest.raises(RuntimeError, match="not possible any more"):
            work.get_future().wait()


def test_wait_honours_the_timeout_of_an_operation_that_cannot_end_itself() -> None:
    group: Any = dist.new_group(list(range(dist.get_world_size())), timeout=timedelta(seconds=4))
    release = threading.Event()
    works = [group._calls.submit("stuck", [number], lambda _: release.wait(60), [], None) for number in range(2)]
    started = time.monotonic()
    for work in works:
        with pytest.raises(DistBackendError, match=r"stuck\(\d\) has not ended within its timeout of 4 s"):
            work.wait()
    assert time.monotonic() - started < 30
    release.set()
    for work in works:
        work.get_future().wait()
    dist.barrier()


def test_any_exception_inside_an_operation_breaks_the_group() -> None:
    """A rank that has stopped in the middle of an operation is out of step with the others."""

    def fail(_: Any) -> None:
        raise KeyError("no such part")

    group: Any = dist.new_group(list(range(dist.get_world_size())))
    work = group._calls.submit("operation", [], fail, [], None)
    with pytest.raises(
        DistBackendError, match=r"operation\(\) has failed on rank \d of \d: KeyError.*no such part"
    ) as error:
        work.wait()
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(DistBackendError, match="not possible any more: KeyError"):
        dist.barrier(group=group)
