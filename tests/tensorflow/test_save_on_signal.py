"""SIGTERM in Keras: saved from outside the graph, by a callback in fit; resumed, nothing is lost."""

import subprocess
from pathlib import Path

import pytest
from case_selection import selected_cases
from prepared_python import prepared_python
from stopped_training import Case, Outcome, assert_nothing_is_lost, outcomes, run

PROGRAM = """
import hashlib, os, signal, sys
from pathlib import Path
import keras, numpy as np, tensorflow as tf
import lentando.tensorflow as lt

def train(where, method, way, *options):
    keras.utils.set_random_seed(lt.rank())
    steps = int(os.environ["STEPS"])
    model = keras.Sequential([
        keras.layers.Input((4,)), keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dense(2),
    ])
    sgd = keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5), momentum=0.9)
    optimizer = {
        "allreduce": lambda: lt.DistributedOptimizer(sgd, model=model),
        "slowmo": lambda: lt.SlowMo(sgd, model=model, period=4),
        "sgp": lambda: lt.DistributedOptimizer(sgd, model=model, base=lt.SGP()),
    }[method]()
    first = lt.load(where, optimizer)["next"] if Path(where).exists() else 0
    mine = [int(at.split("@")[1]) for at in os.environ["STOP"].split() if at.startswith(f"{lt.rank()}@")]

    class Reported(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if first + batch in mine:
                os.kill(os.getpid(), signal.SIGTERM)

    data = [
        np.random.default_rng([lt.rank(), step]).normal(size=(6, 4)).astype("float32") for step in range(first, steps)
    ]

    def train_step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True)))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables, loss=loss)

    stop = lt.save_on_signal(
        where, optimizer, lambda: {"next": int(optimizer.iterations)}, every=3 if "every" in options else None
    )
    if way == "fit":
        model.compile(optimizer=optimizer, loss="mse")
        x = np.concatenate(data)
        callbacks = [Reported()] if "forget" in options else [Reported(), stop]
        model.fit(x, np.zeros((len(x), 2)), batch_size=6, shuffle=False, verbose=0, callbacks=callbacks)
    else:
        step = tf.function(train_step) if way == "graph" else train_step
        for batch, x in enumerate(data):
            Reported().on_train_batch_begin(batch)
            step(tf.constant(x))
            if way == "graph":
                stop.check()
    stop.close()
    digest = hashlib.sha256()
    for variable in model.weights:
        digest.update(variable.numpy().tobytes())
    sys.stdout.write(f"END {lt.rank()} {digest.hexdigest()} {where}:{':'.join((method, way, *options))}\\n")
    sys.stdout.flush()

lt.init()
for training in sys.argv[1:]:
    train(*training.split(":"))
"""
CASES = [
    Case("allreduce:fit", 7),
    Case("slowmo:graph", 8),
    *selected_cases([], [Case("slowmo:eager", 8), Case("slowmo:fit", 8), Case("sgp:graph", 16)]),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(scope="module")
def found(program: Path) -> dict[Case, Outcome]:
    return dict(zip(CASES, outcomes(program, program.parent, CASES, "lentando.tensorflow"), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_signal_to_one_rank_saves_all_and_resuming_loses_nothing(found: dict[Case, Outcome], case: Case) -> None:
    assert_nothing_is_lost(case, found[case])
    assert "rank 1 of 2 received a signal to stop: saved to " in found[case].stopped.output


def test_graph_reports_of_messages_between_outer_steps(program: Path, tmp_path: Path) -> None:
    job = run(program, f"{tmp_path / 'saved'}:slowmo:fit:every", stop="0@4")
    assert job.status == 85, job.output
    assert "after inner step 6," in job.output


def test_callback_that_was_forgotten_is_asked_for(program: Path, tmp_path: Path) -> None:
    job = run(program, f"{tmp_path / 'saved'}:slowmo:fit:forget", stop="1@6", prepared="lentando.tensorflow")
    assert job.status == 0, job.output
    assert job.output.count("give fit() what save_on_signal returned, in callbacks=[...]") == 1, job.output


def test_block_that_ends_as_agreed_continues_ignoring_signals(tmp_path: Path) -> None:
    """Another one, which comes while the job is leaving, must not end a rank before the rest."""
    program = f"""
import os, signal, keras, tensorflow as tf
import lentando.tensorflow as lt
lt.init()
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
optimizer = lt.SlowMo(keras.optimizers.SGD(0.1), model=model, period=1)
optimizer.build(model.trainable_variables)
received = []
signal.signal(signal.SIGUSR1, lambda *_: received.append("mine"))
try:
    with lt.save_on_signal({str(tmp_path / "a")!r}, optimizer, signals=[signal.SIGUSR1]):
        os.kill(os.getpid(), signal.SIGUSR1)
        optimizer.apply([tf.zeros_like(v) for v in model.trainable_variables], model.trainable_variables)
except SystemExit as error:
    assert error.code == 85 and os.path.exists({str(tmp_path / "a")!r})
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not received, received
else:
    raise AssertionError("the job continues")
"""
    python = prepared_python("lentando.tensorflow")
    done = subprocess.run([*python, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
