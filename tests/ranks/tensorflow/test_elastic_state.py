"""``lentando.tensorflow.elastic`` and its Keras side on any number of ranks, none of which dies."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import lentando.tensorflow as lt
import lentando.tensorflow.keras as hvd


def model_of(value: float) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input([2]),
            keras.layers.Dense(1, kernel_initializer=keras.initializers.Constant(value), use_bias=False),
        ]
    )


def kernel(model: keras.Model) -> list[float]:
    return model.get_weights()[0].reshape(-1).tolist()


def test_sync_gives_all_ranks_the_state_of_rank_0_and_restore_returns_to_it() -> None:
    rank = lt.rank()
    model = model_of(1.0 + rank)
    optimizer = keras.optimizers.SGD(0.5 + rank, momentum=0.75)
    state = hvd.elastic.KerasState(model, optimizer, batch=20 + rank, epoch=10 + rank)
    assert optimizer.built

    def step() -> None:
        optimizer.apply([tf.ones([2, 1])], model.trainable_variables)

    step()
    state.sync()
    assert kernel(model) == [0.5, 0.5]  # rank 0's
    assert (state.batch, state.epoch) == (20, 10)
    assert float(optimizer.learning_rate) == 0.5
    step()
    assert kernel(model) == [0.5 - 0.5 * 1.75] * 2
    assert int(optimizer.iterations) == 2
    state.batch, state.epoch = 21, 11
    state.restore()
    assert kernel(model) == [0.5, 0.5]
    assert (state.batch, state.epoch, int(optimizer.iterations)) == (20, 10, 1)
    step()  # the momentum has been restored, too
    assert kernel(model) == [0.5 - 0.5 * 1.75] * 2
    state.batch = 22
    state.commit()
    step()
    state.batch = 23
    state.restore()
    assert kernel(model) == [0.5 - 0.5 * 1.75] * 2
    assert (state.batch, int(optimizer.iterations)) == (22, 2)


def test_state_of_variables() -> None:
    rank = lt.rank()
    variables = [tf.Variable([1.0 + rank, 2.0]), tf.Variable(rank, dtype=tf.int64)]
    state = lt.elastic.TensorFlowState(variables, name=f"rank {rank}")
    state.sync()
    assert [v.numpy().tolist() for v in variables] == [[1.0, 2.0], 0]
    assert state.name == "rank 0"
    variables[0].assign_add([1.0, 1.0])
    state.restore()
    assert variables[0].numpy().tolist() == [1.0, 2.0]
    variables[0].assign_add([1.0, 1.0])
    state.commit()
    variables[0].assign_add([1.0, 1.0])
    state.restore()
    assert variables[0].numpy().tolist() == [2.0, 3.0]
    with pytest.raises(lt.ConfigurationError, match="session= is for TensorFlow 1"):
        lt.elastic.TensorFlowState(variables, session=1)  # type: ignore[arg-type]


def test_model_that_is_not_built_is_refused() -> None:
    with pytest.raises(lt.ConfigurationError, match="the model must be built first"):
        hvd.elastic.KerasState(keras.Sequential([keras.layers.Dense(1)]))


def test_training_in_fit_that_is_restored_repeats_the_same_steps() -> None:
    """With SlowMo, whose outer momentum is a part of the state, and whose steps are counted in the graph."""
    rank = lt.rank()
    model = model_of(0.0)
    sgd = keras.optimizers.SGD(0.0625, momentum=0.75)
    optimizer = lt.SlowMo(sgd, model=model, period=3, slow_momentum=0.5, base_buffers="maintain")
    model.compile(optimizer, "mse")
    state = hvd.elastic.KerasState(model, batch=0, epoch=0)
    batches: list[int] = []

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            batches.append(state.batch)

    def fit(seed: int) -> list[float]:
        x = np.random.default_rng(10 * seed + rank).normal(size=(10, 2))
        callbacks = [hvd.elastic.UpdateBatchStateCallback(state), hvd.elastic.UpdateEpochStateCallback(state), Note()]
        model.fit(x, x.sum(1), batch_size=2, shuffle=False, verbose=0, callbacks=callbacks)
        with optimizer.averaged():
            return kernel(model)

    fit(1)
    state.commit()
    state.sync()  # the replicas differ after 5 steps: from now on, they are rank 0's
    first = [fit(2), fit(3)]
    assert (state.epoch, state.batch, int(optimizer.iterations)) == (3, 0, 15)
    assert batches == [0, 1, 2, 3, 4] * 3
    state.restore()
    state.sync()
    report = optimizer.report()
    assert (state.epoch, int(optimizer.iterations), report["inner_steps"], report["rounds"]) == (1, 5, 5, 1)
    assert [fit(2), fit(3)] == first
    assert optimizer.report()["rounds"] == 5


def test_backward_passes_of_an_unfinished_step_are_restored() -> None:
    model = model_of(0.0)
    sgd = keras.optimizers.SGD(0.5)
    optimizer = hvd.DistributedOptimizer(sgd, backward_passes_per_step=2)
    model.compile(optimizer, "mse")
    state = hvd.elastic.KerasState(model)

    def add(gradient: float) -> None:
        optimizer.apply([tf.fill([2, 1], gradient)], model.trainable_variables)

    add(1.0)
    state.commit()
    add(2.0)
    assert kernel(model) == [-1.5, -1.5]
    add(8.0)
    state.restore()
    assert kernel(model) == [0.0, 0.0]
    add(4.0)
    assert kernel(model) == [-2.5, -2.5]


def test_callback_commits_every_so_many_batches_and_at_the_end_of_an_epoch() -> None:
    commits: list[int] = []

    class State(lt.elastic.State):
        def commit(self) -> None:
            commits.append(len(commits))

    model = model_of(0.0)
    model.compile("sgd", "mse")
    seen: list[int] = []

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            seen.append(len(commits))

    callbacks = [hvd.elastic.CommitStateCallback(State(), batches_per_commit=2), Note()]
    model.fit(np.ones([10, 2]), np.ones([10]), batch_size=2, epochs=2, verbose=0, callbacks=callbacks)
    assert seen == [0, 1, 1, 2, 2, 4, 4, 5, 5, 6]
    assert len(commits) == 7
    with pytest.raises(lt.ConfigurationError, match="batches_per_commit must be at least 1"):
        hvd.elastic.CommitStateCallback(State(), 0)
