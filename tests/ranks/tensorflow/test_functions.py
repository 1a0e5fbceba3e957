"""Horovod's functions under Horovod's names, eagerly and in a graph."""

from collections.abc import Callable
from typing import Any

import keras
import keras_training  # noqa: F401 - quiets TensorFlow before it is imported
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

import lentando.tensorflow as lt


def own(dtype: str = "float32") -> tf.Tensor:
    return tf.cast(tf.fill([3, 2], lt.rank() + 1), dtype)


def eagerly(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


@pytest.fixture(params=[eagerly, tf.function])
def way(request: pytest.FixtureRequest) -> Any:
    return request.param


TOTAL = {"sum": lambda n: n * (n + 1) / 2, "average": lambda n: (n + 1) / 2, "min": lambda n: 1, "max": lambda n: n}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("op", "name"), [(lt.Sum, "sum"), (lt.Average, "average"), (lt.Min, "min"), (lt.Max, "max")])
def test_allreduce_combines_and_leaves_its_argument(op: Any, name: str, dtype: str) -> None:
    tensor = own(dtype)
    result = lt.allreduce(tensor, op=op)
    assert result.dtype == dtype
    assert_array_equal(tf.cast(result, tf.float32), np.full((3, 2), TOTAL[name](lt.size())))
    assert_array_equal(tensor, own(dtype))


def test_all_functions(way: Any) -> None:
    def calls() -> Any:
        scaled = lt.allreduce(own(), op=lt.Sum, prescale_factor=0.5, postscale_factor=4.0)
        gathered = lt.allgather(tf.fill([lt.rank() + 1, 2], lt.rank()), name="rows")
        return lt.allreduce(own(), False), scaled, gathered, lt.broadcast(own(), lt.size() - 1)

    total, scaled, gathered, root = way(calls)()
    assert_array_equal(total, np.full((3, 2), TOTAL["sum"](lt.size())))
    assert_array_equal(scaled, 2 * total)
    assert_array_equal(gathered[:, 0], np.repeat(range(lt.size()), range(1, lt.size() + 1)))
    assert_array_equal(root, np.full((3, 2), lt.size()))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_broadcast_gives_all_ranks_the_roots_values(shape: tuple[int, ...], way: Any) -> None:
    own = tf.fill(shape, float(lt.rank()))
    found = way(lambda: lt.broadcast(own, root_rank=lt.size() - 1))()
    assert_array_equal(found.numpy(), np.full(shape, lt.size() - 1.0))


def test_broadcast_variables(way: Any) -> None:
    keras.utils.set_random_seed(lt.rank())
    layer = keras.layers.Dense(3, name="layer")
    layer.build((2, 4))
    plain = tf.Variable([lt.rank()], name="plain")
    way(lambda: lt.broadcast_variables([*layer.variables, plain], root_rank=lt.size() - 1))()
    for other in lt.allgather_object([layer.kernel, plain]):
        assert_array_equal(other[0], layer.kernel.numpy())
        assert other[1] == [lt.size() - 1]


@pytest.mark.parametrize("op", [lt.Average, lt.Sum])
def test_gradient_tape_combines_gradients(op: Any, way: Any) -> None:
    one, other, unused = tf.Variable([2.0]), tf.Variable([3.0], dtype=tf.float64), tf.Variable([1.0])

    def gradients() -> Any:
        with lt.DistributedGradientTape(tf.GradientTape(), op=op) as tape:
            loss = one * (lt.rank() + 1) + tf.cast(other * other, tf.float32)
        found = tape.gradient(loss, {"one": one, "other": other, "unused": unused})
        assert found.pop("unused") is None
        return found

    found = way(gradients)()
    n = lt.size()
    assert found["one"] == [TOTAL["average" if op is lt.Average else "sum"](n)]
    assert found["other"] == [6.0 if op is lt.Average else 6.0 * n]


def test_objects_travel_with_their_tensors() -> None:
    value = {"tensor": own(), "nested": [1, (2.5, None)], 3: "x"} if lt.rank() == 0 else None
    received = lt.broadcast_object(value)
    assert_array_equal(received["tensor"], np.ones((3, 2)))
    assert received["nested"] == [1, (2.5, None)]
    assert [item["rank"] for item in lt.allgather_object({"rank": lt.rank()})] == list(range(lt.size()))


def test_ranks_that_call_different_things_get_an_error_that_names_them() -> None:
    if lt.size() == 1:
        return
    words = r"rank 0: calls allreduce\(\[3, 2\], float32, sum\) named 'a'.*broadcast"
    different = (
        (lambda: lt.allreduce(own(), name="a", op=lt.Sum)) if lt.rank() == 0 else (lambda: lt.broadcast(own(), 0))
    )
    with pytest.raises(lt.MismatchError, match=words):
        different()
    with pytest.raises(tf.errors.UnknownError, match=words):
        tf.function(different)()
    lt.barrier()


def test_wrong_arguments() -> None:
    with pytest.raises(lt.ConfigurationError, match="not both"):
        lt.allreduce(own(), True, op=lt.Sum)
    with pytest.raises(lt.ConfigurationError, match="Average of bool"):
        lt.allreduce(own("bool"))


def test_metrics_are_averaged_over_ranks() -> None:
    logs = {"loss": float(lt.rank()), "accuracy": np.float32(0.5), "f1_score": np.array([0.25, lt.rank()], np.float32)}
    lt.MetricAverageCallback().on_epoch_end(0, logs)
    assert logs.pop("f1_score").tolist() == [0.25, (lt.size() - 1) / 2]
    assert logs == {"loss": (lt.size() - 1) / 2, "accuracy": 0.5}
    if lt.size() > 1:
        with pytest.raises(lt.MismatchError, match=r"f1_score \[[12]\]"):
            lt.MetricAverageCallback().on_epoch_end(0, {"f1_score": np.zeros(1 + lt.rank() % 2)})


def test_ops_are_found_in_the_module_that_horovod_has_them_in() -> None:
    from lentando.tensorflow.mpi_ops import Sum, size

    assert lt.mpi_ops.Average is lt.Average
    assert lt.allreduce(1.0, op=Sum) == size()
