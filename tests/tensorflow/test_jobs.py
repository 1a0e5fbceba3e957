"""Whole programs under mpirun: what happens to a job when something goes wrong on one rank, in fit."""

import subprocess
from pathlib import Path

import pytest
from case_selection import selected_cases
from launching import mpirun
from prepared_python import prepared_python

PROGRAM = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras, numpy as np
import lentando.tensorflow as lt

lt.init()
model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
sgd = keras.optimizers.SGD(0.1)
if "allreduce" in sys.argv:
    optimizer = lt.DistributedOptimizer(sgd, model=model)
else:
    optimizer = lt.SlowMo(sgd, model=model, period=4)

class Fails(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if "raise" in sys.argv and lt.rank() == 1 and batch == 5:
            raise RuntimeError("disk is on fire")

model.compile(optimizer=optimizer, loss="mse")
steps = 1000 if "raise" in sys.argv else 10 if lt.rank() == 1 and "fewer" in sys.argv else 16
model.fit(np.ones((steps, 4)), np.ones((steps, 1)), batch_size=1, verbose=0, callbacks=[Fails()])
print("done", optimizer.report()["rounds"])
"""


@pytest.mark.parametrize("method", selected_cases(["allreduce"], ["slowmo", "allreduce"]))
def test_rank_with_fewer_batches_is_named_on_every_rank(tmp_path: Path, method: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    job = mpirun(2, str(tmp_path / "program.py"), method, "fewer", timeout_seconds=120, prepared="lentando.tensorflow")
    assert job.status not in (0, None)
    assert job.output.count("MismatchError: the ranks are not about to do the same thing") >= 2
    assert ("after 12 steps and 2 rounds" if method == "slowmo" else "after 10 steps") in job.output
    assert "rank 1: has ended (shutdown, or the end of the program)" in job.output


def test_rank_that_raises_takes_the_job_down(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    job = mpirun(2, str(tmp_path / "program.py"), "slowmo", "raise", timeout_seconds=120)
    assert job.status not in (0, None)
    assert "RuntimeError: disk is on fire" in job.output
    assert "rank 1 failed (RuntimeError) and ends the job" in job.output


def run_alone(program: str) -> "subprocess.CompletedProcess[str]":
    command = [*prepared_python("lentando.tensorflow"), "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_fit_with_a_single_thread_does_not_wait_for_itself() -> None:
    """TensorFlow has one thread for graphs where there is one core: who is called back by it must not ask for it."""
    program = """
import keras, numpy as np, tensorflow as tf
tf.config.threading.set_inter_op_parallelism_threads(1)
import lentando.tensorflow as lt
lt.init()
for base in (lt.LocalSGD(), lt.SGP(), lt.AllReduce()):
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])
    optimizer = lt.SlowMo(keras.optimizers.Adam(0.01), model=model, period=4, base=base)
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(np.ones((16, 4)), np.ones((16, 3)), batch_size=2, verbose=0)
    print("rounds", optimizer.report()["rounds"])
"""
    finished = run_alone(program)
    assert finished.stdout.count("rounds 2") == 3, finished.stderr


def test_graph_mode_of_tensorflow_1_is_refused() -> None:
    program = """
import tensorflow as tf
tf.compat.v1.disable_eager_execution()
import keras, lentando.tensorflow as lt
lt.init()
try:
    lt.SlowMo(keras.optimizers.SGD(0.1))
except lt.ConfigurationError as error:
    print(error)
"""
    finished = run_alone(program)
    assert "TensorFlow 2 is needed" in finished.stdout, finished.stderr
