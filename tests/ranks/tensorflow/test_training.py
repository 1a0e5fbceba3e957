"""Training with Keras on several ranks: the oracles that concern a framework (O2, O3, O16, O20, O25)."""

from typing import Any, ClassVar

import keras
import keras_training
import numpy as np
import pytest
import reference
import tensorflow as tf
from case_selection import selected_cases
from keras_training import Vector, batches, make_model
from numpy.testing import assert_allclose

import lentando.tensorflow as lt
from lentando.comm.dtypes import numpy_dtype
from lentando.comm.transport import Transport
from lentando.optimizers.replica import Replica

DIMENSION = 13
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)
LR = 0.125  # Keras passes learning rates and momenta through float32: numbers that it holds exactly

WAYS = ["eager", "graph"]

few = pytest.mark.skipif(lt.size() > 3, reason="as with two and three ranks, and each rank takes seconds")


def sgd(learning_rate: Any = LR, momentum: float = 0.0, **options: Any) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(learning_rate, momentum, **options)


def vector(optimizer: Any, way: str) -> Vector:
    return Vector(START, optimizer, graph=way == "graph")


def train_vector(trained: Vector, steps: int) -> Any:
    return trained.train(QUADRATIC, lt.rank(), steps)


def train(model: keras.Model, optimizer: Any, steps: int, first: int = 0, way: str = "eager") -> None:
    keras_training.train(model, optimizer, lt.rank(), steps, first, way)


def assert_equal_on_all_ranks(model: keras.Model) -> None:
    for variable in model.weights:
        for other in lt.allgather_object(variable.numpy()):
            np.testing.assert_array_equal(other, variable.numpy(), variable.path)


def assert_same(model: keras.Model, other: keras.Model) -> None:
    for mine, theirs in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy(), mine.path)


# --- the same numbers as the reference ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nesterov", "base_buffers", "way"),
    [
        (True, "reset", "graph"),
        (False, "maintain", "eager"),
        (False, "average", "graph"),
        *selected_cases([], [(True, "reset", "eager"), (False, "maintain", "graph"), (False, "average", "eager")]),
    ],
)
def test_slowmo_in_keras_equals_algorithm_1(nesterov: bool, base_buffers: Any, way: str) -> None:
    optimizer = lt.SlowMo(
        sgd(momentum=0.5), period=4, slow_lr=0.8, slow_momentum=0.6, nesterov=nesterov, base_buffers=base_buffers
    )
    x = train_vector(vector(optimizer, way), 22)
    expected = reference.slowmo(
        lt.size(), 22, START, QUADRATIC, 4, lambda _: LR, 0.8, 0.6, 0.5, buffers=base_buffers, nesterov=nesterov
    )
    assert_allclose(x, expected.x[lt.rank()], rtol=1e-11, atol=1e-11)
    assert optimizer.report()["inner_steps"] == 22


@pytest.mark.parametrize("way", WAYS)
def test_allreduce_is_sgd_on_the_averaged_gradient(way: str) -> None:
    """O3's other side."""
    trained = vector(lt.DistributedOptimizer(sgd(momentum=0.75)), way)
    expected = reference.synchronous_sgd(lt.size(), 20, START, QUADRATIC, LR, momentum=0.75)
    assert_allclose(train_vector(trained, 20), expected, rtol=1e-12)


BASES: dict[str, Any] = {
    "sgp, static exponential": lt.SGP(lt.StaticExponential()),
    "osgp, three steps late": lt.OSGP(staleness=3, deterministic=True),
    "dpsgd": lt.DPSGD(),
    "sgp in bfloat16": lt.SGP(wire_dtype="bfloat16"),
}


@pytest.mark.parametrize(
    ("name", "way"),
    selected_cases([*zip(BASES, 2 * WAYS, strict=True)], [(name, way) for name in BASES for way in WAYS]),
)
def test_gossip_in_keras_equals_the_reference(name: str, way: str) -> None:
    trained = vector(lt.DistributedOptimizer(sgd(), base=BASES[name]), way)
    graphs = BASES[name].topology.for_size(lt.size())
    staleness = getattr(BASES[name], "staleness", 0)
    wire_dtype = numpy_dtype(BASES[name].wire_dtype or "float64")
    expected = reference.push_sum_sgd(
        lt.size(), 12, START, QUADRATIC, graphs.mixing_matrix, LR, staleness, wire_dtype=wire_dtype
    )
    assert_allclose(train_vector(trained, 12), expected.z[lt.rank()], rtol=1e-10)


