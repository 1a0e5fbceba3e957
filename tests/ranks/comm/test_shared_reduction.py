"""The all-reduce through shared memory, over a real MPI."""

import gc
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike
from numpy_model import in_shared_memory
from operation_checks import bits_on_each_rank
from ring_reference import along_the_ring, values_by_rank

from lentando.comm.collectives import plan_reduction
from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import NonFiniteError
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.reductions import plan
from lentando.comm.reductions.backend import BackendReduction
from lentando.comm.reductions.node import NodeMemory, NodeReduction, open_node_memory
from lentando.comm.reductions.plan import SHARED_FROM_BYTES, SHARED_FROM_BYTES_IF_SLOW
from lentando.comm.shared_memory import export_handle, import_handle
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.outer_step import OuterStep
from lentando.optimizers.rules.slow_momentum import SlowMomentum

FLOATS = (np.float32, np.float64, np.float16, bfloat16)
LENGTHS = (1, 3, 7, 1003, 70_001)


def planned(transport: Transport, buffer: Array) -> NodeReduction:
    memory = open_node_memory(transport, buffer)
    assert memory is not None
    return NodeReduction(transport, buffer, memory)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("elements", LENGTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_it_equals_the_ring_bit_identically(several: Transport, dtype: DTypeLike, elements: int, mean: bool) -> None:
    """Whole, and by its halves: also with fewer elements than ranks."""
    by_rank = values_by_rank(several.size, elements, dtype)
    expected = along_the_ring(by_rank, mean=mean)
    array = in_shared_memory(by_rank[several.rank])
    planned(several, array).all_reduce(mean)
    assert bits_on_each_rank(several, array) == {expected.tobytes()}
    array[:] = by_rank[several.rank]
    halves = planned(several, array)
    total = halves.reduce_scatter()
    assert (array == by_rank[several.rank]).all()
    several.barrier()  # as the outer step's question whether all is finite
    array[halves.shard] = (total / several.size if mean else total).astype(dtype)
    halves.all_gather()
    assert bits_on_each_rank(several, array) == {expected.tobytes()}


def test_no_rank_reads_too_early_or_writes_too_soon(several: Transport) -> None:
    """Ranks come late by turns, and write into their buffers as soon as they may."""
    size, rank = several.size, several.rank
    array = in_shared_memory(np.zeros(5000, np.int64))
    reduction = planned(several, array)
    generator = np.random.default_rng(rank)
    for step in range(60):
        array[:] = np.arange(5000) * step + rank
        if generator.random() < 0.3:
            time.sleep(0.002)
        reduction.all_reduce(mean=False)
        expected = size * np.arange(5000) * step + size * (size - 1) // 2
        assert (array == expected).all()
        array[:] = -1


@pytest.mark.parametrize("dtype", FLOATS)
def test_between_nodes_only_sums_of_a_node_travel(several: Transport, dtype: DTypeLike) -> None:
    """Two nodes with half of the ranks each, by turns: their memory is shared here, but read on their node alone."""
    size, rank, elements = several.size, several.rank, 10_007
    if size % 2:
        pytest.skip("two nodes with equally many ranks")
    nodes = [list(range(0, size, 2)), list(range(1, size, 2))]
    by_rank = values_by_rank(size, elements, dtype)
    array = in_shared_memory(by_rank[rank])
    offers = several.allgather(np.array(export_handle(array)))
    neighbors = [
        array if other == rank else import_handle(offers[other].tolist(), elements, array.dtype)
        for other in nodes[rank % 2]
    ]
    memory = NodeMemory(nodes, [found for found in neighbors if found is not None], several.barrier)
    reduction = NodeReduction(several, array, memory)
    before = several.traffic.copy()
    reduction.all_reduce(mean=False)
    sent_bytes = several.traffic.bytes_sent - before.bytes_sent
    wide = np.sum([values.astype(np.float64) for values in by_rank], axis=0)
    magnitude = np.sum([np.abs(values.astype(np.float64)) for values in by_rank], axis=0)
    precision = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(np.dtype(dtype).name, 0.0)
    wide_epsilon = 2.0**-52 if dtype is np.float64 else 2.0**-23
    assert (np.abs(array.astype(np.float64) - wide) <= (size * wide_epsilon + precision) * magnitude).all()
    assert len(bits_on_each_rank(several, array)) == 1
    # Of each half: this rank's part of the buffer, once, minus what stays on the node.
    own, local = -(-elements // len(nodes[0])), len(nodes[0])
    item_bytes = array.itemsize + max(4, array.itemsize)
    read_here_bytes = 2 * array.nbytes * (local - 1) // local
    assert sent_bytes - read_here_bytes <= (own + 1) / 2 * item_bytes + 64  # barriers
    shards = several.allgather(np.array([reduction.shard.start, reduction.shard.stop]))
    covered = sorted((start, stop) for start, stop in shards.tolist() if stop > start)
    assert covered[0][0] == 0
    assert covered[-1][1] == elements
    assert all(first[1] == second[0] for first, second in pairwise(covered))


def flat(elements: int, *, is_shared: bool) -> FlatBuffer:
    (layout,) = build_layouts([Entry("weights", (elements,), "float32", 0)])
    return FlatBuffer(layout, shared=is_shared)


def test_auto_takes_it_where_all_ranks_can(several: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SHARED_FROM_BYTES", 0)
    assert type(plan_reduction(several, flat(100, is_shared=True).array)) is NodeReduction
    one_is_not = flat(100, is_shared=several.rank != 0)
    assert type(plan_reduction(several, one_is_not.array)) is BackendReduction
    one_is_not.array[:] = several.rank
    plan_reduction(several, one_is_not.array).all_reduce(mean=True)
    assert (one_is_not.array == (several.size - 1) / 2).all()


def test_auto_leaves_small_ones_to_the_backend(several: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger ones too, where ranks wait without using the processor."""
    if several.local_size < several.size:
        pytest.skip("on one node")

    def plans(least_bytes: int) -> list[type[Any]]:
        """What one element less takes, and what so many bytes take."""
        least = least_bytes // 4
        return [type(plan_reduction(several, flat(n, is_shared=True).array)) for n in (least - 1, least)]

    assert plans(SHARED_FROM_BYTES) == [BackendReduction, NodeReduction]
    monkeypatch.setattr(several, "yields_cpu", True, raising=False)
    assert plans(SHARED_FROM_BYTES_IF_SLOW) == [BackendReduction, NodeReduction]


def of_two_groups(elements: int, dtype: DTypeLike) -> FlatBuffer:
    """Parameters of two groups, and a statistic, in shared memory."""
    name, third = np.dtype(dtype).name, elements // 3
    sizes = {0: third, 1: third, None: elements - 2 * third}
    (layout,) = build_layouts([Entry(f"part {group}", (size,), name, group) for group, size in sizes.items()])
    return FlatBuffer(layout, shared=True)


@pytest.mark.parametrize("elements", [1003, 300_001])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_outer_step_through_it_equals_the_ring_s(
    several: Transport, monkeypatch: pytest.MonkeyPatch, dtype: DTypeLike, elements: int
) -> None:
    """Within a node the mean is formed twice, and handed out block by block: after steps, and after ``adopt``."""
    monkeypatch.setattr(plan, "SHARED_FROM_BYTES", 0)
    results = []
    for algorithm in ("auto", "ring"):
        buffer = of_two_groups(elements, dtype)
        outer = OuterStep(several, [buffer], SlowMomentum(0.9, 0.6), algorithm=algorithm)  # type: ignore[arg-type]
        outer.reset_anchor()
        for step in range(4):
            buffer.array += np.sin(np.arange(elements) * (several.rank + 1) + step).astype(dtype)
            if step == 2:
                outer.average()
                outer.adopt()
            else:
                outer.run([0.1, 0.3])
        results.append(buffer.array.tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_no_parameter_changes_if_the_average_is_not_finite(
    several: Transport, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """One rank finds it in its part of the sum, also if the sum overflows."""
    monkeypatch.setattr(plan, "SHARED_FROM_BYTES", 0)
    buffer = of_two_groups(200_000, np.float32)
    outer = OuterStep(several, [buffer], SlowMomentum(0.9, 0.6))
    buffer.array[:] = several.rank
    if several.rank == 0 or bad == 3e38:
        buffer.array[199_990] = bad
    before = buffer.array.copy()
    with pytest.raises(NonFiniteError):
        outer.run([0.1, 0.1])
    np.testing.assert_array_equal(buffer.array, before)
    buffer.array[199_990] = 0
    outer.run([0.1, 0.1])
    assert len(bits_on_each_rank(several, buffer.array)) == 1


@pytest.mark.parametrize("elements", [1003, 200_000])
def test_large_values_with_a_finite_sum_are_averaged(
    several: Transport, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    """One rank's squares overflow: the sums themselves are looked at, by all ranks."""
    monkeypatch.setattr(plan, "SHARED_FROM_BYTES", 0)
    results = []
    for algorithm in ("auto", "ring"):
        buffer = of_two_groups(elements, np.float32)
        outer = OuterStep(several, [buffer], SlowMomentum(0.9, 0.6), algorithm=algorithm)  # type: ignore[arg-type]
        buffer.array[:] = several.rank
        if several.rank == several.size - 1:
            buffer.array[elements // 2] = 1e30
        outer.run([0.1, 0.1])
        results.append(buffer.array.tobytes())
    assert results[0] == results[1]


def test_memory_is_not_kept_once_the_plan_is_gone(several: Transport) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:lentando")

    gc.collect()
    before = maps()
    keep: Any = planned(several, in_shared_memory(np.zeros(3000, np.float32)))
    keep.all_reduce(mean=False)
    assert maps() == before + several.size
    several.barrier()
    del keep
    gc.collect()
    assert maps() == before
