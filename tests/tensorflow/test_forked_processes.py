"""As for PyTorch: a pool of forked processes next to training in Keras, which its end terminates."""

from pathlib import Path

from launching import mpirun

PROGRAM = """
import multiprocessing, os, time
import keras, numpy as np
import lentando.tensorflow as lt

lt.init()
model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
optimizer = lt.SlowMo(keras.optimizers.SGD(0.1), model=model, period=2, slow_momentum=0.5)
model.compile(optimizer=optimizer, loss="mse")
stop = lt.save_on_signal("nowhere", optimizer)
context = multiprocessing.get_context("fork")
pool = context.Pool(2)
assert pool.map(abs, [-1, 2]) == [1, 2]
model.fit(np.ones((4, 3)), np.ones((4, 2)), batch_size=1, verbose=0, callbacks=[stop])
refused = context.Process(target=lt.allreduce, args=(np.ones(3, np.float32),))
refused.start()
refused.join()
print("STATUS", refused.exitcode, flush=True)
pool.terminate()
pool.join()
context.Process(target=time.sleep, args=(1000,), daemon=True).start()
"""


def test_children_of_ranks_are_no_ranks(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    job = mpirun(2, str(program), timeout_seconds=150)
    assert job.status == 0, job.output
    assert job.output.count("STATUS 1") == 2, job.output
    assert job.output.count("and only the rank itself can communicate") == 2, job.output
    assert "has received SIGTERM" not in job.output
