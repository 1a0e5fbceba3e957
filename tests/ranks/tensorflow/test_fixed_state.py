"""What layers compute with and keep in no weight is equal on all ranks, or an error that names the layer."""

from pathlib import Path
from typing import Any

import keras
import keras_training  # noqa: F401 - quiets TensorFlow
import numpy as np
import pytest
import tensorflow as tf
from case_selection import selected_cases

import lentando.tensorflow as lt

several = pytest.mark.skipif(lt.size() == 1, reason="one rank differs from none")


def own_data(rank: int | None = None) -> Any:
    """Of another mean and variance on each rank."""
    rank = lt.rank() if rank is None else rank
    return (np.random.default_rng(rank).normal(size=(24, 3)) * (rank + 1) + 3 * rank).astype("float32")


def adapted(rank: int | None = None) -> Any:
    layer = keras.layers.Normalization(name="scale")
    layer.adapt(own_data(rank))
    return layer


class Block(keras.layers.Layer):  # type: ignore[misc]
    """Holds layers where a model does not list them."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.inside = {"first": layer}

    def call(self, x: Any) -> Any:
        return self.inside["first"](x)


class Table(keras.layers.Layer):  # type: ignore[misc]
    """A user's layer, whose state is a file of its own in saved models."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def call(self, x: Any) -> Any:
        return x * len(self.text)

    def save_assets(self, path: str) -> None:
        (Path(path) / "table.txt").write_text(self.text)

    def load_assets(self, path: str) -> None:
        self.text = (Path(path) / "table.txt").read_text()


def model_with(*layers: Any, shape: int = 3, dtype: str = "float32") -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((shape,), dtype=dtype), *layers, keras.layers.Dense(1)])


def wrap(model: keras.Model, **options: Any) -> Any:
    return lt.SlowMo(keras.optimizers.SGD(0.01), model=model, period=2, **options)


def predictions(model: keras.Model) -> list[Any]:
    return lt.allgather_object(model.predict(np.ones((2, 3), np.float32), verbose=0).tolist())


def moments_of_all() -> tuple[Any, Any]:
    """Mean and variance of what all ranks have adapted their layers to: as much data on each."""
    data = np.concatenate([own_data(rank) for rank in range(lt.size())]).astype(np.float64)
    return data.mean(axis=0), data.var(axis=0)


@pytest.mark.parametrize("nested", selected_cases([True], [False, True]))
def test_normalization_is_by_the_data_of_all_ranks(nested: bool, shared_path: Path) -> None:
    layer = adapted()
    model = model_with(Block(layer) if nested else layer)
    model.compile("sgd", "mse")
    model.predict(np.ones((2, 3), np.float32), verbose=0)  # compiles the constants of this rank
    optimizer = wrap(model)
    mean, variance = moments_of_all()
    np.testing.assert_allclose(layer.mean[0], mean, rtol=1e-6)
    np.testing.assert_allclose(layer.variance[0], variance, rtol=1e-5)
    expected = [array.tobytes() for array in (np.asarray(layer.mean), np.asarray(layer.variance))]
    assert lt.allgather_object(expected) == [expected] * lt.size()
    assert len({str(found) for found in predictions(model)}) == 1
    model.compile(optimizer, "mse")
    x = own_data()
    model.fit(x, x.sum(1), batch_size=6, epochs=2, verbose=0)
    with optimizer.averaged():
        assert len({str(found) for found in predictions(model)}) == 1
    assert layer.adapt_mean.numpy().tobytes() == expected[0]

    lt.save(shared_path, optimizer)
    other_layer = adapted(5)
    other = model_with(Block(other_layer) if nested else other_layer)
    lt.load(shared_path, wrap(other))
    assert np.asarray(other_layer.mean).tobytes() == expected[0]
    assert predictions(other)[lt.rank()] == predictions(model)[lt.rank()]


@pytest.mark.parametrize("axis", [-1, None])
def test_normalization_that_all_ranks_have_adapted_alike_stays_as_it_is(axis: int | None) -> None:
    layer = keras.layers.Normalization(axis=axis)
    layer.adapt(own_data(1))
    before = np.asarray(layer.mean).tobytes(), np.asarray(layer.variance).tobytes()
    wrap(model_with(layer))
    assert (np.asarray(layer.mean).tobytes(), np.asarray(layer.variance).tobytes()) == before


