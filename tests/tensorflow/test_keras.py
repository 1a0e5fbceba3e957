"""What Keras users do with an optimizer next to stepping it. One rank: here nothing depends on the others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import keras_training
import numpy as np
import pytest
import tensorflow as tf
from keras_training import batches, make_model
from numpy.testing import assert_array_equal

import lentando.tensorflow as lt
from lentando.comm import simulate
from lentando.comm.flat import FlatBuffer
from lentando.tensorflow.convert import as_array, as_tensor
from lentando.tensorflow.optimizer import DistributedOptimizer

WAYS = ["eager", "graph", "fit"]
COPY_WARNING = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""Of NumPy to Keras."""


@pytest.fixture(autouse=True)
def job() -> Iterator[None]:
    lt.init()
    yield
    lt.shutdown()


def sgd(learning_rate: Any = 0.05, **options: Any) -> Any:
    return keras.optimizers.SGD(learning_rate, **{"momentum": 0.9, **options})


def train(model: Any, optimizer: Any, steps: int, first: int = 0, way: str = "eager") -> None:
    keras_training.train(model, optimizer, 0, steps, first, way)


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", [lt.LocalSGD(), lt.SGP()])
def test_tensors_that_a_user_keeps_do_not_change(base: Any, way: str) -> None:
    """TensorFlow's assign shares memory: neither a variable nor a tensor read from it may share ours."""
    model = make_model()
    optimizer = lt.SlowMo(sgd(), model=model, base=base, period=2)
    train(model, optimizer, 2, way=way)
    kept = [(tf.identity(variable), variable.value.read_value(), variable.numpy()) for variable in model.weights]
    for buffer in optimizer._model.buffers:
        buffer.array[...] = 77.0
    for variable, (tensor, _, value) in zip(model.weights, kept, strict=True):
        assert_array_equal(variable.numpy(), value)
        assert_array_equal(tensor.numpy(), value)
    train(model, optimizer, 4, first=2, way=way)
    for tensor, other, value in kept:
        assert_array_equal(tensor.numpy(), value)
        assert_array_equal(other.numpy(), value)


def test_gradients_that_a_user_keeps_do_not_change() -> None:
    variable = keras.Variable(tf.zeros(100))
    optimizer = lt.DistributedOptimizer(sgd(1.0, momentum=0.0))
    gradients = [tf.fill([100], float(number)) for number in range(3)]
    for gradient in gradients:
        optimizer.apply([gradient], [variable])
    assert [float(gradient[7]) for gradient in gradients] == [0.0, 1.0, 2.0]
    assert float(variable[7]) == -3.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_are_aligned_copies_of_any_part_of_a_buffer(dtype: str) -> None:
    values = tf.cast(tf.range(60), dtype)
    flat = as_array(values).copy()
    for start, shape in ((0, (60,)), (1, (7, 2)), (3, ()), (5, (0, 3)), (13, (1, 47))):
        part = flat[start : start + int(np.prod(shape))].reshape(shape)
        tensor = as_tensor(part)
        assert tensor.dtype == dtype
        expected = part.astype(np.float64)
        part[...] = 0
        assert_array_equal(tf.cast(tensor * 2, tf.float64), 2 * expected)
        flat = as_array(values).copy()