def test_overlap_of_gradients_is_pytorchs() -> None:
    with pytest.raises(lt.ConfigurationError, match="overlap=True.* exists in PyTorch only"):
        lt.DistributedOptimizer(sgd(), base=lt.AllReduce(overlap=True))


@pytest.mark.parametrize(
    ("base_buffers", "way"),
    [("reset", "graph"), ("maintain", "eager"), *selected_cases([], [("reset", "eager"), ("maintain", "graph")])],
)
def test_schedule_counts_as_its_mean_within_a_round_and_continues_after_a_reset(base_buffers: Any, way: str) -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, decay_steps=1, decay_rate=0.75)
    optimizer = lt.SlowMo(sgd(schedule), period=4, slow_momentum=0.6, base_buffers=base_buffers)
    x = train_vector(vector(optimizer, way), 12)
    rates = [float(schedule(step)) for step in range(13)]
    expected = reference.slowmo(lt.size(), 12, START, QUADRATIC, 4, lambda step: rates[step], beta=0.6)
    assert_allclose(x, expected.x[lt.rank()], rtol=1e-10)
    assert optimizer.iterations == 12
    assert float(optimizer.learning_rate) == rates[12]


@pytest.mark.parametrize("way", WAYS)
def test_learning_rate_that_the_user_sets_reaches_both_optimizers(way: str) -> None:
    optimizer = lt.SlowMo(sgd(), period=4, slow_momentum=0.6)
    trained = vector(optimizer, way)
    for step in range(12):
        optimizer.learning_rate = 0.5 / (step + 1)
        trained.step(QUADRATIC(lt.rank(), step, trained.value))
    rates = np.float32(0.5 / np.arange(1, 13)).astype(float)
    expected = reference.slowmo(lt.size(), 12, START, QUADRATIC, 4, lambda step: rates[step], beta=0.6)
    assert_allclose(trained.value, expected.x[lt.rank()], rtol=1e-10)


