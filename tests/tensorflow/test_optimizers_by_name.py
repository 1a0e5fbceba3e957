"""Base optimizers by their names in Keras, for every method."""

from collections.abc import Iterator
from typing import Any

import keras
import pytest
from keras_training import make_model, train

import lentando.tensorflow as lt


@pytest.fixture(autouse=True)
def job() -> Iterator[None]:
    lt.init()
    yield
    lt.shutdown()


@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("adam", lt.SlowMo, keras.optimizers.Adam),
        ("SGD", lt.AdaComm, keras.optimizers.SGD),
        ("adamw", lt.DiLoCo, keras.optimizers.AdamW),
        ("rmsprop", lt.DistributedOptimizer, keras.optimizers.RMSprop),
    ],
)
def test_name_of_an_optimizer_stands_for_it(name: str, make: Any, kind: Any) -> None:
    model = make_model()
    optimizer = make(name, model=model)
    assert type(optimizer.base_optimizer) is kind
    train(model, optimizer, 0, 1, 0, "eager")
    assert optimizer.report()["inner_steps"] == 1


def test_unknown_name_is_refused() -> None:
    with pytest.raises(lt.ConfigurationError, match="Keras has no optimizer 'adamm'"):
        lt.SlowMo("adamm")
