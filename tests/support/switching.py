"""Gives a model of one framework the values of a model of the other, by the mapping between their layers."""

from typing import Any

import numpy as np
import torch
from numpy.testing import assert_allclose
from torch import nn

import lentando.tensorflow as ltf
import lentando.torch as lt
from lentando.tensorflow.names import names_of

__all__ = ["assert_crosses", "randomized", "values_of_keras", "values_of_torch"]


def values_of_torch(model: nn.Module) -> dict[str, torch.Tensor]:
    """The floating-point tensors by name, tied ones once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


def values_of_keras(model: Any) -> dict[str, Any]:
    """The floating-point variables by name."""
    frozen = [variable for variable in model.weights if not variable.trainable]
    variables = [*model.trainable_variables, *frozen]
    named = zip(names_of(variables, model), variables, strict=True)
    return {name: variable for name, variable in named if "float" in variable.dtype}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every value of a torch model drawn again, so that no two tensors are equal and no normalization does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in values_of_torch(model).values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
        if tensor.dim() > 1:
            tensor.sub_(0.8).mul_(2 / tensor[0].numel() ** 0.5)
    return model.eval()


def assert_crosses(first: nn.Module, second: Any, *inputs: Any, tolerance: float = 2e-6) -> lt.WeightMap:
    """The outputs are equal when Keras's model has torch's values, and when torch's then has Keras's new ones.

    Args:
        first: torch's model.
        second: Keras's, built.
        inputs: arrays as Keras takes them; those of images with channels last, which torch is given first.
        tolerance: of the largest output.

    Returns:
        The mapping from torch's to Keras's tensors.
    """
    randomized(first)
    mapping = lt.WeightMap.between(lt.layers(first), ltf.layers(second))
    back = lt.WeightMap.between(ltf.layers(second), lt.layers(first))
    assert back == mapping.inverse
    sources, targets = values_of_torch(first), values_of_keras(second)
    shapes = [{name: tuple(value.shape) for name, value in values.items()} for values in (sources, targets)]
    mapping.check(*shapes)
    for name, variable in targets.items():
        variable.assign(mapping.value(name, lambda source: sources[source].numpy()))
    _assert_same_outputs(first, second, inputs, tolerance)
    generator = np.random.default_rng(1)
    for variable in targets.values():
        variable.assign(variable.numpy() * generator.uniform(0.5, 1.5, variable.shape).astype(np.float32))
    back.check(*reversed(shapes))
    for name, tensor in sources.items():
        tensor.copy_(torch.from_numpy(np.array(back.value(name, lambda target: targets[target].numpy()))))
    _assert_same_outputs(first, second, inputs, tolerance)
    return mapping


def _assert_same_outputs(first: nn.Module, second: Any, inputs: Any, tolerance: float) -> None:
    with torch.no_grad():
        given = [torch.from_numpy(np.moveaxis(array, -1, 1).copy() if array.ndim > 3 else array) for array in inputs]
        expected = first(*given).numpy()
    found = np.asarray(second(inputs[0] if len(inputs) == 1 else list(inputs), training=False))
    if expected.ndim > 3:
        expected = np.moveaxis(expected, 1, -1)
    assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
