"""Functions under Horovod's names that move tensors of every dtype: values, shapes, dtypes and errors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

import lentando.tensorflow as lt

SIZE, RANK = lt.size(), lt.rank()
DTYPES = ["uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "bool"]


def eagerly(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


@pytest.fixture(params=[eagerly, tf.function])
def way(request: pytest.FixtureRequest) -> Any:
    return request.param


def filled(dtype: str, shape: list[int], number: int) -> Any:
    return tf.cast(tf.fill(shape, number), dtype)


@pytest.mark.parametrize("shape", [[], [0], [3], [2, 0], [2, 3]])
def test_every_dtype_and_shape(shape: list[int], way: Any) -> None:
    def calls() -> Any:
        return [
            (
                lt.allreduce(filled(dtype, shape, RANK + 1), op=lt.Max),
                lt.broadcast(filled(dtype, shape, RANK), SIZE - 1),
                lt.allgather(filled(dtype, shape, RANK)),
            )
            for dtype in DTYPES
        ]

    for dtype, (largest, root, gathered) in zip(DTYPES, way(calls)(), strict=True):
        assert largest.dtype == root.dtype == gathered.dtype == dtype
        assert_array_equal(tf.cast(largest, tf.float64), np.full(shape, min(SIZE, 1) if dtype == "bool" else SIZE))
        assert_array_equal(tf.cast(root, tf.float64), np.full(shape, min(SIZE - 1, 1) if dtype == "bool" else SIZE - 1))
        rows = np.concatenate([np.full(shape or [1], min(r, 1) if dtype == "bool" else r) for r in range(SIZE)])
        assert_array_equal(tf.cast(gathered, tf.float64), rows)


@pytest.mark.parametrize("dtype", ["float16", "int64"])
def test_alltoall_sends_rows_where_splits_say(dtype: str, way: Any) -> None:
    """Rank r sends r + s rows to rank s."""
    splits = [RANK + other for other in range(SIZE)]
    rows = tf.cast(tf.repeat(tf.range(SIZE) + 10 * RANK, splits), dtype)[:, tf.newaxis]
    received, received_splits = way(lambda: lt.alltoall(rows, splits, name="rows"))()
    assert received.dtype == dtype
    assert received_splits.dtype == tf.int32
    assert_array_equal(received_splits, [other + RANK for other in range(SIZE)])
    assert_array_equal(received[:, 0], np.repeat([10 * other + RANK for other in range(SIZE)], received_splits))


def test_alltoall_without_splits_divides_evenly(way: Any) -> None:
    received = way(lambda: lt.alltoall(tf.range(2 * SIZE) + 100 * RANK))()
    assert_array_equal(received, [100 * other + 2 * RANK + n for other in range(SIZE) for n in range(2)])


def test_alltoall_with_splits_that_do_not_fit_is_an_invalid_argument() -> None:
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        lt.alltoall(tf.ones([SIZE]), [2] * SIZE)
    assert isinstance(caught.value, lt.ConfigurationError | lt.MismatchError)
    lt.barrier()


def test_reducescatter_gives_the_first_ranks_one_row_more(way: Any) -> None:
    rows = SIZE * 2 + SIZE // 2
    one, group = way(
        lambda: (
            lt.reducescatter(tf.range(float(rows)) + RANK, op=lt.Sum, postscale_factor=2.0),
            lt.grouped_reducescatter([tf.range(float(rows)) + RANK, tf.ones([SIZE, 2], tf.float64)]),
        )
    )()
    own = np.array_split(np.arange(rows), SIZE)[RANK]
    ranks = SIZE * (SIZE - 1) / 2
    assert_array_equal(one, 2 * (SIZE * own + ranks))
    assert_array_equal(group[0], np.float32(own + ranks / SIZE))
    assert_array_equal(group[1], [[1.0, 1.0]])


def test_reducescatter_of_a_scalar_is_an_invalid_argument() -> None:
    with pytest.raises(tf.errors.InvalidArgumentError):
        lt.reducescatter(tf.constant(1.0))
    lt.barrier()


def test_groups_of_tensors_and_slices(way: Any) -> None:
    slices = tf.IndexedSlices(tf.fill([2, 1], RANK + 1.0), tf.constant([RANK, RANK + 1]), tf.constant([SIZE + 1, 1]))
    first, second, third = way(
        lambda: lt.grouped_allreduce([tf.constant([RANK]), slices, tf.constant(RANK, tf.float16)], op=lt.Sum, name="g")
    )()
    assert_array_equal(first, [SIZE * (SIZE - 1) // 2])
    assert third == SIZE * (SIZE - 1) // 2
    assert_array_equal(second.indices, [RANK + n for RANK in range(SIZE) for n in range(2)])
    dense = np.zeros((SIZE + 1, 1))
    for rank in range(SIZE):
        dense[rank : rank + 2] += rank + 1
    assert_array_equal(tf.convert_to_tensor(second), dense)
    gathered = way(lambda: lt.grouped_allgather([tf.fill([RANK], RANK), tf.constant([True])]))()
    assert_array_equal(gathered[0], np.repeat(range(SIZE), range(SIZE)))
    assert_array_equal(gathered[1], [True] * SIZE)
    assert lt.grouped_allreduce([]) == lt.grouped_allgather([]) == lt.grouped_reducescatter([]) == []


def test_slices_are_averaged_by_dividing_their_values() -> None:
    averaged = lt.allreduce(tf.IndexedSlices(tf.constant([[3.0]]), tf.constant([RANK])))
    assert_array_equal(averaged.indices, range(SIZE))
    assert_array_equal(averaged.values, np.full((SIZE, 1), np.float32(3) / np.float32(SIZE)))
    for settings in ({"op": lt.Min}, {"prescale_factor": 0.5}):
        with pytest.raises(NotImplementedError, match=r"convert_to_tensor"):
            lt.allreduce(tf.IndexedSlices(tf.constant([[3.0]]), tf.constant([RANK])), **settings)


@pytest.mark.parametrize("compression", [lt.Compression.none, lt.Compression.fp16, lt.Compression.bf16])
def test_compression_rounds_what_is_sent(compression: Any) -> None:
    value = 1 + 2.0**-9
    result = lt.allreduce(tf.constant([value]), compression=compression)
    assert result.dtype == tf.float32
    assert result[0] == (1 if compression is lt.Compression.bf16 else value)
    assert lt.allreduce(tf.constant([RANK]), compression=compression, op=lt.Max)[0] == SIZE - 1


def test_numbers_of_the_job(way: Any) -> None:
    numbers = way(
        lambda: [lt.rank_op(), lt.size_op(), lt.local_rank_op(), lt.local_size_op(), lt.process_set_included_op()]
    )()
    assert [int(number) for number in numbers] == [RANK, SIZE, lt.local_rank(), lt.local_size(), 1]
    assert all(number.dtype == tf.int32 for number in numbers)


def test_errors_are_also_tensorflows() -> None:
    if SIZE == 1:
        return
    for call in (
        lambda: lt.allreduce(tf.ones([RANK + 1])),
        lambda: lt.allgather(tf.ones([1, RANK + 1])),
        lambda: lt.broadcast(tf.ones([1]), RANK),
        lambda: lt.alltoall(tf.ones([SIZE], tf.int32 if RANK else tf.float32)),
        lambda: lt.reducescatter(tf.ones([SIZE] * (RANK + 1))),
    ):
        with pytest.raises(lt.MismatchError, match="rank 0") as caught:
            call()
        assert isinstance(caught.value, tf.errors.FailedPreconditionError)
        lt.barrier()


def test_operations_that_are_not_defined_keep_all_their_classes() -> None:
    for call in (
        lambda: lt.allreduce(tf.constant([True]), op=lt.Average),
        lambda: lt.reducescatter(tf.ones([SIZE]), op=lt.Max),
    ):
        with pytest.raises(lt.UnsupportedOperationError) as caught:
            call()
        assert isinstance(caught.value, RuntimeError)
        assert isinstance(caught.value, lt.ConfigurationError)
        assert isinstance(caught.value, tf.errors.InvalidArgumentError)
        assert type(caught.value).__name__ == "UnsupportedOperationError"
        assert type(caught.value.__cause__) is lt.UnsupportedOperationError
        lt.barrier()


def test_process_sets() -> None:
    """All ranks but the last, and the last."""
    others = lt.add_process_set(range(max(SIZE - 1, 1))) if SIZE > 1 else lt.global_process_set
    alone = lt.add_process_set([SIZE - 1]) if SIZE > 1 else lt.global_process_set
    own = others if others.included() else alone
    members = own.ranks
    assert lt.allreduce(tf.constant([RANK]), op=lt.Sum, process_set=own)[0] == sum(members)
    assert_array_equal(lt.allgather(tf.constant([RANK]), process_set=own), members)
    assert_array_equal(lt.broadcast(tf.constant([RANK]), members[-1], process_set=own), members[-1:])
    variable = tf.Variable(float(RANK), name="v")
    lt.broadcast_variables([variable], members[-1], process_set=own)
    assert variable.numpy() == members[-1]
    assert lt.broadcast_(variables=[variable], root_rank=members[0], process_set=own)[0] == members[-1]
    assert lt.broadcast_object({"rank": RANK}, members[-1], process_set=own) == {"rank": members[-1]}
    assert lt.allgather_object(RANK, process_set=own) == members
    assert lt.size_op(own.process_set_id) == len(members)
    assert lt.process_set_included_op(alone.process_set_id) == (RANK == SIZE - 1)
    with tf.GradientTape() as tape:
        result = lt.allgather(variable * tf.ones([1]), process_set=own)
    assert tape.gradient(result, variable) == 1
    if SIZE > 1:
        lt.remove_process_set(alone)
        lt.remove_process_set(others)
        with pytest.raises(lt.ConfigurationError, match="no process set with number"):
            lt.size_op(1)
