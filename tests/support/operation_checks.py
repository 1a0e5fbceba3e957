"""Checks of the users' collectives against NumPy, for ranks of any kind and number. All ranks call them together.

Each rank can compute the arrays of all ranks (``values``), and from these the expected results.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from numpy.typing import DTypeLike

from lentando.comm import operations as ops
from lentando.comm.errors import ConfigurationError, MismatchError, UnsupportedOperationError
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.comm.transport import Array, Transport
from lentando.comm.world import rank

FLOATS: tuple[DTypeLike, ...] = (np.float16, bfloat16, np.float32, np.float64)
INTEGERS: tuple[DTypeLike, ...] = (np.uint8, np.int8, np.int16, np.int32, np.int64)
SHAPES: tuple[tuple[int, ...], ...] = ((7,), (3, 2), (), (0,), (0, 3))


def values(of_rank: int, shape: Sequence[int], dtype: DTypeLike, number: int = 0) -> Array:
    """Small integers of one rank, which every dtype represents exactly, as it does their sums."""
    count = int(np.prod(shape))
    small = (np.arange(count) * 3 + 5 * of_rank + number) % 7
    return (small - (0 if np.dtype(dtype).kind in "ub" else 3)).reshape(tuple(shape)).astype(dtype)


def same(array: Any, expected: Array) -> None:
    """Assert that shape, dtype and every element are equal."""
    assert array.shape == expected.shape, (array.shape, expected.shape)
    assert array.dtype == expected.dtype, (array.dtype, expected.dtype)
    np.testing.assert_array_equal(array, expected)


def bits_on_each_rank(transport: Transport, array: Array) -> set[bytes]:
    """The different contents that an array has on the ranks: one, if it is bit-identical everywhere."""
    return {copy.tobytes() for copy in transport.allgather(array)}


def raised(call: Callable[[], object], kind: type[Exception], *parts: str) -> None:
    """Assert that a call raises an error of this class, whose message contains these parts."""
    with pytest.raises(kind) as found:
        call()
    for part in parts:
        assert part in str(found.value)


def allreduce_is_numpys(members: Sequence[int], process_set: ProcessSet = global_process_set) -> None:
    functions: dict[ops.Op, Any] = {
        ops.Sum: np.add.reduce,
        ops.Min: np.minimum.reduce,
        ops.Max: np.maximum.reduce,
        ops.Product: np.multiply.reduce,
    }
    for dtype in (*FLOATS, *INTEGERS):
        for shape in SHAPES:
            by_rank = [values(member, shape, dtype).astype(np.float64) for member in members]
            for op, function in functions.items():
                array = values(rank(), shape, dtype)
                ops.allreduce(array, op, process_set=process_set)
                same(array, np.asarray(function(by_rank)).astype(np.int64).astype(dtype))
            array = values(rank(), shape, dtype)
            ops.allreduce(array, process_set=process_set)
            mean = np.add.reduce(by_rank) / len(members)
            wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
            expected = (np.add.reduce(by_rank).astype(wide) / wide(len(members))).astype(dtype)
            same(array, np.asarray(np.trunc(mean)).astype(dtype) if dtype in INTEGERS else np.asarray(expected))


def averages_of_short_integers_do_not_overflow(size: int) -> None:
    array = np.full(3, 100, np.int8)
    ops.allreduce(array)
    same(array, np.full(3, 100, np.int8))
    same(ops.reducescatter(np.full(size, -100, np.int8)), np.full(1, -100, np.int8))
    largest = np.array([-(2**62) // size], np.int64)  # float64 would round it
    expected = largest.copy()
    ops.allreduce(largest)
    same(largest, expected)


def factors_scale_before_and_after(size: int) -> None:
    before, after = 0.37, 1.83
    for dtype in (*FLOATS, *INTEGERS):
        numbers = (np.arange(9) - (0 if np.dtype(dtype).kind == "u" else 4)).astype(dtype)

        def scaled(array: Array, factor: float, dtype: DTypeLike = dtype) -> Array:
            wide: Any = np.float32 if np.dtype(dtype).itemsize < 4 and dtype in FLOATS else np.dtype(dtype).type
            if dtype in INTEGERS:
                return np.trunc(array.astype(np.float64) * factor).astype(dtype)
            return (array.astype(wide) * wide(factor)).astype(dtype)

        array = numbers.copy()
        ops.allreduce(array, ops.Sum, prescale_factor=before, postscale_factor=after)
        total = np.add.reduce([scaled(numbers, before).astype(np.float64)] * size).astype(dtype)
        if np.dtype(dtype).itemsize > 2 or size <= 2:  # otherwise the sum itself is rounded
            np.testing.assert_allclose(
                array.astype(np.float64), scaled(total, after).astype(np.float64), rtol=0 if dtype in INTEGERS else 1e-6
            )
        rows = ops.reducescatter(numbers, ops.Sum, prescale_factor=before, postscale_factor=after)
        start = sum(9 // size + (r < 9 % size) for r in range(rank()))
        np.testing.assert_allclose(
            rows.astype(np.float64), array[start : start + len(rows)].astype(np.float64), rtol=1e-2
        )
    grouped = [np.ones(2), np.ones(3, np.float32)]
    ops.grouped_allreduce(grouped, ops.Sum, prescale_factor=0.5, postscale_factor=4.0)
    same(grouped[0], np.full(2, 2.0 * size))
    same(grouped[1], np.full(3, 2.0 * size, np.float32))


def allgather_concatenates_rows(members: Sequence[int], process_set: ProcessSet = global_process_set) -> None:
    for dtype in (*FLOATS, *INTEGERS, np.bool_):
        for others in ((), (2, 3), (0,)):
            mine = values(rank(), (rank() % 3, *others), dtype)  # none of rank 0
            expected = np.concatenate([values(member, (member % 3, *others), dtype) for member in members])
            same(ops.allgather(mine, process_set=process_set), expected)
    same(ops.allgather(np.array(rank()), process_set=process_set), np.array(members))
    arrays = [values(rank(), (rank() % 2 + number, 2), dtype, number) for number, dtype in enumerate(FLOATS)]
    arrays += [np.array(rank() % 2 == 0), np.zeros((2, 0))]
    gathered = ops.grouped_allgather(arrays, process_set=process_set)
    for number, dtype in enumerate(FLOATS):
        parts = [values(member, (member % 2 + number, 2), dtype, number) for member in members]
        same(gathered[number], np.concatenate(parts))
    same(gathered[4], np.array([member % 2 == 0 for member in members]))
    same(gathered[5], np.zeros((2 * len(members), 0)))
    assert ops.grouped_allgather([], process_set=process_set) == []


def broadcasts_come_from_the_root(members: Sequence[int], process_set: ProcessSet = global_process_set) -> None:
    for root in members:
        for dtype in (*FLOATS, *INTEGERS, np.bool_):
            for shape in SHAPES:
                array = values(rank(), shape, dtype)
                ops.broadcast(array, root, process_set=process_set)
                same(array, values(root, shape, dtype))
        found = ops.broadcast_object({"rank": rank()}, root, process_set=process_set)
        assert found == {"rank": root}
    assert ops.allgather_object(rank(), process_set=process_set) == list(members)
    ops.barrier(process_set)


def alltoall_sends_rows(members: Sequence[int], process_set: ProcessSet = global_process_set) -> None:
    def splits_of(member: int) -> list[int]:
        return [(member + 2 * position) % 3 for position in range(len(members))]

    me = members.index(rank())
    for dtype in (*FLOATS, *INTEGERS, np.bool_):
        for others in ((), (2,), (2, 0)):
            by_member = [values(member, (sum(splits_of(member)), *others), dtype) for member in members]
            rows, received = ops.alltoall(by_member[me], splits_of(rank()), process_set=process_set)
            parts = []
            for member, array in zip(members, by_member, strict=True):
                start = sum(splits_of(member)[:me])
                parts.append(array[start : start + splits_of(member)[me]])
            same(rows, np.concatenate(parts))
            same(received, np.array([splits_of(member)[me] for member in members], np.int32))
    equal = np.repeat(np.arange(len(members)), 2)
    rows, received = ops.alltoall(equal + 100 * rank(), process_set=process_set)
    same(rows, np.repeat([me + 100 * member for member in members], 2))
    same(received, np.full(len(members), 2, np.int32))
    nothing, received = ops.alltoall(np.zeros((0, 4)), [0] * len(members), process_set=process_set)
    same(nothing, np.zeros((0, 4)))


def reducescatter_divides_rows(members: Sequence[int], process_set: ProcessSet = global_process_set) -> None:
    size, me = len(members), members.index(rank())
    for dtype in (*FLOATS, *INTEGERS, np.complex64):
        for rows in (2 * size, 2 * size + 1, size - 1, 0):
            for others in ((), (3, 2)):
                total = np.add.reduce([values(member, (rows, *others), dtype).astype(complex) for member in members])
                first = [rows // size + (r < rows % size) for r in range(size)]
                mine = slice(sum(first[:me]), sum(first[: me + 1]))
                array = values(rank(), (rows, *others), dtype)
                result = ops.reducescatter(array, ops.Sum, process_set=process_set)
                same(result, (total if dtype == np.complex64 else total.real).astype(np.dtype(dtype))[mine])
                same(array, values(rank(), (rows, *others), dtype))
    grouped = ops.grouped_reducescatter([np.ones((size, 2)), np.full(1, rank())], process_set=process_set)
    same(grouped[0], np.ones((1, 2)))
    same(grouped[1], np.full(1, sum(members) // size)[: int(me == 0)])


def groups_equal_single_calls(members: Sequence[int], process_set: ProcessSet = global_process_set) -> None:
    shapes_and_dtypes = [(shape, dtype) for shape in SHAPES for dtype in (np.float32, np.int32, bfloat16, np.float32)]
    for op in (ops.Average, ops.Sum, ops.Min, ops.Max, ops.Product):
        arrays = [values(rank(), shape, dtype, number) for number, (shape, dtype) in enumerate(shapes_and_dtypes)]
        single = [array.copy() for array in arrays]
        ops.grouped_allreduce(arrays, op, process_set=process_set)
        for array in single:
            ops.allreduce(array, op, process_set=process_set)
        for array, expected in zip(arrays, single, strict=True):
            same(array, expected)
    ops.grouped_allreduce([], process_set=process_set)


def differing_calls_are_errors_on_every_rank(size: int) -> None:
    """Each of these calls differs on one rank, or is wrong there, and the ranks can continue after it."""
    if size == 1:
        return
    odd_one = rank() == size - 1
    calls: list[Callable[[], object]] = [
        lambda: ops.allreduce(np.zeros(3 + odd_one)),
        lambda: ops.allreduce(np.zeros(3, np.float32 if odd_one else np.float64)),
        lambda: ops.allreduce(np.zeros(3), ops.Sum if odd_one else ops.Product),
        lambda: ops.allreduce(np.zeros(3), prescale_factor=2.0 if odd_one else 1.0),
        lambda: ops.allgather(np.zeros((2, 3 + odd_one))),
        lambda: ops.grouped_allreduce([np.zeros(3)] * (2 + odd_one)),
        lambda: ops.grouped_allgather([np.zeros((2, 3)), np.zeros((2, 3 + odd_one))]),
        lambda: ops.broadcast(np.zeros(3), int(odd_one)),
        lambda: ops.alltoall(np.zeros((size, 2 + odd_one))),
        lambda: ops.alltoall(np.zeros(size), [1] * size if not odd_one else [0] * size),
        lambda: ops.alltoall(np.zeros(size), [1] * (size + odd_one)),
        lambda: ops.alltoall(np.zeros(size + odd_one)),
        lambda: ops.reducescatter(np.zeros((size, 2 + odd_one))),
        lambda: ops.reducescatter(np.zeros(()) if odd_one else np.zeros(size)),
        lambda: ops.grouped_reducescatter([np.zeros(size, np.float32 if odd_one else np.float64)]),
        lambda: ops.reducescatter(np.zeros(size)) if odd_one else ops.allreduce(np.zeros(size)),
        *(lambda op=op: ops.allreduce_number(2**63 if odd_one else 1, op) for op in (ops.Sum, ops.Max, ops.Product)),
        lambda: ops.allreduce_number(10**400 if odd_one else 1),
        lambda: ops.allreduce_number(10**400 if odd_one else 1, prescale_factor=0.5),
        lambda: ops.allreduce_number(1.0, postscale_factor="2" if odd_one else 2.0),  # type: ignore[arg-type]
        lambda: ops.allreduce(np.zeros(3, np.bool_ if odd_one else np.uint8)),
        lambda: ops.allreduce(np.zeros(3), prescale_factor="2" if odd_one else 2.0),  # type: ignore[arg-type]
        lambda: ops.grouped_allreduce([np.zeros(3, np.int32 if odd_one else np.float32)], ops.Adasum),
        lambda: ops.reducescatter(np.zeros(size), ops.Max if odd_one else ops.Sum),
        lambda: ops.grouped_reducescatter([np.zeros(size, np.bool_ if odd_one else np.uint8)]),
        lambda: ops.broadcast(np.zeros(3), size if odd_one else 0),
        lambda: ops.broadcast_object(3, size if odd_one else 0),
        lambda: ops.alltoall(np.zeros(size), [[1], [1, 2]] if odd_one else [1] * size),  # type: ignore[list-item]
        lambda: ops.allreduce(not_contiguous() if odd_one else np.zeros((2, 3)), ops.Product),
        lambda: ops.grouped_allreduce([not_contiguous() if odd_one else np.zeros((2, 3))]),
        lambda: ops.broadcast(not_contiguous() if odd_one else np.zeros((2, 3))),
    ]
    for call in calls:
        raised(call, MismatchError, f"rank {size - 1}: ")
    ops.barrier()


def wrong_arguments_are_errors(size: int) -> None:
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: ops.alltoall(np.zeros(size), [0] * size), f"splits that sum to 0: expected the {size} rows"),
        (lambda: ops.alltoall(np.zeros(size), np.zeros(size)), "splits of float64"),
        (lambda: ops.alltoall(np.zeros(0), [1, -1] + [0] * (size - 2) if size > 1 else [-1]), "a negative split"),
        (lambda: ops.alltoall(np.zeros(())), "a scalar"),
        (lambda: ops.reducescatter(np.zeros(())), "a scalar"),
        (lambda: ops.grouped_reducescatter([np.zeros(size), np.zeros(())]), "a scalar"),
        (lambda: ops.broadcast(np.zeros(1), size), "root_rank must be a rank of this job"),
        (lambda: ops.allreduce(np.zeros(1), "sum"), "op must be Average, Sum, Adasum, Min, Max or Product"),  # type: ignore[arg-type]
        (lambda: ops.allreduce(np.zeros(1), prescale_factor="2"), "prescale_factor must be a number"),  # type: ignore[arg-type]
        (lambda: ops.allreduce(np.zeros(1), process_set=[0]), "process_set must be a ProcessSet"),  # type: ignore[arg-type]
    ]
    for op in (ops.Average, ops.Sum, ops.Product, ops.Max, ops.Adasum):
        wrong.append((lambda op=op: ops.allreduce(not_contiguous(), op), "is not C-contiguous"))
        wrong.append((lambda op=op: ops.grouped_allreduce([np.zeros(1), not_contiguous()], op), "is not C-contiguous"))
    wrong.append((lambda: ops.broadcast(not_contiguous()), "is not C-contiguous"))
    wrong.append((lambda: ops.allreduce(np.zeros((2, 3), np.complex64).T, ops.Sum), "is not C-contiguous"))
    wrong.append((lambda: ops.allreduce_number(2**63, ops.Product), "an integer of 64 bits: expected 63 at most"))
    wrong.append((lambda: ops.allreduce_number(10**400), "so that float64 holds it"))
    if size > 1:
        wrong.append((lambda: ops.alltoall(np.zeros(size + 1)), f"{size + 1} rows and no splits"))
    for call, part in wrong:
        raised(call, ConfigurationError, part)
    for call, part in (
        (lambda: ops.reducescatter(np.zeros(size), ops.Adasum), "reducescatter with op=Adasum is not defined"),
        (lambda: ops.allreduce(np.zeros(1, np.int32), ops.Adasum), "Adasum of int32"),
        (lambda: ops.allreduce(np.zeros(1, np.bool_), ops.Product), "Product of bool"),
        (lambda: ops.allreduce(np.zeros(1, np.complex64), ops.Product), "Product of complex64"),
    ):
        raised(call, UnsupportedOperationError, part)
    ops.barrier()


def not_contiguous() -> Array:
    """An array of shape (2, 3) whose rows do not follow each other in memory."""
    return np.zeros((3, 2)).T


def arrays_that_are_not_changed_may_have_any_layout(size: int) -> None:
    rows = np.arange(3.0 * size).reshape(3, size).T
    same(ops.alltoall(rows)[0], np.repeat(rows[rank() : rank() + 1], size, axis=0))
    same(ops.reducescatter(rows, ops.Sum), size * rows[rank() : rank() + 1])
    same(ops.allgather(rows), np.concatenate([rows] * size))
    same(ops.grouped_allgather([rows])[0], np.concatenate([rows] * size))


def groups_may_be_generators(size: int) -> None:
    arrays = [np.full(2, 1.0), np.full(size, 2.0)]
    ops.grouped_allreduce((array for array in arrays), ops.Sum)
    same(arrays[0], np.full(2, 1.0 * size))
    same(arrays[1], np.full(size, 2.0 * size))
    same(ops.grouped_allgather(array[:1] for array in arrays)[1], np.full(size, 2.0 * size))
    same(ops.grouped_reducescatter(array for array in arrays[1:])[0], np.full(1, 2.0 * size))


def numbers_are_combined_exactly(size: int) -> None:
    for value, op, expected in (
        (2**40 + rank(), ops.Product, math.prod(2**40 + member for member in range(size))),
        (-(2**63), ops.Product, (-(2**63)) ** size),
        (True, ops.Product, 1),
        (2.0, ops.Product, 2.0**size),
        (rank() - 3, ops.Sum, sum(range(size)) - 3 * size),
        (rank(), ops.Average, (size - 1) / 2),
        (rank() == 0, ops.Max, True),
    ):
        found = ops.allreduce_number(value, op)
        assert (found, type(found)) == (expected, type(expected))
    assert ops.allreduce_number(3, ops.Max, prescale_factor=0.5, postscale_factor=4.0) == 6.0


def booleans_are_combined_by_min_and_max(size: int) -> None:
    array = np.array([True, rank() == 0, False])
    ops.allreduce(array, ops.Max)
    same(array, np.array([True, True, False]))
    array = np.array([True, rank() == 0, False])
    ops.grouped_allreduce([array], ops.Min)
    same(array, np.array([True, size == 1, False]))


def adasum_follows_its_definition(members: Sequence[int], process_set: ProcessSet = global_process_set) -> None:
    generator = np.random.default_rng(3)
    size, me = len(members), members.index(rank())
    lengths = [5, 1, 0, 130, 17]
    for dtype, tolerance in ((np.float64, 1e-13), (np.float32, 2e-7), (np.float16, 1e-3), (bfloat16, 8e-3)):
        of_ranks = [[generator.normal(size=length).astype(dtype) for length in lengths] for _ in range(size)]
        of_ranks[0][3][...] = 0  # a vector of zeros leaves the others as they are
        arrays = [array.copy() for array in of_ranks[me]]
        ops.grouped_allreduce(arrays, ops.Adasum, process_set=process_set)
        for number, array in enumerate(arrays):
            alone = of_ranks[me][number].copy()
            ops.allreduce(alone, ops.Adasum, process_set=process_set)
            expected = adasum_reference([tensors[number].astype(np.float64) for tensors in of_ranks])
            for result in (array, alone):
                scale = np.abs(expected).max(initial=1e-30)
                assert np.abs(result.astype(np.float64) - expected).max(initial=0) <= tolerance * scale
            bits = ops.allgather_object(array.tobytes(), process_set=process_set)
            assert len(set(bits)) == 1, "ranks have different bits"


def adasum_reference(vectors: list[Array]) -> Array:
    """The definition: neighbours in pairs, then neighbouring pairs, and so on; an odd last one passes unchanged."""
    while len(vectors) > 1:
        combined = []
        for a, b in zip(vectors[::2], vectors[1::2], strict=False):
            first, second = (1 - a @ b / (2 * (v @ v)) if v @ v else 1.0 for v in (a, b))
            combined.append(first * a + second * b)
        vectors = combined + (vectors[-1:] if len(vectors) % 2 else [])
    return vectors[0]


def adasum_adds_orthogonal_and_averages_parallel_gradients(size: int) -> None:
    q, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(20 * size - 17 if size > 1 else 20, size)))
    array = q[:, rank()].copy()
    ops.allreduce(array, ops.Adasum)
    np.testing.assert_allclose(array, q.sum(axis=1), atol=1e-15)
    if size & (size - 1) == 0:  # otherwise the ranks have different weights in the tree
        lengths = 10.0 ** np.arange(size)
        parallel = np.linspace(-1, 1, 33) * lengths[rank()]
        ops.allreduce(parallel, ops.Adasum)
        np.testing.assert_allclose(parallel, np.linspace(-1, 1, 33) * lengths.mean(), rtol=1e-14, atol=1e-14)
    for dtype in (np.float32, np.float16):
        tiny = np.full(1024, np.finfo(dtype).tiny * (rank() + 1), dtype)
        ops.allreduce(tiny, ops.Adasum)
        if size & (size - 1) == 0:
            np.testing.assert_allclose(
                tiny.astype(np.float64), np.full(1024, np.finfo(dtype).tiny * (size + 1) / 2), rtol=1e-3
            )


AMONG_MEMBERS: list[Callable[..., None]] = [
    adasum_follows_its_definition,
    allgather_concatenates_rows,
    allreduce_is_numpys,
    alltoall_sends_rows,
    broadcasts_come_from_the_root,
    groups_equal_single_calls,
    reducescatter_divides_rows,
]
"""Checks that take the participating ranks, and their process set if they are not all."""

ON_ALL_RANKS: list[Callable[[int], None]] = [
    adasum_adds_orthogonal_and_averages_parallel_gradients,
    arrays_that_are_not_changed_may_have_any_layout,
    averages_of_short_integers_do_not_overflow,
    booleans_are_combined_by_min_and_max,
    differing_calls_are_errors_on_every_rank,
    factors_scale_before_and_after,
    groups_may_be_generators,
    numbers_are_combined_exactly,
    wrong_arguments_are_errors,
]
"""Checks that all ranks of the job call, with their number."""
