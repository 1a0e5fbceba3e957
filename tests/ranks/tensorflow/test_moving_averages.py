"""Moving averages of the weights that Keras keeps (``use_ema=True``), with which ``fit`` ends, under outer steps."""

import logging
from typing import Any

import keras
import keras_training  # noqa: F401 - quiets TensorFlow
import numpy as np
import pytest
from case_selection import selected_cases

import lentando.tensorflow as lt


def trained(optimizer: Any, **options: Any) -> float:
    """How far the replicas are apart after a ``fit`` that ends with an outer step."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(lt.SlowMo(optimizer, model=model, period=4, **options), "mse")
    data = np.random.default_rng(lt.rank())
    x, y = data.normal(size=(32, 4)), data.normal(size=(32, 2))
    for _ in range(2):
        model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    own = model.get_weights()[0].tolist()
    return float(np.ptp(np.array(lt.allgather_object(own)), axis=0).max())


@pytest.mark.parametrize("kind", selected_cases([keras.optimizers.SGD], [keras.optimizers.SGD, keras.optimizers.Adam]))
def test_replicas_end_with_equal_moving_averages(kind: Any) -> None:
    assert trained(kind(0.1, use_ema=True, ema_momentum=0.9)) == 0


def test_averages_that_are_left_apart_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lentando"):
        apart = trained(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9), base_buffers="maintain")
    stated = [record for record in caplog.records if "moving averages of the weights (use_ema=True)" in record.message]
    assert len(stated) == (lt.rank() == 0 and lt.size() > 1)
    assert (apart > 0) == (lt.size() > 1)