@pytest.mark.parametrize(
    ("method", "way"),
    [("slowmo", "graph"), ("allreduce", "eager"), *selected_cases([], [("slowmo", "eager"), ("allreduce", "graph")])],
)
def test_accumulated_gradients_make_one_inner_step(method: str, way: str) -> None:
    """Each update of the weights is a step, however many batches it takes."""
    base = sgd(momentum=0.5, gradient_accumulation_steps=3)
    optimizer = lt.SlowMo(base, period=2, slow_momentum=0.5) if method == "slowmo" else lt.DistributedOptimizer(base)
    trained = vector(optimizer, way)
    at_start = trained.value
    for step in range(6):
        if step:
            at_start = trained.value
        for part in (0.5, 1.0, 1.5):
            trained.step(part * QUADRATIC(lt.rank(), step, at_start))
    assert optimizer.report()["inner_steps"] == 6
    if method == "slowmo":
        expected = reference.slowmo(
            lt.size(), 6, START, QUADRATIC, 2, lambda _: LR, beta=0.5, momentum=0.5, buffers="reset"
        ).x[lt.rank()]
    else:
        expected = reference.synchronous_sgd(lt.size(), 6, START, QUADRATIC, LR, momentum=0.5)
    assert_allclose(trained.value, expected, rtol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_clipping_comes_after_the_average(way: str) -> None:
    trained = vector(lt.DistributedOptimizer(sgd(0.5, global_clipnorm=1.0)), way)
    gradient = np.zeros(DIMENSION)
    gradient[lt.rank()] = 4.0
    trained.step(gradient)
    mean = np.zeros(DIMENSION)
    mean[: lt.size()] = 4.0 / lt.size()
    assert_allclose(trained.value, START - 0.5 * mean / max(1.0, np.linalg.norm(mean)), rtol=1e-6)


# --- eager, graph and fit -----------------------------------------------------------------------------------


def make(kind: str, model: keras.Model) -> lt.DistributedOptimizer:
    if kind == "slowmo":
        return lt.SlowMo(sgd(0.05, momentum=0.9, nesterov=True), model=model, period=4, slow_momentum=0.6)
    if kind == "slowmo, adam":
        adam = keras.optimizers.Adam(0.01)
        return lt.SlowMo(adam, model=model, period=3, base=lt.SGP(), base_buffers="average")
    return lt.DistributedOptimizer(keras.optimizers.AdamW(0.01, weight_decay=0.01, clipnorm=1.0), model=model)


@few
@pytest.mark.parametrize("kind", ["slowmo, adam", "allreduce", *selected_cases([], ["slowmo"])])
def test_eager_graph_and_fit_take_the_same_steps(kind: str) -> None:
    models = []
    for way in ("eager", "graph", "fit"):
        model = make_model()
        optimizer = make(kind, model)
        train(model, optimizer, 9, way=way)
        train(model, optimizer, 2, first=9, way="eager")  # what a graph has counted is not forgotten
        assert optimizer.report()["inner_steps"] == 11
        models.append(model)
    for model in models[1:]:
        for mine, theirs in zip(model.weights, models[0].weights, strict=True):
            assert_allclose(mine.numpy(), theirs.numpy(), rtol=2e-5, atol=2e-6, err_msg=mine.path)


@few
def test_graph_of_local_steps_enters_python_only_when_the_outer_step_is_due(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = lt.SlowMo(sgd(), period=48)
    trained = vector(optimizer, "graph")
    reported = []
    original = Replica.after_steps
    monkeypatch.setattr(Replica, "after_steps", lambda self, n, rates: (reported.append(n), original(self, n, rates)))
    silent = 0
    for _ in range(96):
        before = transport.traffic.copy()
        trained.step(START)
        silent += transport.traffic == before
    assert reported == [48, 48]
    assert silent == 2 * 47 - 1  # the first step makes the replica
    assert optimizer.report()["rounds"] == 2


class Watched:
    """A period that keeps what it was given."""

    seen: ClassVar[list[Any]] = []

    def steps(self) -> int:
        return 3

    def update(self, summary: Any) -> None:
        self.seen.append(summary)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


@few
@pytest.mark.parametrize("way", WAYS)
def test_losses_of_a_round_are_averaged(way: str) -> None:
    Watched.seen.clear()
    trained = vector(lt.DistributedOptimizer(sgd(), base=lt.LocalSGD(), period=Watched()), way)
    for step in range(6):
        trained.step(START, loss=10.0 * step + lt.rank())
    mean = (lt.size() - 1) / 2
    assert [summary.loss for summary in Watched.seen] == [10.0 + mean, 40.0 + mean]
    assert Watched.seen[0].learning_rate == LR


@few
def test_fit_gives_the_loss_of_each_batch_automatically() -> None:
    Watched.seen.clear()
    model = make_model()
    optimizer = lt.DistributedOptimizer(sgd(0.0), model=model, base=lt.LocalSGD(), period=Watched())
    losses = [float(keras_training.cross_entropy(y, model(x))) for x, y in batches(lt.rank(), 3)]
    model.layers[-2].rate = 0.0
    model.layers[1].trainable = False  # as when it predicts
    train(model, optimizer, 3, way="fit")
    assert Watched.seen[0].loss == pytest.approx(np.mean(lt.allgather_object(float(np.mean(losses)))), rel=1e-5)


# --- what an outer step does next to the parameters ----------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.01, initial_accumulator_value=0.1),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "ftrl": lambda: keras.optimizers.Ftrl(0.01),
}


@few
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_makes_every_optimizer_new(name: str) -> None:
    """O16: for Adam that includes the step count, so that bias correction starts again."""
    start = tf.random.stateless_normal([4, 3], [1, 2])
    one, other = keras.Variable(start, name="one"), keras.Variable(start, name="other")
    optimizer = lt.SlowMo(OPTIMIZERS[name](), period=3, slow_momentum=0.0, base_buffers="reset")
    gradients = [tf.random.stateless_normal([4, 3], [3, step]) for step in range(5)]
    for gradient in gradients[:3]:
        optimizer.apply([gradient], [one])
    other.assign(one)
    fresh = OPTIMIZERS[name]()
    for gradient in gradients[3:]:
        optimizer.apply([gradient], [one])
        fresh.apply([gradient], [other])
    np.testing.assert_array_equal(one.numpy(), other.numpy())


@few
def test_statistics_are_averaged_and_the_rest_is_left() -> None:
    model = make_model()
    optimizer = lt.SlowMo(sgd(0.05), model=model, period=3)
    frozen = model.get_layer("frozen").kernel.numpy()
    mean, seed = model.get_layer("norm").moving_mean, model.layers[-2].seed_generator.state
    train(model, optimizer, 2)
    before = lt.allgather_object(mean.numpy())
    if lt.size() > 1:
        assert not np.array_equal(*before[:2])
    seed_before = seed.numpy()
    train(model, optimizer, 1, first=2)
    assert_equal_on_all_ranks(model)
    np.testing.assert_array_equal(model.get_layer("frozen").kernel.numpy(), frozen)
    assert not np.array_equal(seed.numpy(), seed_before)


@few
def test_workers_that_start_differently_are_made_equal() -> None:
    """O25: weights, frozen ones and statistics; to rank 0's. Seeds stay each rank's own."""
    model = make_model(seed=lt.rank())
    model.get_layer("norm").moving_mean.assign_add(tf.fill([4], float(lt.rank())))
    seed = model.layers[-2].seed_generator.state
    seed.assign([lt.rank(), 7])
    lt.SlowMo(sgd(), model=model)
    assert_same(model, make_model(seed=0))
    assert seed.numpy().tolist() == [lt.rank(), 7]


@few
@pytest.mark.parametrize("way", ["graph", "fit", *selected_cases([], ["eager"])])
def test_model_that_is_built_by_its_first_batch(way: str) -> None:
    keras.utils.set_random_seed(lt.rank())
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3), keras.layers.BatchNormalization()])
    optimizer = lt.SlowMo(sgd(0.05), model=model, period=2)
    train(model, optimizer, 4, way=way)
    assert optimizer.report()["rounds"] == 2
    assert_equal_on_all_ranks(model)
    assert len(optimizer._model.variables) == 6


