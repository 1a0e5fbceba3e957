"""The layers of a Keras model, described so that they can be paired with another framework's."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras

from lentando.optimizers.checkpoint.layers import Layer, Tensor
from lentando.tensorflow.axis_orders import AxisOrder
from lentando.tensorflow.feature_orders import FeatureOrders
from lentando.tensorflow.functional_graphs import is_functional, sublayers, wrapped
from lentando.tensorflow.layer_kinds import LayerDescription, descriptions_of
from lentando.tensorflow.names import names_of
from lentando.tensorflow.state_variables import native

__all__ = ["layers"]


def layers(model: keras.Model, names: Mapping[int, str] | None = None) -> list[Layer]:
    """The layers of a model that have weights, in the order in which they are called, or assigned by a subclass.

    The input of ``WeightMap.between``. The model's graph is traced to find features that were flattened from feature
    maps, whose order differs between the frameworks. A layer for which the order cannot be determined is marked as
    such, and is not paired.

    Args:
        model: a built model, which has its weights.
        names: names of its variables, by ``id`` of the ``tf.Variable``; by default those that the flat buffers use.
    """
    if names is None:
        trained = model.trainable_variables
        ids = {id(native(variable)) for variable in trained}
        variables = [*trained, *(v for v in model.weights if id(native(v)) not in ids)]
        names = dict(zip([id(native(v)) for v in variables], names_of(variables, model), strict=True))
    orders = FeatureOrders(model, list(_leaves(model)))
    leaves = _leaves(model, orders.calls)
    described = [(leaf, _layer(leaf, part, names, orders)) for leaf in leaves for part in descriptions_of(leaf, names)]
    return _with_parallels(described, orders.ancestors)


def _with_parallels(described: Sequence[tuple[Any, Layer]], ancestors: Mapping[int, set[int]]) -> list[Layer]:
    """The layers, with a mark on each that has a parallel one of the same signature, neither before nor after it."""
    by_signature: dict[Any, list[Any]] = {}
    for leaf, layer in described:
        by_signature.setdefault(layer.signature, []).append(leaf)

    def is_parallel(first: Any, second: Any) -> bool:
        known = ancestors.get(id(first)), ancestors.get(id(second))
        if first is second or known[0] is None or known[1] is None:
            return False
        return id(second) not in known[0] and id(first) not in known[1]

    return [
        replace(layer, is_parallel=any(is_parallel(leaf, like) for like in by_signature[layer.signature]))
        for leaf, layer in described
    ]


def _leaves(layer: Any, calls: Mapping[int, int] | None = None) -> Iterator[Any]:
    """The layers that compute, including those inside models and other layers.

    Functional models list their layers by depth, which differs from program order where there are branches.

    Args:
        layer: a model or layer.
        calls: ``FeatureOrders.calls``, by which the layers of functional models are sorted if it is given.
    """
    if wrapped(layer):
        for sublayer in wrapped(layer):
            yield from _leaves(sublayer, calls)
    else:
        inner = sublayers(layer)
        inner_weights = {id(native(variable)) for sublayer in inner for variable in sublayer.weights}
        if not inner or any(id(native(variable)) not in inner_weights for variable in layer.weights):
            yield layer
        if calls and is_functional(layer):
            inner = sorted(inner, key=lambda sublayer: calls.get(id(sublayer), sys.maxsize))
        for sublayer in inner:
            yield from _leaves(sublayer, calls)


def _layer(leaf: Any, description: LayerDescription, names: Mapping[int, str], orders: FeatureOrders) -> Layer:
    tensors = {}
    for role, (variable, axes, *bounds) in description.roles.items():
        shape = tuple(variable.shape)
        ranges = (tuple(bounds), *((0, length) for length in shape[1:])) if bounds else None
        tensors[role] = Tensor(names[id(native(variable))], axes, shape, ranges)
    described = Layer(
        leaf.name + description.suffix,
        description.kind,
        tensors,
        orders=description.orders,
        lengths=description.lengths,
        structure=description.structure,
        settings=description.settings,
    )
    if description.suffix:  # the second part of a layer
        return described
    letters = {letter for tensor in tensors.values() for group in tensor.groups for letter in group}
    by_letter = {"i": orders.inputs.get(id(leaf)), "o": orders.outputs.get(id(leaf))}
    traced = {letter: order for letter, order in by_letter.items() if letter in letters}
    return _with_orders(described, traced, orders.has_maps)


def _with_orders(layer: Layer, traced: Mapping[str, AxisOrder | None], has_maps: bool) -> Layer:
    """The layer with the traced orders of its input and output features, or the reason why they are not known."""
    known = dict(layer.orders)
    for letter, order in traced.items():
        segments = None if order is None else order.segments()
        # The order of channels and of undecided features matters only where tracing has constrained it.
        is_doubtful = order is not None or (letter == "i" and not layer.kind.endswith("convolution"))
        if segments is None and is_doubtful and has_maps:
            sides = {"i": "input", "o": "output"}
            return replace(
                layer,
                unknown=f"the order of the {sides[letter]} features of {layer.kind} {layer.name!r} is not known: the "
                "model has feature maps, which PyTorch flattens in a different order, and it cannot be determined "
                "whether they are among these features (this requires a Sequential, functional or subclassed model of "
                "Keras layers and keras.ops)",
            )
        if segments is not None and any(len(factors) > 1 for factors in segments):
            known[letter] = tuple((str(number), factors) for number, factors in enumerate(segments))
    return replace(layer, orders=known)
