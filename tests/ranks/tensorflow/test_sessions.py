"""Collectives in graphs of TensorFlow 1, which a session runs in an order of its own."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

import lentando.tensorflow as lt

v1 = tf.compat.v1
SIZE, RANK = lt.size(), lt.rank()
ONE_THREAD = v1.ConfigProto(inter_op_parallelism_threads=1)


def test_many_collectives_of_one_run_are_matched_by_name() -> None:
    """Each rank asks for them in another order, and TensorFlow has a single thread."""
    count = 12
    with tf.Graph().as_default():
        sums = [lt.allreduce(tf.fill([2], RANK + float(number)), op=lt.Sum) for number in range(count)]
        rows = [lt.allgather(tf.fill([RANK + 1], number)) for number in range(count)]
        order = np.random.default_rng(RANK).permutation(2 * count)
        with v1.Session(config=ONE_THREAD) as session:
            for _ in range(2):
                found = session.run([[*sums, *rows][number] for number in order])
    in_order = dict(zip(order, found, strict=True))
    for number in range(count):
        assert_array_equal(in_order[number], [SIZE * number + SIZE * (SIZE - 1) / 2] * 2)
        assert_array_equal(in_order[count + number], np.full(SIZE * (SIZE + 1) // 2, number))


def test_a_run_executes_only_what_its_result_needs() -> None:
    with tf.Graph().as_default():
        lt.allreduce(tf.constant(1.0))  # no rank runs it
        total = lt.allreduce(tf.constant(2.0), op=lt.Sum)
        with v1.Session() as session:
            assert session.run(total) == 2 * SIZE


@pytest.mark.parametrize("dtype", [tf.bool, tf.bfloat16, tf.float16, tf.int8])
def test_dtypes_and_shapes(dtype: Any) -> None:
    with tf.Graph().as_default():
        root = lt.broadcast(tf.cast(tf.fill([], RANK), dtype), SIZE - 1)
        empty = lt.allgather(tf.zeros([0, 3], dtype))
        assert root.shape == []
        assert empty.shape.as_list() == [None, 3]
        with v1.Session() as session:
            value, rows = session.run([root, empty])
    assert value.dtype == rows.dtype == dtype.as_numpy_dtype
    assert value == dtype.as_numpy_dtype(SIZE - 1)
    assert rows.shape == (0, 3)


def test_gradients() -> None:
    with tf.Graph().as_default():
        tensor = tf.ones([2 * SIZE])
        results = [lt.allreduce(tensor, op=lt.Sum), lt.reducescatter(tensor, op=lt.Sum), lt.alltoall(tensor)]
        gradients = [tf.gradients(result, tensor)[0] for result in results]
        with v1.Session() as session:
            found = session.run(gradients)
    assert_array_equal(found, np.array([SIZE, SIZE, 1])[:, np.newaxis] * np.ones(2 * SIZE))


def test_ranks_that_differ_get_an_error_that_names_them() -> None:
    if SIZE == 1:
        return
    with tf.Graph().as_default():
        total = lt.allreduce(tf.ones([RANK + 1]))
        with v1.Session() as session, pytest.raises(tf.errors.FailedPreconditionError, match=r"rank 0") as caught:
            session.run(total)
        assert "float32" in str(caught.value)
        with v1.Session() as session, pytest.raises(lt.MismatchError, match="rank 0"), lt.original_errors():
            session.run(total)
    lt.barrier()


def test_variables_of_a_graph_take_the_values_of_the_root() -> None:
    with tf.Graph().as_default():
        resource = v1.get_variable("resource", initializer=tf.fill([2], float(RANK)), use_resource=True)
        reference = v1.get_variable("reference", initializer=tf.constant(RANK), use_resource=False)
        broadcast = lt.broadcast_global_variables(SIZE - 1)
        in_place = lt.broadcast_([resource, reference], 0)
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            session.run(broadcast)
            assert_array_equal(session.run(resource), [SIZE - 1.0] * 2)
            assert session.run(reference) == SIZE - 1
            session.run(v1.assign(reference, RANK))
            assert_array_equal(session.run(in_place[1]), 0)
            assert session.run(reference) == 0
    with pytest.raises(RuntimeError, match="broadcast_variables"):
        lt.broadcast_global_variables(0)


def test_hook_broadcasts_when_a_session_starts() -> None:
    with tf.Graph().as_default():
        variable = v1.get_variable("variable", initializer=tf.constant(float(RANK)))
        with v1.train.MonitoredTrainingSession(hooks=[lt.BroadcastGlobalVariablesHook(SIZE - 1)]) as session:
            assert session.run(variable) == SIZE - 1


def test_objects_need_no_session() -> None:
    with tf.Graph().as_default():
        assert lt.broadcast_object_fn(SIZE - 1)({"rank": RANK}) == {"rank": SIZE - 1}
        assert lt.allgather_object(RANK) == list(range(SIZE))
        number = lt.rank_op() + lt.size_op()
        with v1.Session() as session:
            assert session.run(number) == RANK + SIZE


def momentum_after_two_steps(gradient: Any) -> Any:
    """What SGD with a rate of 0.5 and a momentum of 0.5 subtracts: the second step has 1.5 times the gradient."""
    return 0.5 * (1 + 1.5) * np.asarray(gradient)


@pytest.mark.parametrize("is_dense", [False, True])
def test_optimizers_of_tensorflow_1_average_gradients(is_dense: bool) -> None:
    """Two in one graph, one of which has sparse gradients of an embedding and a variable of this rank alone."""
    with tf.Graph().as_default():
        weight = v1.get_variable("weight", initializer=tf.constant([1.0 + RANK, 2.0]))
        rows = v1.get_variable("rows", initializer=tf.ones([3, 1]))
        local = v1.get_variable("local", initializer=tf.constant(4.0))
        count = v1.train.get_or_create_global_step()
        first = lt.DistributedOptimizer(v1.train.MomentumOptimizer(0.5, 0.5), sparse_as_dense=is_dense)
        second = lt.DistributedOptimizer(v1.train.MomentumOptimizer(0.5, 0.5), op=lt.Sum)
        first.register_local_var(local)
        loss = tf.reduce_sum(tf.nn.embedding_lookup(rows, [RANK % 3])) + SIZE * local
        steps = [
            first.minimize(loss, global_step=count, var_list=[rows, local]),
            second.minimize((RANK + 1.0) * tf.reduce_sum(weight), var_list=[weight]),
        ]
        assert first.get_slot_names() == ["momentum"]
        slots = [second.get_slot(weight, "momentum"), *second.variables()]
        with v1.train.MonitoredTrainingSession(hooks=[lt.BroadcastGlobalVariablesHook(0)]) as session:
            for _ in range(2):
                session.run(steps)
            found = session.run([weight, rows, local, count])
            moments = session.run(slots)
    total = SIZE * (SIZE + 1) / 2
    assert_allclose(found[0], [1, 2] - momentum_after_two_steps(total), rtol=1e-6)
    lookups = np.bincount(np.arange(SIZE) % 3, minlength=3)[:, np.newaxis]
    assert_allclose(found[1], 1 - momentum_after_two_steps(lookups / SIZE), rtol=1e-6)
    assert found[2] == 4 - momentum_after_two_steps(1.0)
    assert found[3] == 2
    assert_allclose(moments, np.full([2, 2], 1.5 * total))


def test_optimizer_of_tensorflow_1_in_eager_code_and_what_it_cannot_do() -> None:
    weight = tf.Variable(1.0)
    optimizer = lt.DistributedOptimizer(v1.train.GradientDescentOptimizer(0.5))
    optimizer.minimize(lambda: (RANK + 1.0) * weight, var_list=[weight])
    assert weight.numpy() == 1 - 0.5 * (SIZE + 1) / 2
    for options in ({"backward_passes_per_step": 2}, {"op": lt.Adasum}, {"period": 12}):
        with pytest.raises(lt.ConfigurationError, match=f"optimizer of TensorFlow 1 .*{next(iter(options))}="):
            lt.DistributedOptimizer(v1.train.AdamOptimizer(), **options)
    with pytest.raises(lt.ConfigurationError, match="expected a Keras 3 optimizer .* got AdamOptimizer"):
        lt.SlowMo(v1.train.AdamOptimizer(), period=12)
