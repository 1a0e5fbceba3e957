"""Settings that are read or changed on the wrapper are the base optimizer's, or are refused with a reason."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import lentando.tensorflow as lt


@pytest.fixture(autouse=True)
def _job() -> Iterator[None]:
    lt.init()
    yield
    lt.shutdown()


def wrapped(base: Any = None, **options: Any) -> Any:
    """A wrapper round an optimizer, of no model yet."""
    return lt.SlowMo(base or keras.optimizers.SGD(0.5, momentum=0.5), base_buffers="maintain", **options)


def model_of(optimizer: Any, **options: Any) -> keras.Model:
    """A compiled model."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="dense")])
    model.compile(optimizer=optimizer, loss="mse", **options)
    return model


X, Y = np.ones((8, 2), np.float32), np.ones(8, np.float32)


def is_forwarded(name: str, value: Any) -> Callable[[], None]:
    """Checks that a setting is the base optimizer's, both ways."""

    def check() -> None:
        optimizer = wrapped()
        setattr(optimizer, name, value)
        assert getattr(optimizer.base_optimizer, name) == value
        setattr(optimizer.base_optimizer, name, None)
        assert getattr(optimizer, name) is None

    return check


def is_fixed(name: str, value: Any) -> Callable[[], None]:
    """Checks that a setting can be read and not be changed."""

    def check() -> None:
        optimizer = wrapped(keras.optimizers.SGD(0.5, **{name: value}))
        assert getattr(optimizer, name) == value
        with pytest.raises(lt.ConfigurationError, match=f"{name} cannot be set"):
            setattr(optimizer, name, value)
        with pytest.raises(lt.ConfigurationError, match=f"{name} cannot be set"):
            setattr(wrapped(), name, value)

    return check


def is_refused(name: str, reason: str, *arguments: Any) -> Callable[[], None]:
    """Checks that a method raises an error."""

    def check() -> None:
        with pytest.raises((lt.ConfigurationError, ValueError), match=reason):
            getattr(wrapped(), name)(*arguments)

    return check


def check_learning_rate() -> None:
    optimizer = wrapped()
    optimizer.learning_rate = 0.25
    assert float(optimizer.base_optimizer.learning_rate) == 0.25
    optimizer.learning_rate = keras.Variable(0.125)
    assert float(optimizer.base_optimizer.learning_rate) == 0.125
    for base_buffers in ("maintain", "reset"):
        optimizer = lt.SlowMo(keras.optimizers.SGD(0.5), base_buffers=base_buffers)
        optimizer.learning_rate = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.25, 0.0625])
        variable = keras.Variable([1.0])
        for _ in range(3):
            optimizer.apply([np.ones(1, np.float32)], [variable])
        assert float(optimizer.learning_rate) == 0.0625
        assert variable.numpy() == 1 - 2 * 0.25 - 0.0625


def check_exclude_from_weight_decay() -> None:
    for model in (None, keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])):
        optimizer = wrapped(keras.optimizers.SGD(0.5, weight_decay=0.5), model=model)
        optimizer.exclude_from_weight_decay(var_names=["kernel"])
        kernel = keras.Variable([1.0], name="kernel") if model is None else model.weights[0]
        before = kernel.numpy()
        optimizer.apply([np.zeros(kernel.shape, np.float32)], [kernel])
        np.testing.assert_array_equal(kernel.numpy(), before)


def check_weights() -> None:
    optimizer = wrapped()
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    optimizer.set_weights([np.array(7), np.array(0.25, np.float32), np.array([3.0], np.float32)])
    assert [value.numpy() for value in optimizer.base_optimizer.variables] == [7, 0.25, 3.0]
    assert int(optimizer.iterations) == 7
    with pytest.raises(lt.ConfigurationError, match="expected values for the 3 variables"):
        optimizer.set_weights([np.array(7)])


