"""A checkpoint of three ranks that run TensorFlow, continued by two."""

import json
from pathlib import Path

import numpy as np
import pytest
from case_selection import thoroughly
from launching import mpirun
from numpy.testing import assert_allclose, assert_array_equal
from resized_training import LAST, ROUND, left, whole

PROGRAM = Path(__file__).parents[1] / "support/resized_training.py"
FROM_TORCH = """
import json, sys
import torch
import lentando.torch as lt

lt.init()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)).double()
adam = torch.optim.Adam(model.parameters(), lr=0.01)
optimizer = lt.SlowMo(adam, model=model, period=3, base_buffers="maintain")
for step in range(7):
    optimizer.zero_grad()
    model(torch.randn(8, 4, dtype=torch.float64)).sub(lt.rank()).square().mean().backward()
    optimizer.step()
lt.save(sys.argv[1], optimizer)
moment = lt.allreduce(adam.state[model[0].weight]["exp_avg"])
with optimizer.averaged():
    found = [model[0].weight.T, moment.T]
    if lt.rank() == 0:
        print("found", json.dumps([tensor.tolist() for tensor in found]))
"""
TO_KERAS = """
import json, sys
import keras
import lentando.tensorflow as lt

lt.init()
keras.config.set_floatx("float64")
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
optimizer = lt.SlowMo(keras.optimizers.Adam(0.01), model=model, period=3, base_buffers="maintain")
lt.load(sys.argv[1], optimizer)
kernel = model.weights[0]
moment = next(v for v in optimizer.variables if v.shape == kernel.shape and "momentum" in v.path)
if lt.rank() == 0:
    print("found", json.dumps([kernel.numpy().tolist(), moment.numpy().tolist()]))
"""
METHODS = ["slowmo", "slowmo over osgp"]
STEP = 2 * ROUND + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("three")
    for size, action in ((3, "save"), (2, "load")):
        wanted = [f"{method}:{STEP}" for method in METHODS]
        job = mpirun(
            size,
            str(PROGRAM),
            "tensorflow",
            action,
            str(found),
            *wanted,
            timeout_seconds=120,
            prepared="lentando.tensorflow",
        )
        assert job.status == 0, job.output
    return found


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_begin_with_the_mean_of_three(method: str, folder: Path) -> None:
    before, after = left(folder, f"{method} {STEP} on 3"), left(folder, f"{method} {STEP} on 2")
    assert len(after) == 2
    averaged = [name for name in after[0] if name.startswith("optimizer") or "moving" in name]
    if method == "slowmo":
        averaged = [name for name in after[0] if name.startswith(("model", "optimizer"))]
    else:
        for arrays in after:
            assert_allclose(arrays["sum"], np.mean([a["sum"] for a in before], axis=0), rtol=1e-14)
            assert (arrays["weight"], arrays["in flight"]) == (1, 0)
    assert len(averaged) > 4
    for name in averaged:
        for arrays in after:
            mean = np.mean([a[name] for a in before], axis=0, dtype=np.float64)
            assert_allclose(arrays[name], mean, rtol=1e-13, atol=1e-15, err_msg=name)
            assert_array_equal(arrays[name], after[0][name], err_msg=name)
    for name in ("anchors 0", "slow_buffers 0"):
        assert_array_equal(whole(after, name), whole(before, name))
    assert np.any(whole(after, "slow_buffers 0"))
    assert [arrays["about"]["extra"] for arrays in after] == [{"rank": rank, "step": STEP} for rank in range(2)]
    (stated,) = after[0]["about"]["received"]
    assert stated.startswith("resumed 3 ranks' checkpoint on 2 ranks. Exact: inner step 7, 2 rounds and the period's")
    assert ("gossip" in stated) == ("osgp" in method)


@pytest.mark.parametrize("method", METHODS)
def test_training_continues_to_the_same_loss(method: str, folder: Path) -> None:
    expected = left(folder, f"{method} end on 3")[0]["about"]["loss"]
    found = left(folder, f"{method} continued on 2")[0]["about"]
    assert found["inner_steps"] == LAST
    assert found["loss"] == pytest.approx(expected, rel=0.05)


@thoroughly
def test_two_ranks_of_tensorflow_continue_from_three_of_pytorch(tmp_path: Path) -> None:
    """Names, axes and the number of ranks change at once."""
    found = []
    for size, program, module in ((3, FROM_TORCH, "lentando.torch"), (2, TO_KERAS, "lentando.tensorflow")):
        job = mpirun(size, "-c", program, str(tmp_path / "saved"), timeout_seconds=120, prepared=module)
        assert job.status == 0, job.output
        stated = next(line for line in job.output.splitlines() if line.startswith("found "))
        found.append([np.array(tensor) for tensor in json.loads(stated.removeprefix("found "))])
    for saved, loaded in zip(*found, strict=True):
        assert loaded.shape == (4, 3)
        assert_allclose(loaded, saved, rtol=1e-12)
