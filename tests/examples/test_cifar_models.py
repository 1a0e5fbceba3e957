"""The networks of examples/cifar: their published sizes, and that both frameworks build the same ones."""

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import torch

import lentando.tensorflow
import lentando.torch

FOLDER = str(Path(__file__).parents[2] / "examples" / "cifar")
sys.path.insert(0, FOLDER)
try:
    import models_keras
    import models_torch
finally:
    sys.path.remove(FOLDER)

PARAMETERS = {"resnet18": 11_173_962, "resnet50": 23_520_842, "vgg16": 14_728_266}
"""Of the networks for CIFAR-10 that are commonly called so: 11.17, 23.52 and 14.73 million."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_networks_have_their_published_sizes(name: str, parameters: int) -> None:
    model = models_torch.build(name, 3, 10, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    twin = models_keras.build(name, 3, 10, seed=0)
    assert sum(int(np.prod(variable.shape)) for variable in twin.trainable_variables) == parameters


@pytest.mark.slow
def test_both_frameworks_build_the_same_network(tmp_path: Path) -> None:
    """A checkpoint of one gives the same scores in the other: strides, paddings, BatchNorm and order agree."""
    lentando.torch.init()
    model = models_torch.build("resnet8", 3, 10, seed=0)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model(images)  # moves BatchNorm's statistics
    optimizer = lentando.torch.SlowMo(torch.optim.SGD(model.parameters(), 0.1), model=model, period=2)
    lentando.torch.save(tmp_path / "checkpoint", optimizer)
    twin = models_keras.build("resnet8", 3, 10, seed=1)
    its_optimizer = lentando.tensorflow.SlowMo(keras.optimizers.SGD(0.1), model=twin, period=2)
    its_optimizer.build(twin.trainable_variables)
    lentando.tensorflow.load(tmp_path / "checkpoint", its_optimizer)
    model.eval()
    with torch.no_grad():
        expected = model(images).numpy()
    found = twin(images.numpy().transpose(0, 2, 3, 1), training=False).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected) > 0.1