@several
def test_normalization_with_given_constants_that_differ() -> None:
    model = model_with(keras.layers.Normalization(mean=float(lt.rank()), variance=1.0, name="scale"))
    with pytest.raises(lt.MismatchError, match=r"mean of the layer 'scale' \(Normalization\) differs between ranks"):
        wrap(model)


@several
def test_normalization_in_a_model_that_its_first_batch_builds() -> None:
    """The graph that runs continues with the constants that it was traced with."""
    model = keras.Sequential([adapted(), keras.layers.Dense(1)])
    model.compile(wrap(model), "mse", jit_compile=False)
    with pytest.raises((tf.errors.OpError, lt.MismatchError), match="mean of the layer 'scale.*differs"):
        model.fit(own_data(), own_data().sum(1), verbose=0)


@several
def test_layers_that_are_adapted_after_wrapping() -> None:
    layer = adapted(0)
    model = model_with(layer)
    optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(0.01), model=model)
    layer.adapt(own_data())
    with pytest.raises(lt.MismatchError, match="started from parameters"):
        optimizer.apply([np.ones(v.shape, np.float32) for v in model.trainable_variables], model.trainable_variables)


def lookup(rank: int) -> Any:
    layer = keras.layers.StringLookup(name="words")
    layer.adapt([f"w{rank}", "all", "all"])
    return layer


def vectorization(rank: int) -> Any:
    layer = keras.layers.TextVectorization(output_mode="tf_idf", standardize=lambda text: text, name="words")
    layer.adapt(["a b", f"a{'' if rank else ' a'} b", "a"][: 2 + rank])
    return layer


def bins(rank: int) -> Any:
    layer = keras.layers.Discretization(num_bins=3, name="words")
    layer.adapt(own_data(rank))
    return layer


LAYERS = {
    "vocabulary": lookup,
    "integers": lambda rank: keras.layers.IntegerLookup(vocabulary=[1, 2 + rank], name="words"),
    "weights of words": vectorization,
    "bins": bins,
    "salt": lambda rank: keras.layers.Hashing(8, salt=rank, name="words"),
    "encoding": lambda rank: keras.layers.CategoryEncoding(8 + rank, output_mode="count", name="words"),
    "file": lambda rank: Table("ab" + "c" * rank),
}


class Holder(keras.Model):  # type: ignore[misc]
    """Uses a layer next to what it trains."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.dense = keras.layers.Dense(1)

    def build(self, shape: Any) -> None:
        self.dense.build((None, 3))

    def call(self, x: Any) -> Any:
        return self.dense(x)


def holding(layer: Any) -> keras.Model:
    model = Holder(layer)
    model(np.ones((1, 3), np.float32))
    return model


@several
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_that_differ_are_named(kind: str) -> None:
    name = "table" if kind == "file" else "words"
    with pytest.raises(lt.MismatchError, match=f"of the layer '{name}.* differs between ranks") as error:
        wrap(holding(LAYERS[kind](lt.rank())))
    assert "rank 0: " in str(error.value)
    assert len(set(lt.allgather_object(str(error.value)))) <= lt.size()


def test_layers_that_are_equal_train() -> None:
    for make in LAYERS.values():
        model = holding(make(0))
        optimizer = wrap(model)
        optimizer.apply([np.ones(v.shape, np.float32) for v in model.trainable_variables], model.trainable_variables)


@several
def test_a_layer_that_one_rank_lacks() -> None:
    model = holding(lookup(0) if lt.rank() else keras.layers.Activation("relu"))
    with pytest.raises(lt.MismatchError, match=r"layers with state outside of weights differ.*rank 0: none"):
        wrap(model)


def test_synchronized_batch_normalization_is_refused() -> None:
    model = model_with(keras.layers.BatchNormalization(synchronized=True, name="norm"))
    if lt.size() == 1:
        wrap(model)
    else:
        with pytest.raises(lt.ConfigurationError, match="synchronized=True of the layer 'norm' has no effect"):
            wrap(model)