def test_big_variables_come_and_go_with_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dtype conversion, and nothing on the way but the flat buffer."""
    variable = keras.Variable(tf.zeros(1_000_000))
    optimizer = lt.DistributedOptimizer(sgd(momentum=0.0), base=lt.LocalSGD(), period=1)
    optimizer.apply([tf.ones(1_000_000)], [variable])
    copied = []
    original = np.copyto
    monkeypatch.setattr(np, "copyto", lambda out, array, **o: (copied.append(array.nbytes), original(out, array, **o)))
    optimizer._model.load()
    optimizer._model.store()
    assert copied == [4_000_000, 4_000_000]
    assert isinstance(optimizer._model.buffers[0], FlatBuffer)


# --- learning rates and callbacks ---------------------------------------------------------------------------


@pytest.mark.slow
@COPY_WARNING
def test_callbacks_that_set_the_learning_rate_reach_the_base_optimizer() -> None:
    model = make_model()
    base = sgd(0.4)
    optimizer = lt.SlowMo(base, model=model, period=2)
    model.compile(optimizer=optimizer, loss=keras_training.cross_entropy)
    images, labels = next(batches(0, 1))
    callbacks = [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2), lt.LentandoCallback()]
    history = model.fit(images, labels, batch_size=2, epochs=3, verbose=0, callbacks=callbacks).history
    assert history["learning_rate"] == pytest.approx([0.2, 0.1, 0.05])
    assert float(base.learning_rate) == pytest.approx(0.05)
    assert history["lentando_inner_steps"] == [3, 6, 9]
    assert history["lentando_rounds"] == [1, 3, 4]
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="loss",
        factor=0.5,
        patience=1,  # check_words: allow
        min_delta=1e9,
    )
    model.fit(images, labels, batch_size=2, epochs=3, verbose=0, callbacks=[lt.MetricAverageCallback(), plateau])
    assert float(base.learning_rate) == pytest.approx(0.0125)


@pytest.mark.slow
def test_broadcast_callback_restores_what_a_rank_has_loaded() -> None:
    model = make_model()
    model.compile(optimizer=lt.SlowMo(sgd(), model=model), loss=keras_training.cross_entropy)
    images, labels = next(batches(0, 1))
    callback = lt.BroadcastGlobalVariablesCallback(0)
    model.fit(images, labels, verbose=0, callbacks=[callback])
    assert callback._done


@pytest.mark.slow
def test_steps_per_execution() -> None:
    """Several steps in one call of a graph: the outer steps fall where they should."""
    one, several = make_model(), make_model()
    optimizers = [lt.SlowMo(sgd(), model=model, period=3) for model in (one, several)]
    one.compile(optimizer=optimizers[0], loss=keras_training.cross_entropy)
    several.compile(optimizer=optimizers[1], loss=keras_training.cross_entropy, steps_per_execution=4)
    images, labels = (np.concatenate(column) for column in zip(*batches(0, 10), strict=True))
    for model in (one, several):
        model.fit(images, labels, batch_size=6, shuffle=False, verbose=0)
    assert [optimizer.report()["rounds"] for optimizer in optimizers] == [3, 3]
    for mine, theirs in zip(one.get_weights(), several.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_graph_that_fails_before_its_average_loses_no_step() -> None:
    is_bad = tf.Variable(initial_value=False)
    variable = tf.Variable([1.0, 2.0])
    optimizer = lt.DistributedOptimizer(sgd(0.1, momentum=0.0))

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable**2)
        (gradient,) = tape.gradient(loss, [variable])
        with tf.control_dependencies([tf.debugging.assert_equal(is_bad.read_value(), False)]):
            gradient = tf.identity(gradient)
        optimizer.apply([gradient], [variable])

    for _ in range(2):
        step()
        is_bad.assign(value=True)
        with pytest.raises(tf.errors.InvalidArgumentError):
            step()
        is_bad.assign(value=False)
    assert optimizer.report()["inner_steps"] == int(optimizer.iterations) == 2
    np.testing.assert_allclose(variable, 0.8**2 * np.array([1.0, 2.0]), rtol=1e-6)


@pytest.mark.slow
def test_moving_average_of_the_weights_is_the_base_optimizers() -> None:
    model, twin = make_model(), make_model()
    optimizer = lt.DistributedOptimizer(sgd(use_ema=True, ema_momentum=0.5), model=model)
    train(model, optimizer, 5, way="fit")
    train(twin, sgd(use_ema=True, ema_momentum=0.5), 5, way="fit")
    for mine, theirs in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_model_compiled_and_fit_equals_plain_keras_on_one_rank() -> None:
    """Weight decay, clipping and Adam's own state included."""
    for make in (
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, clipnorm=0.5),
        lambda: sgd(global_clipnorm=0.1),
        lambda: sgd(clipvalue=0.01, nesterov=True),
    ):
        model, twin = make_model(), make_model()
        train(model, lt.DistributedOptimizer(make(), model=model), 5, way="fit")
        train(twin, make(), 5, way="fit")
        for mine, theirs in zip(model.get_weights(), twin.get_weights(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@COPY_WARNING
@pytest.mark.parametrize("rate", [0.05, keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.9)])
def test_saved_model_comes_back_with_its_base_optimizer(tmp_path: Path, rate: Any) -> None:
    model = make_model()
    optimizer = lt.SlowMo(sgd(rate), model=model, period=3)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    images, labels = next(batches(0, 1))
    model.fit(images, labels, batch_size=2, epochs=3, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is keras.optimizers.SGD
    assert float(loaded.optimizer.learning_rate) == float(optimizer.learning_rate)
    assert int(loaded.optimizer.iterations) == int(optimizer.iterations) == 9  # although resets have begun again
    for mine, theirs in zip(model.get_weights(), loaded.get_weights(), strict=True):
        assert_array_equal(mine, theirs)
    again = lt.SlowMo(loaded.optimizer, model=loaded, period=3)
    assert int(again.iterations) == 9
    assert float(again.learning_rate) == float(optimizer.learning_rate)
    loaded.compile(optimizer=again, loss="sparse_categorical_crossentropy")
    loaded.fit(images, labels, batch_size=2, verbose=0)
    assert again.report()["rounds"] == 1


# --- wrong use ----------------------------------------------------------------------------------------------


def test_misuse_is_refused() -> None:
    model = make_model()
    optimizer = lt.SlowMo(sgd(), model=model)
    with pytest.raises(lt.ConfigurationError, match="is a DistributedOptimizer already"):
        lt.SlowMo(optimizer)
    with pytest.raises(lt.ConfigurationError, match="expected a Keras 3 optimizer .* got Sequential"):
        lt.SlowMo(model)
    of_keras_2 = type("Adam", (), {"__module__": "tf_keras.src.optimizers.adam"})()  # tf_keras is not installed here
    with pytest.raises(lt.ConfigurationError, match="got Adam of Keras 2: .* without TF_USE_LEGACY_KERAS"):
        lt.SlowMo(of_keras_2)
    with pytest.raises(lt.ConfigurationError, match="built without the variables"):
        optimizer.apply([tf.zeros(1)], [keras.Variable([1.0], name="stranger")])
    with pytest.raises(lt.ConfigurationError, match="the first step needs the variables"):
        lt.SlowMo(sgd()).apply([tf.zeros(1)])
    with pytest.raises(lt.ConfigurationError, match="has not been built"):
        lt.SlowMo(sgd()).report()
    with pytest.raises(lt.ConfigurationError, match="use_ema=True"):
        lt.SlowMo(sgd(use_ema=True), base_buffers="reset")
    with pytest.raises(lt.ConfigurationError, match="the replicas would never communicate"):
        lt.DistributedOptimizer(sgd(), base=lt.LocalSGD())
    with pytest.raises(lt.ConfigurationError, match="period must be an integer >= 1"):
        lt.SlowMo(sgd(), period=0)


def test_use_before_init_is_refused() -> None:
    lt.shutdown()
    for use in (lt.rank, lambda: lt.SlowMo(sgd()), lambda: lt.allreduce(tf.zeros(1)), lambda: lt.broadcast_object(1)):
        with pytest.raises(lt.NotInitializedError, match=r"call init\(\) first"):
            use()


def test_loss_scaling_goes_inside() -> None:
    with pytest.raises(lt.ConfigurationError, match="auto_scale_loss=False"):
        keras.optimizers.LossScaleOptimizer(lt.SlowMo(sgd()))
    inner = keras.optimizers.LossScaleOptimizer(sgd(gradient_accumulation_steps=2))
    with pytest.raises(lt.ConfigurationError, match="gradient_accumulation_steps is not possible inside a LossScale"):
        lt.SlowMo(inner)


@pytest.mark.slow
def test_mixed_precision_in_fit() -> None:
    """compile() adds a LossScaleOptimizer automatically by default: round ours, which is refused."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential([keras.layers.Input((5, 5, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
        scaled = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=2.0**10)
        optimizer = lt.SlowMo(scaled, model=model, period=2)
        with pytest.raises(lt.ConfigurationError, match="auto_scale_loss=False"):
            model.compile(optimizer=optimizer, loss="mse")
        model.compile(optimizer=optimizer, loss=keras_training.cross_entropy, auto_scale_loss=False)
        images, labels = next(batches(0, 1))
        before = model.get_weights()
        model.fit(images, labels, batch_size=2, epochs=2, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert optimizer.report()["rounds"] == 3
    assert not np.array_equal(model.get_weights()[0], before[0])


@pytest.mark.slow
def test_xla_is_refused_with_the_reason() -> None:
    images, labels = next(batches(0, 1))
    for known in (True, False):
        model = make_model()
        optimizer = lt.SlowMo(sgd(), model=model if known else None)
        model.compile(optimizer=optimizer, loss=keras_training.cross_entropy, jit_compile=True)
        with pytest.raises((lt.ConfigurationError, tf.errors.InvalidArgumentError), match="jit_compile.False"):
            model.fit(images, labels, verbose=0)


def test_distribution_strategy_is_refused() -> None:
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    with strategy.scope(), pytest.raises(lt.ConfigurationError, match="OneDeviceStrategy of tf.distribute"):
        lt.SlowMo(sgd())


def test_another_backend_of_keras_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(lt.ConfigurationError, match="KERAS_BACKEND=tensorflow"):
        lt.SlowMo(sgd())


# --- simulation ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_simulated_ranks_train_in_one_process() -> None:
    def worker() -> tuple[list[Any], list[str], list[int]]:
        lt.init()
        model = make_model(seed=lt.rank())
        optimizer = lt.SlowMo(sgd(), model=model, base=lt.OSGP(deterministic=True), period=4)
        keras_training.train(model, optimizer, lt.rank(), 8)
        drawn = tf.random.get_global_generator().uniform([3], maxval=1 << 20, dtype=tf.int32)
        return model.get_weights(), optimizer._model.names, drawn.numpy().tolist()

    weights, names, drawn = zip(*simulate(worker, size=3), strict=True)
    for other in weights[1:]:
        for mine, theirs in zip(weights[0], other, strict=True):
            assert_array_equal(mine, theirs)
    assert names[0] == names[1] == names[2]
    assert drawn[0] != drawn[1]


@pytest.mark.slow
def test_graphs_are_refused_in_a_simulation() -> None:
    def worker() -> None:
        lt.init()
        model = make_model()
        train(model, lt.SlowMo(sgd(), model=model), 1, way="graph")

    def fits() -> None:
        lt.init()
        model = make_model()
        optimizer = lt.SlowMo(sgd(), model=model)
        model.compile(optimizer=optimizer, loss=keras_training.cross_entropy, run_eagerly=True)
        model.fit(*next(batches(0, 1)), verbose=0)

    for work in (worker, fits):
        with pytest.raises(lt.LentandoError, match=r"run_functions_eagerly\(True\)"):
            simulate(work, size=2)
    with pytest.raises(lt.LentandoError, match=r"run_functions_eagerly\(True\)"):
        simulate(lambda: (lt.init(), tf.function(lambda: lt.allreduce(tf.ones(2)))()), size=2)


def test_a_class_is_what_slowmo_makes() -> None:
    optimizer = lt.SlowMo(sgd())
    assert isinstance(optimizer, keras.optimizers.Optimizer)
    assert isinstance(optimizer, DistributedOptimizer)
    assert type(optimizer.base_optimizer) is keras.optimizers.SGD