@few
def test_weights_loaded_before_the_first_step_are_where_it_begins() -> None:
    model, twin = make_model(), make_model(seed=1)
    optimizer = make("slowmo", model)
    model.set_weights(twin.get_weights())
    other = make("slowmo", twin)
    train(model, optimizer, 5, way="graph")
    train(twin, other, 5, way="graph")
    assert_same(model, twin)


@few
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("slowmo", "graph"),
        *selected_cases([], [("slowmo", "eager"), ("slowmo, adam", "eager"), ("slowmo, adam", "graph")]),
    ],
)
def test_resumed_training_is_the_same_bit_identically(kind: str, way: str) -> None:
    """O20: in the middle of rounds."""
    model = make_model()
    optimizer = make(kind, model)
    saved = {}
    for taken, steps in ((0, 2), (2, 3), (5, 4)):
        weights = [variable.numpy() for variable in model.variables]
        state = [variable.numpy() for variable in optimizer.variables]
        saved[taken] = weights, state, optimizer.state_dict()
        train(model, optimizer, steps, first=taken, way=way)
    for taken, (weights, state, replica) in saved.items():
        resumed = make_model(seed=5)
        again = make(kind, resumed)
        for variables, values in ((resumed.variables, weights), (again.variables, state)):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        again.load_state_dict(replica)
        train(resumed, again, 9 - taken, first=taken, way=way)
        assert_same(resumed, model)
        assert again.iterations == optimizer.iterations


@few
def test_averaged_evaluates_the_mean_model_and_restores_the_own() -> None:
    model = make_model()
    optimizer = make("slowmo", model)
    train(model, optimizer, 6)
    own, everyones = model.get_weights(), lt.allgather_object([w.numpy() for w in model.weights])
    with optimizer.averaged():
        for variable, *values in zip(model.weights, *everyones, strict=True):
            assert_allclose(variable.numpy(), np.mean(values, axis=0), atol=1e-6)
    for mine, before in zip(model.get_weights(), own, strict=True):
        np.testing.assert_array_equal(mine, before)
    assert optimizer.consensus_distance() > 0 or lt.size() == 1


# --- what Keras users do besides ----------------------------------------------------------------------------


@few
@pytest.mark.parametrize("way", WAYS)
def test_sparse_gradients_of_an_embedding_are_averaged(way: str) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Embedding(9, 3), keras.layers.Flatten()])
    table = model.layers[0].embeddings
    before = table.numpy()
    optimizer = lt.DistributedOptimizer(sgd(1.0), model=model)

    def step(rows: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(rows))
        (gradient,) = tape.gradient(loss, model.trainable_variables)
        assert isinstance(gradient, tf.IndexedSlices)
        optimizer.apply([gradient], model.trainable_variables)

    (tf.function(step) if way == "graph" else step)(tf.constant([[lt.rank(), 8]]))
    expected = np.zeros((9, 1))
    expected[: lt.size()] += 1 / lt.size()
    expected[8] += 1
    assert_allclose(before - table.numpy(), expected * np.ones(3), atol=1e-6)


@few
def test_gradient_that_only_some_ranks_have_counts_as_zero_elsewhere() -> None:
    one, other = keras.Variable([1.0], name="one"), keras.Variable([1.0], name="other")
    unused = keras.Variable([1.0], name="unused")
    optimizer = lt.DistributedOptimizer(sgd(1.0, weight_decay=0.5))
    gradients = [tf.constant([1.0]), tf.constant([1.0]) if lt.rank() == 0 else None, None]
    one_step = 1 - 0.5
    with pytest.warns(UserWarning, match="Gradients do not exist"):  # Keras says so
        optimizer.apply(gradients, [one, other, unused])
    assert_allclose(other.numpy(), one_step - 1 / lt.size())
    assert unused.numpy() == 1.0


