"""``SlowMo``, ``DiLoCo`` and ``AdaComm`` are classes, which their signatures, ``help`` and ``repr`` describe."""

import copy
import inspect
import pydoc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import lentando.tensorflow as lt
from lentando.optimizers import ReplicaOptimizer, adacomm, diloco, slowmo

METHODS = {lt.SlowMo: slowmo, lt.DiLoCo: diloco, lt.AdaComm: adacomm, lt.DistributedOptimizer: lt.Settings}


@pytest.fixture(autouse=True)
def job() -> Iterator[None]:
    lt.init()
    yield
    lt.shutdown()


def make(method: Any, **settings: Any) -> tuple[Any, Any]:
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    return model, method(keras.optimizers.SGD(0.125), model=model, **settings)


def test_a_method_is_a_class() -> None:
    for method in METHODS:
        _, optimizer = make(method)
        assert type(optimizer) is method
        assert isinstance(optimizer, lt.DistributedOptimizer)
        assert isinstance(optimizer, ReplicaOptimizer)
        assert isinstance(optimizer, keras.optimizers.Optimizer)
        assert {kind for kind in METHODS if isinstance(optimizer, kind)} == {method, lt.DistributedOptimizer}


@pytest.mark.parametrize("method", METHODS)
def test_signature_and_help_show_every_argument_with_its_documentation(method: Any) -> None:
    arguments = list(inspect.signature(method).parameters.values())
    shared = list(inspect.signature(METHODS[method]).parameters.values())
    own = [one.name for one in arguments[: -len(shared)]]
    assert own[0] == "optimizer"
    assert own[-2:] == ["model", "mapping"]
    assert "process_set" in own
    assert len(own) == 4 or method is lt.DistributedOptimizer  # which takes Horovod's arguments as well
    assert [(one.name, one.default) for one in arguments[-len(shared) :]] == [(one.name, one.default) for one in shared]
    positional = len(own) if method is lt.DistributedOptimizer else 1  # Horovod's may be positional
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in arguments[positional:])
    text = pydoc.render_doc(method, renderer=pydoc.plaintext)
    for one in arguments:
        assert f" |      {one.name}: " in text, one.name
    assert "**settings" not in text
    assert " |  Example:" in text


def test_an_argument_that_the_method_does_not_have_is_an_error_that_names_the_method() -> None:
    with pytest.raises(TypeError, match=r"^AdaComm\(\) got an unexpected keyword argument 'interval'$"):
        make(lt.AdaComm, interval=60.0)
    with pytest.raises(TypeError, match=r"^SlowMo\(\) got an unexpected keyword argument 'outer'$"):
        make(lt.SlowMo, outer=lt.SlowMomentum())


def test_repr_names_the_method_its_settings_and_the_base_optimizer() -> None:
    _, optimizer = make(lt.SlowMo, period=4, on_nonfinite="skip")
    assert repr(optimizer).startswith(
        "SlowMo(base=LocalSGD(), outer=SlowMomentum(slow_lr=1.0, slow_momentum=0.5, nesterov=False), period=4, "
        "base_buffers='auto', on_nonfinite='skip', optimizer=SGD"
    )
    assert "learning_rate=0.125" in repr(optimizer)
    assert repr(make(lt.DistributedOptimizer)[1]).startswith("DistributedOptimizer(base=AllReduce(")
    assert repr(make(lt.AdaComm)[1]).startswith("AdaComm(base=LocalSGD(), period=AdaptivePeriod(initial_period=16, ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of NumPy to Keras
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_and_copies_have_the_base_optimizer(method: Any, tmp_path: Path) -> None:
    model, optimizer = make(method)
    model.compile(optimizer, "mse")
    model.fit(np.ones([8, 2]), np.ones([8, 1]), verbose=0)
    model.save(tmp_path / "model.keras")
    assert type(keras.saving.load_model(tmp_path / "model.keras").optimizer) is keras.optimizers.SGD
    assert keras.saving.get_registered_name(method) == f"lentando>{method.__name__}"
    for copied in (
        copy.deepcopy(optimizer),
        keras.optimizers.deserialize(keras.optimizers.serialize(optimizer)),
        method.from_config(optimizer.get_config()),
    ):
        assert type(copied) is keras.optimizers.SGD
        assert float(copied.learning_rate) == 0.125
    assert type(copy.deepcopy(model).optimizer) is keras.optimizers.SGD
