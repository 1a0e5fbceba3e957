"""``lentando.tensorflow.keras`` and ``lentando.keras`` in place of Horovod's modules of these names."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from case_selection import selected_cases

import lentando.keras as hvd_keras
import lentando.tensorflow as lt
import lentando.tensorflow.keras as hvd

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of NumPy to Keras
FRONTS = pytest.mark.parametrize("front", [hvd, hvd_keras], ids=["tensorflow.keras", "keras"])


@FRONTS
def test_collectives_take_values_and_return_tensors(front: Any) -> None:
    size, rank = front.size(), front.rank()
    ranks = np.arange(size)
    own = [1.0 + rank, 2.0]
    assert front.allreduce(own).numpy().tolist() == [float(np.mean(1.0 + ranks)), 2.0]
    assert front.allreduce(own, "sum", op=front.Sum).numpy().tolist() == [float(np.sum(1.0 + ranks)), 2.0 * size]
    assert front.allreduce(own, average=False).numpy().tolist() == [float(np.sum(1.0 + ranks)), 2.0 * size]
    scaled = front.allreduce(np.array([rank], np.float64), "scaled", None, 2.0, 0.5, front.Sum)
    assert scaled.dtype == tf.float64
    assert scaled.numpy().tolist() == [float(ranks.sum())]
    rounded = front.allreduce([1 + 2.0**-12], compression=front.Compression.fp16)
    assert rounded.numpy().tolist() == [1.0]
    gathered = front.allgather(np.full([rank + 1, 2], rank, np.int64), "gathered")
    assert gathered.numpy().tolist() == [[number, number] for number in ranks for _ in range(number + 1)]
    assert front.broadcast(np.full(2, rank), size - 1, "last").numpy().tolist() == [size - 1] * 2
    assert float(front.broadcast(3.5 + rank, 0)) == 3.5
    part = front.reducescatter(np.arange(2.0 * size) + rank, op=front.Sum)
    assert part.numpy().tolist() == [float(size * (2 * rank + number) + ranks.sum()) for number in range(2)]


@FRONTS
def test_names_of_horovod_exist(front: Any) -> None:
    assert front.is_initialized()
    assert (front.rank(), front.size()) == (lt.rank(), lt.size())
    assert (front.local_rank(), front.cross_rank()) == (lt.rank(), 0)  # on one node
    assert front.callbacks.MetricAverageCallback is lt.MetricAverageCallback
    assert issubclass(front.elastic.KerasState, lt.elastic.TensorFlowKerasState)
    with pytest.raises(RuntimeError, match="broadcast_variables"):
        front.broadcast_global_variables(0)


class Doubled(keras.optimizers.SGD):
    """A user's optimizer."""


def new_model(optimizer: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(1)])
    # Keras cannot load the names "mse" and "mae" from .h5 files.
    model.compile(optimizer, keras.losses.MeanSquaredError(), metrics=[keras.metrics.MeanAbsoluteError()])
    return model


def fit(model: keras.Model, seed: int) -> None:
    x = np.random.default_rng(10 * seed + lt.rank()).normal(size=(12, 3))
    model.fit(x, x.sum(1), batch_size=2, shuffle=False, verbose=0)


