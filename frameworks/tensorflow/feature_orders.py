"""Traces the graph of a Keras model to find the order that each layer's features have in PyTorch.

PyTorch's feature maps have channels first, Keras's have channels last. Therefore the features of a flattened map, or of
a vector that is reshaped to a map, are in a different order, and the weights along such axes must be permuted (only in
part, if other features are concatenated). Where the order cannot be determined with certainty, it is unknown.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import keras

from lentando.comm.errors import ConfigurationError
from lentando.tensorflow.axis_orders import AxisOrder
from lentando.tensorflow.functional_graphs import FunctionalGraphs, wrapped
from lentando.tensorflow.layer_classes import GLOBAL_POOLING, SPATIAL
from lentando.tensorflow.layer_rules import LayerRules
from lentando.tensorflow.traced_tensors import TracedTensor, lengths_of, order_of_channels, unknown_tensor

__all__ = ["FeatureOrders"]

NUMBERED = re.compile(r"keras_tensor(?:_(\d+))?")
"""The name that Keras gives the output of a layer; the number counts calls."""


class FeatureOrders:
    """The order of the input and output features of each layer of a model.

    Args:
        model: the model, built.
        leaves: the layers whose orders are needed.

    Attributes:
        ancestors: the ``id`` of every layer whose output reaches a layer, by ``id`` of that layer.
        calls: numbers that sort the layers by their first call, by ``id`` of the layer.

    Raises:
        ConfigurationError: if a layer of the user's raises an error while it is traced.
    """

    def __init__(self, model: Any, leaves: Iterable[Any]) -> None:
        self.ancestors: dict[int, set[int]] = {}
        self.calls: dict[int, int] = {}
        self._graphs = FunctionalGraphs()
        map_layers = (*SPATIAL, *GLOBAL_POOLING, keras.layers.Flatten)
        self._rules = LayerRules(self._graphs, has_maps=any(isinstance(layer, map_layers) for layer in leaves))
        function = self._graphs.of_model(model)
        if function is None:
            self._rules.has_maps |= self._graphs.takes_images(model)
        else:
            try:
                for value, _ in self._trace(function, None, []):
                    if len(value.axes) > 1:  # an image that the model generates, perhaps from another one's channels
                        order_of_channels(value.axes[value.channel_axis], len(value.axes))
            except Exception as error:  # a user's layer may raise anything
                raise ConfigurationError(
                    "could not determine the structure of the model: tracing its layers raised "
                    f"{type(error).__name__}: {error}"
                ) from error

    @property
    def inputs(self) -> Mapping[int, AxisOrder]:
        """The order of the input features, by ``id`` of the layer."""
        return self._rules.inputs

    @property
    def outputs(self) -> Mapping[int, AxisOrder]:
        """The order of the output features, by ``id`` of the layer."""
        return self._rules.outputs

    @property
    def has_maps(self) -> bool:
        """Whether the model contains feature maps."""
        return self._rules.has_maps

    def _trace(
        self, function: Any, given: Sequence[TracedTensor] | None, origins: Sequence[set[int]]
    ) -> list[tuple[TracedTensor, set[int]]]:
        """Trace all layers of a functional model.

        Args:
            function: the functional model.
            given: one traced tensor per input; None for the whole model, whose inputs come from outside.
            origins: for each input, the ``id`` of every layer whose output has reached it.

        Returns:
            One traced tensor per output, each with the ``id`` of every layer whose output has reached it.
        """
        values: dict[int, TracedTensor] = {}
        reached: dict[int, set[int]] = {}
        inputs = self._graphs.inputs(function)
        for number, tensor in enumerate(inputs):
            values[id(tensor)] = self._rules.model_input(tensor) if given is None else given[number]
            reached[id(tensor)] = origins[number] if given is not None else set()
        pending = self._graphs.nodes(function)
        while pending:
            later = []
            for node in pending:
                if all(id(tensor) in values for tensor in node.input_tensors):
                    before = [reached[id(tensor)] for tensor in node.input_tensors]
                    results = self._call(node, [values[id(tensor)] for tensor in node.input_tensors], before)
                    for tensor, (value, after) in zip(node.output_tensors, results, strict=True):
                        values[id(tensor)], reached[id(tensor)] = value, after
                else:
                    later.append(node)
            if len(later) == len(pending):  # the remaining calls belong to other models that share the layers
                break
            pending = later
        outputs = self._graphs.outputs(function)
        return [
            (values.get(id(tensor)) or unknown_tensor(tensor), reached.get(id(tensor), set())) for tensor in outputs
        ]

    def _call(
        self, node: Any, values: list[TracedTensor], before: list[set[int]]
    ) -> list[tuple[TracedTensor, set[int]]]:
        """The outputs of one call of a layer or operation, each with the layers whose output has reached it."""
        layer, tensors = node.operation, node.output_tensors
        all_before = set().union(*before)
        self.ancestors.setdefault(id(layer), set()).update(all_before)
        after = all_before | {id(inner) for inner in (layer, *wrapped(layer))}
        for previous, inner in pairwise((None, *wrapped(layer))):  # the directions of a recurrent layer are ordered
            known = self.ancestors.setdefault(id(inner), set())
            known.update(all_before if previous is None else {*all_before, id(previous)})
        numbers = [int(named[1] or 0) for tensor in tensors if (named := NUMBERED.fullmatch(tensor.name))]
        self.calls[id(layer)] = min([self.calls.get(id(layer), sys.maxsize), *numbers])
        function = self._graphs.within(node)
        if function is not None:
            inputs = self._graphs.inputs(function)
            if [lengths_of(tensor) for tensor in inputs] != [value.lengths for value in values]:
                values, before = [unknown_tensor(tensor) for tensor in inputs], [all_before] * len(inputs)
            results = [(value, after | reached) for value, reached in self._trace(function, values, before)]
            return results if len(results) == len(tensors) else [(unknown_tensor(tensor), after) for tensor in tensors]
        return [(value, after) for value in self._rules.outputs_of(layer, values, tensors)]
