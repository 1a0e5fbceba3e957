"""A framework adapter with nothing but the necessary: what a new framework needs, tried with a NumPy "framework"."""

import importlib
import inspect
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from reference import constant, slowmo

import lentando
from lentando.comm.simulation import simulate
from lentando.comm.transport import Array
from lentando.optimizers.testing import check_framework

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests/support/frameworks/toy"
START = {"weight": np.arange(6.0).reshape(2, 3), "bias": np.array([8.0, -4.0])}
gradient = constant(8)


@pytest.fixture(scope="module")
def lt() -> Iterator[ModuleType]:
    """``lentando.toy``, as if the folder were in ``frameworks``."""
    lentando.__path__.append(str(TOY.parent))
    yield importlib.import_module("lentando.toy")
    lentando.__path__.remove(str(TOY.parent))


class Subject:
    """Two parameters in one group."""

    def __init__(self, lt: Any) -> None:
        self.optimizer = lt.SGD(dict(START), lr=0.125, momentum=0.5)
        self.framework = sys.modules["lentando.toy.model"].ToyModel(self.optimizer)
        self.gradients: Mapping[str, Any] = {}

    def read(self) -> Mapping[str, Array]:
        return {name: array.copy() for name, array in self.optimizer.parameters.items()}

    def assign(self, values: Mapping[str, Array]) -> None:
        self.optimizer.parameters.update({name: array.copy() for name, array in values.items()})

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        (self.optimizer.lr,) = rates

    def set_gradients(self, gradients: Mapping[str, Array]) -> None:
        self.gradients = gradients

    def gather_gradients(self) -> None:
        self.framework.flat_gradients.put(self.gradients)

    def scatter_gradients(self) -> None:
        self.gradients = self.framework.flat_gradients.taken()

    def step(self) -> None:
        self.optimizer.step(self.gradients)


def test_the_adapter_passes_the_conformance_suite(lt: Any) -> None:
    check_framework(lambda: Subject(lt))


def train(optimizer: Any, rank: int, steps: range) -> None:
    for step in steps:
        flat = gradient(rank, step, np.zeros(8))
        optimizer.step({"weight": flat[:6].reshape(2, 3), "bias": flat[6:]}, loss=1.0)


def flat(sgd: Any) -> Array:
    return np.concatenate([sgd.parameters["weight"].ravel(), sgd.parameters["bias"]])


def test_a_method_trains_as_a_few_lines_of_numpy_do(lt: Any) -> None:
    def program() -> Array:
        lt.init()
        sgd = lt.SGD(dict(START), lr=0.25)
        train(lt.SlowMo(sgd, period=3, slow_momentum=0.5), lt.rank(), range(6))
        return flat(sgd)

    start = np.concatenate([START["weight"].ravel(), START["bias"]])
    expected = slowmo(2, 6, start, gradient, 3, lambda _: 0.25, beta=0.5).x
    assert np.array_equal(simulate(program, 2), expected)


def test_gradients_are_averaged(lt: Any) -> None:
    def program() -> Array:
        lt.init()
        sgd = lt.SGD(dict(START), lr=0.25)
        optimizer = lt.DistributedOptimizer(sgd)
        with lt.join(optimizer):
            train(optimizer, lt.rank(), range(3 if lt.rank() == 0 else 2))
        return flat(sgd)

    start = np.concatenate([START["weight"].ravel(), START["bias"]])
    means = [np.mean([gradient(rank, step, start) for rank in (0, 1)], axis=0) for step in (0, 1)]
    expected = start - 0.25 * (means[0] + means[1] + gradient(0, 2, start))
    for x in simulate(program, 2):
        assert np.array_equal(x, expected)


def test_a_checkpoint_continues_bit_identically(lt: Any, tmp_path: Path) -> None:
    def program() -> list[Array]:
        lt.init()
        sgd, other = (lt.SGD(dict(START), lr=0.25, momentum=0.5) for _ in range(2))
        optimizer = lt.SlowMo(sgd, period=3)
        train(optimizer, lt.rank(), range(4))
        lt.save(tmp_path, optimizer, extra={"step": 4})
        train(optimizer, lt.rank(), range(4, 8))
        resumed = lt.SlowMo(other, period=3)
        assert lt.load(tmp_path, resumed) == {"step": 4}
        train(resumed, lt.rank(), range(4, 8))
        return [flat(sgd), flat(other)]

    for uninterrupted, resumed in simulate(program, 2):
        assert np.array_equal(uninterrupted, resumed)


def test_help_repr_and_export_lists_are_those_of_every_framework(lt: Any) -> None:
    lt.init()
    optimizer = lt.SlowMo(lt.SGD(dict(START), lr=0.25), period=4)
    assert isinstance(optimizer, lt.ReplicaOptimizer)
    assert repr(optimizer) == (
        "SlowMo(base=LocalSGD(), outer=SlowMomentum(slow_lr=1.0, slow_momentum=0.5, nesterov=False), period=4, "
        "base_buffers='auto', optimizer=SGD(lr=0.25))"
    )
    assert list(inspect.signature(lt.AdaComm).parameters)[:3] == ["optimizer", "base", "initial_period"]
    assert "lt.AdaComm(sgd, initial_period=8, interval_seconds=30.0)" in lt.AdaComm.__doc__
    assert {"SlowMo", "DistributedOptimizer", "SGP", "save"} <= set(dir(lt))
    lt.shutdown()


@pytest.mark.slow
def test_a_folder_and_a_link_register_a_framework(tmp_path: Path) -> None:
    """docs/architecture.md lists these places. import-linter refuses a package that its layers do not contain."""
    package = tmp_path / "src/lentando"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "src/lentando/__init__.py", package)
    for link in (ROOT / "src/lentando").iterdir():
        if link.is_symlink():
            (package / link.name).symlink_to(link.resolve())
    (package / "toy").symlink_to(TOY)
    settings = (ROOT / "pyproject.toml").read_text()
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as l; l()", "--no-cache"]
    (tmp_path / "pyproject.toml").write_text(settings)
    environment = {"PYTHONPATH": str(tmp_path / "src"), "PATH": ""}
    done = subprocess.run(lint, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "lentando.toy" in done.stdout
    (tmp_path / "pyproject.toml").write_text(settings.replace("torch | tensorflow", "torch | tensorflow | toy"))
    done = subprocess.run(lint, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    use = "import lentando.toy as lt; lt.init(); print(lt.SlowMo.__mro__[1].__module__)"
    done = subprocess.run([sys.executable, "-c", use], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "lentando.toy.optimizer\n", done.stderr
