"""Asynchronous functions: handles, names in any order, and the same results as the blocking functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lentando.torch as lt


def own(dtype: torch.dtype = torch.float32, length: int | None = None) -> torch.Tensor:
    return torch.full((2 * lt.size() if length is None else length, 3), lt.rank() + 1).to(dtype)


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "allreduce": (lt.allreduce_async, lt.allreduce),
    "allreduce_": (lt.allreduce_async_, lt.allreduce_),
    "sum": (lambda t: lt.allreduce_async(t, op=lt.Sum), lambda t: lt.allreduce(t, op=lt.Sum)),
    "grouped_allreduce": (lambda t: lt.grouped_allreduce_async([t, 2 * t]), lambda t: lt.grouped_allreduce([t, 2 * t])),
    "grouped_allreduce_": (
        lambda t: lt.grouped_allreduce_async_([t, 2 * t]),
        lambda t: lt.grouped_allreduce_([t, 2 * t]),
    ),
    "allgather": (lt.allgather_async, lt.allgather),
    "grouped_allgather": (lambda t: lt.grouped_allgather_async([t, t[:1]]), lambda t: lt.grouped_allgather([t, t[:1]])),
    "broadcast": (lambda t: lt.broadcast_async(t, 0), lambda t: lt.broadcast(t, 0)),
    "broadcast_": (lambda t: lt.broadcast_async_(t, 0), lambda t: lt.broadcast_(t, 0)),
    "alltoall": (lambda t: lt.alltoall_async(t, [2] * lt.size()), lambda t: lt.alltoall(t, [2] * lt.size())),
    "reducescatter": (lt.reducescatter_async, lt.reducescatter),
    "grouped_reducescatter": (
        lambda t: lt.grouped_reducescatter_async([t, 2 * t]),
        lambda t: lt.grouped_reducescatter([t, 2 * t]),
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_results_are_those_of_the_blocking_function(name: str, dtype: torch.dtype) -> None:
    start, run = CALLS[name]
    given = own(dtype)
    handle = start(given)
    found, expected = lt.synchronize(handle), run(own(dtype))
    assert lt.poll(handle)
    assert lt.synchronize(handle) is found
    pairs = [(found, expected)] if isinstance(found, torch.Tensor) else zip(found, expected, strict=True)
    for one, other in pairs:
        assert torch.equal(one, other)
    if name.endswith("_"):
        assert (found if isinstance(found, torch.Tensor) else found[0]) is given
    else:
        assert torch.equal(given, own(dtype))


def test_names_may_be_submitted_in_different_orders() -> None:
    names = [f"tensor {number}" for number in range(6)]
    shift = lt.rank() % len(names)
    handles = {
        name: lt.allreduce_async(torch.tensor([float(number)]), name=name, op=lt.Sum)
        for number, name in [*enumerate(names)][shift:] + [*enumerate(names)][:shift]
    }
    for number, name in enumerate(names):
        assert lt.synchronize(handles[name]).item() == number * lt.size()


def test_a_name_twice_in_flight_is_an_error() -> None:
    handle = None
    if lt.rank() == 0:
        handle = lt.allreduce_async(own(), name="twice")
        if lt.size() > 1:
            with pytest.raises(lt.ConfigurationError, match="twice"):
                lt.allreduce_async(own(), name="twice")
    lt.barrier()
    if lt.rank() > 0:
        handle = lt.allreduce_async(own(), name="twice")
    assert handle is not None
    assert torch.equal(lt.synchronize(handle), lt.allreduce(own()))


def test_what_is_no_handle_is_refused() -> None:
    for function in (lt.poll, lt.synchronize):
        with pytest.raises(lt.ConfigurationError, match="expected a handle"):
            function(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", [lt.Average, lt.Sum])
def test_sparse_tensors_are_added(op: lt.Op) -> None:
    dense = torch.zeros(5, 2)
    dense[lt.rank() % 5] = lt.rank() + 1.0
    dense[4] += 1
    handle = lt.sparse_allreduce_async(dense.to_sparse(1), name="sparse", op=op)
    found = handle()
    assert found.is_sparse
    assert torch.equal(found.to_dense(), lt.allreduce(dense, op=op))
    assert lt.synchronize(handle) is found
    with pytest.raises(lt.ConfigurationError, match="expects a sparse COO tensor"):
        lt.sparse_allreduce_async(dense, name="dense")
