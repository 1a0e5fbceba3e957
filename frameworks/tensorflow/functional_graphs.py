"""The graphs of Keras models, and of models and layers whose ``call`` is the user's, as functional models."""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import keras

from lentando.tensorflow.keras_internals import calls_of, tracked_layers

__all__ = ["FunctionalGraphs", "is_functional", "sublayers", "wrapped"]

ATOMS = (keras.layers.MultiHeadAttention, keras.layers.Bidirectional, keras.layers.RNN, keras.layers.TimeDistributed)
"""Layers that are described as a whole."""

_traced: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
"""By layer, what its ``call`` does, None if that cannot be found. Found once: each time leaves traces in the layers."""


def sublayers(layer: Any) -> list[Any]:
    """The layers of a model or of a layer that is made of others; none for layers that are described as a whole."""
    if isinstance(layer, ATOMS):
        return []
    if isinstance(layer, keras.Model):
        return list(layer.layers)
    return tracked_layers(layer)


def wrapped(layer: Any) -> tuple[Any, ...]:
    """The layers that a wrapper computes with."""
    if isinstance(layer, keras.layers.Bidirectional):
        return layer.forward_layer, layer.backward_layer
    return (layer.layer,) if isinstance(layer, keras.layers.TimeDistributed) else ()


def is_functional(model: Any) -> bool:
    """Whether a model has a graph of its own: its layers come in no order that the user gave them."""
    return _own_graph(model) is not None


class FunctionalGraphs:
    """Functional models, by what they are the graph of."""

    def __init__(self) -> None:
        self._users: dict[int, list[Any]] = {}
        self._nodes: dict[int, list[Any]] = {}
        self._alive: list[Any] = []

    def of_model(self, model: Any) -> Any:
        """The graph of a model; None if it cannot be found."""
        function = _own_graph(model)
        if function is None:
            function = _remembered(model, lambda: _inputs_of(model))
        return self._kept(function)

    def within(self, node: Any) -> Any:
        """The graph of the model, or of the user's own layer, that is called at a node; None if it is neither."""
        layer = node.operation
        is_custom = not type(layer).__module__.startswith("keras.")
        if not isinstance(layer, keras.layers.Layer) or not (is_custom or sublayers(layer)):
            return None
        function = _own_graph(layer)
        if function is None:
            function = _remembered(layer, lambda: _inputs_at(node))
        return self._kept(function)

    @staticmethod
    def takes_images(model: Any) -> bool:
        """Whether a model has been built for inputs of the form of an image."""
        shapes = _shapes(model)
        return not shapes or any(len(shape) > 3 for shape in shapes)

    @staticmethod
    def inputs(function: Any) -> list[Any]:
        """The tensors that a graph begins with."""
        return list(keras.tree.flatten(function.inputs))

    @staticmethod
    def outputs(function: Any) -> list[Any]:
        """The tensors that a graph ends with."""
        return list(keras.tree.flatten(function.outputs))

    def nodes(self, function: Any) -> list[Any]:
        """All calls of layers, in this graph and in others that share the layers."""
        if id(function) not in self._nodes:
            self._nodes[id(function)] = found = list(_nodes(function))
            for node in found:
                for tensor in node.input_tensors:
                    self._users.setdefault(id(tensor), []).append(node)
        return self._nodes[id(function)]

    def users(self, tensor: Any) -> list[Any]:
        """The calls that use a tensor, in graphs of which the nodes have been asked for."""
        return self._users.get(id(tensor), [])

    def _kept(self, function: Any) -> Any:
        self._alive.append(function)  # so that ids stay unique
        if function is not None:
            self.nodes(function)
        return function


def _nodes(function: Any) -> Iterator[Any]:
    for operation in function.operations:
        for node in calls_of(operation):
            if not node.is_input:
                yield node


def _own_graph(model: Any) -> Any:
    """The graph of a Sequential or functional model."""
    if not isinstance(model, keras.Model):
        return None
    try:
        return keras.Function(model.inputs, model.outputs)
    except (AttributeError, ValueError, TypeError):  # it has none
        return None


def _remembered(layer: Any, arguments: Any) -> Any:
    if layer not in _traced:
        _traced[layer] = _trace(layer, arguments)
    return _traced[layer]


def _trace(layer: Any, arguments: Any) -> Any:
    """Call the user's ``call`` with symbolic tensors, without changing any variable."""
    try:
        args, kwargs = arguments()
        inputs = [t for t in keras.tree.flatten((args, kwargs)) if isinstance(t, keras.KerasTensor)]
        with keras.StatelessScope():
            outputs = layer.call(*args, **kwargs)
        return keras.Function(inputs, outputs)
    except Exception:  # noqa: BLE001 - whatever the user's code raises, it only means that it cannot be followed
        return None


def _inputs_at(node: Any) -> tuple[Any, Any]:
    """What a layer is called with, with new symbolic tensors."""
    given = node.arguments.args, node.arguments.kwargs
    made = keras.tree.map_structure(
        lambda value: (
            keras.Input(batch_shape=value.shape, dtype=value.dtype) if isinstance(value, keras.KerasTensor) else value
        ),
        given,
    )
    return made[0], made[1]


def _inputs_of(model: Any) -> tuple[Any, Any]:
    """What a model that has been built takes, as symbolic tensors."""

    def symbolic(shape: Any) -> Any:
        if isinstance(shape, dict):
            return {name: symbolic(own) for name, own in shape.items()}
        if _is_shape(shape):
            return keras.Input(batch_shape=(None, *shape[1:]))
        return [symbolic(own) for own in shape]

    return [symbolic(shape) for shape in _given(model)], {}


def _shapes(model: Any) -> list[tuple[int | None, ...]]:
    """The shapes of the inputs that a model was built for."""

    def walk(shape: Any) -> Iterator[tuple[int | None, ...]]:
        if _is_shape(shape):
            yield tuple(shape)
        else:
            for own in shape.values() if isinstance(shape, dict) else shape:
                yield from walk(own)

    return [shape for given in _given(model) for shape in walk(given)]


def _given(model: Any) -> list[Any]:
    """What a model was built for: for each argument of its call a shape, or a list or dict of them."""
    config = model.get_build_config() or {}
    found = config.get("shapes_dict") or {"input_shape": config.get("input_shape")}
    return [shape for shape in found.values() if shape]


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list | tuple) and all(length is None or isinstance(length, int) for length in shape)
