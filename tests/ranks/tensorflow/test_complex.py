"""Complex tensors in collectives, and complex variables in optimizers."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import lentando.tensorflow as lt


@pytest.mark.parametrize("dtype", [tf.complex64, tf.complex128], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
def test_sums_and_averages_of_complex_tensors(in_graph: bool, dtype: Any) -> None:
    def combined() -> Any:
        own = tf.fill([2, 3], tf.constant(complex(lt.rank() + 1, -lt.rank()), dtype))
        return lt.allreduce(own, op=lt.Sum, name="sum"), lt.allreduce(own, name="average")

    total, average = (tf.function(combined) if in_graph else combined)()
    expected = complex(lt.size() * (lt.size() + 1) / 2, -lt.size() * (lt.size() - 1) / 2)
    np.testing.assert_allclose(total.numpy(), np.full((2, 3), expected))
    np.testing.assert_allclose(average.numpy(), np.full((2, 3), expected / lt.size()))


def test_the_largest_of_complex_numbers_is_refused() -> None:
    with pytest.raises(lt.ConfigurationError, match="complex numbers have no order"):
        lt.allreduce(tf.constant([1j]), op=lt.Max)


def test_a_trained_complex_variable_is_refused_by_name() -> None:
    variable = keras.Variable(np.array([1j]), dtype="complex64", name="spectrum")
    optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(0.1))
    with pytest.raises(lt.ConfigurationError, match="spectrum.*complex64.*two variables"):
        optimizer.build([variable])