def check_steps() -> None:
    optimizer, variable = wrapped(), keras.Variable([1.0])
    optimizer.build([variable])
    assert optimizer.built
    assert optimizer.base_optimizer.built
    optimizer.apply([np.ones(1, np.float32)], [variable])
    assert int(optimizer.apply_gradients([(np.ones(1, np.float32), variable)])) == 2
    assert int(optimizer.iterations) == int(optimizer.base_optimizer.iterations) == 2
    assert [v.path for v in optimizer.variables] == [v.path for v in optimizer.base_optimizer.variables]
    optimizer.assign(variable, tf.constant([2.0]))
    optimizer.assign_add(variable, tf.constant([2.0]))
    optimizer.assign_sub(variable, tf.constant([1.0]))
    assert variable.numpy() == 3
    assert float(wrapped(keras.optimizers.SGD(0.5, loss_scale_factor=4.0)).scale_loss(tf.constant(2.0))) == 8


def check_moving_average() -> None:
    optimizer, variable = wrapped(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5)), keras.Variable([1.0])
    for _ in range(2):
        optimizer.apply([np.ones(1, np.float32)], [variable])
    optimizer.finalize_variable_values([variable])
    assert variable.numpy() == 0.25


def check_configuration() -> None:
    loaded = lt.DistributedOptimizer.from_config(wrapped().get_config())
    assert isinstance(loaded, keras.optimizers.SGD)
    assert loaded.momentum == 0.5
    optimizer = wrapped()
    optimizer.name = "mine"
    assert optimizer.name == "mine"
    store: dict[str, Any] = {}
    optimizer.build([keras.Variable([1.0])])
    optimizer.save_own_variables(store)
    optimizer.load_own_variables({**store, "2": np.array([5.0], np.float32)})
    assert optimizer.base_optimizer.variables[2].numpy() == 5


HOLDS = {
    **{name: is_forwarded(name, 0.5) for name in ("weight_decay", "clipnorm", "clipvalue", "global_clipnorm")},
    **{name: is_forwarded(name, 3) for name in ("ema_momentum", "ema_overwrite_frequency", "momentum", "nesterov")},
    "use_ema": is_fixed("use_ema", True),
    "gradient_accumulation_steps": is_fixed("gradient_accumulation_steps", 2),
    "loss_scale_factor": is_fixed("loss_scale_factor", 8.0),
    "update_step": is_refused("update_step", "without the other ranks", None, None, None),
    "add_variable": is_refused("add_variable", "no variables of its own", (2,)),
    "add_variable_from_reference": is_refused("add_variable_from_reference", "no variables of its own", None),
    "add_optimizer_variables": is_refused("add_optimizer_variables", "no variables of its own", [], "momentum"),
    "stateless_apply": is_refused("stateless_apply", "not supported with the TensorFlow backend", [], [], []),
    "learning_rate": check_learning_rate,
    "exclude_from_weight_decay": check_exclude_from_weight_decay,
    "set_weights": check_weights,
    **dict.fromkeys(["apply", "apply_gradients", "assign", "assign_add", "assign_sub", "build", "built"], check_steps),
    **dict.fromkeys(["iterations", "variables", "scale_loss"], check_steps),
    "finalize_variable_values": check_moving_average,
    **dict.fromkeys(["get_config", "from_config", "name", "save_own_variables"], check_configuration),
    "load_own_variables": check_configuration,
}


@pytest.mark.slow
def test_every_public_attribute_of_a_keras_optimizer_works_or_is_refused() -> None:
    base = keras.optimizers.SGD(0.5)
    assert {name for name in dir(base) if not name.startswith("_")} == HOLDS.keys()
    for check in {id(check): check for check in HOLDS.values()}.values():
        check()