@few
def test_gradient_that_only_some_ranks_have_is_refused_in_a_graph() -> None:
    if lt.size() == 1:
        return
    one, other = keras.Variable([1.0], name="one"), keras.Variable([1.0], name="other")
    optimizer = lt.DistributedOptimizer(sgd(1.0))
    gradients = [tf.constant([1.0]), tf.constant([1.0]) if lt.rank() == 0 else None]
    step = tf.function(lambda: optimizer.apply(gradients, [one, other]))
    if lt.rank() == 0:
        step()
        return
    refused = pytest.raises(tf.errors.InvalidArgumentError, match=r"other ranks have gradients for \['other'\]")
    with pytest.warns(UserWarning, match="Gradients do not exist"), refused:
        step()


@few
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["local", "allreduce"])
def test_overflow_on_one_rank_keeps_the_ranks_in_step(kind: str, way: str) -> None:
    base = keras.optimizers.LossScaleOptimizer(sgd(momentum=0.5), initial_scale=8.0)
    optimizer = lt.SlowMo(base, period=3) if kind == "local" else lt.DistributedOptimizer(base)
    trained = vector(optimizer, way)
    for step in range(6):
        before = trained.value
        overflows = step == 1 and lt.rank() == lt.size() - 1
        trained.step(8.0 * QUADRATIC(lt.rank(), step, before) if not overflows else np.full(DIMENSION, np.inf))
        if step == 1:
            skipped = np.array_equal(trained.value, before)
            assert skipped == (overflows or kind == "allreduce")  # there, one rank's overflow is all ranks'
            assert float(base.dynamic_scale) == (4.0 if skipped else 8.0)
            base.dynamic_scale.assign(8.0)
    assert optimizer.report()["inner_steps"] == 6
    for other in lt.allgather_object(trained.value):
        np.testing.assert_array_equal(other, trained.value)


@few
@pytest.mark.parametrize(
    ("kind", "dtype"),
    selected_cases(
        [("slowmo", "bfloat16"), ("allreduce", "float16"), ("slowmo", "float64")],
        [(kind, dtype) for kind in ("slowmo", "allreduce") for dtype in ("bfloat16", "float16", "float64")],
    ),
)
def test_models_of_every_floating_point_dtype(dtype: str, kind: str) -> None:
    model = make_model(dtype=dtype)
    optimizer = make(kind, model)
    step = keras_training.train_step(model, optimizer)
    for images, labels in batches(lt.rank(), 8):
        step(tf.cast(images, dtype), labels)
    if kind == "slowmo":
        assert_equal_on_all_ranks(model)
    assert {str(variable.dtype) for variable in model.weights} == {dtype}
    assert optimizer.consensus_distance() < 1e-12  # a third of three equal numbers may be rounded


# --- wrong use ----------------------------------------------------------------------------------------------


@few
def test_different_models_are_refused_on_every_rank() -> None:
    if lt.size() == 1:
        return
    last = lt.rank() == lt.size() - 1
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(5 if last else 6, name="out")])
    with pytest.raises(lt.MismatchError, match=r"out/kernel' of shape \[4, 6\].*rank .*out/kernel' of shape \[4, 5\]"):
        lt.SlowMo(sgd(), model=model)


@few
def test_models_built_before_on_one_rank_alone_do_not_matter() -> None:
    """Keras numbers layers over all models of a process."""
    for _ in range(lt.rank() + 1):
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(6), keras.layers.Dense(1)])
    optimizer = lt.SlowMo(sgd(), model=model)
    assert optimizer._model.names == [
        "sequential/dense/kernel", "sequential/dense/bias", "sequential/dense_1/kernel", "sequential/dense_1/bias",
    ]  # fmt: skip


@few
@pytest.mark.parametrize("way", WAYS)
def test_non_finite_parameters_are_refused_by_name_and_rank(way: str) -> None:
    trained = vector(lt.SlowMo(sgd(), period=2), way)
    trained.step(START)
    gradient = START.copy()
    if lt.rank() == lt.size() - 1:
        gradient[1] = np.nan
    expected = lt.NonFiniteError if way == "eager" else tf.errors.UnknownError
    with pytest.raises(expected, match=rf"NonFiniteError|rank {lt.size() - 1}: 'vector' is not finite") as error:
        trained.step(gradient)
    assert f"rank {lt.size() - 1}: 'vector' is not finite" in str(error.value)
