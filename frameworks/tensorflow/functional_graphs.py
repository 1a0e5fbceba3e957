"""Functional graphs of Keras models, also of models and layers with a custom ``call``."""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import keras

from lentando.tensorflow.keras_internals import calls_of, tracked_layers

__all__ = ["FunctionalGraphs", "is_functional", "sublayers", "wrapped"]

ATOMS = (keras.layers.MultiHeadAttention, keras.layers.Bidirectional, keras.layers.RNN, keras.layers.TimeDistributed)
"""Layers that are described as a whole, without the layers inside them."""

_traced: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
"""The graph of each layer's ``call``; None if it cannot be traced. Traced once, since tracing adds calls to layers."""


def sublayers(layer: Any) -> list[Any]:
    """The layers directly inside a model or layer; none for layers that are described as a whole."""
    if isinstance(layer, ATOMS):
        return []
    if isinstance(layer, keras.Model):
        return list(layer.layers)
    return tracked_layers(layer)


def wrapped(layer: Any) -> tuple[Any, ...]:
    """The layers inside a wrapper layer, such as the directions of ``Bidirectional``."""
    if isinstance(layer, keras.layers.Bidirectional):
        return layer.forward_layer, layer.backward_layer
    return (layer.layer,) if isinstance(layer, keras.layers.TimeDistributed) else ()


def is_functional(model: Any) -> bool:
    """Whether a model is functional or Sequential, so that it lists its layers in an order of Keras's own."""
    return _own_graph(model) is not None


class FunctionalGraphs:
    """The graphs of models and layers, with the calls that use each tensor."""

    def __init__(self) -> None:
        self._users: dict[int, list[Any]] = {}
        self._nodes: dict[int, list[Any]] = {}
        self._alive: list[Any] = []

    def of_model(self, model: Any) -> Any:
        """The graph of a model; None if it cannot be traced."""
        function = _own_graph(model)
        if function is None:
            function = _remembered(model, lambda: _inputs_of(model))
        return self._kept(function)

    def within(self, node: Any) -> Any:
        """The graph of the model or custom layer that is called at a node; None for any other layer or operation."""
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
        """Whether a model may take images: inputs with more than three axes, or inputs of unknown shape."""
        shapes = _shapes(model)
        return not shapes or any(len(shape) > 3 for shape in shapes)

    @staticmethod
    def inputs(function: Any) -> list[Any]:
        """The input tensors of a graph."""
        return list(keras.tree.flatten(function.inputs))

    @staticmethod
    def outputs(function: Any) -> list[Any]:
        """The output tensors of a graph."""
        return list(keras.tree.flatten(function.outputs))

    def nodes(self, function: Any) -> list[Any]:
        """All calls of layers, in this graph and in other graphs that share its layers."""
        if id(function) not in self._nodes:
            self._nodes[id(function)] = nodes = list(_nodes(function))
            for node in nodes:
                for tensor in node.input_tensors:
                    self._users.setdefault(id(tensor), []).append(node)
        return self._nodes[id(function)]

    def users(self, tensor: Any) -> list[Any]:
        """The calls that use a tensor, in all graphs whose ``nodes`` have been requested."""
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
    """The graph of a Sequential or functional model; None for any other."""
    if not isinstance(model, keras.Model):
        return None
    try:
        return keras.Function(model.inputs, model.outputs)
    except (AttributeError, ValueError, TypeError):  # a subclassed model, or a layer
        return None


def _remembered(layer: Any, arguments: Any) -> Any:
    if layer not in _traced:
        _traced[layer] = _trace(layer, arguments)
    return _traced[layer]


def _trace(layer: Any, arguments: Any) -> Any:
    """Run a custom ``call`` with symbolic tensors, without changing any variable; None if it raises an error."""
    try:
        args, kwargs = arguments()
        inputs = [t for t in keras.tree.flatten((args, kwargs)) if isinstance(t, keras.KerasTensor)]
        with keras.StatelessScope():
            outputs = layer.call(*args, **kwargs)
        return keras.Function(inputs, outputs)
    except Exception:  # noqa: BLE001 - the user's code may raise anything, and then cannot be traced
        return None


def _inputs_at(node: Any) -> tuple[Any, Any]:
    """The arguments of a call, with new symbolic tensors in place of its own."""
    given = node.arguments.args, node.arguments.kwargs
    replaced = keras.tree.map_structure(
        lambda value: (
            keras.Input(batch_shape=value.shape, dtype=value.dtype) if isinstance(value, keras.KerasTensor) else value
        ),
        given,
    )
    return replaced[0], replaced[1]


def _inputs_of(model: Any) -> tuple[Any, Any]:
    """Symbolic tensors of the shapes that a model has been built for, as arguments."""

    def symbolic(shape: Any) -> Any:
        if isinstance(shape, dict):
            return {name: symbolic(inner) for name, inner in shape.items()}
        if _is_shape(shape):
            return keras.Input(batch_shape=(None, *shape[1:]))
        return [symbolic(inner) for inner in shape]

    return [symbolic(shape) for shape in _given(model)], {}


def _shapes(model: Any) -> list[tuple[int | None, ...]]:
    """The shapes of all inputs that a model has been built for."""

    def walk(shape: Any) -> Iterator[tuple[int | None, ...]]:
        if _is_shape(shape):
            yield tuple(shape)
        else:
            for inner in shape.values() if isinstance(shape, dict) else shape:
                yield from walk(inner)

    return [shape for given in _given(model) for shape in walk(given)]


def _given(model: Any) -> list[Any]:
    """The shapes that a model has been built for: for each argument a shape, or a list or dict of shapes."""
    config = model.get_build_config() or {}
    by_argument = config.get("shapes_dict") or {"input_shape": config.get("input_shape")}
    return [shape for shape in by_argument.values() if shape]


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list | tuple) and all(length is None or isinstance(length, int) for length in shape)