CLASSES = [
    kind
    for kind in vars(keras.optimizers).values()
    if isinstance(kind, type)
    and issubclass(kind, keras.optimizers.Optimizer)
    and kind not in (keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer)
    and kind is not getattr(keras.optimizers, "MultiOptimizer", None)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_public_attribute_of_every_keras_optimizer_is_the_wrappers_too(kind: Any) -> None:
    base = kind(learning_rate=0.5)
    optimizer = wrapped(base)
    optimizer.build([keras.Variable([1.0])])
    kept = {"name", "get_config", "from_config"}  # tested above
    for name in {name for name in dir(base) if not name.startswith("_")} - kept:
        mine, theirs = getattr(optimizer, name), getattr(base, name)
        is_method = callable(theirs) or name == "variables"  # which is one in Keras 2
        assert callable(mine) == is_method, name
        if not callable(theirs) and name != "iterations":  # which counts on when the base optimizer is reset
            assert mine is theirs or mine == theirs, name


def test_settings_that_only_the_base_optimizer_has() -> None:
    adam = wrapped(keras.optimizers.Adam(0.5, beta_1=0.25))
    assert adam.beta_1 == 0.25
    adam.beta_1 = 0.75
    assert adam.base_optimizer.beta_1 == 0.75
    assert not hasattr(adam, "momentum")
    with pytest.raises(AttributeError, match="neither SlowMo nor Adam, which it wraps, has 'rho'"):
        _ = adam.rho
    adam.note = "mine"
    assert not hasattr(adam.base_optimizer, "note")
    scaled = wrapped(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5, clipnorm=2.0), initial_scale=4.0))
    assert (scaled.initial_scale, scaled.clipnorm) == (4.0, 2.0)
    scaled.clipnorm = 3.0
    assert scaled.base_optimizer.inner_optimizer.clipnorm == 3.0


@pytest.mark.slow
def test_setting_counts_in_fit() -> None:
    """Equal to plain Keras with the same settings made at the same moments."""
    plain, own = keras.optimizers.SGD(0.5, momentum=0.5), keras.optimizers.SGD(0.5, momentum=0.5)
    models = model_of(plain), model_of(wrapped(own))
    models[1].set_weights(models[0].get_weights())
    for model in models:
        model.optimizer.momentum = 0.25
        model.optimizer.clipvalue = 0.125
        model.optimizer.weight_decay = 0.5
        model.optimizer.exclude_from_weight_decay(var_names=["bias"])
        model.fit(X, Y, batch_size=2, verbose=0)
    for mine, theirs in zip(models[1].get_weights(), models[0].get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
def test_swap_ema_weights(scaled: bool) -> None:
    found = []
    for wrap in (lambda base: base, wrapped):
        keras.utils.set_random_seed(0)
        base = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5)
        optimizer = keras.optimizers.LossScaleOptimizer(base) if scaled else base
        model = model_of(wrap(optimizer), auto_scale_loss=False)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        history = model.fit(X, Y, batch_size=4, epochs=2, validation_data=(X, Y), verbose=0, callbacks=[swap])
        found.append([*history.history["val_loss"], *model.get_weights()])
    for mine, theirs in zip(found[1], found[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
def test_swap_ema_weights_of_an_optimizer_without_them() -> None:
    model = model_of(wrapped())
    with pytest.raises(ValueError, match="use_ema=True"):
        model.fit(X, Y, verbose=0, callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch=True)])


def test_optimizer_without_a_learning_rate_of_its_own_is_refused() -> None:
    several = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.5)))
    with pytest.raises(lt.ConfigurationError, match="wrap one optimizer for all layers"):
        wrapped(several)


@pytest.mark.parametrize("wrap", [lt.DistributedOptimizer, lt.SlowMo, lt.AdaComm, lt.DiLoCo])
def test_a_model_that_is_not_passed_by_its_name_is_refused(wrap: Any) -> None:
    model = model_of("sgd")
    with pytest.raises(lt.ConfigurationError, match="got Sequential. A model is passed by its name: model=model"):
        wrap(keras.optimizers.SGD(0.5), model)


@pytest.mark.parametrize("kind", ["variables", "layer", "class", "text"])
def test_something_else_than_a_model_is_refused(kind: str) -> None:
    model = model_of("sgd")
    others = {"variables": model.variables, "layer": model.layers[0], "class": keras.Model, "text": "model"}
    named = {"variables": "list", "layer": "Dense", "class": "the class Model itself", "text": "str"}
    text = rf"model= must be the keras\.Model that this optimizer trains, or be left out, got {named[kind]}"
    with pytest.raises(lt.ConfigurationError, match=text):
        lt.SlowMo(keras.optimizers.SGD(0.5), model=others[kind])
