"""Which tensors of a model's graph are feature maps, and in which data format."""

from typing import Any

import keras

from lentando.tensorflow.functional_graphs import FunctionalGraphs
from lentando.tensorflow.layer_classes import (
    BINARY,
    CHANNEL_NORMS,
    ELEMENTWISE,
    GLOBAL_POOLING,
    MERGES,
    MOVES_OF_STEPS,
    SEQUENCE_POOLING,
    SPATIAL,
    UNARY,
    is_operation,
)

__all__ = ["data_format_of", "is_output_image", "map_format"]


def map_format(graphs: FunctionalGraphs, tensor: Any) -> str | None:
    """The data format of the layer that uses a tensor as a feature map, directly or behind shape-preserving layers."""
    seen: set[int] = set()
    pending = [tensor]
    while pending:
        tensor = pending.pop()
        for node in graphs.users(tensor):
            if id(node) in seen:
                continue
            seen.add(id(node))
            layer = node.operation
            if isinstance(layer, (*SPATIAL, *GLOBAL_POOLING)) and not isinstance(
                layer, (*SEQUENCE_POOLING, *MOVES_OF_STEPS)
            ):
                return str(layer.data_format)
            function = graphs.within(node)
            if function is not None:
                places = [number for number, argument in enumerate(node.input_tensors) if argument is tensor]
                graphs.nodes(function)
                pending += [graphs.inputs(function)[place] for place in places]
            elif isinstance(
                layer, (*ELEMENTWISE, *CHANNEL_NORMS, *MERGES, *MOVES_OF_STEPS, keras.layers.Concatenate)
            ) or (is_operation(layer) and type(layer).__name__ in UNARY | BINARY | {"Concatenate"}):
                pending += node.output_tensors
    return None


def is_output_image(graphs: FunctionalGraphs, tensor: Any) -> bool:
    """Whether only element-wise operations use a tensor, as those that end a model which generates images."""
    users = graphs.users(tensor)
    return all(
        (isinstance(node.operation, ELEMENTWISE) or type(node.operation).__name__ in UNARY)
        and all(is_output_image(graphs, result) for result in node.output_tensors)
        for node in users
    )


def data_format_of(layer: Any) -> str:
    """The data format of a spatial layer. Sequence layers without one have channels last."""
    return str(getattr(layer, "data_format", "channels_last"))
