"""Children of a rank do not change the memory that its gradients and weights travel from."""

import keras
import numpy as np
import pytest
from forking import succeeds_in_child

import lentando.tensorflow as lt

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def test_a_child_writes_into_a_copy_of_weights_and_gradients() -> None:
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(300), keras.layers.Dense(2)])
    optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(0.1), model=model, base=lt.AllReduce(), period=2)
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(np.ones((8, 6)), np.ones((8, 2)), batch_size=4, verbose=0)
    framework = optimizer.training().replica.framework
    arrays = [buffer.array for buffer in (*framework.buffers, *framework.gradients)]
    before = [array.copy() for array in arrays]

    def spoil() -> None:
        for array in arrays:
            array[:] = np.nan

    assert succeeds_in_child(spoil)
    for array, kept in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, kept)
