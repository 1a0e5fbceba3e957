"""Which variables a Keras wrapper trains: none is left out in silence, whatever its name, dtype or layer."""

import logging
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import lentando.tensorflow as lt

INPUTS = np.arange(8, dtype=np.float32).reshape(2, 4) / 8


def model_of(*layers: Any) -> keras.Model:
    keras.utils.set_random_seed(lt.rank())
    model = keras.Sequential(list(layers) or [keras.layers.Dense(3, name="first"), keras.layers.Dense(2, name="last")])
    model.build((2, 4))
    return model


def slowmo(model: keras.Model | None, **options: Any) -> Any:
    return lt.SlowMo(keras.optimizers.SGD(0.1), model=model, period=2, **options)


def step(optimizer: Any, model: keras.Model, variables: list[Any]) -> None:
    with tf.GradientTape() as tape:
        loss = keras.ops.mean(keras.ops.square(model(INPUTS * (lt.rank() + 1))))
    optimizer.apply(tape.gradient(loss, variables), variables)


def equal_on_all_ranks(variable: Any) -> bool:
    everyone = np.asarray(lt.allgather(tf.reshape(tf.cast(variable, tf.float32), (1, -1))))
    return bool((everyone == everyone[0]).all())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "in no wrapped optimizer" in r.getMessage()]


def test_variables_of_one_name_and_several_dtypes_are_all_averaged() -> None:
    variables = [
        keras.Variable(np.full(3, lt.rank(), dtype), dtype=dtype, name="kernel")
        for dtype in ("float32", "float64", "float32", "bfloat16")
    ]
    optimizer = slowmo(None)
    for _ in range(2):
        gradients = [tf.fill(v.shape, tf.cast(lt.rank() + 1, v.dtype)) for v in variables]
        optimizer.apply(gradients, variables)
    assert all(equal_on_all_ranks(variable) for variable in variables)


@pytest.mark.parametrize("recompiled", [False, True])
def test_a_layer_that_is_unfrozen_later_needs_a_new_optimizer(recompiled: bool) -> None:
    model = model_of()
    model.layers[0].trainable = False
    targets = np.zeros((2, 2), np.float32)
    optimizer = slowmo(model)
    model.compile(optimizer, "mse")
    model.fit(INPUTS, targets, epochs=2, verbose=0)
    model.layers[0].trainable = True
    if recompiled:
        model.compile(optimizer, "mse")
        with pytest.raises(lt.ConfigurationError, match="make a new optimizer when the trainable variables change"):
            model.fit(INPUTS, targets, verbose=0)
    else:
        with pytest.raises(lt.ConfigurationError, match=r"built without the variables \[.*first/kernel"):
            step(optimizer, model, model.trainable_variables)
    model.compile(slowmo(model), "mse")  # Keras's own way
    before = model.layers[0].kernel.numpy()
    model.fit(INPUTS * (lt.rank() + 1), targets, epochs=2, verbose=0)
    assert not np.array_equal(model.layers[0].kernel.numpy(), before)
    assert all(equal_on_all_ranks(variable) for variable in model.trainable_variables)


def test_a_layer_that_is_frozen_later_is_not_moved_by_slow_momentum() -> None:
    model = model_of()
    optimizer = slowmo(model)
    for _ in range(2):
        step(optimizer, model, model.trainable_variables)
    model.layers[0].trainable = False
    with pytest.raises(lt.ConfigurationError, match=r"first/kernel.*were frozen after the optimizer was built"):
        step(optimizer, model, model.trainable_variables)
    model = model_of()
    optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(0.1), model=model, base=lt.LocalSGD(), period=2)
    for number in range(6):
        if number == 2:
            model.layers[0].trainable = False
            before = model.layers[0].kernel.numpy()
        step(optimizer, model, model.trainable_variables)
    np.testing.assert_allclose(model.layers[0].kernel.numpy(), before, rtol=1e-6)


def test_variables_of_no_wrapped_optimizer_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="lentando")
    unbuilt = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(2)])
    optimizer = slowmo(unbuilt)
    unbuilt.build((2, 4))
    for _ in range(4):
        step(optimizer, unbuilt, unbuilt.layers[1].trainable_variables)
    if lt.rank() == 0:
        (text,) = warnings(caplog)
        assert text.startswith("2 trainable parameters of the model given as model=")
        assert "dense/kernel" in text
    else:
        assert not warnings(caplog)
    assert all(equal_on_all_ranks(variable) for variable in unbuilt.layers[1].trainable_variables)


def test_models_that_are_divided_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="lentando")
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dense(2)])
    optimizers = [slowmo(model), slowmo(model)]
    model.build((2, 4))
    parts = [
        [*model.layers[0].trainable_variables, *model.layers[1].trainable_variables],
        model.layers[2].trainable_variables,
    ]
    for optimizer, variables in zip(optimizers, parts, strict=True):
        optimizer.build(variables)
    for _ in range(2):
        for optimizer, variables in zip(optimizers, parts, strict=True):
            step(optimizer, model, variables)
    assert not warnings(caplog)
    assert all(equal_on_all_ranks(variable) for variable in model.trainable_variables)


def test_a_model_that_shares_nothing_with_the_optimizer_is_refused() -> None:
    model, other = keras.Sequential([keras.layers.Dense(2)]), model_of()
    optimizer = slowmo(model)
    model.build((2, 4))
    with pytest.raises(lt.ConfigurationError, match="has none of the optimizer's variables"):
        optimizer.build(other.trainable_variables)