@pytest.mark.parametrize(
    ("kind", "ending", "is_wrapped"),
    [
        (keras.optimizers.RMSprop, "h5", True),
        (Doubled, "keras", False),
        *selected_cases([], [(keras.optimizers.Adam, "keras", True)]),
    ],
)
def test_loaded_model_continues_as_if_it_had_not_been_saved(
    kind: type, ending: str, is_wrapped: bool, tmp_path: Path
) -> None:
    plain = kind(0.125, **({"momentum": 0.5} if kind is not keras.optimizers.Adam else {}))
    model = new_model(hvd.DistributedOptimizer(plain))
    fit(model, 1)
    if not is_wrapped:  # the same state in a model with the plain optimizer
        model.optimizer = plain
    model.save(tmp_path / f"model.{ending}")
    custom = {"custom_optimizers": [Doubled]} if kind is Doubled else {}
    loaded = hvd_keras.load_model(tmp_path / f"model.{ending}", **custom)
    assert isinstance(loaded.optimizer, lt.DistributedOptimizer)
    assert type(loaded.optimizer.base_optimizer) is kind
    assert int(loaded.optimizer.iterations) == 6
    for saved, found in zip(plain.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(saved.numpy(), found.numpy())
    if not is_wrapped:
        model.optimizer = hvd.DistributedOptimizer(plain)
        model.make_train_function(force=True)
    for one in (model, loaded):
        fit(one, 2)
    for expected, found in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(expected, found)
    checksum = float(sum(np.abs(weight).sum() for weight in loaded.get_weights()))
    assert len(set(lt.allgather_object(checksum))) == 1
    assert int(loaded.optimizer.iterations) == 12


def test_function_makes_the_optimizer_of_a_loaded_model(tmp_path: Path) -> None:
    model = new_model(hvd.DistributedOptimizer(Doubled(0.125)))
    fit(model, 1)
    model.save(tmp_path / "model.keras")
    made: list[dict[str, Any]] = []

    def make(**config: Any) -> Any:
        made.append(config)
        return hvd.DistributedOptimizer(Doubled(**config), compression=hvd.Compression.fp16)

    loaded = hvd.load_model(tmp_path / "model.keras", custom_objects={"Doubled": make})
    assert made[0]["learning_rate"] == 0.125
    assert type(loaded.optimizer.base_optimizer) is Doubled
    fit(loaded, 2)
    assert int(loaded.optimizer.iterations) == 12


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_functions_of_a_loaded_model_remain_functions(ending: str, tmp_path: Path) -> None:
    """Functions with keyword arguments of any name, at places where Keras takes functions."""

    def half(x: Any, **options: Any) -> Any:
        return x / 2

    def distance(y: Any, output: Any, **options: Any) -> Any:
        return keras.ops.mean(keras.ops.abs(y - output), -1)

    def make(**config: Any) -> Any:
        return Doubled(**config)

    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1, half)])
    model.compile(hvd.DistributedOptimizer(Doubled(0.125)), distance, metrics=[distance])
    fit(model, 1)
    custom = {"half": half, "distance": distance, "Doubled": make}
    for number in (1, 2):
        model.save(tmp_path / f"{number}.{ending}")
        model = hvd.load_model(tmp_path / f"{number}.{ending}", custom_objects=custom)
        assert model.layers[0].activation is half
        assert model.loss is distance
        assert type(model.optimizer.base_optimizer) is Doubled
    fit(model, 2)
    assert int(model.optimizer.iterations) == 12


def test_model_that_rank_0_alone_has_loaded_is_broadcast(tmp_path: Path) -> None:
    def new() -> keras.Model:
        keras.utils.set_random_seed(lt.rank())
        inputs = keras.Input([3])
        outputs = keras.layers.Dense(1, name="last")(keras.layers.Dense(4, "relu", name="first")(inputs))
        model = keras.Model(inputs, outputs)
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.125, momentum=0.5)), "mse")
        return model

    model = new()
    fit(model, 1)
    if lt.rank() == 0:
        model.save(tmp_path / "model.keras")
        again = hvd.load_model(tmp_path / "model.keras")
    else:
        again = new()
    fit(model, 2)
    x = np.random.default_rng(20 + lt.rank()).normal(size=(12, 3))
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    again.fit(x, x.sum(1), batch_size=2, shuffle=False, verbose=0, callbacks=callbacks)
    for expected, found in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(expected, found)
    assert int(again.optimizer.iterations) == 12


def test_model_without_an_optimizer_and_legacy_optimizers_are_refused(tmp_path: Path) -> None:
    keras.Sequential([keras.Input([3]), keras.layers.Dense(1)]).save(tmp_path / "model.keras")
    with pytest.raises(lt.ConfigurationError, match="contains a model without an optimizer"):
        hvd.load_model(tmp_path / "model.keras")
    with pytest.raises(lt.ConfigurationError, match="Keras 3 has no legacy optimizers"):
        hvd.load_model(tmp_path / "model.keras", legacy_opts=True)


@pytest.mark.parametrize("is_scaled", [True, *selected_cases([], [False])])
def test_local_layers_are_trained_on_each_rank_alone(is_scaled: bool) -> None:
    rank, size = lt.rank(), lt.size()
    layers = [keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", trainable=True) for _ in range(2)]
    model = keras.Sequential([keras.Input([1]), *layers])
    optimizer = hvd.PartialDistributedOptimizer(
        keras.optimizers.SGD(0.25), local_layers=layers[0], scale_local_gradients=is_scaled
    )
    model.compile(optimizer, lambda y, output: output)
    x = np.full([1, 1], 1.0 + rank)
    model.fit(x, x, verbose=0)
    mean = np.mean([1.0 + number for number in range(size)])
    local = 1 - 0.25 * (1.0 + rank) / (size if is_scaled else 1)
    np.testing.assert_allclose(layers[0].get_weights()[0], [[local]], rtol=1e-6)
    np.testing.assert_allclose(layers[1].get_weights()[0], [[1 - 0.25 * mean]], rtol=1e-6)
    with pytest.raises(lt.ConfigurationError, match="must be Keras layers, got str"):
        hvd.PartialDistributedOptimizer("sgd", local_layers=["dense"])
    with pytest.raises(lt.ConfigurationError, match="has not been built"):
        hvd.PartialDistributedOptimizer("sgd", local_layers=[keras.layers.Dense(1)])
